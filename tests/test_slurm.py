"""cluster/slurm.sh under Slurm itself: two nodes on loopback, with GPUs that are counted and not there.

The daemons of a distribution, started as root in a folder of their own: apt-get install slurm-wlm. They end with the tests.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import CONFIGS, HANGS, ROOT, workplace

from posttrain.records import read_rows
from posttrain.runs.manifest import read_manifest

HOST = socket.gethostname().split(".")[0]


def cannot_run():
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "setpriv") if not shutil.which(name)]
    if missing or os.geteuid():
        return f"needs root and slurm-wlm of the distribution; missing: {', '.join(missing) or 'root'}"
    try:
        address = socket.gethostbyname(HOST)
    except OSError:
        address = "no address"
    return None if address.startswith("127.") else f"Slurm listens where {HOST} is, which is {address} and not loopback"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(cannot_run()), reason=cannot_run() or "")]

# A requeued job waits until its old credential has expired: 120 seconds unless cred_expire says less, and 5 is the least.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=600
SlurmdTimeout=600
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 Gres=gpu:8
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=2
"""
GPUS = "AutoDetect=off\nNodeName=127.0.0.[1-2] Name=gpu File={folder}/gpu[0-7]\n"


def free_ports(count):
    found = [socket.socket() for _ in range(count)]
    for each in found:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return ports


def until(holds, what):
    end = time.monotonic() + HANGS
    while not (found := holds()):
        assert time.monotonic() < end, what()
        time.sleep(0.5)
    return found


class Slurm:
    """A controller and two nodes."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "state").mkdir()
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "slurm.conf").write_text(CONF.format(host=HOST, folder=folder, ports=free_ports(3)))
        (folder / "gres.conf").write_text(GPUS.format(folder=folder))
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons = [self.start("slurmctld"), *(self.start("slurmd", "-N", f"127.0.0.{node}") for node in (1, 2))]

    def start(self, name, *more):
        """In the foreground, and gone with this process, however that ends."""
        log = (self.folder / f"{name}{more[-1] if more else ''}.log").open("w")
        command = ["setpriv", "--pdeathsig", "TERM", name, "-D", "-f", str(self.folder / "slurm.conf"), *more]
        return subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def ask(self, *command, cwd=None):
        done = subprocess.run(list(map(str, command)), cwd=cwd, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def logs(self):
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log"))

    def state(self, job):
        return dict(re.findall(r"(JobState|Restarts|ExitCode)=(\S+)", self.ask("scontrol", "show", "job", job)))

    def ended(self, job):
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.state(job).get("JobState") in over, lambda: f"{self.state(job)}\n{self.logs()}")
        return self.state(job)

    def end(self):
        self.ask("scancel", "--user=root")
        until(lambda: not self.ask("squeue", "--noheader"), self.logs)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(60)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    started = Slurm(tmp_path_factory.mktemp("slurm"))
    until(lambda: started.ask("sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D") == "2", started.logs)
    yield started
    started.end()


@pytest.fixture
def place(tmp_path, tiny_model_dir, tiny_data_dir):
    """A checkout, as sbatch needs it where it is called."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    for name in ("cluster", "configs", "sft_train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)


SETTINGS = ("data.num_dev=0", "trainer.max_steps=300", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=4")
SMALL = ("--parsable", "--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1")


def submit(slurm, place, *settings):
    script = ("cluster/slurm.sh", "sft_train.py", "--config", CONFIGS / "sft_tiny.yaml")
    return slurm.ask("sbatch", *SMALL, *script, *settings, cwd=place)


def steps(place, run):
    rows = place / "runs" / run / "metrics.jsonl"
    return rows.read_bytes().count(b"\n") if rows.is_file() else 0


def losses(place, run):
    return [row["loss"] for row in read_rows(place / "runs" / run / "metrics.jsonl") if "loss" in row]


def test_a_job_that_is_stopped_and_preempted_ends_as_one_that_is_not(slurm, place):
    plain = submit(slurm, place, *SETTINGS, "run_dir=runs/plain")
    assert slurm.ended(plain) == {"JobState": "COMPLETED", "Restarts": "0", "ExitCode": "0:0"}, slurm.logs()
    job = submit(slurm, place, *SETTINGS, "run_dir=runs/stopped")
    log = place / f"slurm-posttrain-{job}.out"
    said = lambda: f"{slurm.state(job)}\n{log.read_text()}"  # noqa: E731

    until(lambda: steps(place, "stopped") >= 3, said)
    slurm.ask("scancel", "--signal=USR1", job)  # to every process but the batch script, as --signal before the end of --time
    until(lambda: slurm.state(job)["Restarts"] == "1", said)
    first = read_manifest(place / "runs" / "stopped").exit
    assert re.fullmatch(r"interrupted at step \d+ of 300", first), said()
    kept = steps(place, "stopped")

    until(lambda: steps(place, "stopped") >= kept + 3, said)
    other = slurm.ask("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    until(lambda: slurm.state(job)["Restarts"] == "2", said)
    assert slurm.ended(other)["JobState"] == "COMPLETED"

    assert slurm.ended(job) == {"JobState": "COMPLETED", "Restarts": "2", "ExitCode": "0:0"}, said()
    both = [read_manifest(place / "runs" / run) for run in ("plain", "stopped")]
    assert both[0].adapter_sha256 == both[1].adapter_sha256 and [run.num_processes for run in both] == [2, 2]
    assert losses(place, "plain") == losses(place, "stopped") and len(losses(place, "plain")) == 300
    assert log.read_text().count("resuming from runs/stopped/checkpoints/checkpoint-") == 2  # one file, and each start adds to it


def test_wrong_settings_end_a_job_for_good(slurm, place):
    job = submit(slurm, place, "trainer.learning_rat=1")
    assert slurm.ended(job) == {"JobState": "FAILED", "Restarts": "0", "ExitCode": "2:0"}, slurm.logs()
    assert "did you mean 'trainer.learning_rate'?" in (place / f"slurm-posttrain-{job}.out").read_text()

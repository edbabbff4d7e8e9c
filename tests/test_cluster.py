"""cluster/: what the files name exists, and two launchers of one process each train as one launcher of two."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from scripts import CONFIGS, ROOT, workplace

from posttrain.config.load import load
from posttrain.config.schema import SftConfig
from posttrain.records import read_rows
from posttrain.runs.manifest import read_manifest
from posttrain.training import planner
from posttrain.training.fitting import fastest_that_fits, fits
from posttrain.training.machines import GIB, MACHINES
from posttrain.training.planner import Rollouts, Shape, Step

CLUSTER = ROOT / "cluster"


@pytest.mark.parametrize("name", ["launch.sh", "slurm.sh"])
def test_a_script_is_understood_by_bash(name):
    assert subprocess.run(["bash", "-n", CLUSTER / name], check=False).returncode == 0


def test_the_commands_of_the_first_lines_name_what_is_there():
    named = 0
    for file in CLUSTER.iterdir():
        for line in re.findall(r"(?m)^#   (.+)", file.read_text(encoding="utf-8")):
            words = [word.split("=", 1)[-1] for word in shlex.split(line)]
            paths = [word for word in words if re.fullmatch(r"(cluster|configs)/\S+|\w+_train\.py", word)]
            assert all((ROOT / path).is_file() for path in paths), line
            named += len(paths)
    assert named >= 10


def test_the_kubernetes_job_starts_a_training_and_reads_its_exit_codes():
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    bash, launcher, script, option, config, *rest = container["command"]
    assert bash == "bash" and (ROOT / launcher).is_file() and (ROOT / script).is_file() and option == "--config"
    assert rest.pop() == "--resume"
    assert load(ROOT / config, rest, SftConfig).run_dir.startswith("/shared/")
    assert (
        pod["subdomain"] == service["metadata"]["name"] and {"name": "HEAD", "value": "posttrain-0.posttrain"} in container["env"]
    )
    codes = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"][:2]}
    assert codes == {2: "FailJob", 75: "Ignore"}


def test_the_sky_task_starts_a_training():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    assert (ROOT / task["envs"]["SCRIPT"]).is_file() and (ROOT / task["envs"]["CONFIG"]).is_file()
    assert 'bash cluster/launch.sh "$SCRIPT" --config "$CONFIG"' in task["run"] and "--resume" in task["run"]
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True, check=False).returncode == 0


def test_the_image_copies_what_is_there():
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / path).exists() for path in copied)
    python = re.search(r"FROM python:(3\.\d+)", "\n".join(lines))[1]
    assert python in ("3.11", "3.12", "3.13")


def node(place, rank, nodes, port, *settings, gpus=1):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NODES": str(nodes),
        "NODE_RANK": str(rank),
        "HEAD": "127.0.0.1",
        "PORT": str(port),
        "GPUS": str(gpus),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", CLUSTER / "launch.sh", ROOT / "sft_train.py", "--config", CONFIGS / "sft_tiny.yaml", *settings]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def losses(run_dir):
    return [row["loss"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]


SIX = ("data.num_dev=0", "trainer.max_steps=6", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=4")


@pytest.fixture
def place(tmp_path, tiny_model_dir, tiny_data_dir):
    return workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)


@pytest.mark.slow
def test_two_nodes_train_as_one_of_two_processes(place):
    one = node(place, 0, 1, free_port(), *SIX, "run_dir=runs/one", gpus=2)
    said = one.communicate()[0]
    assert one.returncode == 0, said
    port = free_port()
    nodes = [node(place, rank, 2, port, *SIX, "run_dir=runs/two") for rank in (0, 1)]
    said = [process.communicate()[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said
    assert losses(place / "runs" / "two") == losses(place / "runs" / "one") and len(losses(place / "runs" / "two")) == 6
    two = read_manifest(place / "runs" / "two")
    assert (two.num_processes, two.adapter_sha256) == (2, read_manifest(place / "runs" / "one").adapter_sha256)
    logs = [*(place / "runs" / "logs" / "two").glob("node-*/**/std*.log")]
    assert {path.relative_to(place / "runs" / "logs" / "two").parts[0] for path in logs} == {"node-0", "node-1"}


def to_the_first(process):
    """As Kubernetes stops a container."""
    process.send_signal(signal.SIGTERM)


def to_all(process):
    """As Slurm stops a job before the end of its time, workers of a data loader included."""
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGUSR1)


def descendants(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [pid, *(each for child in listed.stdout.split() for each in descendants(int(child)))]


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [to_the_first, to_all])
def test_a_node_that_is_stopped_ends_with_the_code_that_asks_for_a_restart(place, signalled):
    settings = ("data.num_dev=0", "trainer.max_steps=4000", "trainer.logging_steps=1", "trainer.dataloader_num_workers=1")
    process = node(place, 0, 1, free_port(), *settings, "trainer.save_steps=4000")
    rows = place / "runs" / "sft_tiny" / "metrics.jsonl"
    until = time.monotonic() + 300
    while not (rows.is_file() and rows.stat().st_size) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
    signalled(process)
    said = process.communicate()[0]
    assert process.returncode == 75, said
    manifest = read_manifest(place / "runs" / "sft_tiny")
    step = int(manifest.exit.removeprefix("interrupted at step ").removesuffix(" of 4000"))
    assert (place / "runs" / "sft_tiny" / "checkpoints" / f"checkpoint-{step}" / "commit.json").is_file(), said


@pytest.mark.slow
def test_a_node_that_is_stopped_before_its_run_has_begun_asks_for_a_restart(place):
    process = node(place, 0, 1, free_port())
    while len(descendants(process.pid)) < 2:  # the settings are being looked at
        time.sleep(0.1)
    to_the_first(process)
    said = process.communicate()[0]
    assert process.returncode == 75 and not (place / "runs").exists(), said


@pytest.mark.slow
def test_wrong_settings_end_a_node_before_it_waits_for_others(place):
    process = node(place, 1, 2, free_port(), "trainer.learning_rat=1")
    said = process.communicate()[0]
    assert process.returncode == 2 and "did you mean 'trainer.learning_rate'?" in said


# --- what several cards give, by the planner --------------------------------------------------------------------------

H100 = MACHINES["h100"]
MODELS = {  # by their config.json
    "3B": Shape(3072, 8192, 28, 24, 1024, 128256, True),
    "8B": Shape(4096, 14336, 32, 32, 1024, 128256, False),
    "70B": Shape(8192, 28672, 80, 64, 1024, 128256, False),
}
ROWS, TOKENS, LONGEST = 16, 250, 512  # of a card's SFT step: rows, tokens of a row with its padding, of the longest
COMPLETIONS, NEW = 128, 256  # of a card's GRPO step, and tokens of each


def adapter(shape):
    sizes = 4 * shape.hidden + 2 * (shape.hidden + shape.kv_width) + 3 * (shape.hidden + shape.inner)
    return 32 * shape.layers * sizes


def sft_plan(shape):
    return Step(shape, 1, ROWS, LONGEST, ROWS * TOKENS, adapter(shape))


def grpo_plan(shape):
    rollouts = Rollouts(COMPLETIONS, 128, NEW, 1, True, False, 8)
    rows = COMPLETIONS // 2
    return Step(shape, 2, rows, NEW + 128 / 8, rows * (NEW + 128 / 8), adapter(shape), rollouts=rollouts)


def cells(step, done):
    """How it fits one card, GiB of it, and what 1, 8 and 64 cards do in a second."""
    found = (step, []) if fits(step, H100) else fastest_that_fits(step, H100)
    if not found:
        return ["does not fit", "", "", "", ""]
    fitting, changed = found
    rate = done / planner.seconds(fitting, H100).total
    how = ", ".join(f"`{word}`" for word in changed) or "as it is"
    return [how, f"{planner.memory(fitting, True).total / GIB:.0f}", *(f"{rate * cards:,.0f}" for cards in (1, 8, 64))]


def table():
    for name, shape in MODELS.items():
        for stage, step, done in (("SFT, rows", sft_plan(shape), ROWS), ("GRPO, completions", grpo_plan(shape), COMPLETIONS)):
            yield f"| {name} | {stage} | {' | '.join(cells(step, done))} |"


def test_the_page_has_what_the_planner_says_of_several_cards():
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert [line for line in table() if line not in page] == []
    assert page.count("| 3B | ") == page.count("| 70B | ") == 2


if __name__ == "__main__":
    print("\n".join(table()))

"""The scripts as a user runs them, from his own folder. They run in this process: their imports take longer than their work.

    python tests/scripts.py '[["data_prep", "--config", "data.yaml"], ...]'    # several in one fresh process, as JSON

`tiny_pipeline` runs all four on the tiny configs, once for every test file that asks.
"""

import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from posttrain.errors import exit_on_user_error

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
HANGS = 1500  # seconds: no machine is that slow; less than pytest's own timeout


@dataclass
class Done:
    code: int
    out: str
    err: str


def run(script, *arguments, cwd="."):
    """A script's exit code and what it said. An error that is not the user's is raised as it is."""

    module = importlib.import_module(script)
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{script}.py", *map(str, arguments)]
    code = 0
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exit_on_user_error(module.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return Done(code, out.getvalue(), err.getvalue())


def start(script, *arguments, cwd=".", **environment):
    """The same in a process of its own, which can be killed. It imports nothing: the server that it is forked from has."""
    process = fork_server().Process(target=_run_and_exit, args=(script, arguments, cwd, environment))
    process.start()
    return process


@functools.cache
def fork_server():
    """Forks from a process that runs nothing. A fork of this one could inherit a lock that a thread of some test holds."""
    context = multiprocessing.get_context("forkserver")
    heavy = ("posttrain.models.policy", "posttrain.generation.engines", "posttrain.training.grpo_trainer", "datasets", "tqdm")
    context.set_forkserver_preload(["scripts", "data_prep", "sft_train", "grpo_train", "evaluate", *heavy, "forked"])
    return context


def _run_and_exit(script, arguments, cwd, environment):
    from tqdm import tqdm

    # By default all forked processes share tqdm's lock. A process that is killed while it draws a bar would keep it for ever.
    tqdm.set_lock(threading.RLock())
    os.environ |= environment
    sys.exit(run(script, *arguments, cwd=cwd).code)


def launched(*command, cwd="."):
    """Run a module that starts processes of its own, to its end. Returns what it said."""
    with subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said, complaint = process.communicate(timeout=HANGS)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher that is killed leaves its processes behind
            said, complaint = process.communicate()
            complaint += f"\nstopped after {HANGS} seconds"
    assert process.returncode == 0, complaint[-4000:]
    return said


def run_fresh(*commands, cwd=".", **environment):
    """Several commands one after the other in one new process, which reads its environment as it starts."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([[str(word) for word in command] for command in commands])],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Done(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def tree(folder):
    """Every file below a folder with its content and time of change: what must not differ when nothing is written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None for path in Path(folder).rglob("*")}


def retell(folder, **changes):
    """Change what a manifest.json says."""
    file = Path(folder, "manifest.json")
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def workplace(folder, model, *, data=None):
    """A folder as a user has it: models/tiny, and data/tiny if it is prepared already."""
    for name, source in (("models", model), ("data", data)):
        if source:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "tiny").symlink_to(source)
    return folder


EVALUATIONS = ("base", "sft_tiny", "grpo_tiny")


@functools.cache
def tiny_pipeline(folder, model):
    """Run data_prep, SFT, GRPO and three evaluations in `folder`. Returns what each of them said, by name."""
    workplace(folder, model)
    said = {}
    for stage, script, *more in (
        ("data", "data_prep"),
        ("sft", "sft_train", "trainer.optim=paged_adamw_32bit"),
        ("grpo", "grpo_train"),
    ):
        said[stage] = run(script, "--config", CONFIGS / f"{stage}_tiny.yaml", *more, cwd=folder)
    for name in EVALUATIONS:
        adapter = [] if name == "base" else [f"adapter=runs/{name}"]
        said[name] = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", *adapter, cwd=folder)
    assert {done.code for done in said.values()} == {0}, said
    return said


def retry_at_once():
    """huggingface_hub waits 23 seconds in all before it gives up on a network that is not there."""
    from huggingface_hub.utils import _http

    _http.time = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    retry_at_once()
    print(json.dumps([asdict(run(*command)) for command in json.loads(sys.argv[1])]))

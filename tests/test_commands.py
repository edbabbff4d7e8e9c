"""A command that is forked (tests/commands.py) is the command that is started: exit code, what it says, what it reads."""

import os
import subprocess
import sys

import pytest
from commands import run_command
from conftest import ROOT

SHOWS = "import os, sys; from huggingface_hub import constants; print(constants.ENDPOINT, os.getcwd(), sys.argv, sys.path[0])"
WORDS = {
    "a script": ("sft_train.py", "--config", "configs/sft_demo.yaml", "--print-config"),
    "a user's mistake": ("grpo_train.py", "--config", "configs/grpo_demo.yaml", "sead=1"),
    "a room": ("-m", "posttrain.hub", "--help"),
    "a room that others import": ("-m", "posttrain.lineage", "nowhere"),
    "code": ("-c", SHOWS, "one", "two"),
    "words as exit code": ("-c", "raise SystemExit('no')"),
    "what is left for the end": (
        "-c",
        "import atexit, threading as t; atexit.register(print, 'end'); t.Timer(0.1, print).start()",
    ),
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
def test_a_forked_command_is_the_command(words):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    forked = run_command(words, ROOT, environment)
    started = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_an_error_of_nobody_is_a_traceback(tmp_path):
    done = run_command(("-c", "open('here', 'w'); 1 / 0"), tmp_path, os.environ)
    assert (done.returncode, done.stderr.splitlines()[-1], (tmp_path / "here").exists()) == (
        1,
        "ZeroDivisionError: division by zero",
        True,
    )

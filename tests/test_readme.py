"""Every command in the README is put to the program that it names, and every path and link leads somewhere."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("data_prep.py", "sft_train.py", "grpo_train.py", "evaluate.py")
WRITTEN = ("data/", "models/", "runs/", "report/", ".venv/")  # by the commands themselves


def blocks(language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", README)


def commands() -> list[list[str]]:
    """Those in shell blocks, continued lines joined, and those in running text."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"(?ms)^```.*?^```", "", README)
    spans = re.findall(r"`((?:make|python|pip|accelerate) [^`]+)`", prose)
    return [words for line in (*lines, *spans) if (words := shlex.split(line, comments=True))]


COMMANDS = sorted({shlex.join(words): words for words in commands()}.items())


def run(*command: str) -> subprocess.CompletedProcess[str]:
    # A make that runs these tests hands its own flags and variables down.
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "QUICK")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=environment)


def check(words: list[str]) -> None:
    match words:
        case ["make", *targets]:
            checked = run("make", "--dry-run", *targets)
            assert checked.returncode == 0, checked.stderr
        case ["python", "-m", module, *arguments]:
            check_module(module, arguments)
        case ["python", script, *_] if script in SCRIPTS:
            check_script(words[1:])
        case ["accelerate", "launch", *rest]:
            script = next(place for place, word in enumerate(rest) if word in SCRIPTS)
            check_paths(rest[:script])
            check_script(rest[script:])
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["pip", "install", "-e", what]:
            assert set(re.findall(r"\w+", what)) <= extras()
        case ["source", ".venv/bin/activate"] | ["hf", "auth", "login"]:
            pass
        case _:
            pytest.fail(f"no way to check this one: {shlex.join(words)}")


def check_script(words: list[str]) -> None:
    """The script reads its settings and stops before it does anything."""
    done = run(sys.executable, *words, "--print-config")
    assert done.returncode == 0, done.stderr


def check_module(module: str, arguments: list[str]) -> None:
    """Its help knows every option that is used."""
    done = run(sys.executable, "-m", module, "--help")
    assert done.returncode == 0, done.stderr
    options = {word for word in arguments if word.startswith("--")}
    assert options <= set(re.findall(r"--[\w-]+", done.stdout))


def check_paths(words: list[str]) -> None:
    for word in words:
        assert "/" not in word or (ROOT / word).exists(), word


def extras() -> set[str]:
    return {*tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]}


def test_the_blocks_are_found():
    assert len(COMMANDS) >= 20
    assert {words[1] for _, words in COMMANDS if words[0] == "python"} >= {*SCRIPTS, "-m"}


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_command_is_understood_by_its_program(command, words):
    check(words)


@pytest.mark.parametrize("arguments", [(), ("QUICK=1",)], ids=["in full", "quick"])
def test_every_step_of_the_demo_is_understood_by_its_program(arguments):
    lines = run("make", "--dry-run", "demo", *arguments).stdout.splitlines()
    steps = [
        words for line in lines if (words := shlex.split(line))[:1] == ["python"] and "pip" not in words and "venv" not in words
    ]
    assert len(steps) == 8  # model, data, three evaluations, two trainings, report
    for words in steps:
        check(words)


@pytest.mark.parametrize("session", [part for block in blocks("console") for part in re.split(r"(?m)^\$ ", block)[1:]])
def test_a_shown_mistake_is_answered_as_shown(session):
    command, *answer = session.splitlines()
    python, *words = shlex.split(command)
    assert python == "python"
    done = run(sys.executable, *words)
    assert (done.returncode, done.stderr.splitlines()) == (2, answer)


def test_paths_in_the_text_exist():
    prose = re.sub(r"(?ms)^```.*?^```", "", README)
    spans = re.findall(r"`([\w.-]+(?:/[\w.*-]*)+|[\w-]+\.(?:py|md|toml|txt|yaml|sh))`", prose)
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", prose)
    assert spans and targets
    for path in (*spans, *targets):
        assert path.startswith(WRITTEN) or [*ROOT.glob(path)], path


def test_every_target_of_the_makefile_is_listed_by_make_alone():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = {line.split()[0] for line in run("make").stdout.splitlines()}
    assert listed == set(re.findall(r"(?m)^([a-z-]+):.*##", makefile)) >= {"setup", "model", "demo", "test", "bench"}


def test_the_markers_that_the_report_fills_are_there():
    for name in ("results", "demo"):
        assert README.index(f"<!-- {name}:start -->\n") < README.index(f"<!-- {name}:end -->")

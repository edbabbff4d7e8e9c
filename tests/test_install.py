"""`posttrain STAGE` from any folder: of a checkout, and of a wheel that is built, unpacked and run here."""

import configparser
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from posttrain import __main__ as command
from posttrain import places
from posttrain.config.load import from_command_line
from posttrain.config.schema import SftConfig
from posttrain.errors import UserError, exit_on_user_error
from posttrain.models.chat import load_tokenizer
from posttrain.runs.manifest import git_state, typed
from posttrain.tasks.sources import written_shots

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory. What was said of a file is said again."""
    places._say.cache_clear()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["/usr/bin/posttrain", *words])
    exit_on_user_error(command.main)


# --- in a checkout ----------------------------------------------------------------------------------------------------


def test_a_stage_is_its_script_wherever_it_is_called(elsewhere, monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        started(monkeypatch, "sft", "--config", "configs/sft_tiny.yaml", "trainer.max_steps=7", "--print-config")
    said = capsys.readouterr()
    assert done.value.code == 0 and "max_steps: 7\n" in said.out
    assert said.err == f"configs/sft_tiny.yaml is not in this folder: taking {ROOT}/configs/sft_tiny.yaml\n"


def test_help_is_in_the_words_that_started_it(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        started(monkeypatch, "eval", "--help")
    said = capsys.readouterr().out
    assert said.startswith("usage: posttrain eval ") and ".py" not in said
    assert "\n    posttrain eval --config configs/eval_gsm8k.yaml adapter=runs/grpo_llama3.2-3b" in said
    assert "\n    torchrun --nproc_per_node 2 -m posttrain eval --config ..." in said
    assert "\n    accelerate launch --config_file $(posttrain where)/configs/accelerate/ddp.yaml -m posttrain eval " in said


def test_a_remedy_is_in_the_words_that_started_it(elsewhere, monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        started(monkeypatch, "grpo", "--config", "configs/grpo_tiny.yaml")
    said = capsys.readouterr().err.splitlines()[-1]
    assert done.value.code == 2
    assert said == (
        "posttrain grpo: no train examples at data/tiny/train.jsonl: "
        "prepare them with `posttrain data --config configs/data_tiny.yaml`"
    )


def test_a_script_keeps_its_own_words(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sft_train.py"])
    text = "evaluate.py --regrade settles it; python sft_train.py --config ..."
    assert places.as_typed(text) == text
    assert typed() == f"{Path(sys.executable).name} sft_train.py"


def test_the_manifest_has_the_command_that_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["posttrain sft", "--config", "my own.yaml"])
    assert typed() == "posttrain sft --config 'my own.yaml'"


def test_all_commands_are_listed(monkeypatch, capsys):
    started(monkeypatch)
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert listed >= {*places.SCRIPTS, "report", "push", "model", "where"}
    started(monkeypatch, "where")
    assert capsys.readouterr().out == f"{ROOT}\n"


def test_another_command_is_told_those_that_there_are(monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        started(monkeypatch, "train")
    said = capsys.readouterr().err
    assert done.value.code == 2
    assert (
        said.startswith("posttrain: no command train: there are data, sft, grpo, eval, report, plan, push,")
        and said.count("\n") == 1
    )


def test_a_grader_of_the_working_directory_is_refused(elsewhere, monkeypatch):
    (elsewhere / "rewards.py").write_text("")
    monkeypatch.syspath_prepend(elsewhere)  # as `python -m` does
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    with pytest.raises(UserError, match=f"{elsewhere}/rewards.py hides the grader, {ROOT}/rewards.py: start `posttrain`"):
        command.check_grader()


# --- which file is taken ----------------------------------------------------------------------------------------------


def test_a_file_of_the_working_directory_comes_first(elsewhere, capsys):
    own = elsewhere / "configs" / "templates" / "plain.jinja"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert places.found("configs/templates/plain.jinja") == Path("configs/templates/plain.jinja")
    own.unlink()
    own.symlink_to("nowhere")  # a dangling link is the user's to mend
    assert places.found("configs/templates/plain.jinja") == Path("configs/templates/plain.jinja")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "path", ["sft_train.py", "README.md", "/configs/sft_tiny.yaml", "configs/none.yaml", "configs", "../configs"]
)
def test_nothing_else_is_looked_for_beside_the_scripts(elsewhere, capsys, path):
    assert places.found(path) == Path(path)
    assert capsys.readouterr().err == ""


def test_files_that_a_config_names_are_found_as_the_config_is(elsewhere, tiny_model_dir, capsys):
    from posttrain.config.schema import Tokenizer

    plain = "configs/templates/chatml_reasoning.jinja"
    settings = Tokenizer(name_or_path=str(tiny_model_dir), chat_template=plain)
    assert settings.chat_template == plain  # the run's settings, and their hash, are those of a run in a checkout
    for _ in range(2):
        load_tokenizer(settings)
    assert capsys.readouterr().err == f"{plain} is not in this folder: taking {ROOT}/{plain}\n"
    assert len(written_shots("configs/prompts/gsm8k_cot.jsonl")) == 8


def test_one_process_of_several_says_it(elsewhere, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert places.found("configs/sft_tiny.yaml") == ROOT / "configs/sft_tiny.yaml"
    assert capsys.readouterr().err == ""


def test_a_slip_in_a_shipped_name_has_its_hint(elsewhere, capsys):
    with pytest.raises(SystemExit):
        from_command_line(SftConfig, None, ["--config", "configs/sft_tiny.yml"])
    assert capsys.readouterr().err == "configs/sft_tiny.yml: no such file (did you mean 'configs/sft_tiny.yaml'?)\n"


# --- the wheel --------------------------------------------------------------------------------------------------------

BUILT_OF = ("*.py", "posttrain", "configs", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", ".gitignore")


def git(*words):
    identity = {f"GIT_{who}_{what}": "me@here" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, env=os.environ | identity)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkout of its own, with one commit: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("source") / "posttrain"
    folder.mkdir()
    for path in (path for pattern in BUILT_OF for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder)
    git("init", "--quiet", folder)
    git("-C", folder, "add", "--all")
    git("-C", folder, "commit", "--quiet", "--message", "all")
    left = folder / "build" / "lib" / "posttrain" / "gone.py"  # by a build of an earlier commit
    left.parent.mkdir(parents=True)
    left.touch()
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True)
    [file] = folder.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs `posttrain` of the unpacked wheel in a folder."""
    site = tmp_path_factory.mktemp("site")
    wheel.extractall(site)

    def run(*words, cwd):
        environment = os.environ | {"PYTHONPATH": str(site)}
        start = "from posttrain.__main__ import start; start()"  # what pip writes into bin/posttrain
        command = [sys.executable, "-P", "-c", start, *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    run.site = site
    return run


@pytest.mark.slow
def test_a_wheel_holds_package_grader_scripts_and_configs(wheel, source):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {
        f"posttrain/{path.relative_to(source / 'posttrain')}" for path in (source / "posttrain").rglob("*") if path.is_file()
    }
    configs = {f"posttrain/shipped/{path.relative_to(source)}" for path in (source / "configs").rglob("*") if path.is_file()}
    scripts = {f"posttrain/shipped/{script}.py" for script in places.SCRIPTS.values()}
    assert names == package | configs | scripts | {"rewards.py", "posttrain/shipped/built.json"}
    for script in places.SCRIPTS.values():
        assert wheel.read(f"posttrain/shipped/{script}.py") == (ROOT / f"{script}.py").read_bytes()
    entry = configparser.ConfigParser()
    entry.read_string(next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt")))
    assert {**entry["console_scripts"]} == {"posttrain": "posttrain.__main__:start"}


@pytest.mark.slow
def test_a_wheel_knows_the_commit_that_it_was_built_of(wheel, source):
    built = json.loads(wheel.read("posttrain/shipped/built.json"))
    assert built == {"commit": git("-C", source, "rev-parse", "HEAD"), "dirty": False}


@pytest.mark.slow
def test_an_installed_wheel_prepares_data_and_plans_a_training_from_an_empty_folder(installed, source, tiny_model_dir, tmp_path):
    listed = installed("--help", cwd=tmp_path)
    assert listed.returncode == 0 and "\n  sft " in listed.stdout, listed.stderr
    assert installed("where", cwd=tmp_path).stdout == f"{installed.site}/posttrain/shipped\n"
    git("init", "--quiet", tmp_path)  # another project, whose commit is not that of the run
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model_dir)
    prepared = installed("data", "--config", "configs/data_tiny.yaml", cwd=tmp_path)
    assert prepared.returncode == 0 and "wrote data/tiny" in prepared.stdout, prepared.stderr
    manifest = json.loads((tmp_path / "data" / "tiny" / "manifest.json").read_text())
    assert manifest["installed"] and manifest["commit"] == git("-C", source, "rev-parse", "HEAD")
    planned = installed("sft", "--config", "configs/sft_tiny.yaml", "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0 and "30 steps" in planned.stdout, planned.stderr
    assert {path.name for path in tmp_path.iterdir()} == {".git", "data", "models"}


@pytest.mark.slow
def test_a_source_archive_builds_the_same_wheel_without_a_commit(wheel, source, tmp_path):
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    git("init", "--quiet", tmp_path)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    [again] = map(zipfile.ZipFile, tmp_path.glob("*.whl"))
    assert {*again.namelist()} == {*wheel.namelist()}
    assert json.loads(again.read("posttrain/shipped/built.json")) == {"commit": None, "dirty": False}


def test_the_build_ships_the_scripts_that_the_command_runs(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **how: None)
    built = runpy.run_path(str(ROOT / "setup.py"))
    assert built["SCRIPTS"] == tuple(f"{script}.py" for script in places.SCRIPTS.values())
    if (ROOT / ".git").exists():
        assert built["git_state"]() == git_state()

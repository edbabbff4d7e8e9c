"""Every command of reproduce.sh is put to the script that it names."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_command
from scripts import run, workplace

from posttrain import plan

ROOT = Path(__file__).resolve().parents[1]


def commands_of(place, folder, **environment):
    """The words of each command, written down by a stand-in for python: in processes of their own they take minutes.

    Behind those of posttrain.plan stands what is in the file that they name.
    """
    stand_in, heard = folder / "bin" / "python", folder / "heard.jsonl"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!{sys.executable} -IS\nimport json, sys\n"
        "words = sys.argv[1:] + ([open(sys.argv[-1]).read()] if 'posttrain.plan' in sys.argv else [])\n"
        f"print(json.dumps(words), file=open({str(heard)!r}, 'a'))\n"
    )
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    subprocess.run([place / "reproduce.sh"], cwd=place, env=os.environ | environment | {"PATH": path}, timeout=60, check=True)
    return [json.loads(line) for line in heard.read_text().splitlines()]


# SmolLM2 has eight more runs, of RFT and of GRPO from there. SVAMP, where it is prepared, is one for each model that is sampled.
# Qwen has a chain of its own.
@pytest.mark.parametrize(
    ("model", "num_runs", "num_sampled"), [("llama3.2-3b", 17, 2), ("smollm2-135m", 25, 3), ("qwen2.5-coder-0.5b", 6, 0)]
)
def test_each_stage_has_settings_that_hold(model, num_runs, num_sampled, tmp_path):
    stages = commands_of(ROOT, tmp_path, MODEL=model, FLAGS="--print-config")
    done = [run_command(words, ROOT, os.environ) for words in stages]
    assert {stage.returncode for stage in done} == {0}, [stage.stderr for stage in done if stage.returncode]
    shown = "".join(stage.stdout for stage in done)
    run_dirs = re.findall(r"(?m)^run_dir: (\S+)", shown)
    assert len(run_dirs) == len(set(run_dirs)) == num_runs + num_sampled * (ROOT / "data" / "svamp").is_dir()
    assert all(folder.startswith(f"runs/{model}/") for folder in run_dirs)
    adapters = set(re.findall(r"(?m)^adapter: (\S+)", shown)) - {"null"}
    assert adapters <= set(run_dirs), "an adapter that no stage trains"


@pytest.mark.parametrize(("model", "num_stages"), [("smollm2-135m", 25), ("qwen2.5-coder-0.5b", 6)])
def test_a_dry_run_plans_every_stage_before_anything_has_run(
    model, num_stages, tmp_path, tiny_model_dir, tiny_data_dir, monkeypatch, capsys
):
    for name in ("reproduce.sh", "configs", *(f"{script}.py" for script in ("data_prep", "sft_train", "grpo_train", "evaluate"))):
        (tmp_path / name).symlink_to(ROOT / name)
    workplace(tmp_path, tiny_model_dir)
    for place, source in ((f"models/{model}-instruct", tiny_model_dir), ("data/gsm8k", tiny_data_dir)):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to(source)
    prepare, (*asked, _, commands), *stages = commands_of(tmp_path, tmp_path, MODEL=model, FLAGS="--dry-run", GPU="t4=0.10")
    assert prepare[0] == "data_prep.py" and len(stages) == num_stages
    assert asked == ["-m", "posttrain.plan", "--gpu", "t4=0.10"]
    assert [shlex.split(line) for line in commands.splitlines()] == [stage[:-1] for stage in stages]
    (tmp_path / "commands.txt").write_text(commands)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plan", "--gpu", "t4=0.10", "commands.txt"])
    plan.main()
    told = capsys.readouterr().out.splitlines()
    assert len([line for line in told if line.startswith(f"  runs/{model}/")]) == num_stages
    assert re.fullmatch(rf"{num_stages} runs: [\d.]+ hours, [\d.]+ dollars at 0.10 an hour .*", told[num_stages + 1])
    for script, *arguments in stages:
        done = run(script.removesuffix(".py"), *arguments, cwd=tmp_path)
        assert done.code == 0, (script, arguments, done.err)
        assert "steps" in done.out or "question" in done.out
    assert not (tmp_path / "runs").exists()


def test_the_model_that_it_is_run_on_by_default_is_the_publisheds():
    text = (ROOT / "reproduce.sh").read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text and "MODEL:-llama3.2-3b" in text

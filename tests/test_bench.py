"""The benches' commands are this project's own: each of them has settings that hold."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from bench import decoding, parties, speed
from posttrain.config.load import load
from posttrain.config.schema import EvalConfig, GrpoConfig, SftConfig

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {"sft_train.py": SftConfig, "grpo_train.py": GrpoConfig, "evaluate.py": EvalConfig}


def named(monkeypatch, *more: str) -> dict[str, parties.Command]:
    words = ["speed.py", "--model", "models/m", "--data", "data/d", "--work", "w", "--adapter", "a", *more]
    monkeypatch.setattr(sys, "argv", words)
    return parties.parties(speed.arguments())


def test_every_party_of_ours_has_settings_that_hold(monkeypatch):
    found = named(monkeypatch, "--lm-eval", "lm_eval", "--vllm", "python", "--stages", *speed.STAGES)
    ours = {name: command(Path("out")) for name, command in found.items() if name.startswith("ours") or "ladder" in name}
    assert len(ours) == 22 + len(parties.SFT_LEVERS) + len(parties.GRPO_LEVERS)
    for script, flag, config, *overrides in ours.values():
        assert flag == "--config"
        load(ROOT / config, overrides, CLASSES[script])


@pytest.mark.parametrize("stage", speed.STAGES)
def test_a_stage_has_its_own_parties(monkeypatch, stage):
    found = named(monkeypatch, "--lm-eval", "lm_eval", "--vllm", "python", "--stages", stage)
    assert found and all(stage in name for name in found)


def test_a_ladder_changes_one_lever_at_a_time():
    for levers in (parties.SFT_LEVERS, parties.GRPO_LEVERS):
        rungs = parties.ladder(levers)
        assert [name for name, _ in rungs] == list(levers)
        for (_, below), (name, above) in itertools.pairwise(rungs):
            assert above[: len(below)] == below and " ".join(above[len(below) :]) == levers[name]


@pytest.mark.parametrize(
    "more, told",
    [
        (["--stages", "lm-eval"], "needs --lm-eval or --vllm"),
        (["--stages", "grpo", "--num-completions", "40"], "multiple of --micro-batch 16"),
        (["--stages", "ladder-grpo", "--num-completions", "32"], "leave --num-completions out"),
    ],
)
def test_a_bench_that_cannot_run_says_why(monkeypatch, capsys, more, told):
    with pytest.raises(SystemExit):
        named(monkeypatch, *more)
    assert told in capsys.readouterr().err


def test_the_bench_of_decoding_compares_equal_tokens(monkeypatch, capsys, tiny_model_dir, tiny_data_dir):
    asked = ["--rows", "4", "--samples", "2", "--new-tokens", "6", "--temperature", "1", "--dtype", "float32", "--profile"]
    monkeypatch.setattr(decoding, "REPEATS", 1)
    monkeypatch.setattr(sys, "argv", ["decoding.py", "--model", str(tiny_model_dir), "--data", str(tiny_data_dir), *asked])
    decoding.main()
    told = capsys.readouterr().out
    assert "8 of 8 rows of seats are those of loop" in told
    assert [line.split(":")[0] for line in told.splitlines() if "kernels, " in line] == ["loop", "seats"]

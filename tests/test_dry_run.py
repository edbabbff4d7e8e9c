"""--dry-run's memory: what a step keeps, by the settings that decide it. EXPERIMENTS.md, 2026-11-26, has what was measured."""

import re

import pytest
from scripts import CONFIGS, run, workplace

from posttrain.training import plans


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir, tiny_data_dir):
    return workplace(tmp_path_factory.mktemp("plan"), tiny_model_dir, data=tiny_data_dir)


def planned(place, script, *overrides):
    """Rows, tokens of each, and the GiB of their activations, rounded to a hundredth; large enough to tell them apart."""
    stage = script.removesuffix("_train")
    done = run(script, "--config", CONFIGS / f"{stage}_tiny.yaml", *overrides, "--dry-run", cwd=place)
    assert done.code == 0, done.err
    rows, tokens, size = re.search(r"activations of (\d+) x (\d+) tokens ([\d.]+) GiB", done.out).groups()
    return int(rows), int(tokens), float(size)


@pytest.mark.parametrize(("checkpointing", "prompt"), [("false", 256 // 4), ("true", 256)])
def test_a_group_shares_its_prompt_unless_layers_are_checkpointed(place, checkpointing, prompt):
    found = planned(place, "grpo_train", "trainer.num_generations=4", f"trainer.gradient_checkpointing={checkpointing}")
    assert found[:2] == (16, 24 + prompt)


def test_fused_kernels_keep_less(place, monkeypatch):
    sizes = {}
    for fused in (False, True):
        monkeypatch.setattr(plans, "is_fused", lambda model, fused=fused: fused)
        sizes[fused] = planned(place, "sft_train", "trainer.per_device_train_batch_size=4096", "model.attn_implementation=sdpa")[
            2
        ]
    assert 0.7 < sizes[True] / sizes[False] < 0.95


def test_lean_layers_keep_less_still(place, monkeypatch):
    monkeypatch.setattr(plans, "is_fused", lambda model: True)
    settings = ("trainer.per_device_train_batch_size=4096", "model.attn_implementation=sdpa")
    fused, lean = (planned(place, "sft_train", *settings, f"lean_layers={value}")[2] for value in ("false", "true"))
    assert 0.5 < lean / fused < 0.75


def test_a_packed_step_is_told_in_rows_and_tokens(place):
    packed = ("trainer.packing=true", "trainer.max_length=512", "trainer.per_device_train_batch_size=2")
    done = run("sft_train", "--config", CONFIGS / "sft_tiny.yaml", *packed, "trainer.max_steps=-1", "--dry-run", cwd=place)
    assert done.code == 0, done.err
    assert "= 2 rows of 512 packed tokens a step" in done.out and "activations of 2 x 512 tokens" in done.out
    tokens, rows = re.search(r"about ([\d,]+) a step \((\d+) rows\)", done.out).groups()
    assert 800 < int(tokens.replace(",", "")) <= 1024 and 4 < int(rows) < 20


def test_a_card_is_planned_for_with_hours_and_cost(place):
    done = run("grpo_train", "--config", CONFIGS / "grpo_tiny.yaml", "--dry-run", "--gpu", "h100=2.50", cwd=place)
    assert done.code == 0, done.err
    assert "fits H100 80GB SXM" in done.out
    assert re.search(
        r"time, computed: [\d.]+ s a step \(.* rollouts, .* update, .* reference\), [\d.]+ hours for \d+ steps", done.out
    )
    assert "at 2.50 an hour" in done.out


def test_an_evaluation_is_planned_for_a_card_too(place):
    command = ("evaluate", "--config", CONFIGS / "eval_tiny.yaml", "--dry-run", "--gpu", "h100")
    done = run(*command, cwd=place)
    assert done.code == 0, done.err
    assert re.search(r"time, computed, .*: [\d.]+ hours on 1 x H100 80GB SXM, [\d.]+ dollars", done.out)
    hours = [float(re.search(r": ([\d.]+) hours", run(*command[:-1], card, cwd=place).out)[1]) for card in ("h100", "cpu")]
    assert hours[0] <= hours[1]


def test_the_disk_is_that_of_checkpoints_result_and_samples(place):
    saves = ("trainer.save_strategy=steps", "trainer.save_steps=1")
    found = []
    for limit in (2, 4):
        more = (
            "trainer.max_steps=40",
            f"trainer.save_total_limit={limit}",
            "lora={r: 4096, alpha: 1, target_modules: all-linear}",
        )
        done = run("sft_train", "--config", CONFIGS / "sft_tiny.yaml", *saves, *more, "--dry-run", cwd=place)
        assert done.code == 0, done.err
        parts = re.search(r"disk, computed: (\d+) x ([\d.]+) GiB of checkpoints, adapter ([\d.]+) GiB; ([\d.]+) GiB", done.out)
        found.append([float(part) for part in parts.groups()])
    for kept, each, adapter, whole in found:
        assert abs(kept * each + adapter - whole) < 0.03 and abs(each - 3 * adapter) < 0.03 and adapter > 0
    assert [kept for kept, *_ in found] == [3, 5]  # a new one is written before an old one goes
    grpo = run("grpo_train", "--config", CONFIGS / "grpo_tiny.yaml", "trainer.max_steps=100000", "--dry-run", cwd=place)
    assert float(re.search(r"samples.jsonl ([\d.]+) GiB", grpo.out)[1]) > 0


def test_a_step_that_does_not_fit_is_planned_in_smaller_parts(place):
    huge = (
        "trainer.per_device_train_batch_size=4194304",
        "trainer.gradient_accumulation_steps=1",
        "trainer.gradient_checkpointing=false",
    )
    done = run("sft_train", "--config", CONFIGS / "sft_tiny.yaml", *huge, "--dry-run", "--gpu", "t4", cwd=place)
    assert done.code == 0, done.err
    rows, parts = map(int, re.search(r"train_batch_size=(\d+) trainer.gradient_accumulation_steps=(\d+)", done.out).groups())
    assert rows * parts == 4194304 and "does not fit T4" in done.out and "set model.dtype=float16" in done.out


def test_a_card_that_is_not_known_is_named(place):
    done = run("sft_train", "--config", CONFIGS / "sft_tiny.yaml", "--dry-run", "--gpu", "h1000", cwd=place)
    assert done.code == 2 and done.err.startswith("sft_train.py: --gpu h1000: no card of that name: h100, a100, l40s, 4090, t4")
    assert run("sft_train", "--config", CONFIGS / "sft_tiny.yaml", "--gpu", "h100", cwd=place).code == 2

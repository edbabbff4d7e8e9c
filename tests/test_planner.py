"""What a step was predicted to take, beside what it took: docs/planning.md has the same table."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import pytest
import torch
from tiny_training import LORA
from transformers import Trainer, TrainingArguments

from posttrain.config.schema import SftConfig
from posttrain.errors import UserError
from posttrain.training.fitting import fastest_that_fits, fits
from posttrain.training.machines import GIB, MACHINES, find_machine, named
from posttrain.training.planner import (
    Rollouts,
    Shape,
    Step,
    cache_bytes,
    evaluation_seconds,
    memory,
    padded,
    seconds,
)
from posttrain.training.plans import moment_bytes

ROOT = Path(__file__).resolve().parents[1]
H100, CPU = MACHINES["h100"], MACHINES["cpu"]
LLAMA_3B = Shape(3072, 8192, 28, 24, 1024, 128256, True)
QWEN_05B = Shape(896, 4864, 24, 14, 128, 151936, True)
SMOL_135M = Shape(576, 1536, 30, 9, 192, 49152, True)
LONGEST = 473  # tokens of the longest of the rows that all of these trained on


def adapter(shape: Shape) -> int:
    sizes = 4 * shape.hidden + 2 * (shape.hidden + shape.kv_width) + 3 * (shape.hidden + shape.inner)
    return 32 * shape.layers * sizes


def sft(rows: int, micro_batches: int, tokens: float, shape: Shape = LLAMA_3B, length: float = LONGEST, **settings) -> Step:
    """`tokens`: of a step."""
    return Step(shape, micro_batches, rows, length, tokens / micro_batches, adapter(shape), **settings)


def grpo(shape, rows, micro_batches, prompt, new, group=8, longest=None, seats=True, reference=False, **settings) -> Step:
    """`new`: tokens of a completion on average, `longest` the limit."""
    rollouts = Rollouts(rows * micro_batches, prompt, longest or new, 1, seats, reference, group)
    row = new + prompt / group
    widest = (longest or new) + prompt / group
    return Step(shape, micro_batches, rows, widest, rows * row, adapter(shape), rollouts=rollouts, **settings)


PACKING = json.loads((ROOT / "results/h100-3b/packing.json").read_text())["runs"]
REPLAYED = json.loads((ROOT / "results/h100-3b/layer-graphs.json").read_text())["runs"]
PARTS = json.loads((ROOT / "results/h100-3b/grpo-parts.json").read_text())
LEVERS = json.loads((ROOT / "results/h100-3b/levers.json").read_text())
FUSED = json.loads((ROOT / "results/h100-3b/speed-fused.json").read_text())
STEPS = json.loads((ROOT / "results/qwen2.5-coder-0.5b/steps.json").read_text())["runs"]


def packing(name, runs=PACKING):
    return {"gib": runs[name][0]["peak_gib"], "s": fmean(run["step_seconds"] for run in runs[name])}


def runs(entries):
    return {"gib": entries[0]["peak_gib"], "s": fmean(run["step_seconds"] for run in entries)}


def lever(name):
    return runs(LEVERS["levers of the fast settings"][name]["runs"])


def ladder(name):
    return runs(LEVERS["ladder"]["runs"][name])


def steps(name):
    return {"gib": None, "s": median(STEPS[name]["step_time"][2:])}


def manifest(run, s):
    return {"gib": json.loads((ROOT / "results" / run / "manifest.json").read_text())["peak_gib"], "s": s}


def in_parts(tokens: int, width: int = 2) -> Step:
    """128 completions of 16 questions, of 256 tokens each. `width`: bytes of a weight of the copy."""
    step = grpo(LLAMA_3B, 128, 1, 100, 256, reference=True, lean=True, nf4=True, replayed=True, part_tokens=tokens)
    assert step.rollouts is not None
    return replace(step, rollouts=replace(step.rollouts, width=width))


BY_16, BY_32, PACKED = 3932, 6377, 7816  # tokens of a step, by its rows
FULL = 8083 / 16  # tokens of the fullest packed step, by row
HALF_PADDING = 1.25  # positions by tokens, where rows are not put together by length

# Name -> what was planned, where it was measured, the card.
ROWS = {
    "3B SFT, 16 rows": (sft(16, 1, BY_16), lever("fast"), H100),
    "3B SFT, 32 rows": (sft(32, 1, BY_32), packing("32-rows-nf4-unpacked"), H100),
    "3B SFT, 16 rows, checkpointed": (sft(16, 1, BY_16, checkpointing=True), lever("checkpointing"), H100),
    "3B SFT, 32 rows, checkpointed": (sft(32, 1, 6512, checkpointing=True), lever("32-checkpointing"), H100),
    "3B SFT, 8 x 2 rows": (sft(2, 8, 3819), runs(FUSED["sft"]["parts"][0]["runs"]["ours-sft-small"]), H100),
    "3B SFT, 4 x 4 rows, NF4, checkpointed": (
        sft(4, 4, 3077 * HALF_PADDING, checkpointing=True, nf4=True),
        runs(FUSED["sft"]["parts"][0]["runs"]["ours-sft-tiny"]),
        H100,
    ),
    "3B SFT, 4 x 4 rows, NF4, torch's kernels": (
        sft(4, 4, 3103 * HALF_PADDING, nf4=True, fused=False),
        ladder("4-ladder-sft-no-checkpointing"),
        H100,
    ),
    "3B SFT, PEFT's layers, NF4, checkpointed": (
        sft(4, 4, 3103 * HALF_PADDING, nf4=True, fused=False, fast_adapter=False, checkpointing=True),
        ladder("0-ladder-sft-plain"),
        H100,
    ),
    "3B SFT, packed": (sft(16, 1, PACKED, length=FULL), packing("packed-bf16"), H100),
    "3B SFT, packed, lean": (sft(16, 1, PACKED, length=FULL, lean=True), packing("packed-lean-bf16"), H100),
    "3B SFT, packed, lean, NF4": (sft(16, 1, PACKED, length=FULL, lean=True, nf4=True), packing("packed-lean-nf4"), H100),
    "3B SFT, packed, lean, NF4, checkpointed": (
        sft(16, 1, PACKED, length=FULL, lean=True, nf4=True, checkpointing=True),
        packing("packed-lean-nf4-checkpointed"),
        H100,
    ),
    "3B SFT, packed, lean, NF4, replayed": (
        sft(16, 1, 7841, length=512, lean=True, nf4=True, replayed=True),
        packing("packed-lean-nf4-graphs", REPLAYED),
        H100,
    ),
    "3B SFT, packed, lean, 8 x 2, replayed": (
        sft(8, 2, 7841, length=512, lean=True, replayed=True),
        packing("packed-lean-nf4-unpacked-graphs-2x8", REPLAYED),
        H100,
    ),
    "3B SFT, packed, lean, NF4, 4 x 4, checkpointed, replayed": (
        sft(4, 4, 7841, length=512, lean=True, nf4=True, checkpointing=True, replayed=True),
        packing("packed-lean-nf4-checkpointed-graphs-4x4", REPLAYED),
        H100,
    ),
    "3B SFT, the same, 8-bit Adam": (
        sft(4, 4, 7834, length=512, lean=True, nf4=True, checkpointing=True, replayed=True, moments=2),
        packing("packed-lean-nf4-checkpointed-graphs-4x4-adam8", REPLAYED),
        H100,
    ),
    "3B SFT, packed, lean, replayed": (
        sft(16, 1, 7834, length=512, lean=True, replayed=True),
        packing("packed-lean-nf4-unpacked-graphs", PARTS["sft"]),
        H100,
    ),
    "3B SFT, 16 rows, lean, NF4": (sft(16, 1, 3145, lean=True, nf4=True), packing("16-rows-lean-nf4"), H100),
    "3B SFT, 32 rows, NF4, checkpointed": (
        sft(32, 1, BY_32, nf4=True, checkpointing=True),
        packing("32-rows-nf4-checkpointed"),
        H100,
    ),
    "3B GRPO, 2 x 64, loop, KL": (
        grpo(LLAMA_3B, 64, 2, 100, 256, seats=False, reference=True),
        runs(FUSED["grpo 128"]["runs"]["ours-grpo"]),
        H100,
    ),
    "3B GRPO, 32, loop, KL": (
        grpo(LLAMA_3B, 32, 1, 100, 256, seats=False, reference=True),
        runs(FUSED["grpo 32"]["runs"]["ours-grpo"]),
        H100,
    ),
    "3B GRPO, 128 in parts of 4,096, replayed, KL": (in_parts(4096), packing("3b-parts-4096", PARTS["grpo"]), H100),
    "3B GRPO, 128 in parts of 4,096, replayed, KL, fp8": (in_parts(4096, 1), packing("3b-parts-4096-fp8", PARTS["grpo"]), H100),
    "3B GRPO, 128 in parts of 6,144, replayed, KL, fp8": (in_parts(6144, 1), packing("3b-parts-6144-fp8", PARTS["grpo"]), H100),
    "0.5B GRPO, 512 in parts of 16,384, replayed": (
        grpo(QWEN_05B, 512, 1, 90, 280, longest=400, lean=True, replayed=True, part_tokens=16384),
        packing("grpo-0.5b-512-graphs", REPLAYED),
        H100,
    ),
    "0.5B GRPO, 8 x 64, loop": (grpo(QWEN_05B, 64, 8, 90, 277, longest=400, seats=False), steps("time_loop"), H100),
    "0.5B GRPO, 8 x 64, seats": (grpo(QWEN_05B, 64, 8, 90, 277, longest=400), steps("time_seats"), H100),
    "0.5B GRPO, 4 x 128, seats, lean": (
        grpo(QWEN_05B, 128, 4, 90, 265, longest=400, lean=True),
        steps("grpo_claim_s42"),
        H100,
    ),
    "0.5B GRPO, 2 x 256, seats, lean": (
        grpo(QWEN_05B, 256, 2, 90, 277, longest=400, lean=True),
        steps("time_lean256 (second machine)"),
        H100,
    ),
    # No rate was fitted to these. Their seconds: medians over metrics.jsonl, the times of an optimizer step summed.
    "0.5B SFT, 32 rows": (
        sft(32, 1, 10619 / 0.69, QWEN_05B, length=640),
        manifest("qwen2.5-coder-0.5b/sft_own_short4", 0.196),
        H100,
    ),
    "0.5B SFT, 32 rows, again": (
        sft(32, 1, 10616 / 0.69, QWEN_05B, length=640),
        manifest("qwen2.5-coder-0.5b/sft_own_short4_again", 0.243),
        H100,
    ),
    "135M SFT, 32 rows": (
        sft(32, 1, 6356 / 0.59, SMOL_135M),
        manifest("qwen2.5-coder-0.5b/sft_smol_gold", 0.235),
        H100,
    ),
    "0.5B GRPO, 8 x 64, loop, 240 steps": (
        grpo(QWEN_05B, 64, 8, 90, 265, longest=400, seats=False),
        manifest("qwen2.5-coder-0.5b/grpo_plain_240", 4.52),
        H100,
    ),
    "135M GRPO, 8 x 64, loop, torch's kernels": (
        grpo(SMOL_135M, 64, 8, 100, 68, group=16, longest=256, seats=False, fused=False),
        manifest("smollm2-135m/grpo_rft_seed42", 4.51),
        H100,
    ),
    # EXPERIMENTS.md, 2026-11-25 and 2026-11-26.
    "135M SFT on a CPU, 16 rows": (
        sft(16, 1, 4390, SMOL_135M, fused=False, probabilities=True),
        {"gib": 8.4, "s": 4.95},
        CPU,
    ),
    "135M SFT on a CPU, 8 x 2 rows": (
        sft(2, 8, 4461, SMOL_135M, fused=False, probabilities=True),
        {"gib": 3.3, "s": 6.78},
        CPU,
    ),
    "135M SFT on a CPU, 4 x 4 rows, NF4": (
        sft(4, 4, 4461, SMOL_135M, fused=False, nf4=True),
        {"gib": 3.3, "s": None},
        CPU,
    ),
    "135M SFT on a CPU, 16 rows, torch's attention": (sft(16, 1, 4390, SMOL_135M, fused=False), {"gib": 8.7, "s": None}, CPU),
    "135M GRPO on a CPU, 8 x 16, KL": (
        grpo(SMOL_135M, 16, 8, 100, 60, fused=False, probabilities=True, reference=True),
        {"gib": None, "s": 33.6},
        CPU,
    ),
}


def off(predicted, measured):
    return predicted / measured - 1


MISSED = {"135M GRPO, 8 x 64, loop, torch's kernels"}  # the page says so and why; one that is met again is taken off


@pytest.mark.parametrize("name", ROWS)
def test_a_measured_row_is_what_was_planned(name):
    step, measured, machine = ROWS[name]
    held = []
    if measured["gib"]:
        held.append(abs(off(memory(step, machine.is_gpu).total / GIB, measured["gib"])) < (0.1 if step.replayed else 0.2))
    if measured["s"]:
        held.append(abs(off(seconds(step, machine).total, measured["s"])) < (0.15 if step.replayed else 0.3))
    assert held and all(held) == (name not in MISSED)


SIZES = {"grpo_seed42": (384, 512), "grpo_seed43": (384, 512), "grpo_rft_seed43": (384, 512), "grpo_rft_seed42": (384, 512, 640)}


@pytest.mark.parametrize(("run", "sizes"), SIZES.items())
def test_the_missed_row_held_the_buffers_of_an_earlier_decoder(run, sizes):
    """Until commit 057487f each graph had keys and values of its own: for 512 rows, 256, 128 ... and for each capacity.

    Capacities are the longest prompt and 256 tokens, in steps of 128: of 32 prompts of GSM8K that is 512 in every run, in two of
    five also 384, in one of four 640. No run says which it met; these are the ones that the four runs' memory fits.
    """
    (name,) = MISSED
    step, _, machine = ROWS[name]
    rollouts = step.rollouts
    one_set = rollouts.rows * (rollouts.prompt + rollouts.new)
    tokens = (2 * rollouts.rows - 1) * sum(sizes)
    held = memory(step, machine.is_gpu).total + (tokens - one_set) * cache_bytes(step.shape)
    assert abs(off(held / GIB, manifest(f"smollm2-135m/{run}", None)["gib"])) < 0.1


def row(name):
    step, measured, machine = ROWS[name]
    cells = [name]
    for unit, planned in (("gib", memory(step, machine.is_gpu).total / GIB), ("s", seconds(step, machine).total)):
        was = measured[unit]
        cells += [f"{planned:.3g}", f"{was:.3g}", f"{off(planned, was):+.0%}"] if was else ["", "", ""]
    line = f"| {' | '.join(cells)} |"
    return line if name not in MISSED else f"| **{name}** | {' | '.join(cells[1:])} |"


def test_the_page_has_these_rows():
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert [row(name) for name in ROWS if row(name) not in page] == []


# Name -> shape, questions, samples, limit, rows of a batch, of the H100 in the loop. No rate was fitted to these.
EVALUATIONS = {
    "qwen2.5-coder-0.5b/eval_base": (QWEN_05B, 1319, 1, 512, 512),
    "qwen2.5-coder-0.5b/eval_samples": (QWEN_05B, 6404, 8, 400, 1024),
    "qwen2.5-coder-0.5b/eval_pass8_base": (QWEN_05B, 1319, 8, 512, 512),
    "qwen2.5-coder-0.5b/eval_pass8_sft_own_short4": (QWEN_05B, 1319, 8, 512, 1024),
    "smollm2-135m/eval_grpo_rft_seed42": (SMOL_135M, 1319, 1, 320, 512),
    "smollm2-135m/eval_pass8_grpo_rft_seed42": (SMOL_135M, 1319, 8, 320, 512),
    "smollm2-135m/eval_pass8_sft_rft_second": (SMOL_135M, 1319, 8, 320, 512),
}


def test_evaluations_took_a_third_to_two_and_a_half_times_of_what_is_planned():
    """The page says so: it is the order of magnitude, no more."""
    took = []
    for run, (shape, questions, samples, limit, rows) in EVALUATIONS.items():
        asked = Rollouts(rows, 100, limit, 1, False, False, samples)
        planned = evaluation_seconds(Step(shape, 1, 1, 100, 100, 0), asked, questions * samples, H100)
        took.append(json.loads((ROOT / "results" / run / "manifest.json").read_text())["seconds"] / planned)
    assert 0.3 < min(took) < 0.4 and 2.0 < max(took) < 2.5


def test_in_seats_the_next_prompt_begins_as_one_ends():
    step, asked = Step(QWEN_05B, 1, 1, 100, 100, 0), Rollouts(512, 100, 256, 1, True, False, 1)
    whole = evaluation_seconds(step, asked, 5 * 512, H100)
    assert evaluation_seconds(step, asked, 5 * 512 + 256, H100) == pytest.approx(whole * 5.5 / 5)
    loop = replace(asked, seats=False)
    assert evaluation_seconds(step, loop, 5 * 512 + 1, H100) == pytest.approx(evaluation_seconds(step, loop, 6 * 512, H100))


def test_what_does_not_fit_is_made_smaller_at_the_same_batch():
    whole = grpo(LLAMA_3B, 64, 2, 100, 256)
    assert fits(whole, H100) and not fits(whole, MACHINES["4090"])
    smaller, changed = fastest_that_fits(whole, MACHINES["4090"])
    assert fits(smaller, MACHINES["4090"]) and smaller.rows * smaller.micro_batches == 128
    assert f"trainer.per_device_train_batch_size={smaller.rows}" in changed
    assert fastest_that_fits(grpo(replace(LLAMA_3B, layers=280), 1, 1, 100, 256), MACHINES["t4"]) is None


def test_parts_of_an_update_take_less_and_are_made_smaller_before_the_batch_is():
    whole = grpo(LLAMA_3B, 128, 1, 100, 256, lean=True)
    parts = replace(whole, part_tokens=8192)
    assert memory(parts, True).activations < memory(whole, True).activations / 4
    assert seconds(parts, H100).update > seconds(whole, H100).update
    smaller, changed = fastest_that_fits(parts, MACHINES["4090"])
    assert (smaller.rows, smaller.micro_batches) == (128, 1)
    assert "update_tokens=2048" in changed and not any("per_device" in change for change in changed)
    assert memory(replace(parts, part_tokens=10), True).activations == memory(replace(whole, rows=1), True).activations


def test_rollouts_in_8_bits_take_half_of_the_copy_and_less_time():
    step = grpo(LLAMA_3B, 128, 1, 100, 256)
    eight = replace(step, rollouts=replace(step.rollouts, width=1))
    assert memory(step, True).rollouts - memory(eight, True).rollouts == LLAMA_3B.linear
    assert seconds(eight, H100).rollouts < seconds(step, H100).rollouts


def test_the_base_is_packed_only_where_nothing_else_fits():
    step = sft(16, 1, BY_16)
    assert "quantization=nf4" not in fastest_that_fits(step, MACHINES["4090"])[1]
    assert "quantization=nf4" in fastest_that_fits(sft(16, 1, BY_16, replace(LLAMA_3B, layers=140)), MACHINES["4090"])[1]


def test_a_price_of_ones_own():
    assert find_machine("h100").dollars == H100.dollars
    assert find_machine("H100=2.5") == replace(H100, dollars=2.5)
    for text in ("h10", "h100=cheap", "=2"):
        with pytest.raises(UserError, match="--gpu"):
            find_machine(text)


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090"),
     ("Tesla T4", "t4"), ("NVIDIA L40S", "l40s"), ("NVIDIA H200", None), ("NVIDIA T400 4GB", None)],
)  # fmt: skip
def test_a_card_is_known_by_the_name_that_the_driver_gives(device, name):
    assert named(device) == MACHINES.get(name)


def test_a_batch_is_as_wide_as_its_longest_row():
    assert padded([1, 9, 2, 8], 2, by_length=False) == 2 * (9 + 8) / 2
    assert padded([1, 9, 2, 8], 2, by_length=True) == 2 * (2 + 9) / 2


if __name__ == "__main__":  # the table of docs/planning.md
    print("\n".join(map(row, ROWS)))


@pytest.mark.parametrize(
    "optim",
    ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "lion_8bit", "lion_32bit", "rmsprop", "sgd", "adagrad"],
)
def test_the_moments_that_are_counted_are_those_that_the_optimizer_holds(optim, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
    weight = torch.nn.Parameter(torch.ones(128, 256))
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = kind([weight], **settings)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(
        state.nbytes
        for state in optimizer.state[weight].values()
        if isinstance(state, torch.Tensor) and state.shape == weight.shape
    )
    config = SftConfig(run_dir="x", data={"path": "x"}, model={"name_or_path": "x"}, lora=LORA, trainer={"optim": optim})
    assert moment_bytes(config) * weight.numel() == held

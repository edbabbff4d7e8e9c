"""Every link from the base to an artefact: whole as the runs left it, broken by each thing that breaks it, and never guessed."""

import json
import shutil

import pytest
from scripts import retell, run

from posttrain.lineage.command import as_text, lineage_of
from posttrain.lineage.links import Link

OTHER = "e" * 64


@pytest.fixture
def place(pipeline, tmp_path, monkeypatch):
    """A copy of the pipeline's folder, and the working directory in it: the base is models/tiny there."""
    folder = shutil.copytree(pipeline, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def states(folder):
    return {link.stage: (link.state, link.why) for link in lineage_of(folder)}


def test_every_link_of_finished_runs_holds(place):
    for name, stages in (
        ("sft_tiny", ["base", "sft"]),
        ("grpo_tiny", ["base", "sft", "grpo"]),
        ("eval_tiny_grpo_tiny", ["base", "sft", "grpo", "eval"]),
        ("eval_tiny_base", ["base", "eval"]),
        ("grpo_tiny/adapter", ["base", "sft", "grpo"]),
    ):
        found = states(place / "runs" / name)
        assert list(found) == stages and {state for state, _ in found.values()} == {"whole"}, found


def test_runs_that_were_moved_together_still_find_each_other(place):
    shutil.move(place / "runs", place / "kept")
    assert {state for state, _ in states(place / "kept" / "grpo_tiny").values()} == {"whole"}


def flip(name):
    def change(runs):
        content = bytearray((runs / name).read_bytes())
        content[-1] ^= 64
        (runs / name).write_bytes(bytes(content))

    return change


def recorded(run_dir, **changes):
    return lambda runs: retell(runs / run_dir, **changes)


def edited(name, **changes):
    def change(runs):
        values = json.loads((runs / name).read_text())
        (runs / name).write_text(json.dumps(values | changes))

    return change


def other_base(runs):
    model = json.loads((runs / "sft_tiny/manifest.json").read_text())["model"]
    retell(runs / "sft_tiny", model=model | {"weights": "e" * 16})


def another_answer(runs):
    file = runs / "eval_tiny_grpo_tiny/predictions.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    file.write_text(json.dumps(json.loads(first) | {"completion": "#### 1"}) + "\n" + "".join(rest))


BROKEN = {
    "a byte of SFT's weights": (flip("sft_tiny/adapter/adapter_model.safetensors"), "sft", "its weights are others"),
    "a byte of GRPO's weights": (flip("grpo_tiny/adapter/adapter_model.safetensors"), "grpo", "its weights are others"),
    "alpha by hand": (edited("grpo_tiny/adapter/adapter_config.json", lora_alpha=1), "grpo", "adapter_config.json has changed"),
    "the template": (flip("sft_tiny/adapter/chat_template.jinja"), "sft", "chat_template.jinja has changed"),
    "SFT trained again": (recorded("sft_tiny", adapter_sha256=OTHER), "grpo", "sft_tiny holds eeeeeeeeeeee"),
    "another parent": (
        recorded("grpo_tiny", parent={"run_dir": "runs/sft_tiny", "adapter_sha256": OTHER}), "grpo", "two different adapters",
    ),
    "no chain": (recorded("grpo_tiny", chain=[]), "grpo", "two different adapters"),
    "another base": (other_base, "base", "the weights there are others"),
    "the base in between": (other_base, "grpo", "other weights of models/tiny than the run before"),
    "an answer": (another_answer, "eval", "its questions or answers have changed since"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "stage", "why"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_link_is_named_and_is_an_exit_code(place, change, stage, why):
    change(place / "runs")
    state, said = states(place / "runs" / "eval_tiny_grpo_tiny")[stage]
    assert (state, why in said) == ("broken", True), said
    done = run("posttrain.lineage.command", "runs/eval_tiny_grpo_tiny")
    assert done.code == 1 and "BROKEN" in done.out and "do not hold" in done.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "stage", "why"),
    [
        (lambda runs: shutil.rmtree(runs / "sft_tiny"), "sft", "its record is not here"),
        (lambda runs: shutil.rmtree(runs / "sft_tiny/adapter"), "sft", "its weights are not here"),
        (lambda runs: (runs.parent / "models/tiny").unlink(), "base", "it is not on this machine"),
        (recorded("grpo_tiny", exit="interrupted at step 1 of 2"), "grpo", "not finished (interrupted"),
        (lambda runs: (runs / "eval_tiny_grpo_tiny/predictions.jsonl").unlink(), "eval", "its answers are not here"),
    ],
)
def test_what_is_not_here_is_neither_whole_nor_broken(place, change, stage, why):
    change(place / "runs")
    state, said = states(place / "runs" / "eval_tiny_grpo_tiny")[stage]
    assert (state, why in said) == ("unchecked", True), said
    done = run("posttrain.lineage.command", "runs/eval_tiny_grpo_tiny", "--json")
    assert (done.code, json.loads(done.out)["state"]) == (0, "unchecked")


def test_solutions_that_were_sampled_make_it_rft(place):
    data = json.loads((place / "runs/sft_tiny/manifest.json").read_text())["data"]
    retell(place / "runs/sft_tiny", data=data | {"source": {"kind": "rejection_sampled"}})
    assert list(states(place / "runs/grpo_tiny")) == ["base", "rft", "grpo"]


def test_a_line_for_each_link_and_one_for_all():
    links = [Link("base", "me/base", "a" * 16, "whole", "here"), Link("sft", "x", "b" * 64, "unchecked", "away")]
    assert as_text(links).splitlines() == [
        "base    me/base  aaaaaaaaaaaa  whole: here",
        "-> sft  x        bbbbbbbbbbbb  cannot be checked: away",
        "no link is broken, 1 of 2 links cannot be checked",
    ]


@pytest.mark.parametrize("folder", ["nowhere", "data", "models/tiny"])
def test_a_folder_of_something_else_is_refused(place, folder):
    done = run("posttrain.lineage.command", folder)
    assert (done.code, done.out) == (2, "") and "holds no run" in done.err

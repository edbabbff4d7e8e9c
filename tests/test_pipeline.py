"""data -> SFT -> GRPO -> evaluation -> report -> card, by the scripts themselves, on a model of two layers."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import CONFIGS, EVALUATIONS, ROOT, launched, retell, run, tiny_pipeline, tree

from posttrain.config.schema import Model
from posttrain.models.base import load_base
from posttrain.models.chat import load_tokenizer
from posttrain.records import read_rows
from posttrain.runs.manifest import read_manifest


@pytest.fixture
def place(tmp_path, pipeline):
    """A copy that may be changed."""
    return shutil.copytree(pipeline, tmp_path / "copy", symlinks=True)


def metrics(run_dir, key):
    return [row[key] for row in read_rows(run_dir / "metrics.jsonl") if key in row]


# --- one run of everything --------------------------------------------------------------------------------------------


def test_every_stage_finishes_and_says_where_its_result_is(pipeline, tiny_model_dir):
    said = tiny_pipeline(pipeline, tiny_model_dir)  # what the run of everything said, kept
    assert "train 32 dev 4 test 8; 0 rejected" in said["data"].out and "wrote data/tiny" in said["data"].out
    for stage in ("sft", "grpo"):
        manifest = read_manifest(pipeline / "runs" / f"{stage}_tiny")
        assert manifest.exit == "ok" and manifest.adapter_sha256[:12] in said[stage].out
    for name in EVALUATIONS:
        assert f"eval_tiny_{name}: " in said[name].out and " of 8 on tiny" in said[name].out


def test_three_adapters_are_three(pipeline):
    sft, grpo = (read_manifest(pipeline / "runs" / name) for name in ("sft_tiny", "grpo_tiny"))
    assert grpo.start_sha256 == sft.adapter_sha256 == grpo.parent["adapter_sha256"]  # GRPO goes on where SFT ended
    assert len({sft.start_sha256, sft.adapter_sha256, grpo.adapter_sha256}) == 3
    texts = [(pipeline / "runs" / f"eval_tiny_{name}" / "predictions.jsonl").read_text() for name in EVALUATIONS]
    assert texts[0] != texts[1]


def test_training_learns_and_its_curves_are_there(pipeline):
    runs = pipeline / "runs"
    losses = metrics(runs / "sft_tiny", "loss")
    assert len(losses) == 6 and losses[-1] < losses[0]  # 30 steps, logged every 5
    assert len(metrics(runs / "sft_tiny", "dev/accuracy")) == len(metrics(runs / "grpo_tiny", "dev/accuracy")) == 2
    for key in ("reward", "rewards/correctness_reward/mean", "rewards/format_reward/mean", "kl", "completions/clipped_ratio"):
        assert len(metrics(runs / "grpo_tiny", key)) == 2, key
    assert metrics(runs / "grpo_tiny", "kl")[0] == 0.0  # the reference is the policy that it starts from
    assert min(metrics(runs / "sft_tiny", "lora_moved_share")) > 0.9
    assert max(metrics(runs / "grpo_tiny", "reward")) > 0


def test_the_report_reads_the_run_directories(place):
    names = [f"runs/eval_tiny_{name}" for name in EVALUATIONS]
    before = tree(place / "runs")
    done = run("posttrain.report", *names, "--out", "report", cwd=place)
    assert done.code == 0, done.err
    page = (place / "report" / "report.html").read_text(encoding="utf-8")
    table = (place / "report" / "report.md").read_text(encoding="utf-8")
    for name in EVALUATIONS:
        assert f"| tiny_{name} (" in table and f"tiny_{name}" in page
    assert "report.html" in done.out
    assert tree(place / "runs") == before


def test_the_card_is_made_of_the_run(place):
    from posttrain.hub.reading import read_release
    from posttrain.hub.release import Request
    from posttrain.hub.repository import all_files

    evaluations = tuple(place / "runs" / f"eval_tiny_{name}" for name in EVALUATIONS)
    request = Request(place / "runs" / "grpo_tiny", "me/tiny-grpo", evals=evaluations, base_model="me/tiny")
    files = all_files(read_release(request))
    card = files["README.md"].decode()
    assert "base_model: me/tiny" in card and "base -> SFT -> GRPO" in card
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    assert not [name for name in files if "optimizer" in name or name.endswith(".bin")]


def test_all_of_it_again_is_nothing_to_do(place):
    before = {path: entry and entry[0] for path, entry in tree(place).items()}
    for stage, script, *more in (
        ("data", "data_prep"),
        ("sft", "sft_train", "trainer.optim=paged_adamw_32bit"),
        ("grpo", "grpo_train"),
        ("eval", "evaluate"),
        ("eval", "evaluate", "adapter=runs/sft_tiny"),
    ):
        done = run(script, "--config", CONFIGS / f"{stage}_tiny.yaml", *more, cwd=place)
        assert done.code == 0 and "nothing to do" in done.out
    assert {path: entry and entry[0] for path, entry in tree(place).items()} == before


# --- interrupted ------------------------------------------------------------------------------------------------------


def interrupt(folder, step):
    """Turn a finished run into one that was killed after this step. Returns its manifest before that."""
    whole = read_manifest(folder)
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)
    (folder / "checkpoints" / f"checkpoint-{step + 1}").mkdir()  # killed while it was written
    shutil.rmtree(folder / "adapter")
    retell(folder, exit="running", adapter_sha256=None)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # and while this was
    return whole


@pytest.mark.parametrize(
    ("name", "script", "step", "more"),
    [("sft_tiny", "sft_train", 15, ["trainer.optim=paged_adamw_32bit"]), ("grpo_tiny", "grpo_train", 1, [])],
)
def test_a_resumed_run_ends_where_it_would_have(place, pipeline, name, script, step, more):
    folder, config = place / "runs" / name, CONFIGS / f"{name.removesuffix('_tiny')}_tiny.yaml"
    whole = interrupt(folder, step)
    before = tree(folder)
    done = run(script, "--config", config, *more, cwd=place)
    assert done.code == 2 and "unfinished run of these settings: add --resume" in done.err and tree(folder) == before
    done = run(script, "--config", config, *more, "--resume", cwd=place)
    assert done.code == 0 and f"resuming from runs/{name}/checkpoints/checkpoint-{step}\n" in done.out, done
    resumed = read_manifest(folder)
    assert (resumed.exit, resumed.steps, resumed.started) == ("ok", whole.steps, whole.started)
    assert resumed.adapter_sha256 == whole.adapter_sha256  # bit for bit
    logged = {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row}  # the last row counts
    before = {row["step"]: row["loss"] for row in read_rows(pipeline / "runs" / name / "metrics.jsonl") if "loss" in row}
    assert logged == before


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_stage_runs_with_two_processes(place, monkeypatch):
    """By torchrun: `accelerate launch --cpu --num_processes 2` starts one process, and says nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def launch(script, *arguments):
        two = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        return launched(*two, ROOT / script, *arguments, cwd=place)

    def tokens(name):
        return metrics(place / "runs" / name, "num_tokens")[-1]  # of all processes: one with half the rows has half of them

    half = ("data.num_dev=0", "trainer.save_strategy=no")
    more = ("run_dir=runs/sft2", "trainer.per_device_train_batch_size=4")
    said = launch("sft_train.py", "--config", CONFIGS / "sft_tiny.yaml", *more, *half)
    assert said.count("trainable parameters") == said.count("step  5 of 30") == said.count("\nnext: ") == 1  # one voice
    sft, one = read_manifest(place / "runs" / "sft2"), read_manifest(place / "runs" / "sft_tiny")
    assert sft.exit == "ok" and sft.steps == 30 and sft.adapter_sha256 not in (sft.start_sha256, one.adapter_sha256)
    assert (sft.num_processes, sft.launcher, one.num_processes) == (2, "torchrun", 1)
    assert sft.global_batch == one.global_batch
    losses, alone = metrics(place / "runs" / "sft2", "loss"), metrics(place / "runs" / "sft_tiny", "loss")
    assert losses[0] == pytest.approx(alone[0], rel=0.02) and len(losses) == len(alone)  # the same rows in a step, halved
    assert tokens("sft2") == tokens("sft_tiny")

    more = ("run_dir=runs/grpo2", "adapter=runs/sft2", "trainer.per_device_train_batch_size=8")
    said = launch("grpo_train.py", "--config", CONFIGS / "grpo_tiny.yaml", *more, *half)
    assert said.count("trainable parameters") == 1
    grpo = read_manifest(place / "runs" / "grpo2")
    assert grpo.exit == "ok" and grpo.parent["adapter_sha256"] == sft.adapter_sha256 != grpo.adapter_sha256
    assert metrics(place / "runs" / "grpo2", "kl")[0] == 0.0
    samples = [row["step"] for row in read_rows(place / "runs" / "grpo2" / "samples.jsonl")]
    assert samples.count(1) == 16  # completions of both processes

    said = launch("evaluate.py", "--config", CONFIGS / "eval_tiny.yaml", "run_dir=runs/eval2", "adapter=runs/sft_tiny")
    assert said.count(" of 8 on tiny") == 1
    two, alone = (place / "runs" / name / "predictions.jsonl" for name in ("eval2", "eval_tiny_sft_tiny"))
    assert Path(two).read_bytes() == alone.read_bytes()


def exported(place, name):
    """The tensors of a run's merged folder. The export holds them to the policy that one process makes of the run's files."""
    few = ("--format", "merged", "--questions", 2, "--max-new-tokens", 8)
    done = run("posttrain.export.command", f"runs/{name}", *few, cwd=place)
    assert done.code == 0, done
    assert read_manifest(place / "runs" / name).num_processes == (1 if name == "alone" else 2)
    return load_file(place / "runs" / name / "export" / "merged" / "model.safetensors")


def unpacked_base(place):
    settings = Model(name_or_path=str(place / "models" / "tiny"))
    return load_base(settings, "nf4_unpacked", load_tokenizer(settings)).state_dict()


def apart(one, other):
    """The norm of the difference, over the tensors of the first."""
    return torch.stack([(one[name].float() - other[name].float()).norm() for name in one]).norm()


@pytest.mark.slow
def test_fsdp_trains_what_data_parallel_does_and_resumes(place):
    """They agree to the last bits of a sum. The bits of NF4 weights must survive the way between processes."""
    rows = ("trainer.save_steps=3", "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1")
    sft = ("--config", CONFIGS / "sft_tiny.yaml", *rows, "trainer.max_steps=6", "quantization=nf4")
    two = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    sharded = (*two, ROOT / "tests" / "fsdp_on_cpu.py", "sft_train.py", *sft, "run_dir=runs/fsdp")
    launched(*two, ROOT / "sft_train.py", *sft, "run_dir=runs/ddp", cwd=place)
    launched(*sharded, cwd=place)
    ddp, fsdp = (metrics(place / "runs" / name, "loss") for name in ("ddp", "fsdp"))
    assert len(fsdp) == 6 and fsdp == pytest.approx(ddp, rel=1e-5)
    ddp, fsdp = (metrics(place / "runs" / name, "dev/accuracy") for name in ("ddp", "fsdp"))
    assert len(fsdp) == 2 and fsdp == ddp
    ddp, fsdp = (load_file(place / "runs" / name / "adapter" / "adapter_model.safetensors") for name in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    assert all(torch.allclose(fsdp[name], ddp[name], atol=1e-4) for name in ddp)

    # What others load of such a run is what they would load of the same run in one process, up to the order of its sums.
    assert run("sft_train", *sft, "run_dir=runs/alone", "trainer.per_device_train_batch_size=8", cwd=place).code == 0
    alone, ddp, fsdp = (exported(place, name) for name in ("alone", "ddp", "fsdp"))
    moved = apart(alone, unpacked_base(place))
    assert moved > 0 and apart(ddp, fsdp) < 1e-3 * moved and apart(alone, fsdp) < 0.05 * moved

    whole = interrupt(place / "runs" / "fsdp", 3)
    said = launched(*sharded, "--resume", cwd=place)
    assert [line for line in said.splitlines() if "resuming" in line] == ["resuming from runs/fsdp/checkpoints/checkpoint-3"]
    assert read_manifest(place / "runs" / "fsdp").adapter_sha256 == whole.adapter_sha256


@pytest.mark.slow
def test_grpo_under_fsdp_trains_what_data_parallel_does_and_resumes(place):
    """Rollouts from a gathered copy, the reference by the sharded adapter "ref", dev accuracy, a window that a kill cuts.

    Checkpointed layers share no prompts under DDP either: the same operations then, and a draw that a last bit would change is
    the same draw.
    """
    often = ("trainer.max_steps=4", "trainer.save_steps=1", "trainer.num_iterations=2", "rollouts.correct_mismatch=true")
    same = ("trainer.per_device_train_batch_size=8", "trainer.gradient_checkpointing=true")
    grpo = ("--config", CONFIGS / "grpo_tiny.yaml", *often, *same)
    two = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    sharded = (*two, ROOT / "tests" / "fsdp_on_cpu.py", "grpo_train.py", *grpo, "run_dir=runs/fsdp")
    launched(*two, ROOT / "grpo_train.py", *grpo, "run_dir=runs/ddp", cwd=place)
    launched(*sharded, cwd=place)
    for key in ("loss", "kl", "reward", "rollout/logp_difference", "dev/accuracy"):
        ddp, fsdp = (metrics(place / "runs" / name, key) for name in ("ddp", "fsdp"))
        assert len(fsdp) >= 2 and fsdp == pytest.approx(ddp, rel=1e-4, abs=1e-7), key
    assert metrics(place / "runs" / "fsdp", "kl")[0] == 0.0 < metrics(place / "runs" / "fsdp", "kl")[-1]

    whole = interrupt(place / "runs" / "fsdp", 3)
    said = launched(*sharded, "--resume", cwd=place)
    assert [line for line in said.splitlines() if "resuming" in line] == ["resuming from runs/fsdp/checkpoints/checkpoint-3"]
    assert read_manifest(place / "runs" / "fsdp").adapter_sha256 == whole.adapter_sha256

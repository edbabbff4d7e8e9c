"""The scripts on a GPU, as they run there by default, against what transformers and PEFT compose: `make gpu-tests`."""

import pytest
import torch
from fsdp_on_cpu import as_on_cuda
from scripts import CONFIGS, ROOT, launched, run_fresh, workplace

from posttrain.records import read_rows
from posttrain.runs.manifest import read_manifest

PLAIN = ("model.kernels=torch", "model.attn_implementation=sdpa", "fast_adapter=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_dir, tiny_data_dir):
    """SFT both ways, then GRPO and evaluation of the default one. Each way in a process of its own: kernels are patched in."""
    folder = tmp_path_factory.mktemp("gpu")
    workplace(folder, tiny_model_dir)
    more = ["quantization=none", f"data.path={tiny_data_dir}"]
    sft, grpo, evaluation = (["--config", CONFIGS / f"{stage}_tiny.yaml", *more] for stage in ("sft", "grpo", "eval"))
    ours = (
        ["sft_train", *sft],
        ["grpo_train", *grpo, "trainer.weight_decay=0.1"],  # no answer is right, and a run that moves nothing fails
        ["evaluate", *evaluation, "adapter=runs/grpo_tiny"],
    )
    for commands in (ours, (["sft_train", *sft, *PLAIN, "run_dir=runs/plain"],)):
        assert all(done.code == 0 for done in run_fresh(*commands, cwd=folder))
    return folder / "runs"


def logged(folder, key):
    return [row[key] for row in read_rows(folder / "metrics.jsonl") if key in row]


@pytest.mark.gpu
def test_sft_has_the_losses_of_the_plain_layers(runs):
    kernels = [read_manifest(runs / name).model["kernels"] for name in ("sft_tiny", "plain")]
    assert kernels == ["liger", "torch"]
    ours, plain = (logged(runs / name, "loss") for name in ("sft_tiny", "plain"))
    assert len(ours) == 6 and ours[-1] < ours[0]
    assert ours == pytest.approx(plain, rel=0.01)  # ways to compute the same on a CPU differ by 0.001 after thirty steps


@pytest.mark.gpu
def test_the_sampler_and_the_trainer_of_grpo_agree(runs):
    folder = runs / "grpo_tiny"
    assert read_manifest(folder).model["kernels"] == "liger"
    assert all(0 < difference < 0.05 for difference in logged(folder, "rollout/logp_difference"))
    assert abs(logged(folder, "kl")[0]) < 1e-6  # the reference is the policy, by the same kernels
    assert len(list(read_rows(runs / "eval_tiny_grpo_tiny" / "predictions.jsonl"))) == 20


@pytest.mark.gpu
def test_cuda_copies_what_fsdp_sends_as_it_is_imitated_on_a_cpu():
    """Every word of bf16: NaNs come out alike, which costs NF4 sent as bf16 its bits: the first reason of shard_as_stored."""
    words = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    imitated, copied = torch.empty_like(words), torch.empty_like(words, device="cuda")
    as_on_cuda(torch._foreach_copy_)([imitated], [words])
    torch._foreach_copy_([copied], [words.cuda()])
    assert torch.equal(copied.cpu().isnan(), words.isnan())
    assert torch.equal(copied.cpu()[~words.isnan()].view(torch.int16), words[~words.isnan()].view(torch.int16))
    assert all(len(tensor[tensor.isnan()].view(torch.int16).unique()) == 1 for tensor in (imitated, copied.cpu()))
    byte = words.view(torch.uint8).cuda()
    torch._foreach_copy_([copied.view(torch.uint8)], [byte])
    assert torch.equal(copied.view(torch.uint8), byte)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("quantization", ["nf4", "nf4_unpacked"])
def test_fsdp_trains_what_data_parallel_does(tmp_path, tiny_model_dir, tiny_data_dir, quantization):
    """As tests/test_pipeline.py has it on a CPU, with CUDA's own copies."""
    workplace(tmp_path, tiny_model_dir)
    sft = ("--config", CONFIGS / "sft_tiny.yaml", f"data.path={tiny_data_dir}", "data.num_dev=0", f"quantization={quantization}")
    each = ("trainer.per_device_train_batch_size=4", "trainer.logging_steps=1", "trainer.max_steps=6", "trainer.save_strategy=no")
    for way in ("ddp", "fsdp2"):
        launcher = ("accelerate.commands.launch", "--config_file", CONFIGS / "accelerate" / f"{way}.yaml")
        launched(*launcher, ROOT / "sft_train.py", *sft, *each, f"run_dir=runs/{way}", cwd=tmp_path)
    ddp, fsdp = (logged(tmp_path / "runs" / way, "loss") for way in ("ddp", "fsdp2"))
    assert len(fsdp) == 6 and fsdp[0] == pytest.approx(ddp[0], rel=1e-5)
    assert fsdp == pytest.approx(ddp, rel=1e-3)  # sums on a GPU come in any order


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("quantization", ["nf4", "nf4_unpacked"])
def test_grpo_under_fsdp_begins_as_data_parallel_does(tmp_path, tiny_model_dir, tiny_data_dir, quantization):
    """Later steps sample by what a last bit decides; that the copy is the policy shows in `rollout/logp_difference`."""
    workplace(tmp_path, tiny_model_dir)
    same = (f"data.path={tiny_data_dir}", f"quantization={quantization}")
    launcher = ("accelerate.commands.launch", "--config_file")
    profiles = {way: CONFIGS / "accelerate" / f"{way}.yaml" for way in ("ddp", "fsdp2")}
    sft = ("--config", CONFIGS / "sft_tiny.yaml", *same, "trainer.save_strategy=no")
    launched(*launcher, profiles["fsdp2"], ROOT / "sft_train.py", *sft, cwd=tmp_path)
    grpo = ("--config", CONFIGS / "grpo_tiny.yaml", *same, "trainer.per_device_train_batch_size=8", "trainer.max_steps=4")
    for way, profile in profiles.items():
        more = ("trainer.gradient_checkpointing=true", f"run_dir=runs/{way}")
        launched(*launcher, profile, ROOT / "grpo_train.py", *grpo, *more, cwd=tmp_path)
    for key in ("loss", "kl", "reward", "grad_norm"):
        ddp, fsdp = (logged(tmp_path / "runs" / way, key)[0] for way in profiles)
        assert fsdp == pytest.approx(ddp, rel=1e-3, abs=1e-6), key
    assert max(logged(tmp_path / "runs" / "fsdp2", "rollout/logp_difference")) < 0.05

"""FSDP2 with one process: sharded weights through everything that this project does with trained ones."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_lora_linear import distance, make, run
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, OPTConfig

from posttrain.config.load import load
from posttrain.config.schema import GrpoConfig, Model, SftConfig
from posttrain.errors import UserError
from posttrain.kernels import lora_linear
from posttrain.kernels.nf4 import flatten_scales, layers_to_pack
from posttrain.models.adapters import gather_sharded_adapter
from posttrain.models.base import load_base
from posttrain.models.chat import load_tokenizer
from posttrain.models.policy_copy import GatheredCopy, PolicyCopy
from posttrain.runs.directory import check_machine
from posttrain.training.callbacks import MovedShare, StopOnNonFinite
from posttrain.training.label_head import LabelHead
from posttrain.training.masters import shard_as_stored

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    distributed.destroy_process_group()


def sharded(mesh: DeviceMesh, *args, **kwargs) -> nn.Module:
    model = make(*args, **kwargs)
    lora_linear.fuse_adapters(model)
    for name in ("up", "gate", "down"):  # sharded one by one, as accelerate shards decoder layers
        fully_shard(model.base_model.model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("dtype, packed, rtol", [(torch.float32, False, 1e-6), (torch.bfloat16, True, 1e-6)])
def test_outputs_and_gradients_are_those_of_the_whole_model(mesh, dtype, packed, rtol):
    storage = {"storage": torch.bfloat16} if packed else {}
    alone = make(dtype, packed, **storage)
    lora_linear.fuse_adapters(alone)
    expected = run(alone, dtype, autocast=packed)
    for got, value in zip(run(sharded(mesh, dtype, packed, **storage), dtype, autocast=packed), expected, strict=True):
        assert distance(whole(got), value) < rtol


def test_nothing_is_rounded_that_one_process_does_not_round(mesh, tiny_model_dir, monkeypatch):
    """Under accelerate's own policy much is. Whether NF4's bits arrive takes two processes to see: tests/test_pipeline.py."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    sharding = SimpleNamespace(fsdp_plugin=plugin)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")

    settings = Model(name_or_path=str(tiny_model_dir))
    tokenizer = load_tokenizer(settings)
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("whole", "theirs", "ours"):
        base = load_base(settings, "nf4", tokenizer)
        flatten_scales(base)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
        LabelHead(base, 1.0, ())
        if name == "ours":
            shard_as_stored(sharding, model)
        for layer in (*base.model.layers, model) if name != "whole" else ():
            fully_shard(layer, mesh=mesh, mp_policy=plugin.mixed_precision_policy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            log_probs = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        (-log_probs.sum() / 37).backward()  # a divisor that bf16 does not hold
        found[name] = (log_probs, *(whole(p.grad) for p in model.parameters() if p.requires_grad))
    assert all(one.dtype == torch.float32 for one in found["ours"])
    assert all(map(torch.equal, found["ours"], found["whole"]))
    assert max(map(distance, found["theirs"], found["whole"])) > 2e-3


def test_trained_rows_of_an_embedding_are_refused(tiny_model_dir):
    settings = Model(name_or_path=str(tiny_model_dir))
    base = load_base(settings, "none", load_tokenizer(settings))
    model = get_peft_model(base, LoraConfig(target_modules=["up_proj"], trainable_token_indices=[1]))
    with pytest.raises(UserError, match="launch with configs/accelerate/ddp.yaml, or set lora.train_special_tokens=never"):
        shard_as_stored(SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)), model)


def test_nf4_beside_no_adapter_is_refused(tiny_model_dir):
    settings = Model(name_or_path=str(tiny_model_dir))
    for quantization, refused in (("nf4", True), ("nf4_unpacked", False)):
        base = load_base(settings, quantization, load_tokenizer(settings))
        model = get_peft_model(base, LoraConfig(target_modules=["layers.1.mlp.up_proj"]))
        shard_as_stored(SimpleNamespace(), model)  # of one process, or under DDP
        with pytest.raises(UserError, match="model.layers.0 has no adapter") if refused else nullcontext():
            shard_as_stored(SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)), model)


def packed(config, target):
    """A model whose linear layers are as a load as NF4 leaves them, but for the packing, with an adapter on some."""
    base = AutoModelForCausalLM.from_config(config)
    for name in layers_to_pack(base):
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, Linear4bit(*base.get_submodule(name).weight.shape[::-1]))
    base.requires_grad_(False)
    return get_peft_model(base, LoraConfig(target_modules=target))


SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
BIG_CODE = GPTBigCodeConfig(n_embd=8, n_layer=2, n_head=2, vocab_size=9)
OPT = OPTConfig(**SIZES, ffn_dim=8, word_embed_proj_dim=4)


@pytest.mark.parametrize(
    ("config", "target", "without"),
    [
        (BIG_CODE, ["c_attn"], None),
        (BIG_CODE, r"transformer\.h\.0\..*c_attn", "transformer.h.1"),
        (OPT, ["q_proj", "project_in"], None),
        (OPT, ["q_proj"], "the part outside of the layers"),
        (OPT, r".*(layers\.1\..*q_proj|project_in)", "model.decoder.layers.0"),
    ],
)
def test_what_is_sent_together_is_found_in_every_family(config, target, without):
    sharding = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    with pytest.raises(UserError, match=f"^{without} has no adapter") if without else nullcontext():
        shard_as_stored(sharding, packed(config, target))


def policies(tiny_model_dir, mesh, quantization, **lora):
    """The same policy whole and sharded, as accelerate shards it."""
    settings = Model(name_or_path=str(tiny_model_dir))
    for is_sharded in (False, True):
        base = load_base(settings, quantization, load_tokenizer(settings))
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False, **lora))
        for part in (*base.model.layers, [base.model.norm, base.lm_head], model) if is_sharded else ():
            fully_shard(part, mesh=mesh)
        yield model


@pytest.mark.parametrize("form", [("nf4", {}), ("nf4_unpacked", {}), ("none", {}), ("none", {"use_dora": True})])
def test_the_copy_that_generates_is_that_of_the_whole_policy(mesh, tiny_model_dir, monkeypatch, form):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    alone, shards = policies(tiny_model_dir, mesh, form[0], **form[1])
    assert all(isinstance(p, DTensor) for p in shards.parameters())
    wanted, copied = dict(PolicyCopy(alone).model.named_parameters()), GatheredCopy(shards).refresh()
    assert len(wanted) == len(list(copied.parameters())) > 10
    for name, parameter in copied.named_parameters():
        assert not isinstance(parameter, DTensor) and torch.equal(parameter, wanted[name]), name


def test_the_moved_share_and_the_check_for_non_numbers_read_them(mesh):
    model = sharded(mesh, torch.float32)
    reported = []
    moved, stop = MovedShare(lambda key, value: reported.append(value)), StopOnNonFinite()
    arguments, state = SimpleNamespace(logging_steps=1), SimpleNamespace(global_step=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    run(model, torch.float32, autocast=False)
    for callback in (moved, stop):
        callback.on_pre_optimizer_step(arguments, state, None, optimizer=optimizer)
    optimizer.step()
    moved.on_optimizer_step(arguments, state, None, optimizer=optimizer)
    assert reported == [1.0]
    trained[-1].grad.to_local()[0] = float("nan")
    with pytest.raises(FloatingPointError, match="non-finite gradient"):
        stop.on_pre_optimizer_step(arguments, state, None, optimizer=optimizer)


def test_what_is_saved_is_the_adapter_that_was_trained(mesh, tmp_path):
    plain = make(torch.float32)
    assert gather_sharded_adapter(plain) is None
    for name, model, state in (
        ("plain", plain, None),
        ("sharded", (shards := sharded(mesh, torch.float32)), gather_sharded_adapter(shards)),
    ):
        model.save_pretrained(tmp_path / name, selected_adapters=["default"], state_dict=state)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "sharded")]
    assert files[0].keys() == files[1].keys() and len(files[0]) == 6
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


MERGED = ["adapter_mode=merge_and_new", "lora={r: 4, alpha: 8, target_modules: [up_proj]}"]


@pytest.mark.parametrize(
    "cls, name, overrides, told",
    [
        (SftConfig, "sft", ["lora=null", "quantization=none"], "or give lora"),
        (GrpoConfig, "grpo", ["rollouts.engine=trl"], "or use rollouts.engine=transformers"),
        (GrpoConfig, "grpo", ["update_tokens=2048"], "or remove it"),
        (GrpoConfig, "grpo", MERGED, "or use rescale or continue"),
    ],
)
def test_what_needs_a_whole_model_is_refused(monkeypatch, cls, name, overrides, told):
    config = load(CONFIGS / f"{name}_tiny.yaml", overrides, cls)
    check_machine(config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=f"FSDP shards the model: launch with configs/accelerate/ddp.yaml, {told}"):
        check_machine(config)


@pytest.mark.parametrize(("cls", "name"), [(SftConfig, "sft"), (GrpoConfig, "grpo")])
def test_training_with_dev_questions_is_not_refused(monkeypatch, cls, name):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_machine(load(CONFIGS / f"{name}_tiny.yaml", [], cls))

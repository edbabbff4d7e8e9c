"""Layers that keep little against the layers that they replace: losses, gradients, and what is kept for them."""

from __future__ import annotations

import functools
import re

import bitsandbytes
import pytest
import torch
import transformers
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.config.schema import SftConfig
from posttrain.errors import UserError
from posttrain.kernels import lean_layers, lora_linear
from posttrain.kernels.liger import use_liger

KINDS = ["Llama", "Llama, tied", "Qwen2", "Qwen3", "Gemma2", "Gemma3 (text)", "Mistral", "Granite", "OLMo2", "SmolLM3"]
IDS = torch.randint(3, 90, (3, 21), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
HIDDEN, INNER, KV, RANK = 64, 176, 32, 4


def base_model(name, dtype, **changes):
    class_name, special, *_ = FAMILIES[name]
    special = {key: value[:2] if isinstance(value, list) else value for key, value in special.items()}
    config = getattr(transformers, class_name)(
        **(SIZES | {"hidden_size": HIDDEN, "intermediate_size": INNER} | special | changes)
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").requires_grad_(False)


def pack(model):
    """Every linear layer of the decoder as NF4."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.endswith("proj"):
            parent, _, child = name.rpartition(".")
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.bfloat16, quant_type="nf4"
            )
            layer.load_state_dict(module.state_dict())
            setattr(model.get_submodule(parent), child, layer.to("cpu").requires_grad_(False))
    return model


def policy(name="Llama", dtype=torch.float32, layers="plain", checkpointing=False, packed=False, **lora):
    """An adapted model whose layers are PEFT's (plain), one operation each (fused), or keep little (lean)."""
    base = base_model(name, dtype)
    settings = {"r": RANK, "lora_alpha": 12, "target_modules": FAMILIES[name][2], "init_lora_weights": False} | lora
    model = get_peft_model(pack(base) if packed else base, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if layers != "plain":
        lora_linear.fuse_adapters(model)
    if layers == "lean":
        lean_layers.use_lean_layers(model)
    return model.train()


def step(model, autocast=False):
    """The loss, and the gradients of the adapter one after the other."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS, use_cache=False).logits
    loss = -logits.float().log_softmax(-1).gather(-1, IDS[..., None]).mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def distance(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_plain_layers(name, checkpointing):
    (loss, gradient), (wanted, plain) = (
        step(policy(name, layers=kind, checkpointing=checkpointing)) for kind in ("lean", "plain")
    )
    assert loss == pytest.approx(wanted, abs=1e-5) and distance(gradient, plain) < 1e-5


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bf16_they_are_as_exact_as_the_fused_layers(name, packed, checkpointing):
    exact = step(policy(name))[1] if not packed else None
    found = {
        kind: step(policy(name, torch.bfloat16, kind, checkpointing, packed), autocast=True)[1]
        for kind in ("fused", "lean", "plain")
    }
    if packed:
        assert distance(found["lean"], found["plain"]) < 1.2 * distance(found["fused"], found["plain"]) + 0.02
    else:
        assert distance(found["lean"], exact) < 1.1 * distance(found["fused"], exact)


class LigerMLP(nn.Module):
    """As Liger's SwiGLU: once it has changed the classes of a process, models that have torch's kernels have it, too."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        raise NotImplementedError("a kernel for a GPU")


def test_an_mlp_without_a_module_for_its_activation_is_ligers(monkeypatch):
    wanted = step(policy("Llama", layers="lean"))
    make = base_model

    def with_ligers_class(*args, **kwargs):
        model = make(*args, **kwargs)
        for layer in model.model.layers:
            layer.mlp = LigerMLP(layer.mlp)
        return model

    monkeypatch.setitem(globals(), "base_model", with_ligers_class)
    found = step(policy("Llama", layers="lean"))
    assert found[0] == wanted[0] and torch.equal(found[1], wanted[1])


class Launches(TorchDispatchMode):
    """What is a kernel on a GPU: all operations but those that make a view or allocate."""

    quiet = re.compile(r"aten\.(view|split|detach|empty|new_empty|t\.|permute|transpose|_unsafe_view)")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.quiet.match(str(func)):
            self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_query_key_and_value_are_few_kernels():
    """A GPU waits for their launch. Three layers: two products each and three gradients each; all else once for the group."""
    model = policy("Llama", torch.bfloat16, "lean")
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 9, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), Launches() as forward:
        outputs = [getattr(attention, name)(x) for name in lean_layers.GROUPS[0]]
    with Launches() as backward:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    backward.names = [name for name in backward.names if "ones_like" not in name]
    cast = "aten._foreach_copy_.default"
    assert len(forward.names) == 2 + 3 * 2 and len(backward.names) == 3 + 3 * 3, (forward.names, backward.names)
    assert forward.names.count(cast) == backward.names.count(cast) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_into_new_memory_read_nothing_of_it(dtype):
    """A column block of a wider matrix, as the backward pass writes the adapters' gradients side by side."""
    x, y = torch.randn(9, 64).to(dtype), torch.randn(64, 4).to(dtype)
    wide = torch.full((9, 12), torch.nan, dtype=dtype)
    wide[:, 4:8].addmm_(x, y, beta=0, alpha=2.0)
    assert torch.allclose(wide[:, 4:8], 2 * (x @ y), rtol=1e-2) and wide.isnan().sum() == 9 * 8


def bytes_kept(model, tokens):
    """What a backward pass keeps, parameters and storages that are kept twice not counted again."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    model.enable_input_require_grads()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.get_base_model().model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for place, storage in kept.items() if place not in known)


def a_token_and_layer(layers):
    """Bytes, but for those of attention, which the kernel decides: here it keeps its probabilities."""
    sizes = {}
    for count in (1, 2):
        base = base_model("Llama", torch.bfloat16, num_hidden_layers=count, hidden_size=256, intermediate_size=704, head_dim=64)
        base.config._attn_implementation = "none"
        settings = LoraConfig(r=RANK, target_modules=FAMILIES["Llama"][2])
        model = get_peft_model(base, settings, autocast_adapter_dtype=True)
        lora_linear.fuse_adapters(model)
        if layers == "lean":
            lean_layers.use_lean_layers(model)
        sizes[count] = (bytes_kept(model, 96) - bytes_kept(model, 32)) / 64
    return sizes[2] - sizes[1]


def no_attention(module, query, key, value, attention_mask, **kwargs):
    """Keeps what flash attention keeps: queries, keys, values and its output."""
    output = _Keeps.apply(query, key, value)
    return output.transpose(1, 2), None


class _Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        output = query.clone()
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def test_a_layer_keeps_what_it_cannot_compute_again(monkeypatch):
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "none", no_attention)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "none", lambda *args, **kwargs: None)
    hidden, inner, kv, ranks = 256, 704, 128, 7 * RANK
    assert a_token_and_layer("lean") == 2 * (4 * hidden + 2 * kv + 2 * inner + ranks)
    assert a_token_and_layer("fused") > 2 * (8 * hidden + 2 * kv + 4 * inner + ranks)


def unpackings(monkeypatch, **settings):
    calls = []
    for module in (lean_layers, lora_linear):
        unpack = module.base_weight
        monkeypatch.setattr(
            module, "base_weight", functools.partial(lambda unpack, base: calls.append(base) or unpack(base), unpack)
        )
    model = policy(dtype=torch.bfloat16, packed=True, checkpointing=True, **settings)
    step(model, autocast=True)
    assert not any("unpacked" in vars(module) for module in model.modules())
    return len(calls)


def test_a_layer_that_runs_again_is_unpacked_once_for_that_and_its_gradient(monkeypatch):
    layers = 2 * 7
    assert unpackings(monkeypatch, layers="fused") == 3 * layers
    assert unpackings(monkeypatch, layers="lean") == 2 * layers


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_what_peft_alone_computes_is_left_to_it(settings):
    found = []
    for layers in ("lean", "plain"):
        model = policy(layers=layers, **settings)
        torch.manual_seed(2)
        found.append(step(model))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6) and distance(found[0][1], found[1][1]) < 1e-5


def test_without_the_adapter_it_is_the_base():
    model = policy(layers="lean")
    with torch.no_grad(), model.disable_adapter():
        found = model(input_ids=IDS).logits
    assert torch.allclose(found, base_model("Llama", torch.float32)(input_ids=IDS).logits, atol=1e-5)


def test_norms_that_are_trained_keep_what_they_need():
    found = []
    for layers in ("lean", "plain"):
        model = policy(layers="plain")
        norm = model.get_base_model().model.layers[0].input_layernorm
        norm.weight.requires_grad_()
        if layers == "lean":
            lean_layers.use_lean_layers(model)
        step(model)
        found.append(norm.weight.grad)
    assert found[0].abs().sum() > 0 and distance(found[0], found[1]) < 1e-5


def test_another_kind_of_model_is_refused():
    model = get_peft_model(base_model("Phi-3", torch.float32), LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(UserError, match=r"lean_layers: not tried on phi3"):
        lean_layers.use_lean_layers(model)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"compile": True}, "compile chooses itself what a layer keeps"), ({"fast_adapter": False}, "set fast_adapter to true")],
)
def test_settings_that_take_the_layers_for_themselves_are_refused(settings, told):
    lora = {"r": 1, "alpha": 1, "target_modules": ["q_proj"]}
    with pytest.raises(ValidationError, match=told):
        SftConfig(run_dir="x", model={"name_or_path": "x"}, data={"path": "x"}, lora=lora, lean_layers=True, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_ligers_kernels_the_gradients_are_those_of_transformers_layers(checkpointing):
    found = []
    for layers in ("plain", "lean"):
        model = policy(layers="plain", checkpointing=checkpointing).cuda()
        if layers == "lean":
            use_liger(model.get_base_model(), "liger")
            lora_linear.fuse_adapters(model)
            lean_layers.use_lean_layers(model)
        logits = model(input_ids=IDS.cuda(), use_cache=False).logits
        (logits * torch.linspace(-1, 1, logits.shape[-1], device="cuda")).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert distance(found[1], found[0]) < 1e-4

"""Adapters made by PEFT itself, of every kind it has: folded to PEFT's own forward, or refused by peft_type."""

import json

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from posttrain.errors import UserError
from posttrain.models.adapter_kinds import FOLDED, check_packed, check_shapes, check_trainable, read_adapter_config
from posttrain.models.adapters import load_adapter
from posttrain.models.checkpoint import skeleton
from posttrain.models.policy_copy import PolicyCopy

IDS = torch.randint(20, 280, (2, 12), generator=torch.Generator().manual_seed(1))
ATTENTION, TWO = ["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "up_proj"]


def lora(**changes):
    shape = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ATTENTION, "init_lora_weights": False}
    return peft.LoraConfig(**shape | changes)


def other(kind, **settings):
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{"task_type": "CAUSAL_LM", "target_modules": TWO} | settings)


LORAS = {
    "plain": lambda: lora(),
    "lora_bias": lambda: lora(lora_bias=True),
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "rank and alpha patterns": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}),
    "fan_in_fan_out": lambda: lora(fan_in_fan_out=True),
    "modules_to_save the head": lambda: lora(modules_to_save=["lm_head"]),
    "modules_to_save the embedding, untied": lambda: lora(modules_to_save=["embed_tokens"]),
    "modules_to_save both, tied": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "modules_to_save norms": lambda: lora(modules_to_save=["norm"]),
    "modules_to_save a whole block": lambda: lora(modules_to_save=["mlp"]),
    "the embedding": lambda: lora(target_modules=["embed_tokens"]),
    "the embedding with dora": lambda: lora(target_modules=["embed_tokens"], use_dora=True),
    "the head": lambda: lora(target_modules=["lm_head"]),
    "token rows": lambda: lora(trainable_token_indices=[1, 2]),
    "token rows of both ends": lambda: lora(trainable_token_indices={"embed_tokens": [*range(20, 90)], "lm_head": [80, 90]}),
    "the same token rows of both ends": lambda: lora(trainable_token_indices={"embed_tokens": [30, 31], "lm_head": [30, 31]}),
    "token rows of the head": lambda: lora(trainable_token_indices={"lm_head": [*range(20, 90)]}),
    "one layer": lambda: lora(layers_to_transform=[1], layers_pattern="layers"),
    "a pattern": lambda: lora(target_modules=r".*q_proj"),
    "all-linear": lambda: lora(target_modules="all-linear"),
    "parameters": lambda: lora(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "qalora": lambda: lora(use_qalora=True, qalora_group_size=16),
}
OTHERS = {
    "ADALORA": {"total_step": 10, "init_r": 4},
    "BEFT": {"target_modules": ["q_proj", "v_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 16},
    "FROD": {},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {"r": 4},
    "TINYLORA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "UNILORA": {"r": 4},
    "VBLORA": {"r": 4, "vector_length": 8, "num_vectors": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 16},
}
MADE = LORAS | {kind: (lambda kind=kind, more=more: other(kind, **more)) for kind, more in OTHERS.items()}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def made(load, config, folder):
    """An adapter on disk as another tool leaves it, every trained value moved."""
    model = peft.get_peft_model(load(dtype="float32"), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_the_folded_copy_is_pefts_own_forward(make, load, settings, tmp_path):
    folder = made(load, make(), tmp_path)
    check_shapes(folder, read_adapter_config(folder), skeleton(settings))
    policy = load_adapter(load(dtype="float32"), folder, trainable=False).eval()
    wanted, effect = logits(policy), (logits(policy) - logits(load(dtype="float32"))).abs().mean()
    assert effect > 1e-5
    assert torch.allclose(logits(PolicyCopy(policy).model), wanted, atol=1e-5)


def test_every_kind_of_peft_is_folded_in_this_file_or_refused(tmp_path):
    assert {"LORA", *OTHERS} == {*FOLDED}
    kinds = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert kinds - {*FOLDED} >= {"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "POLY", "XLORA", "ADAPTION_PROMPT"}
    for kind in (*sorted(kinds - {*FOLDED}), "NEWER", None):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(UserError, match=f"is of peft_type {kind}, which cannot be folded"):
            read_adapter_config(tmp_path)


CONFIGS = {
    "activated": ({"alora_invocation_tokens": [5]}, "has alora_invocation_tokens, which cannot be folded"),
    "more layers": ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication, which cannot be folded"),
    "from the future": ({"use_tomorrow": True}, "has settings that PEFT .* does not know: use_tomorrow True"),
    "not consistent": ({"lora_bias": True, "use_dora": True}, "PEFT refuses its adapter_config.json"),
}


@pytest.mark.parametrize(("changes", "told"), CONFIGS.values(), ids=CONFIGS.keys())
def test_what_no_merged_weight_computes_is_refused(load, tmp_path, changes, told):
    file = made(load, lora(), tmp_path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=told):
        read_adapter_config(tmp_path)


def test_a_number_of_a_newer_peft_turns_nothing_on(load, tmp_path):
    file = made(load, lora(), tmp_path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tomorrows_rank": 3, "use_tomorrow": False}))
    assert read_adapter_config(tmp_path).r == 4


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


FILES = {
    "a tensor is missing": (lambda t, n: without(t, n), r"lacks .* \(1 such tensors\)"),
    "a tensor fits no layer": (lambda t, n: t | {n.replace("layers.0", "layers.9"): t[n].clone()}, "fits no layer"),
    "another rank": (lambda t, n: t | {n: torch.zeros(8, t[n].shape[1])}, r"as \(8, 64\) where the base needs \(4, 64\)"),
    "none fits": (lambda t, n: {f"x.{key}": tensor for key, tensor in t.items()}, r"lacks .* and has x\.base"),
}


@pytest.mark.parametrize(("change", "told"), FILES.values(), ids=FILES.keys())
def test_a_file_that_is_not_what_its_config_says_is_refused(load, settings, tmp_path, change, told):
    file = made(load, lora(), tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors, next(name for name in tensors if "layers.0" in name and "lora_A" in name)), file)
    with pytest.raises(UserError, match=told):
        check_shapes(tmp_path, read_adapter_config(tmp_path), skeleton(settings))


@pytest.mark.parametrize("kind", ["lora_bias", "dora", "IA3", "LOHA"])
def test_more_than_lora_is_not_folded_into_packed_weights(load, tmp_path, kind):
    config = read_adapter_config(made(load, MADE[kind](), tmp_path))
    with pytest.raises(UserError, match="set quantization=nf4_unpacked"):
        check_packed(tmp_path, config, "nf4")
    check_packed(tmp_path, config, "nf4_unpacked")
    policy = load_adapter(load("nf4_unpacked", dtype="float32"), tmp_path, trainable=False).eval()
    assert torch.allclose(logits(PolicyCopy(policy).model), logits(policy), atol=1e-5)


@pytest.mark.parametrize("kind", ["modules_to_save the head", "IA3", "parameters", "qalora"])
def test_training_goes_on_from_lora_alone(load, tmp_path, kind):
    config = read_adapter_config(made(load, MADE[kind](), tmp_path))
    with pytest.raises(UserError, match="training goes on from LoRA alone"):
        check_trainable(tmp_path, config)


@pytest.mark.parametrize("kind", ["dora", "rank and alpha patterns", "token rows", "rslora"])
def test_sft_goes_on_from_lora_made_elsewhere(load, tmp_path, tiny, kind):
    folder = made(load, MADE[kind](), tmp_path)
    check_trainable(folder, read_adapter_config(folder))
    with tiny.sft({"max_steps": 1, "learning_rate": 1e-2}, adapter=str(folder), quantization="none") as trainer:
        trainer.train()
        policy = trainer.model.eval()
        with trainer.accelerator.autocast():
            wanted = logits(policy).float()
        assert (logits(PolicyCopy(policy).model).float() - wanted).abs().mean() < 0.02 * wanted.abs().mean()

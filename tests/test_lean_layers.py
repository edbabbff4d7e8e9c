"""Layers that keep little against the layers that they replace: losses, gradients, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import FAMILIES
from peft import LoraConfig, get_peft_model

from posttrain.kernels import lean_layers, lora_linear

KINDS = ["Llama", "Llama, tied", "Qwen2", "Qwen3", "Gemma2", "Gemma3 (text)", "Mistral", "Granite", "OLMo2", "SmolLM3"]
IDS = torch.randint(3, 90, (3, 21), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


def made(name="Llama", dtype=torch.float32, dropout=0.0):
    class_name, changes, targets, _ = FAMILIES[name]
    changes = {key: value[:2] if isinstance(value, list) else value for key, value in changes.items()}
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, class_name)(**(SIZES | changes)), dtype=dtype, attn_implementation="eager"
    )
    base.requires_grad_(False)
    settings = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(base, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def step(model, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS).logits
    loss = logits.float().log_softmax(-1).gather(-1, IDS[..., None]).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def distance(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_plain_layers(name, checkpointing):
    found = []
    for lean in (False, True):
        model = made(name)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if lean:
            lora_linear.fuse_adapters(model)
            lean_layers.use_lean_layers(model)
        found.append(step(model))
    for plain, ours in zip(*found, strict=True):
        assert ours.dtype == plain.dtype and distance(ours, plain) < 2e-4

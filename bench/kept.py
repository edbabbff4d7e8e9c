"""What a decoder layer keeps of every token until its backward pass, in bytes, counted on a CPU: no GPU and no checkpoint.

    python bench/kept.py
    python bench/kept.py --hidden 4096 --intermediate 14336 --heads 32 --layers 32      # the shape of Llama-3.1-8B

Two layers less one, 96 tokens less 32, so that neither weights nor what is kept once count. Attention keeps what flash attention
keeps. `liger` stands for Liger's kernels, which need a GPU and keep the inputs of norm and product alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.random_llama import TARGETS  # noqa: E402
from posttrain.kernels import lean_layers, lora_linear  # noqa: E402

WAYS = {
    "PEFT's layers": (),
    "fused adapter": ("fused",),
    "fused adapter, liger": ("fused", "liger"),
    "lean layers": ("fused", "lean"),
}


class Attention(torch.autograd.Function):
    """No attention: it keeps queries, keys, values and an output, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.clone()
        ctx.save_for_backward(query, key, value, output)
        return output


def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    return Attention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register("on paper", attend)
AttentionMaskInterface.register("on paper", lambda *args, **kwargs: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 3072, "intermediate": 8192, "heads": 24, "kv-heads": 8, "layers": 28, "rank": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    print(f"| layers | bytes a token and layer | MiB a token of {args.layers} layers |\n|---|--:|--:|")
    for name, how in WAYS.items():
        size = a_token_and_layer(args, how)
        print(f"| {name} | {size:,.0f} | {size * args.layers / 2**20:.2f} |", flush=True)
    print(f"| checkpointed: a layer's input | {2 * args.hidden:,} | {2 * args.hidden * args.layers / 2**20:.2f} |")


def a_token_and_layer(args: argparse.Namespace, how: tuple[str, ...]) -> float:
    sizes = []
    for layers in (1, 2):
        model = made(args, layers, how)
        sizes.append((kept(model, 96) - kept(model, 32)) / 64)
    return sizes[1] - sizes[0]


def made(args: argparse.Namespace, layers: int, how: tuple[str, ...]) -> Any:
    config = LlamaConfig(
        vocab_size=128, hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
    )  # fmt: skip
    base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="on paper")
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=args.rank, target_modules=TARGETS))
    model.enable_input_require_grads()
    if "fused" in how:
        lora_linear.fuse_adapters(model)
    if "lean" in how:
        lean_layers.use_lean_layers(model)
    if "liger" in how:
        for layer in base.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.forward = lean_layers.from_inputs(norm.forward)
            layer.mlp.forward = as_liger(layer.mlp)
    return model


def as_liger(mlp: Any) -> Any:
    product = lean_layers.gated_product(mlp, fused=False)
    return lambda x: mlp.down_proj(product(mlp.gate_proj(x), mlp.up_proj(x)))


def kept(model: Any, tokens: int) -> int:
    """Bytes of every storage that is kept and is no parameter, each once."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.get_base_model().model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert output.last_hidden_state.requires_grad
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for place, storage in storages.items() if place not in parameters)


if __name__ == "__main__":
    main()

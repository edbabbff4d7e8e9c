"""What posttrain/kernels/attention.py and posttrain/kernels/packed_linear.py are worth on this CPU, apart from everything else.

    python bench/cpu_kernels.py

All shapes are SmolLM2-135M's, in bf16. Attention: one layer of 16 rows of 280 tokens, forward and back, under autocast as in
training and without it as in generation, and how far the output is from the output in fp64. Linear layers: all of the decoder,
forward, each with a weight of its own, so that no cache holds them. Times are the least of many, in milliseconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from posttrain.kernels.attention import matmul_attention
from posttrain.kernels.packed_linear import packed_weights

ROWS, TOKENS, HEADS, KV_HEADS, DIM, LAYERS = 16, 280, 9, 3, 64, 30
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
MODULE = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True, training=True)


def main() -> None:
    for name, function in (("sdpa", sdpa_attention_forward), ("eager", eager_attention_forward), ("matmul", matmul_attention)):
        for where, enabled in (("autocast", True), ("no autocast", False)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                milliseconds, error = attention(function)
            print(f"attention, {name}, {where}: {milliseconds:.1f} ms, off by {error:.2%}")
    model = nn.ModuleList(nn.Linear(i, o, bias=False) for _ in range(LAYERS) for o, i in SHAPES).bfloat16()
    for rows in (16, 128):
        plain = linear(model, rows)
        with packed_weights(model):
            print(f"linear layers, {rows} rows: plain {plain:.1f} ms, packed {linear(model, rows):.1f} ms")


def attention(function: Callable[..., tuple[torch.Tensor, None]]) -> tuple[float, float]:
    q, k, v = (
        torch.randn(ROWS, TOKENS, heads, DIM, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    mask = torch.full((ROWS, 1, TOKENS, TOKENS), torch.finfo(torch.bfloat16).min).triu(1).bfloat16()
    given = None if function is sdpa_attention_forward else mask  # SDPA needs no mask for unpadded rows
    grad = torch.randn(ROWS, TOKENS, HEADS, DIM, dtype=torch.bfloat16)
    exact = sdpa_attention_forward(MODULE, q.double(), k.double(), v.double(), None, scaling=DIM**-0.5)[0]
    found = function(MODULE, q, k, v, given, scaling=DIM**-0.5)[0]
    error = ((found.double() - exact).norm() / exact.norm()).item()
    return least(lambda: function(MODULE, q, k, v, given, scaling=DIM**-0.5)[0].backward(grad)), error


@torch.no_grad()
def linear(model: nn.ModuleList, rows: int) -> float:
    inputs = {width: torch.randn(rows, width, dtype=torch.bfloat16) for width in (576, 1536)}
    return least(lambda: [layer(inputs[layer.in_features]) for layer in model])


def least(function: Callable[[], object], seconds: float = 2.0) -> float:
    function()
    times, stop = [], time.perf_counter() + seconds
    while time.perf_counter() < stop:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()

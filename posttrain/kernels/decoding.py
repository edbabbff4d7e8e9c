"""What one decoding step does between its matrix products, as a few Triton kernels on a GPU and as plain torch elsewhere.

A step gives every row one token, so nothing here has much to compute: reading is all. transformers composes these parts of many
small operations; each of them takes longer to start than to run, and the sampler reads the vocabulary in fp32 eight times. Here
attention reads the keys that a row has and no others, and drawing reads the logits once.

The torch path is the standard: tests/test_decoding_kernels.py compares the two, in Triton's interpreter where there is no GPU.
Arithmetic is in fp32, and rounded to the model's dtype where transformers' own layers round.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn


@functools.cache
def triton_kernels() -> Any:
    """decoding_triton, or None where Triton cannot run."""
    if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or interpreted()):
        return None
    from posttrain.kernels import decoding_triton

    return decoding_triton


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined


def use_triton(x: torch.Tensor) -> bool:
    return (x.is_cuda or interpreted()) and triton_kernels() is not None


class Scaled(NamedTuple):
    """What a product of rows in 8 bits is, before its factors: whoever reads it next applies them, which saves a kernel."""

    products: torch.Tensor  # (rows, columns)
    rows: torch.Tensor  # a factor for each, (rows, 1), fp32
    columns: torch.Tensor  # (columns, 1), fp32


Product: TypeAlias = "torch.Tensor | Scaled"


def whole(x: Product) -> torch.Tensor:
    return scaled(*x) if isinstance(x, Scaled) else x


def _parts(x: Product) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """The products, and their factors if there are any."""
    return (x.products, (x.rows, x.columns)) if isinstance(x, Scaled) else (x, None)


def add_norm(x: Product, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of `x`, (rows, hidden), or of x + residual, which then holds that sum."""
    products, factors = _parts(x)
    if use_triton(products):
        return triton_kernels().add_norm(products, factors, residual, weight, eps)
    x = whole(x)
    if residual is not None:
        x = residual.add_(x)
    return weight * nn.functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, (rows, width), of (rows, 2 * width)."""
    if use_triton(gate_up):
        return triton_kernels().silu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return nn.functional.silu(gate) * up


class Fp8Rows(NamedTuple):
    """Rows in 8-bit floating point, each with the factor that gives its values back."""

    values: torch.Tensor  # (rows, width), FP8
    scale: torch.Tensor  # (rows, 1), fp32


FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST = 1e-12  # of what a scale is made of, so that a row of zeros has one


def fp8_rows(x: torch.Tensor) -> Fp8Rows:
    """Each row of x, (rows, width), with its largest entry as the format's."""
    return Fp8Rows(*triton_kernels().fp8_rows(x)) if use_triton(x) else plain_fp8_rows(x)


def plain_fp8_rows(x: torch.Tensor) -> Fp8Rows:
    x = x.float()
    scale = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return Fp8Rows((x / scale).to(FP8), scale)


def scaled(products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """products (rows, columns) times a factor for each row, (rows, 1), and one for each column, (columns, 1), in fp32."""
    if use_triton(products):
        return triton_kernels().scaled(products, rows, columns)
    return (products.float() * rows * columns.T).to(products.dtype)


def add_norm_fp8(x: Product, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Fp8Rows:
    """`add_norm`, and `fp8_rows` of what it gives."""
    products, factors = _parts(x)
    if use_triton(products):
        return Fp8Rows(*triton_kernels().add_norm_fp8(products, factors, residual, weight, eps))
    return fp8_rows(add_norm(x, residual, weight, eps))


def silu_mul_fp8(gate_up: torch.Tensor) -> Fp8Rows:
    """`silu_mul`, and `fp8_rows` of what it gives."""
    return Fp8Rows(*triton_kernels().silu_mul_fp8(gate_up)) if use_triton(gate_up) else fp8_rows(silu_mul(gate_up))


class Fp8Cache(NamedTuple):
    """Keys or values in 8-bit floating point, each with the factor that gives it back."""

    values: torch.Tensor  # (rows or more, kv_heads, capacity, head_dim), FP8
    scale: torch.Tensor  # (rows or more, kv_heads, capacity), fp32

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def put(self, row: torch.Tensor, place: torch.Tensor, x: torch.Tensor) -> None:
        """x (rows, kv_heads, head_dim), each to its row and place."""
        values, scale = plain_fp8_rows(x.flatten(0, 1))
        self.values.view(torch.uint8)[row, :, place] = values.view(torch.uint8).view(x.shape)
        self.scale[row, :, place] = scale.view(x.shape[:2])

    def front(self, rows: int, end: int) -> torch.Tensor:
        """The first `end` of the front rows in fp32."""
        return self.values[:rows, :, :end].float() * self.scale[:rows, :, :end, None]


Cache: TypeAlias = "torch.Tensor | Fp8Cache"  # keys or values of all rows


def _kept(cache: Cache) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The entries, and their factors if there are any."""
    return cache if isinstance(cache, Fp8Cache) else (cache, None)


def tensors_of(cache: Cache) -> tuple[torch.Tensor, ...]:
    """What a cache is made of, rows and heads and places first: to be moved. torch does not move every 8-bit format."""
    return (cache.values.view(torch.uint8), cache.scale) if isinstance(cache, Fp8Cache) else (cache,)


def rotate_and_store(
    qkv: Product,  # (rows, (heads + 2 * kv_heads) * head_dim)
    cos: torch.Tensor,  # (places, head_dim)
    sin: torch.Tensor,
    place: torch.Tensor,  # (rows,), where each row's token stands
    keys: Cache,  # (rows or more, kv_heads, capacity, head_dim); the token's are written
    values: Cache,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,  # weights for queries and keys, and epsilon (Qwen3)
    seat: torch.Tensor | None = None,  # (rows,), whose keys and values the rows' are; None: the front ones
) -> torch.Tensor:
    """Rotated queries, (rows, heads, head_dim). Rotated keys, and values, go to their place; with `seat`, keys into `qkv` too.

    That takes a `qkv` that is whole.
    """
    products, factors = _parts(qkv)
    if use_triton(products):
        assert seat is None or factors is None, "rotated keys go into what is whole"
        return triton_kernels().rotate_and_store(products, factors, cos, sin, place, _kept(keys), _kept(values), norms, seat)
    qkv = whole(qkv)
    rows, (_, kv_heads, _, head_dim) = len(qkv), keys.shape
    heads = qkv.view(rows, -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if norms is not None:
        q, k = (add_norm(x.reshape(-1, head_dim), None, w, norms[2]).view(x.shape) for x, w in zip((q, k), norms, strict=False))
    c, s = cos[place][:, None], sin[place][:, None]
    q, k = (x * c + torch.cat([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], -1) * s for x in (q, k))
    row = torch.arange(rows, device=qkv.device) if seat is None else seat
    for cache, x in ((keys, k), (values, v)):
        if isinstance(cache, Fp8Cache):
            cache.put(row, place, x)
        else:
            cache[row, :, place] = x
    if seat is not None:
        heads[:, -2 * kv_heads : -kv_heads] = k
    return q


def attend(
    query: torch.Tensor,  # (rows, heads, head_dim)
    keys: Cache,  # (rows or more, kv_heads, capacity, head_dim)
    values: Cache,
    place: torch.Tensor,  # (rows,): a row sees its keys up to this place, and no more of them than `window`
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Attention of one token of each row, (rows, heads * head_dim)."""
    if use_triton(query):
        return triton_kernels().attend(query, _kept(keys), _kept(values), place, window, scale)
    rows, heads, head_dim = query.shape
    kv_heads, end = keys.shape[1], int(place.max()) + 1
    at = torch.arange(end, device=query.device)
    sees = at <= place[:, None]
    if window is not None:
        sees &= at > place[:, None] - window
    grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
    k, v = (x.front(rows, end) if isinstance(x, Fp8Cache) else x[:rows, :, :end].float() for x in (keys, values))
    scores = (grouped.float() @ k.transpose(2, 3)) * scale
    weights = scores.masked_fill(~sees[:, None, None], -torch.inf).softmax(-1)
    return (weights @ v.masked_fill(~sees[:, None, :, None], 0.0)).to(query.dtype).view(rows, -1)


def attend_packed(
    query: torch.Tensor,  # (tokens, heads, head_dim), prompts one after the other
    key: torch.Tensor,  # (tokens, kv_heads, head_dim)
    value: torch.Tensor,
    starts: torch.Tensor,  # (prompts + 1,), int32
    longest: int,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Causal attention of whole prompts, (tokens, heads * head_dim)."""
    if query.is_cuda:
        seen = (-1 if window is None else window - 1, 0)
        grouped = query.shape[1] != key.shape[1]
        out = varlen_attn(query, key, value, starts, starts, longest, longest, scale=scale, window_size=seen, enable_gqa=grouped)
        return out.flatten(1)
    parts = [x.split(starts.diff().tolist()) for x in (query, key, value)]
    outs = []
    for q, k, v in zip(*parts, strict=True):
        sees = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        if window is not None:
            sees = sees.triu(1 - window)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outs)


def draw_in_two_passes(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """loop.choose for a whole vocabulary, by Triton: tokens drawn at `uniform` and their log-probabilities, (rows,) each."""
    return triton_kernels().draw(logits, uniform, temperature)


class Rows(NamedTuple):
    """What a step changes of each row, (rows,) or (rows, max_new_tokens)."""

    ids: torch.Tensor  # the last token, which the next step begins with
    place: torch.Tensor  # where it stands
    step: torch.Tensor  # the number of the token to choose
    live: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor


def advance(rows: Rows, token: torch.Tensor, logprob: torch.Tensor, stop: torch.Tensor, limit: torch.Tensor) -> None:
    """Write the chosen tokens of live rows. A row goes on unless its token is `stop` or its `limit`-th, (1,) each."""
    if use_triton(token):
        return triton_kernels().advance(rows, token, logprob, stop, limit)
    at, live = rows.step[:, None], rows.live[:, None]
    rows.tokens.scatter_(1, at, torch.where(live, token[:, None], rows.tokens.gather(1, at)))
    rows.logprobs.scatter_(1, at, torch.where(live, logprob[:, None], rows.logprobs.gather(1, at)))
    goes_on = rows.live & (token != stop) & (rows.step + 1 < limit)
    rows.ids.copy_(token)
    rows.step.add_(goes_on)
    rows.place.copy_(torch.where(goes_on, rows.place + 1, 0))  # a row that is done reads one key
    rows.live.copy_(goes_on)

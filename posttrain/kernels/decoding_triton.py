"""The Triton half of decoding.py. Imported only where Triton can run.

The signatures are the same, but that products to scale and keys and values come with their factors beside them, or None.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl

Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor] | None"  # of rows and of columns
Kept: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None]"  # keys or values, and their factors

# --- norm and MLP -----------------------------------------------------------------------------------------------------


def add_norm(x: torch.Tensor, factors: Factors, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _normed(x, factors, residual, weight, eps, torch.empty_like(x), None)


def add_norm_fp8(
    x: torch.Tensor, factors: Factors, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, scale = _no_fp8_rows(len(x), x.shape[1], x.device)
    return _normed(x, factors, residual, weight, eps, out, scale), scale


def _normed(
    x: torch.Tensor,
    factors: Factors,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    rows, hidden = x.shape
    of_row, of_column = factors or (weight, weight)
    _add_norm[(rows,)](
        x, of_row, of_column, x if residual is None else residual, weight, out, out if scale is None else scale,
        eps, hidden, factors is not None, residual is not None, scale is not None, triton.next_power_of_2(hidden),
    )  # fmt: skip
    return out


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x, of_row, of_column, residual, weight, out, scale, eps, hidden,
    SCALED: tl.constexpr, ADD: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = row * hidden
    cols = tl.arange(0, BLOCK)
    inside = cols < hidden
    h = tl.load(x + at + cols, mask=inside, other=0.0)
    if SCALED:
        h = _with_factors(h, of_row + row, of_column + cols, inside)
    if ADD:
        h = (h.to(tl.float32) + tl.load(residual + at + cols, mask=inside, other=0.0).to(tl.float32)).to(h.dtype)
        tl.store(residual + at + cols, h, mask=inside)
    wide = h.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)).to(h.dtype).to(tl.float32)
    normed *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(h.dtype)
    if FP8:
        _store_fp8(normed.to(tl.float32), out + at + cols, scale + row, inside)
    else:
        tl.store(out + at + cols, normed, mask=inside)


@triton.jit
def _with_factors(x, row, columns, inside):  # type: ignore[no-untyped-def]
    """Products of rows in 8 bits as numbers, rounded as `_scaled` rounds them."""
    factors = tl.load(row) * tl.load(columns, mask=inside, other=0.0)
    return (x.to(tl.float32) * factors).to(x.dtype)


@triton.jit
def _store_fp8(row, to, scale, inside) -> None:  # type: ignore[no-untyped-def]
    factor = tl.maximum(tl.max(tl.abs(row), 0), 1e-12) / 448.0  # SMALLEST and LARGEST of decoding.py
    tl.store(to, (row / factor).to(to.dtype.element_ty), mask=inside)
    tl.store(scale, factor)


def _no_fp8_rows(rows: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty(rows, 1, dtype=torch.float32, device=device)


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = _no_fp8_rows(len(x), x.shape[1], x.device)
    _fp8_rows[(len(x),)](x, values, scale, x.stride(0), x.shape[1], triton.next_power_of_2(x.shape[1]))
    return values, scale


@triton.jit
def _fp8_rows(x, values, scale, stride, width, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    wide = tl.load(x + row * stride + cols, mask=inside, other=0.0).to(tl.float32)
    _store_fp8(wide, values + row * width + cols, scale + row, inside)


def scaled(products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    count, width = products.shape
    out, block = torch.empty_like(products), min(1024, triton.next_power_of_2(width))
    _scaled[(count, triton.cdiv(width, block))](products, rows, columns, out, width, block)
    return out


@triton.jit
def _scaled(products, rows, columns, out, width, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(products + row * width + cols, mask=inside, other=0.0)
    tl.store(out + row * width + cols, _with_factors(x, rows + row, columns + cols, inside), mask=inside)


def silu_mul_fp8(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    values, scale = _no_fp8_rows(rows, width, gate_up.device)
    _silu_mul_fp8[(rows,)](gate_up, values, scale, width, triton.next_power_of_2(width), num_warps=8)
    return values, scale


@triton.jit
def _silu_mul_fp8(gate_up, values, scale, width, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    product = _gated(gate_up + row * 2 * width + cols, width, inside)
    _store_fp8(product.to(tl.float32), values + row * width + cols, scale + row, inside)


@triton.jit
def _gated(at, width, inside):  # type: ignore[no-untyped-def]
    gate = tl.load(at, mask=inside, other=0.0)
    up = tl.load(at + width, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(rows, triton.cdiv(width, block))](gate_up, out, width, block)
    return out


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    tl.store(out + row * width + cols, _gated(gate_up + row * 2 * width + cols, width, inside), mask=inside)


# --- attention --------------------------------------------------------------------------------------------------------


def rotate_and_store(
    qkv: torch.Tensor,
    factors: Factors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    place: torch.Tensor,
    keys: Kept,
    values: Kept,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    seat: torch.Tensor | None,
) -> torch.Tensor:
    of_row, of_column = factors or (cos, cos)
    (k, k_scale), (v, v_scale) = keys, values
    rows, (_, kv_heads, capacity, head_dim) = len(qkv), k.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = qkv.new_empty(rows, heads, head_dim)
    q_norm, k_norm, eps = norms or (cos, cos, 0.0)
    _rotate_and_store[(rows,)](
        qkv, of_row, of_column, cos, sin, place, place if seat is None else seat, query,
        k, v, k if k_scale is None else k_scale, v if v_scale is None else v_scale,
        q_norm, k_norm, eps, capacity, factors is not None, k_scale is not None, norms is not None, seat is not None,
        heads, kv_heads, head_dim // 2, triton.next_power_of_2(heads + 2 * kv_heads),
    )  # fmt: skip
    return query


@triton.jit
def _rotate_and_store(  # type: ignore[no-untyped-def]
    qkv, of_row, of_column, cos, sin, places, seats, query, keys, values, k_scale, v_scale, q_norm, k_norm, eps, capacity,
    SCALED: tl.constexpr, FP8: tl.constexpr, NORM: tl.constexpr, SEATED: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    half = tl.arange(0, HALF)[None, :]
    total: tl.constexpr = HEADS + 2 * KV_HEADS
    inside = (head < total) & (half < HALF)
    column = head * 2 * HALF + half
    at = qkv + row * total * 2 * HALF + column
    low, high = tl.load(at, mask=inside, other=0.0), tl.load(at + HALF, mask=inside, other=0.0)
    if SCALED:
        low = _with_factors(low, of_row + row, of_column + column, inside)
        high = _with_factors(high, of_row + row, of_column + column + HALF, inside)
    a, b = low.to(tl.float32), high.to(tl.float32)
    turns = head < HEADS + KV_HEADS
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        is_query = head < HEADS
        w_low = tl.where(is_query, tl.load(q_norm + half).to(tl.float32), tl.load(k_norm + half).to(tl.float32))
        w_high = tl.where(is_query, tl.load(q_norm + HALF + half).to(tl.float32), tl.load(k_norm + HALF + half).to(tl.float32))
        n_low = ((a * scale).to(low.dtype).to(tl.float32) * w_low).to(low.dtype).to(tl.float32)
        n_high = ((b * scale).to(low.dtype).to(tl.float32) * w_high).to(low.dtype).to(tl.float32)
        a, b = tl.where(turns, n_low, a), tl.where(turns, n_high, b)
    c = tl.load(cos + place * 2 * HALF + half).to(tl.float32)
    s = tl.load(sin + place * 2 * HALF + half).to(tl.float32)
    new_low = tl.where(turns, a * c - b * s, a).to(low.dtype)
    new_high = tl.where(turns, b * c + a * s, b).to(low.dtype)
    to_query = query + row * HEADS * 2 * HALF + column
    tl.store(to_query, new_low, mask=head < HEADS)
    tl.store(to_query + HALF, new_high, mask=head < HEADS)
    is_key = (head >= HEADS) & turns
    is_value = (head >= HEADS + KV_HEADS) & (head < total)
    if SEATED:
        tl.store(at, new_low, mask=is_key)
        tl.store(at + HALF, new_high, mask=is_key)
        row = tl.load(seats + row).to(tl.int64)
    key_at = (row * KV_HEADS + head - HEADS) * capacity + place
    value_at = key_at - KV_HEADS * capacity
    if FP8:
        wide_low, wide_high = new_low.to(tl.float32), new_high.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide_low), 1), tl.max(tl.abs(wide_high), 1))[:, None]
        factor = tl.maximum(largest, 1e-12) / 448.0  # SMALLEST and LARGEST of decoding.py
        tl.store(k_scale + key_at, factor, mask=is_key)
        tl.store(v_scale + value_at, factor, mask=is_value)
        new_low, new_high = (wide_low / factor).to(keys.dtype.element_ty), (wide_high / factor).to(keys.dtype.element_ty)
    to_key = keys + key_at * 2 * HALF + half
    tl.store(to_key, new_low, mask=is_key)
    tl.store(to_key + HALF, new_high, mask=is_key)
    to_value = values + value_at * 2 * HALF + half
    tl.store(to_value, new_low, mask=is_value)
    tl.store(to_value + HALF, new_high, mask=is_value)


# Of twelve choices on an H100 the first or within 2 % of it, for heads of 64 and 128 and for 128 and 512 rows: 2.0 to 2.7 TB/s.
KEYS_AT_ONCE, WARPS, STAGES = 32, 1, 4
FP8_KEYS_AT_ONCE, FP8_WARPS = 64, 2  # as many bytes at once; on no GPU yet
PROGRAMS = 512  # about four for each multiprocessor of an H100: fewer rows than that share out their keys


def attend(query: torch.Tensor, keys: Kept, values: Kept, place: torch.Tensor, window: int | None, scale: float) -> torch.Tensor:
    rows, heads, head_dim = query.shape
    (k, k_scale), (v, v_scale) = keys, values
    fp8 = k_scale is not None
    kv_heads, capacity = k.shape[1:3]
    at_once, warps = (FP8_KEYS_AT_ONCE, FP8_WARPS) if fp8 else (KEYS_AT_ONCE, WARPS)
    parts = triton.next_power_of_2(max(1, min(PROGRAMS // (rows * kv_heads), capacity // at_once, 32)))
    out = query.new_empty(rows, heads * head_dim)
    partial = query.new_empty(rows, heads, parts, head_dim, dtype=torch.float32) if parts > 1 else out
    weight = query.new_empty(rows, heads, parts, 2, dtype=torch.float32) if parts > 1 else out
    group = heads // kv_heads
    _attend[(rows, kv_heads, parts)](
        query, k, v, k if k_scale is None else k_scale, v if v_scale is None else v_scale,
        place, partial, weight, scale, capacity, window or 0,
        fp8, parts, kv_heads, group, max(16, triton.next_power_of_2(group)), head_dim, at_once,
        num_warps=warps if head_dim <= 128 else 4, num_stages=STAGES,
    )  # fmt: skip
    if parts > 1:
        _join_parts[(rows * heads,)](partial, weight, out, parts, head_dim)
    return out


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, k_scale, v_scale, places, out, weight, scale, capacity, window,
    FP8: tl.constexpr, PARTS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    end = tl.load(places + row).to(tl.int32) + 1
    first = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    if PARTS > 1:
        share = tl.cdiv(tl.cdiv(end - first, PARTS), KEYS) * KEYS
        first += part * share
        end = tl.minimum(end, first + share)
    head = tl.arange(0, BLOCK)
    dim = tl.arange(0, HEAD_DIM)
    which = (row * KV_HEADS + kv_head) * GROUP + head  # of all rows' heads
    q = tl.load(query + which[:, None] * HEAD_DIM + dim[None, :], mask=head[:, None] < GROUP, other=0.0)
    dtype = q.dtype
    if FP8:
        q = q.to(tl.float16)  # 8 bits become these by one instruction, and lose nothing
    places_at = (row * KV_HEADS + kv_head) * capacity
    base = places_at * HEAD_DIM
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    scale = scale * 1.4426950408889634  # for exp2
    for start in range(first, end, KEYS):
        at = start + tl.arange(0, KEYS)
        inside = at < end
        k = tl.load(keys + base + at[:, None] * HEAD_DIM + dim[None, :], mask=inside[:, None], other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if FP8:
            scores *= tl.load(k_scale + places_at + at, mask=inside, other=0.0)[None, :]
        scores = tl.where(inside[None, :], scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(values + base + at[:, None] * HEAD_DIM + dim[None, :], mask=inside[:, None], other=0.0).to(q.dtype)
        if FP8:  # by the largest entry of each value, which 16 bits hold; what that is too much by comes off in the end
            p *= tl.load(v_scale + places_at + at, mask=inside, other=0.0)[None, :] * 448.0
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    if FP8:
        sums /= 448.0
    if PARTS == 1:
        result = (sums / total[:, None]).to(dtype)
        tl.store(out + which[:, None] * HEAD_DIM + dim[None, :], result, mask=head[:, None] < GROUP)
    else:
        to = which * PARTS + part
        tl.store(out + to[:, None] * HEAD_DIM + dim[None, :], sums, mask=head[:, None] < GROUP)
        tl.store(weight + to * 2, top, mask=head < GROUP)
        tl.store(weight + to * 2 + 1, total, mask=head < GROUP)


@triton.jit
def _join_parts(partial, weight, out, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    which = tl.program_id(0).to(tl.int64)
    part = which * PARTS + tl.arange(0, PARTS)
    dim = tl.arange(0, HEAD_DIM)
    top, total = tl.load(weight + part * 2), tl.load(weight + part * 2 + 1)
    share = tl.exp2(top - tl.max(top, 0))
    sums = tl.load(partial + part[:, None] * HEAD_DIM + dim[None, :])
    joined = tl.sum(sums * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + which * HEAD_DIM + dim, joined.to(out.dtype.element_ty))


# --- drawing ----------------------------------------------------------------------------------------------------------

SUM_BLOCK = 256  # as in loop.py: the sums of blocks find the block first
BLOCKS = 16  # blocks that one program sums
BELOW_ONE = 1 - 2**-23  # as in loop.py


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, SUM_BLOCK * BLOCKS)
    sums = logits.new_empty(rows, chunks * BLOCKS, dtype=torch.float32)
    tops = logits.new_empty(rows, chunks, dtype=torch.float32)
    token = logits.new_empty(rows, dtype=torch.long)
    logprob = logits.new_empty(rows, dtype=torch.float32)
    _sum_blocks[(rows, chunks)](logits, logits.stride(0), sums, tops, vocabulary, temperature, chunks, SUM_BLOCK, BLOCKS)
    _draw[(rows,)](
        logits, logits.stride(0), sums, tops, uniform, token, logprob, vocabulary, temperature, chunks,
        SUM_BLOCK, BLOCKS, triton.next_power_of_2(chunks * BLOCKS), BELOW_ONE,
    )  # fmt: skip
    return token, logprob


@triton.jit
def _sum_blocks(logits, stride, sums, tops, vocabulary, temperature, chunks, SIZE: tl.constexpr, BLOCKS: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """Sums of exp(logit - top) over each block, where top is the largest logit of the chunk of blocks."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(logits + row * stride + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32) / temperature
    top = tl.maximum(tl.max(tl.max(x, 1), 0), -1e30)
    tl.store(sums + row * chunks * BLOCKS + block, tl.sum(tl.exp(x - top), 1))
    tl.store(tops + row * chunks + chunk, top)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits, stride, sums, tops, uniform, token, logprob, vocabulary, temperature, chunks,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, ALL: tl.constexpr, BELOW_ONE: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, ALL)
    inside = block < chunks * BLOCKS
    tops_of = tl.load(tops + row * chunks + block // BLOCKS, mask=inside, other=-1e30)
    top = tl.max(tops_of, 0)
    weights = tl.load(sums + row * chunks * BLOCKS + block, mask=inside, other=0.0) * tl.exp(tops_of - top)
    ends = tl.cumsum(weights, 0)
    total = tl.max(ends, 0)
    target = tl.minimum(tl.load(uniform + row), BELOW_ONE) * total
    chosen = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), (vocabulary - 1) // SIZE)
    before = tl.sum(tl.where(block == chosen, ends - weights, 0.0), 0)
    cols = tl.arange(0, SIZE)
    at = chosen * SIZE + cols
    x = tl.load(logits + row * stride + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32) / temperature
    cumulative = tl.cumsum(tl.exp(x - top), 0)
    target = tl.minimum(tl.maximum(target - before, 0.0), tl.max(cumulative, 0) * BELOW_ONE)
    place = tl.sum((cumulative <= target).to(tl.int32), 0)
    drawn = tl.minimum(chosen * SIZE + place, vocabulary - 1)
    scaled = tl.load(logits + row * stride + drawn).to(tl.float32) / temperature
    tl.store(token + row, drawn.to(tl.int64))
    tl.store(logprob + row, scaled - top - tl.log(total))


def advance(rows: Any, token: torch.Tensor, logprob: torch.Tensor, stop: torch.Tensor, limit: torch.Tensor) -> None:
    _advance[(len(token),)](token, logprob, *rows, stop, limit, rows.tokens.stride(0), num_warps=1)


@triton.jit
def _advance(token, logprob, ids, places, steps, lives, tokens, logprobs, stop, limit, width) -> None:  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    new, step, live = tl.load(token + row), tl.load(steps + row), tl.load(lives + row)
    tl.store(tokens + row * width + step, new, mask=live)
    tl.store(logprobs + row * width + step, tl.load(logprob + row), mask=live)
    goes_on = live & (new != tl.load(stop)) & (step + 1 < tl.load(limit))
    tl.store(ids + row, new)
    tl.store(steps + row, tl.where(goes_on, step + 1, step))
    tl.store(places + row, tl.where(goes_on, tl.load(places + row) + 1, 0))  # a row that is done reads one key
    tl.store(lives + row, goes_on)

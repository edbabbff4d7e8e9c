"""Attention for training, exact: as matrix products on a CPU, without padding on a GPU.

"matmul" is nearly three times as fast as SDPA on a CPU (bench/cpu_kernels.py): torch's flash attention for CPU
(aten/src/ATen/native/cpu/FlashAttentionKernel.cpp) reaches a sixth of the rate of a plain matrix product. Here one product for
the whole batch scores a block of queries against all keys up to the block's end, the heads of a group together. Scores and
softmax are fp32, as in SDPA. Under autocast, and so in training, the scores are rounded to bf16, as in transformers' "eager".
The probabilities are kept for the backward pass: 2 bytes for every pair of positions and head, and causality halves the pairs.

"varlen" is twice as fast as SDPA on a GPU: a batch with padding needs a mask, and torch's flash attention takes none. Causality
hides padding on the right from every query. Padding on the left is cut off: torch's `varlen_attn` takes rows of different
lengths. So it takes the sequences of a packed row, each of which sees itself alone. Layers with sliding windows have a mask of
their own, which transformers makes for packed rows as well: SDPA computes those.

    model.config._attn_implementation = "matmul"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

# --- as matrix products -----------------------------------------------------------------------------------------------

QUERY_BLOCK = 96  # few enough queries that a block's scores stay in the cache and little above the diagonal is computed


@torch.compiler.disable  # the number of blocks follows the length: torch would compile each length anew
def matmul_attention(
    module: nn.Module,
    query: torch.Tensor,  # (rows, heads, queries, head_dim)
    key: torch.Tensor,  # (rows, kv_heads, keys, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # added to the scores, or True where a query may look; (rows or 1, 1, queries, keys)
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention, (rows, queries, heads, head_dim): query i sees the unmasked keys up to keys - queries + i.

    Some architectures ask for more. That is left to SDPA, which does it or says that it cannot.
    """
    if any(kwargs.get(name) for name in ("dropout", "softcap")) or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key, value = _as_autocast_would(query, key, value)
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, value.dtype):
        # fp32's lowest is -inf in bf16, and a query that sees no key would become NaN.
        attention_mask = attention_mask.clamp(min=torch.finfo(value.dtype).min).to(value.dtype)
    if attention_mask is None:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
    if attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, lowest)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, attention_mask, scale), None


def _as_autocast_would(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In autocast's dtype, which it gives to torch's own functions alone. Beside fp32 weights, norms and rotations make fp32."""
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return [tensor.to(dtype or tensor.dtype) for tensor in tensors]


AttentionInterface.register("matmul", matmul_attention)
AttentionMaskInterface.register("matmul", eager_mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        rows, heads, queries, dim = query.shape
        kv_heads, keys = key.shape[1:3]
        group = heads // kv_heads
        q = (query * scale).reshape(rows * kv_heads, group, queries, dim)
        k, v = key.reshape(-1, keys, dim), value.reshape(-1, keys, dim)
        k32 = k.float().transpose(1, 2)
        out = query.new_empty(rows, queries, kv_heads, group, dim)
        kept = []
        for block, end in _blocks(queries, keys):
            scores = torch.bmm(_flat(q, block).float(), k32[:, :, :end])
            scores.view(rows, kv_heads, group, -1, end).add_(mask[:, :, None, block, :end])
            p = scores.softmax(-1).to(v.dtype)
            out[:, block] = torch.bmm(p, v[:, :end]).view(rows, kv_heads, group, -1, dim).permute(0, 3, 1, 2, 4)
            kept.append(p)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, *kept)
            ctx.shapes, ctx.scale = (query.shape, key.shape), scale
        return out.view(rows, queries, heads, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        query_shape, key_shape = ctx.shapes
        queries, dim = query_shape[2:]
        grad = grad.transpose(1, 2).reshape(q.shape)
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (block, end) in zip(kept, _blocks(queries, key_shape[2]), strict=True):
            g = _flat(grad, block)
            to_v[:, :end] += torch.bmm(p.transpose(1, 2), g)
            to_p = torch.bmm(g, v[:, :end].transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_p, p, -1, p.dtype)
            to_q[:, :, block] = torch.bmm(to_scores, k[:, :end]).view(len(q), -1, g.shape[1] // q.shape[1], dim)
            to_k[:, :end] += torch.bmm(to_scores.transpose(1, 2), _flat(q, block))
        return to_q.mul_(ctx.scale).view(query_shape), to_k.view(key_shape), to_v.view(key_shape), None, None


def _flat(x: torch.Tensor, block: slice) -> torch.Tensor:
    """The queries of a block, with the heads of a group one after the other: (rows * kv_heads, group * block, head_dim)."""
    return x[:, :, block].reshape(len(x), -1, x.shape[-1])


def _blocks(queries: int, keys: int) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, each with the end of the keys that its last query sees."""
    for start in range(0, queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, queries)
        yield slice(start, end), keys - queries + end


# --- without padding --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LeftPadded:
    """Causal attention of rows that begin with padding: row i sees its keys from `first[i]` on, (rows,)."""

    first: torch.Tensor
    row: torch.Tensor  # the row of each key that is no padding, and its place in that row, (keys left,) each
    place: torch.Tensor
    ends: torch.Tensor  # 0, then where each row ends among the keys left; int32 (rows + 1,)

    def mask(self, queries: int, keys: int) -> torch.Tensor:
        """The same as a mask for SDPA, (rows, 1, queries, keys), True where a query looks."""
        places = torch.arange(keys, device=self.first.device)
        causal = places <= places[keys - queries :, None]
        return (causal & (places >= self.first[:, None, None]))[:, None]


def left_padded(first: torch.Tensor, keys: int) -> LeftPadded:
    row, place = (torch.arange(keys, device=first.device) >= first[:, None]).nonzero(as_tuple=True)
    return LeftPadded(first, row, place, nn.functional.pad((keys - first).cumsum(0), (1, 0)).int())


@dataclasses.dataclass(frozen=True)
class Packed:
    """Causal attention of packed rows: a token sees the earlier ones of its own sequence."""

    sequence: torch.Tensor  # the number of each token's sequence in its row, which never falls, (rows, tokens)
    ends: torch.Tensor  # 0, then where each sequence ends among the tokens of all rows; int32 (sequences + 1,)
    longest: int

    def mask(self, queries: int, keys: int) -> torch.Tensor:
        """The same as a mask for SDPA, (rows, 1, queries, keys), True where a query looks."""
        same = self.sequence[:, :, None] == self.sequence[:, None]
        return same.tril()[:, None]


@dataclasses.dataclass(frozen=True)
class Shared(Packed):
    """Packed rows in which sequences see tokens of others, too, as completions see the prompt that they share.

    `take` lists what each sequence sees, one after the other, by a token's place: (keys,). A sequence is the end of what it sees.
    Keys that are of no sequence have the number of tokens for their place.
    """

    take: torch.Tensor
    key_ends: torch.Tensor  # 0, then where each list ends; int32 (sequences + 1,)

    def mask(self, queries: int, keys: int) -> torch.Tensor:
        """The same of the keys that are taken, (1, 1, queries, keys)."""
        of_query, query = self._from_the_end(self.ends, queries)
        of_key, key = self._from_the_end(self.key_ends, keys)
        return ((of_query[:, None] == of_key) & (query[:, None] <= key))[None, None]

    @staticmethod
    def _from_the_end(ends: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sequence of each place, and how far it is from that sequence's end; (size,) each."""
        place = torch.arange(size, device=ends.device)
        of = torch.bucketize(place, ends, right=True)
        return of, ends[of.clamp(max=len(ends) - 1)] - place


def packed(sequence: torch.Tensor) -> Packed:
    row = torch.arange(len(sequence), device=sequence.device)[:, None]
    lengths = (row * sequence.shape[1] + sequence).flatten().unique_consecutive(return_counts=True)[1]
    return Packed(sequence, nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()))


def packed_sequences(mask_function: Callable[..., Any]) -> torch.Tensor | None:
    """The number of each token's sequence, (rows, tokens), if a mask is causality within packed sequences and nothing more.

    transformers tells a mask its packed sequences by closures alone: packed_sequence_compatibility_function in
    transformers/masking_utils.py. A function of another make has none of them, and SDPA takes its mask.
    """
    parts = _enclosed(mask_function, "mask_functions")
    if getattr(mask_function, "__name__", "") != "and_mask" or parts is None or len(parts) != 2:
        return None
    within, causal = parts
    return _enclosed(within, "packed_sequence_mask") if _enclosed(causal, "mask_function") is causal_mask_function else None


def _enclosed(function: Any, name: str) -> Any:
    """What a function holds of the scope that made it, under this name."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index(name)].cell_contents if name in names else None


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> LeftPadded | Packed | torch.Tensor | None:
    """The mask for transformers: None if no row begins with padding, LeftPadded if one does, Packed, or else SDPA's."""
    if attention_mask is None and (sequence := packed_sequences(mask_function)) is not None:
        return packed(sequence)
    plain = mask_function is causal_mask_function and kv_length == q_offset + q_length
    if plain and attention_mask is not None and attention_mask.shape[1] == kv_length:
        token = attention_mask.bool()
        begins = token & ~nn.functional.pad(token, (1, 0))[:, :-1]
        first = token.int().argmax(1)
        padded, torn = torch.stack([first.any(), (begins.sum(1) > 1).any()]).tolist()
        if not torn:
            return left_padded(first, kv_length) if padded or q_length != kv_length else None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,  # (rows, heads, queries, head_dim)
    key: torch.Tensor,  # (rows, kv_heads, keys, head_dim)
    value: torch.Tensor,
    attention_mask: LeftPadded | Packed | torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention, (rows, queries, heads, head_dim), by SDPA where flash attention cannot. The outputs of padding mean nothing."""
    query, key, value = _as_autocast_would(query, key, value)
    rows, heads, queries, dim = query.shape
    if isinstance(attention_mask, Shared):
        key, value = (_TakeTokens.apply(x, attention_mask.take) for x in (key, value))
    keys = key.shape[2]
    if isinstance(attention_mask, LeftPadded | Packed):
        more = any(kwargs.get(name) for name in ("dropout", "softcap"))
        if query.is_cuda and query.dtype in HALF and dim <= 256 and not more:
            q = query.transpose(1, 2).reshape(rows * queries, heads, dim)
            if isinstance(attention_mask, Packed):
                k, v = (x.transpose(1, 2).reshape(rows * keys, -1, dim) for x in (key, value))
                starts, longest = attention_mask.ends, (attention_mask.longest, attention_mask.longest)
                ends = attention_mask.key_ends if isinstance(attention_mask, Shared) else attention_mask.ends
            else:
                k, v = (_TakeKeys.apply(x, attention_mask.row, attention_mask.place) for x in (key, value))
                starts = torch.arange(0, (rows + 1) * queries, queries, dtype=torch.int32, device=q.device)
                longest, ends = (queries, keys), attention_mask.ends
            # The causal window counts from the end of a row, also in rows with more keys than queries.
            out = varlen_attn(
                q, k, v, starts, ends, *longest,
                scale=scaling, window_size=(-1, 0), enable_gqa=heads != key.shape[1],
            )  # fmt: skip
            return out.view(rows, queries, heads, dim), None
        attention_mask = attention_mask.mask(queries, keys)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


HALF = (torch.bfloat16, torch.float16)
AttentionInterface.register("varlen", varlen_attention)
AttentionMaskInterface.register("varlen", varlen_mask)


class _TakeKeys(torch.autograd.Function):
    """x[row, :, place], (taken, heads, head_dim) of (rows, heads, places, head_dim). No key is taken twice: nothing to sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, row: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row, place)
        ctx.shape = x.shape
        return x[row, :, place]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        row, place = ctx.saved_tensors
        to_x = grad.new_zeros(ctx.shape)
        to_x[row, :, place] = grad
        return to_x, None, None


class _TakeTokens(torch.autograd.Function):
    """x[:, :, take], (1, heads, taken, head_dim) of (1, heads, tokens, head_dim). Tokens are taken several times.

    What is taken for the place after the last token is any token, its gradient, which flash attention never writes, is left.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, take: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(take)
        ctx.shape = x.shape
        return x[:, :, take.clamp(max=x.shape[2] - 1)]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (take,) = ctx.saved_tensors
        _, heads, tokens, dim = ctx.shape
        to_x = grad.new_zeros(tokens + 1, heads, dim, dtype=torch.float32)
        to_x.index_add_(0, take, grad[0].transpose(0, 1).float())
        return to_x[:tokens].transpose(0, 1)[None].to(grad.dtype), None

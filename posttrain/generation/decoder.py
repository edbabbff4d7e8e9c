"""One token for every row by a forward of our own, for families whose layers are Llama's: fewer kernels, and less to read.

The weights are the model's. Queries, keys and values come of one product, and so do gate and up: `join_projections` puts the
weights of each group into one tensor, of which the modules' own become views, so an adapter is folded into them as before.
Attention reads the keys of each row and no others. Whatever this does not know is left to steps.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.generation.masks import ALL_LAYERS, layer_windows
from posttrain.kernels import decoding, fp8_linear
from posttrain.kernels.fp8_linear import Fp8Linear

Rows: TypeAlias = "torch.Tensor | decoding.Fp8Rows"  # (rows, width), what a product reads
# layer, its qkv (tokens, ...), keys, values, window -> attention's output (tokens, heads * head_dim)
Attend: TypeAlias = Callable[[Any, decoding.Product, decoding.Cache, decoding.Cache, "int | None"], torch.Tensor]
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # tests/test_decoder.py compares these with transformers' own forward
# Whose angles depend on a token's place alone. The others change with the longest row.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def fits(model: PreTrainedModel) -> bool:
    """Whether a model decodes by `Decoder`: where `model.decoding` asks for seats, and where it leaves the choice.

    Raises:
        UserError: seats were asked for, and the model or the card is none for them.
    """
    asked = getattr(model, "decoding", "auto")
    if asked == "auto":  # Liger's kernels are there on a GPU with Triton, unless model.kernels took them out
        fused = getattr(model, "kernels", "torch") == "liger" and model.dtype in (torch.bfloat16, torch.float16)
        return fused and not _old_card(model) and why_not(model) is None
    if asked == "seats" and (reason := "the card is older than Ampere" if _old_card(model) else why_not(model)):
        raise UserError(f"model.decoding seats: {reason}; use model.decoding=loop")
    return asked == "seats"


def way(model: PreTrainedModel) -> str:
    """What `model.decoding` came to, for a manifest."""
    return "seats" if fits(model) else "loop"


def _old_card(model: PreTrainedModel) -> bool:
    return model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < (8, 0)  # flash attention needs Ampere


def why_not(model: PreTrainedModel) -> str | None:
    """What keeps a model from `Decoder`; None if nothing does."""
    config = model.config
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        return f"not tried on {config.model_type} with {getattr(config, 'hidden_act', 'its activation')}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rotary embeddings of type {rope.get('rope_type')}"
    if not all(_is_plain(layer) for layer in model.model.layers):
        return "its layers are not plain linear layers, or have other biases"
    head_dim = model.model.layers[0].self_attn.head_dim
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        return f"heads of {head_dim}"
    return None


def _is_plain(layer: Any) -> bool:
    linears = [*_qkv(layer), *_gate_up(layer), layer.self_attn.o_proj, layer.mlp.down_proj]
    biased = {linear.bias is not None for linear in _qkv(layer)}
    return (
        len({type(linear) for linear in linears}) == 1
        and type(linears[0]) in (nn.Linear, Fp8Linear)
        and len(biased) == 1
        and all(linear.bias is None for linear in (*_gate_up(layer), layer.mlp.down_proj))
    )


class Decoder:
    """`logits = decoder(ids, place)`: row i's token ids[i] stands at place[i] of the row, and its keys and values go there.

    Keys and values are (seats, kv_heads, capacity, head_dim) for each layer; the rows are the front seats. They are in 8 bits if
    `model.fp8_cache` is set.
    """

    def __init__(self, model: PreTrainedModel, num_seats: int, capacity: int) -> None:
        self.model, self.num_seats, self.capacity = model, num_seats, capacity
        join_projections(model)
        self.fp8 = isinstance(model.model.layers[0].mlp.down_proj, Fp8Linear)
        config, head_dim = model.config, model.model.layers[0].self_attn.head_dim
        shape = (num_seats, config.num_key_value_heads, capacity, head_dim)
        weight = model.model.embed_tokens.weight
        fp8 = getattr(model, "fp8_cache", False)
        self.keys, self.values = ([_empty_cache(weight, shape, fp8) for _ in model.model.layers] for _ in range(2))
        places = torch.arange(capacity, device=weight.device)[None]
        self.cos, self.sin = (x[0].contiguous() for x in model.model.rotary_emb(weight, places))
        windows = layer_windows(config)
        types = getattr(config, "layer_types", None) or [ALL_LAYERS] * len(model.model.layers)
        self.windows = [windows.get(kind, windows.get(ALL_LAYERS)) for kind in types]

    def cached(self) -> Iterator[torch.Tensor]:
        """All that is kept of tokens, each tensor (seats, kv_heads, capacity, ...)."""
        return itertools.chain.from_iterable(map(decoding.tensors_of, (*self.keys, *self.values)))

    def __call__(self, ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Logits (rows, vocabulary) of what follows ids, (rows,)."""

        def attend(
            layer: Any, qkv: decoding.Product, keys: decoding.Cache, values: decoding.Cache, window: int | None
        ) -> torch.Tensor:
            query = decoding.rotate_and_store(qkv, self.cos, self.sin, place, keys, values, _norms(layer))
            return decoding.attend(query, keys, values, place, window, layer.scaling)

        return self._logits(self._hidden(ids, attend))

    def prefill(self, prompts: Sequence[Sequence[int]], seats: Sequence[int]) -> torch.Tensor:
        """Logits (prompts, vocabulary) of what follows each prompt. Its keys and values go to its seat. No token is padding."""
        device, lengths = self.cos.device, [len(prompt) for prompt in prompts]
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        seat = torch.tensor(seats).repeat_interleave(torch.tensor(lengths)).to(device)
        place = torch.cat([torch.arange(length) for length in lengths]).to(device)
        ends = torch.tensor(lengths).cumsum(0)
        starts = nn.functional.pad(ends, (1, 0)).int().to(device)

        def attend(
            layer: Any, qkv: decoding.Product, keys: decoding.Cache, values: decoding.Cache, window: int | None
        ) -> torch.Tensor:
            qkv = decoding.whole(qkv)
            query = decoding.rotate_and_store(qkv, self.cos, self.sin, place, keys, values, _norms(layer), seat)
            key, value = qkv.view(len(ids), -1, keys.shape[3])[:, query.shape[1] :].chunk(2, 1)
            return decoding.attend_packed(query, key, value, starts, max(lengths), window, layer.scaling)

        return self._logits(self._hidden(ids, attend)[(ends - 1).to(device)])

    def _hidden(self, ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        """What the last layer gives for each token, normed, (tokens, hidden)."""
        residual = nn.functional.embedding(ids, self.model.model.embed_tokens.weight)
        more: decoding.Product | None = None
        for layer, keys, values, window in zip(self.model.model.layers, self.keys, self.values, self.windows, strict=True):
            x = self._read(more, residual, layer.input_layernorm)
            out = attend(layer.self_attn, _joined_linear(x, _qkv(layer)), keys, values, window)
            more = _joined_linear(out, [layer.self_attn.o_proj])
            gate_up = decoding.whole(_joined_linear(self._read(more, residual, layer.post_attention_layernorm), _gate_up(layer)))
            product: Rows = decoding.silu_mul_fp8(gate_up) if self.fp8 else decoding.silu_mul(gate_up)
            more = _joined_linear(product, [layer.mlp.down_proj])
        return self._normed(more, residual, self.model.model.norm)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head: Any = self.model.get_output_embeddings()
        return nn.functional.linear(hidden, head.weight, head.bias)

    def _normed(self, more: decoding.Product | None, residual: torch.Tensor, norm: Any) -> torch.Tensor:
        """The norm of residual + more; `residual` then holds that sum."""
        x, rest = (residual, None) if more is None else (more, residual)
        return decoding.add_norm(x, rest, norm.weight, norm.variance_epsilon)

    def _read(self, more: decoding.Product | None, residual: torch.Tensor, norm: Any) -> Rows:
        """The same as a layer's products read it."""
        x, rest = (residual, None) if more is None else (more, residual)
        make = decoding.add_norm_fp8 if self.fp8 else decoding.add_norm
        return make(x, rest, norm.weight, norm.variance_epsilon)


def _empty_cache(like: torch.Tensor, shape: tuple[int, ...], fp8: bool) -> decoding.Cache:
    if not fp8:
        return like.new_zeros(shape)
    return decoding.Fp8Cache(like.new_zeros(shape, dtype=decoding.FP8), like.new_zeros(shape[:3], dtype=torch.float32))


def _norms(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    return (layer.q_norm.weight, layer.k_norm.weight, layer.q_norm.variance_epsilon) if hasattr(layer, "q_norm") else None


# --- one product for several layers -----------------------------------------------------------------------------------


def _qkv(layer: Any) -> list[Any]:
    return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


def _gate_up(layer: Any) -> list[Any]:
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


def join_projections(model: Any) -> None:
    """Put the weights of queries, keys and values one after the other in memory, and those of gate and up: the same numbers.

    Only the given model's parameters move. What shared their memory before keeps what it has.
    """
    for layer in model.model.layers:
        for linears in (_qkv(layer), _gate_up(layer)):
            for name in ("weight", "bias", "scale"):
                parameters: list[Any] = [getattr(linear, name, None) for linear in linears]
                if parameters[0] is not None and not _adjacent(parameters):
                    whole = torch.cat([parameter.data for parameter in parameters])
                    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
                        parameter.data = part


def _joined_linear(x: Rows, linears: Sequence[Any]) -> decoding.Product:
    bias = None if linears[0].bias is None else joined([linear.bias for linear in linears])
    weight = joined([linear.weight for linear in linears])
    if isinstance(linears[0], Fp8Linear):
        scale = joined([linear.scale for linear in linears])
        multiply = fp8_linear.product_to_scale if bias is None else fp8_linear.product
        return multiply(x, fp8_linear.Weight(weight, scale, bias), linears[0].dtype)
    assert isinstance(x, torch.Tensor)
    return nn.functional.linear(x, weight, bias)


def joined(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors that lie one after the other in memory, as one: nothing is copied."""
    assert _adjacent(parameters), "join_projections comes first"
    first = parameters[0].data
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())


def _adjacent(parameters: Sequence[torch.Tensor]) -> bool:
    first, end = parameters[0], parameters[0].data_ptr()
    for parameter in parameters:
        same = parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or parameter.data_ptr() != end or not parameter.is_contiguous():
            return False
        end += parameter.numel() * parameter.element_size()
    return True

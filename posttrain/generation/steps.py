"""One token for every row of a batch, by the model's own forward.

At every token `model.generate` repeats the grouped key and value heads and concatenates keys and values. Here attention reads
them as they are, buffers take the new ones, and on CUDA the step is replayed as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from posttrain.generation.masks import ALL_LAYERS, Mask, hide_before_window, layer_windows, mask_for_each
from posttrain.kernels.attention import matmul_attention

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer
STEPS_BETWEEN_DROPS = 16  # how often finished rows may be dropped; key and value buffers grow by twice as many


# --- keys and values --------------------------------------------------------------------------------------------------


class Buffers:
    """Keys and values of all layers, (rows, kv_heads, capacity, head_dim) each, filled up to `length` and 0 from there on.

    They stand in for a transformers cache: a decoder layer calls nothing but `update`, the model nothing but
    `get_seq_length`. In a CUDA graph `position` is a tensor, so that each replay writes at another place.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers: Layers = []
        self.position: torch.Tensor | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == len(self.layers):
            if key.shape[2] == self.capacity:  # a whole prompt: nothing to copy
                self.layers.append((key, value))
                return key, value
            rows, heads, _, head_dim = key.shape
            self.layers.append(tuple(key.new_zeros(rows, heads, self.capacity, head_dim) for _ in range(2)))
        keys, values = self.layers[layer]
        if self.position is not None:
            keys.index_copy_(2, self.position, key)
            values.index_copy_(2, self.position, value)
            return keys, values
        end = self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def take(self, rows: torch.Tensor, capacity: int) -> None:
        """Keep these rows, in their order, in buffers of a new capacity."""
        self.layers = [tuple(_resized(tensor, rows, self.length, capacity) for tensor in layer) for layer in self.layers]
        self.capacity = capacity


def _resized(tensor: torch.Tensor, rows: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    grown = tensor.new_empty(len(rows), tensor.shape[1], capacity, tensor.shape[3])
    all_stay = len(rows) == len(tensor)
    grown[:, :, :length] = tensor[:, :, :length] if all_stay else tensor[rows, :, :length]
    grown[:, :, length:] = 0
    return grown


def _joined_layers(slices: Sequence[Layers], num_samples: int, length: int, capacity: int) -> Layers:
    """Join keys and values of slices of prompts into one batch, a row for each sample. They end at `length`; the rest is 0."""
    return [
        tuple(_joined_tensor(parts, num_samples, length, capacity) for parts in zip(*layer, strict=True))
        for layer in zip(*slices, strict=True)
    ]


def _joined_tensor(parts: Sequence[torch.Tensor], num_samples: int, length: int, capacity: int) -> torch.Tensor:
    _, heads, _, head_dim = parts[0].shape
    whole = parts[0].new_zeros(sum(map(len, parts)), num_samples, heads, capacity, head_dim)
    for rows, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
        rows[:, :, :, length - part.shape[2] : length] = part[:, None]
    return whole.flatten(0, 1)


# --- attention --------------------------------------------------------------------------------------------------------


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,  # (rows, heads, tokens, head_dim)
    key: torch.Tensor,  # (rows, kv_heads, length, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention that never repeats keys and values: for one new token, the heads of a group are queries of one key head."""
    on_cpu = query.device.type == "cpu"
    if query.shape[2] != 1:
        whole = matmul_attention if on_cpu else sdpa_attention_forward
        return whole(module, query, key, value, attention_mask, **kwargs)
    rows, heads, _, head_dim = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], head_dim)
    attend = products_attention if on_cpu else nn.functional.scaled_dot_product_attention
    out = attend(grouped, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling") or head_dim**-0.5)
    return out.reshape(rows, 1, heads, head_dim), None


def products_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """SDPA for a handful of queries, as two products over all rows and heads: faster on CPU. `attn_mask` is added."""
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
    scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale)
    scores.view(*query.shape[:3], -1).add_(attn_mask)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(query.shape)


AttentionInterface.register("grouped", grouped_attention)


def decoding_attention(model: PreTrainedModel) -> str:
    """ "grouped", or the model's own attention where that does more than SDPA.

    transformers says so of a family with attention sinks (gpt-oss) or with scores that are capped (Gemma2: "sdpa does not support
    softcapping"). Its own attention is slower, and takes the same masks and buffers.
    """
    does_more = not type(model)._supports_sdpa or getattr(model.config, "attn_logit_softcapping", None)
    return "eager" if does_more else "grouped"


def routes_tokens(config: Any) -> bool:
    """Whether layers choose among experts. How many rows each of those gets is known only as they run: no graph holds them."""
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


# --- the steps --------------------------------------------------------------------------------------------------------


def last_logits(model: PreTrainedModel, ids: torch.Tensor, mask: Mask, positions: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """Logits of the last position, (rows, vocabulary). Keys and values of all positions go into `buffers`."""
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=buffers,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1]


class EagerStep:
    """One token for every row, kernel by kernel.

    Copying the buffers takes as long as a step or two, so they are copied only when they are full or a tenth of the rows is done.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model, self.max_capacity = model, capacity
        self.windows = layer_windows(model.config)
        # The mask is added to the scores, which are fp32 in products_attention.
        on_cpu = model.device.type == "cpu" and model.config._attn_implementation == "grouped"
        self.mask_dtype = torch.float32 if on_cpu else model.dtype

    def fill(self, slices: Sequence[Layers], num_samples: int, length: int) -> None:
        self.buffers = Buffers(min(length + 2 * STEPS_BETWEEN_DROPS, self.max_capacity))
        self.buffers.layers = _joined_layers(slices, num_samples, length, self.buffers.capacity)
        self.buffers.length = length
        self.num_rows = len(self.buffers.layers[0][0])

    def worth_dropping(self, num_rows: int, num_live: int) -> bool:
        return num_live < 0.9 * num_rows or self.buffers.length + STEPS_BETWEEN_DROPS > self.buffers.capacity

    def keep(self, rows: torch.Tensor, length: int) -> None:
        self.num_rows = len(rows)
        self.buffers.take(rows, min(length + 2 * STEPS_BETWEEN_DROPS, self.max_capacity))

    def __call__(self, current: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        lowest = torch.finfo(self.model.dtype).min

        def make(window: int | None) -> torch.Tensor:  # once a step, not once a layer
            mask = torch.zeros(len(valid), 1, 1, self.buffers.capacity, dtype=self.mask_dtype, device=valid.device)
            mask.masked_fill_(~valid[:, None, None, : self.buffers.capacity], lowest)
            hide_before_window(mask, window, length, lowest)
            return mask

        mask = mask_for_each(self.windows, make)
        logits = last_logits(self.model, current[:, None], mask, positions[:, None], self.buffers)
        self.buffers.length += 1
        return logits


class GraphStep:
    """The same step as one CUDA graph: launching the hundreds of kernels of a small model takes longer than they run.

    A graph has fixed shapes. There is one for each number of rows, in powers of two, and for each number of tokens to attend
    to, in steps of `SPAN`: attention reads all it is given, and in a graph for the longest completion that is twice the need.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model, self.capacity = model, capacity

    def fill(self, slices: Sequence[Layers], num_samples: int, length: int) -> None:
        layers = _joined_layers(slices, 1, length, length)
        rows = torch.arange(len(layers[0][0]), device=self.model.device).repeat_interleave(num_samples)
        self.num_rows = _power_of_two(len(rows))
        self.graphs = _graphs_of(self.model, layers, self.num_rows, self.capacity)
        self.graphs.load(layers, rows, length)

    def worth_dropping(self, num_rows: int, num_live: int) -> bool:
        return _power_of_two(num_live) < self.num_rows

    def keep(self, rows: torch.Tensor, length: int) -> None:
        self.num_rows = _power_of_two(len(rows))
        self.graphs.load(self.graphs.layers, rows, length)

    def __call__(self, current: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        return self.graphs(current, valid, positions, length, self.num_rows)


SPAN = 128  # SDPA reads keys 128 at a time: a smaller span saves nothing


class _Graphs:
    """The graphs of a model, with inputs, keys and values for its largest batch so far. A smaller batch uses their front part."""

    def __init__(self, model: PreTrainedModel, like: Layers, num_rows: int, capacity: int) -> None:
        self.model, self.num_rows, self.capacity = model, num_rows, capacity
        device = model.device
        self.ids = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        # Added to the scores: 0 where a row may look, the lowest number elsewhere. Made once a step, not once a layer.
        self.lowest = torch.finfo(model.dtype).min
        self.windows = layer_windows(model.config)
        self.masks = {name: torch.zeros(num_rows, 1, 1, capacity, dtype=model.dtype, device=device) for name in self.windows}
        self.layers: Layers = [
            tuple(tensor.new_zeros(num_rows, tensor.shape[1], capacity, tensor.shape[3]) for tensor in layer) for layer in like
        ]
        self.captured: dict[tuple[int, int], Callable[[], torch.Tensor]] = {}

    def load(self, layers: Layers, rows: torch.Tensor, length: int) -> None:
        """Copy these rows of `layers`, which may be its own, to the front."""
        for own, layer in zip(self.layers, layers, strict=True):
            for target, source in zip(own, layer, strict=True):
                target[: len(rows), :, :length] = source[rows, :, :length]

    def __call__(
        self, current: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, length: int, num_rows: int
    ) -> torch.Tensor:
        n, span = len(current), _up_to(length + 1, SPAN)
        valid = valid[:, :span]
        self.ids[:n, 0] = current
        self.positions[:n, 0] = positions
        for name, window in self.windows.items():
            mask = self.masks[name]
            mask[:num_rows, ..., :span].fill_(self.lowest)
            mask[:n, 0, 0, : valid.shape[1]].masked_fill_(valid, 0.0)
            hide_before_window(mask[:n], window, length, self.lowest)
            mask[n:num_rows] = 0.0
        self.position.fill_(length)
        if (num_rows, span) not in self.captured:
            self.captured[num_rows, span] = capture(self._step(num_rows, span))
        return self.captured[num_rows, span]()[:n]

    def _step(self, num_rows: int, span: int) -> Callable[[], torch.Tensor]:
        front = Buffers(span)
        front.position = self.position
        front.layers = [(keys[:num_rows, :, :span], values[:num_rows, :, :span]) for keys, values in self.layers]
        masks = {name: mask[:num_rows, ..., :span] for name, mask in self.masks.items()}
        inputs = self.ids[:num_rows], masks.get(ALL_LAYERS, masks), self.positions[:num_rows], front
        return lambda: last_logits(self.model, *inputs)


def _graphs_of(model: PreTrainedModel, like: Layers, num_rows: int, capacity: int) -> _Graphs:
    """The graphs kept with the model, made anew for a batch that is larger than all before."""
    kept: _Graphs | None = model.__dict__.get("_graphs")
    capacity = _up_to(capacity, SPAN)
    if kept is None or kept.num_rows < num_rows or kept.capacity < capacity:
        model.__dict__["_graphs"] = None  # its memory is needed
        if kept:
            num_rows, capacity = max(kept.num_rows, num_rows), max(kept.capacity, capacity)
            del kept
        model.__dict__["_graphs"] = kept = _Graphs(model, like, num_rows, capacity)
    return kept


def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that replays `run` as a graph, into the same tensor. A run before it lets kernels set up what they need."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def release_graphs(model: PreTrainedModel) -> None:
    """Give back the GPU memory that decoding keeps for the next batch."""
    model.__dict__.pop("_graphs", None)


def _up_to(n: int, step: int) -> int:
    return -(-n // step) * step


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()

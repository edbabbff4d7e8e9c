"""Prompts -> completions on any engine, one signature.

The `transformers` engine is a decode loop over the model's own forward. Against `model.generate` it computes each prompt
once for all of its samples, attends without repeating the grouped key and value heads, writes keys and values into
buffers instead of concatenating them at every token, drops finished rows, on CUDA replays the step as one graph, and on CPU
lays the weights out once for all steps.
Random numbers belong to a row and a step, so what a row samples does not depend on which rows finished before it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.attention import matmul_attention
from posttrain.config import Engine
from posttrain.packed_linear import packed
from posttrain.timing import phase

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer
BLOCK = 16  # steps between two looks for finished rows; key and value buffers grow by twice as many


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy. `seed` and the batch number decide every random draw."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_samples: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """Generated token ids, the end token included when there is one, and their log-probabilities as sampled."""

    ids: list[int]
    finish: Literal["stop", "length"]
    logprobs: list[float]


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices by falling prompt length, cut into batches: little padding, and the largest batch fails first if any does.

    The plan depends on nothing but its arguments, so an interrupted evaluation finds the same batches again.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def auto_batch_size(model: PreTrainedModel, num_tokens: int, num_samples: int, num_processes: int = 1) -> int:
    """Prompts in one batch such that the keys and values of all their samples take a third of the memory.

    Of the memory the machine has, not of what happens to be free: the same machine always gets the same batches.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    on_gpu = model.device.type == "cuda"
    memory = memory_bytes(model.device) // (1 if on_gpu else num_processes)
    rows = min(512 if on_gpu else 128, max(1, memory // 3 // (per_token * num_tokens)))
    return max(1, rows // num_samples)


def memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- the decode loop --------------------------------------------------------------------------------------------------


class Buffers:
    """Keys and values of all layers, (rows, kv_heads, capacity, head_dim) each, filled up to `length` and 0 from there on.

    Stands in for a transformers cache: a decoder layer calls nothing but `update`, the model nothing but
    `get_seq_length`. On CUDA `position` is a tensor, so that a captured graph can write at a place that moves.
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


def _together(slices: Sequence[Layers], num_samples: int, length: int, capacity: int) -> Layers:
    """Keys and values of slices of prompts as those of one batch, a row for each sample; they end at `length`, 0 is around."""
    return [
        tuple(_one(parts, num_samples, length, capacity) for parts in zip(*layer, strict=True))
        for layer in zip(*slices, strict=True)
    ]


def _one(parts: Sequence[torch.Tensor], num_samples: int, length: int, capacity: int) -> torch.Tensor:
    _, heads, _, head_dim = parts[0].shape
    whole = parts[0].new_zeros(sum(map(len, parts)), num_samples, heads, capacity, head_dim)
    for rows, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
        rows[:, :, :, length - part.shape[2] : length] = part[:, None]
    return whole.flatten(0, 1)


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,  # (rows, heads, tokens, head_dim)
    key: torch.Tensor,  # (rows, kv_heads, length, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention that never repeats keys and values: for one new token the heads of a group are the queries of its key head."""
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
    """SDPA for a handful of queries, faster on CPU: two products over all rows and heads. `attn_mask` is added."""
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
    scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale)
    scores.view(*query.shape[:3], -1).add_(attn_mask)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(query.shape)


AttentionInterface.register("grouped", grouped_attention)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model ready to decode: grouped attention, and a contiguous input for the output head.

    A frozen head given a slice is run by ATen as a batched product with a copied weight, 5-6 times slower on CPU.
    """
    model.config._attn_implementation = "grouped"
    head = model.get_output_embeddings()
    if not getattr(head, "contiguous_input", False):
        head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        head.contiguous_input = True
    return model.eval()


@torch.no_grad()
def decode_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_id: int, batch: int = 0
) -> list[list[Completion]]:
    """Completions of a batch of prompts, `num_samples` each. `model` must have been through `prepare`.

    `batch` numbers the batch: with `sampling.seed` it fixes every random draw.
    """
    rows = _Rows(model, prompts, sampling, stop_id, batch)
    with phase("prefill"):
        logits = rows.prefill()
    with phase("decode"):
        step = 0
        while rows.place(logits, step):
            step += 1
            if step % BLOCK == 0:
                rows.retire()
            logits = rows.forward()
        return rows.completions()


class _Rows:
    """The state of one batch: one row for every sample, the finished ones dropped from time to time."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_id: int, batch: int
    ) -> None:
        self.model, self.prompts, self.sampling, self.stop_id = model, prompts, sampling, stop_id
        self.device = model.device
        self.num_rows = len(prompts) * sampling.num_samples
        self.tokens = torch.full((self.num_rows, sampling.max_new_tokens), -1, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(self.num_rows, sampling.max_new_tokens, device=self.device)
        self.alive = torch.arange(self.num_rows, device=self.device)  # which sample each decoding row belongs to
        self.done = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)
        if sampling.temperature > 0:
            draw = torch.Generator().manual_seed((sampling.seed * 1_000_003 + batch) % 2**63)
            self.uniform = torch.rand(self.num_rows, sampling.max_new_tokens, generator=draw).to(self.device)

    def prefill(self) -> torch.Tensor:
        """Run every prompt once, in slices of similar length; then one row for each sample. Logits (rows, vocabulary)."""
        self.length = max(len(prompt) for prompt in self.prompts)
        pieces = [self._prefill(slice) for slice in _slices(self.prompts, PREFILL_TOKENS[self.device.type])]
        logits, layers, valid, positions = zip(*pieces, strict=True)
        repeat = torch.arange(len(self.prompts), device=self.device).repeat_interleave(self.sampling.num_samples)
        self.valid = torch.zeros(self.num_rows, self.length + self.sampling.max_new_tokens, dtype=torch.bool, device=self.device)
        self.valid[:, : self.length] = torch.cat(valid)[repeat]
        self.positions = torch.cat(positions)[repeat]
        self.step = (GraphStep if self.device.type == "cuda" else EagerStep)(self.model, self.valid.shape[1])
        self.step.fill(layers, self.sampling.num_samples, self.length)
        return torch.cat(logits)[repeat]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Layers, torch.Tensor, torch.Tensor]:
        """One slice, padded on the left: last logits, keys and values, valid padded to the batch's width, next positions."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        valid = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            valid[row, width - len(prompt) :] = True
        ids, valid = ids.to(self.device), valid.to(self.device)
        positions = (valid.cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        # A padding query attends to itself, so that its softmax is not empty; nothing ever attends to it.
        mask = (causal & valid[:, None, :]) | torch.eye(width, dtype=torch.bool, device=self.device)
        buffers = Buffers(width)
        logits = last_logits(self.model, ids, mask[:, None], positions, buffers)
        return logits, buffers.layers, nn.functional.pad(valid, (self.length - width, 0)), positions[:, -1] + 1

    def place(self, logits: torch.Tensor, step: int) -> bool:
        """Choose token number `step` of every live row; False when there is nothing left to decode."""
        uniform = self.uniform[self.alive, step] if self.sampling.temperature > 0 else None
        token, logprob = choose(logits, self.sampling, uniform)
        going = ~self.done[self.alive]
        self.tokens[self.alive, step] = torch.where(going, token, -1)
        self.logprobs[self.alive, step] = torch.where(going, logprob, 0.0)
        self.done[self.alive] |= token == self.stop_id
        self.current = token
        last = step + 1 == self.sampling.max_new_tokens
        return not last and (step % LOOK[self.device.type] != 0 or not bool(self.done[self.alive].all()))

    def retire(self) -> None:
        """Drop finished rows, where that makes a step cheaper."""
        keep = (~self.done[self.alive]).nonzero().squeeze(1)
        if len(keep) and self.step.worth_dropping(len(self.alive), len(keep)):
            self.step.keep(keep, self.length)
            self.alive, self.valid = self.alive[keep], self.valid[keep]
            self.positions, self.current = self.positions[keep], self.current[keep]

    def forward(self) -> torch.Tensor:
        phase.counts["slots"] += self.step.num_rows
        self.valid[:, self.length] = True
        logits = self.step(self.current, self.valid, self.positions, self.length)
        self.length += 1
        self.positions = self.positions + 1
        return logits

    def completions(self) -> list[list[Completion]]:
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        flat = [self._completion(ids, logps) for ids, logps in zip(tokens, logprobs, strict=True)]
        k = self.sampling.num_samples
        return [flat[start : start + k] for start in range(0, len(flat), k)]

    def _completion(self, ids: list[int], logprobs: list[float]) -> Completion:
        length = ids.index(-1) if -1 in ids else len(ids)
        finish: Literal["stop", "length"] = "stop" if ids[length - 1] == self.stop_id else "length"
        return Completion(ids[:length], finish, logprobs[:length])


# Prompt tokens, padding included, in one prefill slice: enough to fill the device, few enough to pad little.
PREFILL_TOKENS = {"cpu": 2_048, "cuda": 65_536}
# How often to ask whether every row is done: on CUDA the answer waits for the device.
LOOK = {"cpu": 1, "cuda": 8}


def _slices(prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Sequence[Sequence[int]]]:
    """Neighbours in slices of at most `num_tokens` tokens after padding (at least one prompt each)."""
    slices, start = [], 0
    while start < len(prompts):
        end, width = start, 0
        while end < len(prompts) and (end == start or max(width, len(prompts[end])) * (end + 1 - start) <= num_tokens):
            width = max(width, len(prompts[end]))
            end += 1
        slices.append(prompts[start:end])
        start = end
    return slices


def last_logits(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, buffers: Buffers
) -> torch.Tensor:
    """Logits of the last position, (rows, vocabulary); keys and values of all positions go into `buffers`."""
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
    """One token for every row, run as it is written.

    A copy of the buffers takes as long as a step or two: they are copied when they are full, and where a tenth of the rows goes.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model, self.most = model, capacity

    def fill(self, slices: Sequence[Layers], num_samples: int, length: int) -> None:
        self.buffers = Buffers(min(length + 2 * BLOCK, self.most))
        self.buffers.layers = _together(slices, num_samples, length, self.buffers.capacity)
        self.buffers.length = length
        self.num_rows = len(self.buffers.layers[0][0])

    def worth_dropping(self, num_rows: int, num_live: int) -> bool:
        return num_live < 0.9 * num_rows or self.buffers.length + BLOCK > self.buffers.capacity

    def keep(self, rows: torch.Tensor, length: int) -> None:
        self.num_rows = len(rows)
        self.buffers.take(rows, min(length + 2 * BLOCK, self.most))

    def __call__(self, current: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        # Added to the scores, fp32 in products_attention, and converted once a step, not once a layer.
        dtype = torch.float32 if valid.device.type == "cpu" else self.model.dtype
        mask = torch.zeros(len(valid), 1, 1, self.buffers.capacity, dtype=dtype, device=valid.device)
        mask.masked_fill_(~valid[:, None, None, : self.buffers.capacity], torch.finfo(self.model.dtype).min)
        logits = last_logits(self.model, current[:, None], mask, positions[:, None], self.buffers)
        self.buffers.length += 1
        return logits


class GraphStep:
    """The same as one CUDA graph: a step of a small model is hundreds of kernels, and launching them takes longer than they run.

    A graph has fixed shapes. There is one for each number of rows, in powers of two, and for each number of tokens to attend
    to, in steps of `SPAN`: attention reads all it is given, and one for the longest completion would read twice what it needs.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model, self.capacity = model, capacity

    def fill(self, slices: Sequence[Layers], num_samples: int, length: int) -> None:
        layers = _together(slices, 1, length, length)
        rows = torch.arange(len(layers[0][0]), device=self.model.device).repeat_interleave(num_samples)
        self.num_rows = _power_of_two(len(rows))
        self.stage = _stage(self.model, layers, self.num_rows, self.capacity)
        self.stage.load(layers, rows, length)

    def worth_dropping(self, num_rows: int, num_live: int) -> bool:
        return _power_of_two(num_live) < self.num_rows

    def keep(self, rows: torch.Tensor, length: int) -> None:
        self.num_rows = _power_of_two(len(rows))
        self.stage.load(self.stage.layers, rows, length)

    def __call__(self, current: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        return self.stage(current, valid, positions, length, self.num_rows)


SPAN = 128  # keys that SDPA's kernel takes at once: half as many take it as long


class _Stage:
    """Inputs, keys and values of the largest batch so far, and the graphs that step over the front part of them."""

    def __init__(self, model: PreTrainedModel, like: Layers, num_rows: int, capacity: int) -> None:
        self.model, self.num_rows, self.capacity = model, num_rows, capacity
        device = model.device
        self.ids = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        # Added to the scores: 0 where a row may look, the lowest number elsewhere. Converted once a step, not once a layer.
        self.lowest = torch.finfo(model.dtype).min
        self.mask = torch.zeros(num_rows, 1, 1, capacity, dtype=model.dtype, device=device)
        self.layers: Layers = [
            tuple(tensor.new_zeros(num_rows, tensor.shape[1], capacity, tensor.shape[3]) for tensor in layer) for layer in like
        ]
        self.graphs: dict[tuple[int, int], Callable[[], torch.Tensor]] = {}

    def load(self, layers: Layers, rows: torch.Tensor, length: int) -> None:
        """Put these rows of other keys and values, or of its own, in front."""
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
        self.mask[:num_rows, ..., :span].fill_(self.lowest)
        self.mask[:n, 0, 0, : valid.shape[1]].masked_fill_(valid, 0.0)
        self.mask[n:num_rows] = 0.0
        self.position.fill_(length)
        if (num_rows, span) not in self.graphs:
            self.graphs[num_rows, span] = capture(self._step(num_rows, span))
        return self.graphs[num_rows, span]()[:n]

    def _step(self, num_rows: int, span: int) -> Callable[[], torch.Tensor]:
        front = Buffers(span)
        front.position = self.position
        front.layers = [(keys[:num_rows, :, :span], values[:num_rows, :, :span]) for keys, values in self.layers]
        inputs = self.ids[:num_rows], self.mask[:num_rows, ..., :span], self.positions[:num_rows], front
        return lambda: last_logits(self.model, *inputs)


def _stage(model: PreTrainedModel, like: Layers, num_rows: int, capacity: int) -> _Stage:
    """The one kept with the model, made anew where a batch is larger than all before."""
    kept: _Stage | None = model.__dict__.get("_stage")
    capacity = _up_to(capacity, SPAN)
    if kept is None or kept.num_rows < num_rows or kept.capacity < capacity:
        model.__dict__["_stage"] = None  # its memory is needed
        if kept:
            num_rows, capacity = max(kept.num_rows, num_rows), max(kept.capacity, capacity)
            del kept
        model.__dict__["_stage"] = kept = _Stage(model, like, num_rows, capacity)
    return kept


def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """What runs `run` again as a graph, into the same tensor. Runs it once itself, for what kernels set up on first use."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def release(model: PreTrainedModel) -> None:
    """Give back the memory that decoding keeps on a GPU for the next batch."""
    model.__dict__.pop("_stage", None)


def _up_to(n: int, step: int) -> int:
    return -(-n // step) * step


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def choose(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens and their log-probabilities, (rows,) each, from logits (rows, vocabulary).

    Sampling inverts the cumulative distribution at `uniform`, (rows,) in [0, 1): one draw a token instead of one for
    every entry of the vocabulary. Log-probabilities are those of the temperature-scaled distribution, as the trainer's.
    """
    if uniform is None:
        top = logits.float().argmax(-1)  # on CPU that of bf16 takes five times as long
        return top, torch.zeros_like(top, dtype=torch.float32)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    drawn_from = _nucleus(probabilities, sampling.top_p) if sampling.top_p < 1 else probabilities
    token = _inverse(drawn_from, uniform)
    return token, probabilities.gather(1, token[:, None]).squeeze(1).clamp(min=1e-38).log()


def _inverse(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Of each row the first entry at which the running sum of its weights passes `uniform` of their whole, (rows,).

    By way of the sums of blocks: on a GPU one row's running sum over a whole vocabulary is half of what choosing takes.
    """
    rows, vocabulary = weights.shape
    blocks = nn.functional.pad(weights, (0, -vocabulary % SUMMED)).view(rows, -1, SUMMED)
    ends = blocks.sum(-1).cumsum(-1)
    target = uniform[:, None].to(ends.dtype).clamp(max=BELOW_ONE) * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=blocks.shape[1] - 1)
    inside = blocks[torch.arange(rows, device=weights.device), block.squeeze(1)]
    before = ends.gather(1, block) - inside.sum(-1, keepdim=True)
    cumulative = inside.cumsum(-1)
    # Sums in another order round differently: within a block stay below its own whole, or a weight of 0 could be drawn.
    target = (target - before).clamp(min=0).minimum(cumulative[:, -1:] * BELOW_ONE)
    return (block * SUMMED + torch.searchsorted(cumulative, target, right=True)).squeeze(1).clamp(max=vocabulary - 1)


SUMMED = 256
BELOW_ONE = 1 - 2**-23  # times any fp32 number, it is the next lower one or the one after


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero everything outside the smallest set of tokens whose probability reaches `top_p` (arXiv:1904.09751)."""
    ordered, index = probabilities.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), 0.0)


# --- engines ----------------------------------------------------------------------------------------------------------

Batch = tuple[int, list[int]]  # its number in the plan, and the indices of its prompts
Finished = tuple[list[int], list[list[Completion]]]


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None = None,
    engine: Engine = "transformers",
) -> list[list[Completion]]:
    """Completions of every prompt, `sampling.num_samples` each, in the order of the prompts."""
    lengths = [len(prompt) for prompt in prompts]
    size = batch_size or auto_batch_size(model, max(lengths) + sampling.max_new_tokens, sampling.num_samples)
    results: list[list[Completion]] = [[] for _ in prompts]
    for indices, completions in engine_batches(
        engine, model, prompts, sampling, tokenizer, list(enumerate(plan_batches(lengths, size)))
    ):
        for index, completion in zip(indices, completions, strict=True):
            results[index] = completion
    return results


def engine_batches(
    engine: Engine,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
) -> Iterator[Finished]:
    """Batch by batch as they are finished: the indices of the prompts and their completions."""
    run = {
        "transformers": _transformers_engine,
        "continuous_batching": _continuous_batching_engine,
        "vllm": _vllm_engine,
    }[engine]
    return run(model, prompts, sampling, tokenizer, batches)


def _transformers_engine(
    model: Any, prompts: Any, sampling: Sampling, tokenizer: Any, batches: Sequence[Batch]
) -> Iterator[Finished]:
    prepare(model)
    with packed(model):
        for number, indices in batches:
            yield indices, decode_batch(model, [prompts[i] for i in indices], sampling, tokenizer.eos_token_id, number)


def _continuous_batching_engine(
    model: Any, prompts: Any, sampling: Sampling, tokenizer: Any, batches: Sequence[Batch]
) -> Iterator[Finished]:
    """transformers' own continuous batching; it keeps no log-probabilities."""
    if model.config._attn_implementation in ("grouped", "matmul", "varlen"):  # ours, which it does not know
        model.config._attn_implementation = "sdpa"
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or 1.0,
        top_p=sampling.top_p,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for number, indices in batches:
        inputs = [list(prompts[i]) for i in indices for _ in range(sampling.num_samples)]
        paging = None if model.device.type == "cuda" else _just_enough(inputs, sampling.max_new_tokens)
        with torch.random.fork_rng(), torch.no_grad():  # it fails inside inference_mode
            torch.manual_seed((sampling.seed * 1_000_003 + number) % 2**63)
            outputs = model.generate_batch(inputs, settings, continuous_batching_config=paging, progress_bar=False)
        ordered = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[1]))
        flat = [_as_completion(list(output.generated_tokens), tokenizer.eos_token_id) for output in ordered]
        k = sampling.num_samples
        yield indices, [flat[start : start + k] for start in range(0, len(flat), k)]


def _just_enough(inputs: Sequence[Sequence[int]], max_new_tokens: int) -> ContinuousBatchingConfig:
    """A cache for these sequences alone; left to itself, on CPU it takes nine tenths of the memory and fills it first."""
    page, longest = 64, max(map(len, inputs))
    pages = sum(-(-(len(ids) + max_new_tokens) // page) for ids in inputs)
    return ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=max(longest, len(inputs), 1024))


def _vllm_engine(model: Any, prompts: Any, sampling: Sampling, tokenizer: Any, batches: Sequence[Batch]) -> Iterator[Finished]:
    """vLLM on a folder with the merged weights: all batches at once, its own scheduler orders them."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("engine vllm needs vLLM: pip install 'posttrain[vllm]' on a GPU machine, or use engine=transformers")
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        engine = vllm.LLM(folder, dtype=str(model.dtype).removeprefix("torch."), seed=sampling.seed)
    settings = vllm.SamplingParams(
        n=sampling.num_samples, max_tokens=sampling.max_new_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
        stop_token_ids=[tokenizer.eos_token_id], seed=sampling.seed, logprobs=0,
    )  # fmt: skip
    order = [i for _, indices in batches for i in indices]
    outputs = engine.generate([{"prompt_token_ids": list(prompts[i])} for i in order], settings)
    yield order, [[_from_vllm(sample) for sample in output.outputs] for output in outputs]


def _from_vllm(sample: Any) -> Completion:
    ids = list(sample.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, sample.logprobs or [], strict=False)]
    return Completion(ids, "stop" if sample.finish_reason == "stop" else "length", logprobs)


def _as_completion(ids: list[int], stop_id: int) -> Completion:
    finish: Literal["stop", "length"] = "stop" if ids and ids[-1] == stop_id else "length"
    return Completion(ids, finish, [])

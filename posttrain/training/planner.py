"""What an optimizer step takes: memory and seconds. Arithmetic on a model's shape and a config's numbers, for `--dry-run`.

Bytes of a layer are those that bench/kept.py counts. The rates are fitted to rows of results/; docs/planning.md has what is
predicted beside what was measured, and tests/test_planner.py holds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.training.machines import GIB, Machine

# Seconds to launch the kernels of one layer in one direction. Work of the host's CPU, so taken for every card (EXPERIMENTS.md,
# 2026-11-27: every step waits for Python). PEFT's layers launch half as many again, lean ones a seventh.
LAUNCH, PEFT_LAUNCHES, LEAN_LAUNCHES = 2.7e-3, 1.5, 1.15
# Replayed layers wait for nothing: the seconds of a GPU to unpack a layer, the share of a card's rate that is left when it never
# waits, and what Python does around the layers of a micro-batch (EXPERIMENTS.md, 2026-11-28).
REPLAYED_UNPACK, REPLAYED_AT, REPLAYED_AROUND = 0.14e-3, 0.47, 0.03
UNPACK = 2.0e-3  # seconds to unpack the seven NF4 matrices of a layer, each time that they are needed
# Decoding: shares of the bandwidth at which weights, and keys and values, are read; a layer's kernels in a CUDA graph; and what
# the loop's choice of a token takes a logit (EXPERIMENTS.md, 2026-11-27, where the time of a decoding step goes).
WEIGHTS_AT, SEATS_CACHE_AT, LOOP_CACHE_AT, LAYER_STEP, LOOP_LOGIT = 0.69, 0.78, 0.33, 50e-6, 17e-12
AROUND = 1.1  # a GRPO step beside its products: rewards, folding the adapter, loading, logging
# What a process holds beside these sums: CUDA's context; on a CPU Python, the libraries and oneDNN's buffers.
CONTEXT, CPU_PROCESS = 1.0 * GIB, 1.9 * GIB
NF4_BYTES = 0.5 + 4 / 64  # a weight, with an fp32 scale for each block of 64


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, in numbers of entries."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_width: int
    vocab: int
    tied: bool

    @property
    def linear(self) -> int:
        """Weights of the linear layers, without the head."""
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * self.kv_width + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def embedding(self) -> int:
        return self.head * (1 if self.tied else 2)


@dataclass(frozen=True)
class Rollouts:
    """What GRPO samples for a window, and how."""

    rows: int  # completions at once
    prompt: float  # tokens
    new: float  # tokens of a completion
    steps: float  # optimizer steps that they serve; below 1 where a step takes several such rounds
    seats: bool
    reference: bool  # KL to a reference: a further pass
    group: int  # completions of a question
    width: float = 2  # bytes of a weight of the copy, but for its head's
    cached: float = 2  # bytes of an entry of keys and values


@dataclass(frozen=True)
class Step:
    """What one process computes and keeps in one optimizer step."""

    shape: Shape
    micro_batches: int
    rows: int  # of a micro-batch
    length: float  # positions of its longest row: what memory is for
    positions: float  # of a micro-batch on average, padding included: what time is for
    trained: float  # parameters
    rank: int = 32
    width: int = 2  # bytes of a value
    all_weights: bool = False
    nf4: bool = False  # packed in memory
    checkpointing: bool = False
    lean: bool = False
    replayed: bool = False  # layers as CUDA graphs
    part_tokens: int | None = None  # positions that are learnt from at once; None: those of a micro-batch
    fused: bool = True  # Liger's norm, rotary embedding and MLP
    fast_adapter: bool = True
    probabilities: bool = False  # attention keeps them, as by matrix products on a CPU
    moments: float = 8  # bytes that the optimizer keeps of a trained parameter: Adam's two in fp32
    rollouts: Rollouts | None = None

    @property
    def rows_at_once(self) -> float:
        """Rows that are learnt from at once: a part has one at least."""
        return min(self.rows, max(1.0, self.part_tokens / self.length)) if self.part_tokens else self.rows

    @property
    def parts(self) -> int:
        """Of a micro-batch."""
        return math.ceil(self.positions / self.part_tokens) if self.part_tokens else 1


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by what they are for."""

    weights: float
    optimizer: float  # fp32 weights, gradients and the optimizer's moments of what is trained
    activations: float
    logits: float  # of GRPO's completions, where the head keeps them
    rollouts: float  # the copy that generates, with its keys and values
    reference: float  # the model as it was, where all weights are trained
    process: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(step: Step, on_gpu: bool) -> Memory:
    """The peak of a step. It is torch's `max_memory_allocated` on a GPU, the process's resident set on a CPU."""
    shape, rollouts = step.shape, step.rollouts
    weights = shape.linear * (NF4_BYTES if step.nf4 else step.width) + shape.embedding * step.width
    if step.all_weights:  # of the base itself, only what autocast keeps of a step in the narrower dtype
        weights = shape.linear * step.width if step.width < 4 else 0.0
    logits = cache = reference = 0.0
    if rollouts:
        logits = step.rows_at_once * rollouts.new * shape.vocab * 4 if on_gpu and not step.replayed else 0.0
        places = rollouts.prompt + rollouts.new
        places = math.ceil(places / 64) * 64 if rollouts.seats else places
        cache = rollouts.rows * places * cache_bytes(shape) * rollouts.cached / 2 + copy_bytes(step)
        reference = 4.0 * (shape.linear + shape.embedding) if step.all_weights and rollouts.reference else 0.0
    process = 0.0 if on_gpu else CPU_PROCESS
    return Memory(weights, (8 + step.moments) * step.trained, activation_bytes(step), logits, cache, reference, process)


def cache_bytes(shape: Shape) -> int:
    """Keys and values of a token, in bf16."""
    return 2 * shape.layers * shape.kv_width * 2


def copy_bytes(step: Step) -> float:
    """The policy's copy that generates. The embedding is shared where it is not trained."""
    if not step.all_weights:
        return (step.rollouts.width if step.rollouts else 2.0) * step.shape.linear
    return 2.0 * (step.shape.linear + step.shape.embedding) if step.width < 4 else 0.0


def activation_bytes(step: Step) -> float:
    """What the backward pass reads of a micro-batch."""
    shape, positions = step.shape, step.rows_at_once * step.length
    kept = positions * layer_bytes(step)
    if step.probabilities:  # half a square for each head
        kept += step.rows_at_once * shape.heads * step.length**2 / 2 * step.width
    unpacked = shape.linear / shape.layers * step.width * step.nf4
    # A replayed layer is run once beside all that is kept, before a graph of it is made.
    trial = kept + unpacked if step.replayed else 0.0
    if step.checkpointing:  # every layer's input, and one layer at a time, a lean one with its weights
        stream = 4 if step.all_weights else step.width
        return kept + unpacked * step.lean + positions * shape.layers * shape.hidden * stream + trial
    return kept * shape.layers + trial


def layer_bytes(step: Step) -> float:
    """What a layer keeps of a token: EXPERIMENTS.md, 2026-11-27, counted by bench/kept.py."""
    hidden, inner, kv = step.shape.hidden, step.shape.inner, step.shape.kv_width
    adapters = 0 if step.all_weights else 7 * step.rank
    if step.lean:
        return (4 * hidden + 2 * kv + 2 * inner + adapters) * step.width
    # fp32 weights of norms make their outputs fp32 where all weights are trained.
    stream = 4 if step.all_weights else step.width
    norms, gated = (6, 3) if step.fused else (8, 4)
    if not step.fast_adapter and not step.all_weights:
        norms += 4
    return norms * hidden * stream + (2 * kv + gated * inner + adapters) * step.width


# --- seconds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Of an optimizer step, by what they are for."""

    update: float
    reference: float = 0.0
    rollouts: float = 0.0

    @property
    def total(self) -> float:
        parts = self.update + self.reference + self.rollouts
        return parts * AROUND if self.rollouts else parts


def seconds(step: Step, machine: Machine) -> Seconds:
    """Forward, backward and what is computed again; with rollouts the sampling and the reference, for one step."""
    passes = 3 if step.checkpointing else 2
    launches = (LEAN_LAUNCHES if step.lean else 1.0) * (1.0 if step.fast_adapter or step.all_weights else PEFT_LAUNCHES)
    waits = passes * step.shape.layers * (LAUNCH * launches + UNPACK * step.nf4) if machine.is_gpu else 0.0
    share = machine.trains_at
    if step.replayed:
        waits, share = passes * step.shape.layers * REPLAYED_UNPACK * step.nf4 + REPLAYED_AROUND, min(share, REPLAYED_AT)
    # Forward 2 a weight and position; back 2 for the input's gradient, and 2 more for a weight that is trained.
    weight_flops = (6 if step.all_weights else 4) + 2 * step.checkpointing
    adapters = 0.0 if step.all_weights else 6 * step.trained
    scored = step.rows * step.rollouts.new if step.rollouts else 0.0  # SFT's labels are few
    flops = step.positions * (weight_flops * step.shape.linear + adapters) + scored * 4 * step.shape.head
    update = step.micro_batches * (step.parts * waits + flops / (machine.flops * share))
    if step.rollouts is None:
        return Seconds(update)
    sampled = rollout_seconds(step, step.rollouts, machine) / step.rollouts.steps
    return Seconds(update, reference_seconds(step, machine) if step.rollouts.reference else 0.0, sampled)


def reference_seconds(step: Step, machine: Machine) -> float:
    """One pass over all completions of the step."""
    flops = 2 * step.micro_batches * step.positions * (step.shape.linear + step.shape.head)
    waits, share = step.shape.layers * (LAUNCH + UNPACK * step.nf4) if machine.is_gpu else 0.0, machine.trains_at
    if step.replayed:  # in the parts of the update, without what comes around a backward pass
        each = step.shape.layers * REPLAYED_UNPACK * step.nf4 + REPLAYED_AROUND / 2
        waits, share = step.micro_batches * step.parts * each, min(share, REPLAYED_AT)
    return waits + flops / (machine.flops * share)


def rollout_seconds(step: Step, rollouts: Rollouts, machine: Machine) -> float:
    """Prompts, then one token for all rows, as often as the longest completion is long. A group's prompt is computed once."""
    shape = step.shape
    rate = machine.flops * machine.trains_at
    prompts = 2 * rollouts.rows / rollouts.group * rollouts.prompt * shape.linear / rate
    read = (rollouts.width * shape.linear + 2.0 * shape.head) / (machine.bandwidth * WEIGHTS_AT)
    products = rollouts.rows * 2.0 * (shape.linear + shape.head) / rate  # 2 flops a weight and row
    share = SEATS_CACHE_AT if rollouts.seats else LOOP_CACHE_AT
    cached = rollouts.rows * (rollouts.prompt + rollouts.new / 2) * cache_bytes(shape) / (machine.bandwidth * share)
    chosen = 0.0 if rollouts.seats else rollouts.rows * shape.vocab * LOOP_LOGIT
    around = shape.layers * LAYER_STEP + chosen if machine.is_gpu else 0.0
    return prompts + rollouts.new * (max(read, products) + cached + around)


def evaluation_seconds(step: Step, asked: Rollouts, total: int, machine: Machine) -> float:
    """To answer `total` prompts, `asked.rows` at a time: the next takes a seat as one falls free; a loop ends its batch first."""
    rounds = total / asked.rows if asked.seats and total > asked.rows else math.ceil(total / asked.rows)
    return rounds * rollout_seconds(step, replace(asked, rows=min(asked.rows, total)), machine)


def rows_at_once(shape: Shape, tokens: float, machine: Machine) -> int:
    """As generation/engines.py counts them: rows whose keys and values, `tokens` long, fill a third of the memory."""
    return min(512 if machine.is_gpu else 128, max(1, int(machine.memory / 3 / (cache_bytes(shape) * tokens))))


# --- what a step is planned of -----------------------------------------------------------------------------------------


def padded(lengths: Sequence[int], rows: int, by_length: bool) -> float:
    """Positions of a micro-batch on average, each as wide as its longest row."""
    ordered = sorted(lengths) if by_length else list(lengths)
    batches = [ordered[at : at + rows] for at in range(0, len(ordered), rows)]
    return rows * sum(max(batch) for batch in batches) / len(batches)


def shape_of(config: dict[str, Any]) -> Shape:
    """Sizes by a model's config.json."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_width = config.get("num_key_value_heads", heads) * (config.get("head_dim") or hidden // heads)
    tied = bool(config.get("tie_word_embeddings"))
    return Shape(hidden, config["intermediate_size"], config["num_hidden_layers"], heads, kv_width, config["vocab_size"], tied)

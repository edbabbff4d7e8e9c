"""Prompts -> completions, with one signature for every engine. `transformers` is loop.py's loop; the others are libraries."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import Engine
from posttrain.console import answering
from posttrain.errors import UserError
from posttrain.generation import decoder, seats, vllm_engine
from posttrain.generation.loop import Completion, Sampling, decode_batch, prepare_to_decode
from posttrain.kernels.packed_linear import packed_weights

Batch = tuple[int, list[int]]  # its number in the plan, and the indices of its prompts


class Finished(NamedTuple):
    """A finished batch: which prompts, and the completions of each."""

    indices: list[int]
    completions: list[list[Completion]]
    num_slots: int = 0  # rows x steps that were decoded, with or without a token in them; 0: the engine does not say


class Generated(NamedTuple):
    completions: list[list[Completion]]  # of every prompt, in the order of the prompts
    num_slots: int


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices by falling prompt length, cut into batches: little padding, and if a batch does not fit, the first one fails.

    The plan depends on nothing but its arguments, so an interrupted evaluation finds the same batches again.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def auto_batch_size(model: PreTrainedModel, num_tokens: int, num_samples: int, num_processes: int = 1) -> int:
    """As many prompts in a batch as can be decoded at a time; where a free seat takes the next prompt, several times as many."""
    rounds = ROUNDS if decoder.fits(model) else 1
    return max(1, rounds * rows_at_once(model, num_tokens, num_processes) // num_samples)


# A batch is what an interrupted evaluation decodes again, and at the end of each its seats stand empty.
ROUNDS = 4


def rows_at_once(model: PreTrainedModel, num_tokens: int, num_processes: int = 1) -> int:
    """As many rows as keep their keys and values within a third of the memory.

    It counts the memory that the machine has, not what happens to be free: the same machine always gets the same batches.
    """
    on_gpu = model.device.type == "cuda"
    memory = memory_bytes(model.device) // (1 if on_gpu else num_processes)
    return min(512 if on_gpu else 128, max(1, memory // 3 // (bytes_per_token(model) * num_tokens)))


def bytes_per_token(model: PreTrainedModel) -> int:
    """Of keys and values, in all layers."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # GPT-NeoX groups no heads
    return int(2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize)


def memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None = None,
    engine: Engine = "transformers",
) -> Generated:
    """Completions of every prompt, `sampling.num_samples` each, and the slots that decoding them took."""
    lengths = [len(prompt) for prompt in prompts]
    size = batch_size or auto_batch_size(model, max(lengths) + sampling.max_new_tokens, sampling.num_samples)
    batches = list(enumerate(plan_batches(lengths, size)))
    results: list[list[Completion]] = [[] for _ in prompts]
    num_slots = 0
    for finished in engine_batches(engine, model, prompts, sampling, tokenizer, batches):
        num_slots += finished.num_slots
        answering.finished(len(finished.indices))
        for index, completions in zip(finished.indices, finished.completions, strict=True):
            results[index] = completions
    return Generated(results, num_slots)


def generate_watched(
    model: PreTrainedModel,
    prompt: Sequence[int],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    watch: Callable[[int], None],
) -> Completion:
    """The first completion that the loop decodes of a batch of this prompt alone; `watch` gets each token as it is chosen."""

    def tell(tokens: torch.Tensor) -> None:
        if (token := int(tokens[0])) >= 0:
            watch(token)

    prepare_to_decode(model)
    with packed_weights(model):
        [[completion, *_]], _ = decode_batch(model, [prompt], sampling, tokenizer.eos_token_id, watch=tell)
    return completion


def engine_batches(
    engine: Engine,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
) -> Iterator[Finished]:
    """Decode the batches and yield each one as soon as it is finished."""
    run = {
        "transformers": _transformers_engine,
        "continuous_batching": _continuous_batching_engine,
        "vllm": _vllm_engine,
    }[engine]
    return run(model, prompts, sampling, tokenizer, batches)


def _transformers_engine(
    model: Any, prompts: Any, sampling: Sampling, tokenizer: Any, batches: Sequence[Batch]
) -> Iterator[Finished]:
    prepare_to_decode(model)
    with packed_weights(model):
        for number, indices in batches:
            asked = [prompts[i] for i in indices]
            yield Finished(indices, *_decode(model, asked, sampling, tokenizer.eos_token_id, number))


def _decode(model: Any, prompts: Any, sampling: Sampling, stop_id: int, number: int) -> tuple[list[list[Completion]], int]:
    if not decoder.fits(model):
        return decode_batch(model, prompts, sampling, stop_id, number)
    num_seats = rows_at_once(model, max(map(len, prompts)) + sampling.max_new_tokens)
    return seats.decode_batch(model, prompts, sampling, stop_id, number, num_seats)


def _continuous_batching_engine(
    model: Any, prompts: Any, sampling: Sampling, tokenizer: Any, batches: Sequence[Batch]
) -> Iterator[Finished]:
    """transformers' own continuous batching. It keeps no log-probabilities."""
    if model.config._attn_implementation in ("grouped", "matmul", "varlen"):  # transformers' paged cache does not know ours
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
        with torch.random.fork_rng(), torch.no_grad():  # generate_batch fails in inference_mode
            torch.manual_seed((sampling.seed * 1_000_003 + number) % 2**63)
            outputs = model.generate_batch(inputs, settings, continuous_batching_config=paging, progress_bar=False)
        ordered = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[1]))
        flat = [_as_completion(list(output.generated_tokens), tokenizer.eos_token_id) for output in ordered]
        k = sampling.num_samples
        yield Finished(indices, [flat[start : start + k] for start in range(0, len(flat), k)])


def _just_enough(inputs: Sequence[Sequence[int]], max_new_tokens: int) -> ContinuousBatchingConfig:
    """A cache for these sequences alone. By default transformers takes and fills nine tenths of the memory of a CPU machine."""
    page, longest = 64, max(map(len, inputs))
    pages = sum(-(-(len(ids) + max_new_tokens) // page) for ids in inputs)
    return ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=max(longest, len(inputs), 1024))


def _vllm_engine(model: Any, prompts: Any, sampling: Sampling, tokenizer: Any, batches: Sequence[Batch]) -> Iterator[Finished]:
    """vLLM gets all batches at once, and its own scheduler orders them."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("engine vllm needs vLLM: pip install 'posttrain[vllm]' on a GPU machine, or use engine=transformers")
    order = [i for _, indices in batches for i in indices]
    if not order:
        return
    longest = max(len(prompts[i]) for i in order) + sampling.max_new_tokens
    rows = min(rows_at_once(model, longest), len(order) * sampling.num_samples)
    room = vllm_engine.Room(rows, longest, bytes_per_token(model), memory_bytes(model.device))
    yield Finished(order, vllm_engine.complete(model, prompts, order, sampling, tokenizer, room))


def _as_completion(ids: list[int], stop_id: int) -> Completion:
    finish: Literal["stop", "length"] = "stop" if ids and ids[-1] == stop_id else "length"
    return Completion(ids, finish, [])

"""vLLM in this process: started once for a model, and handed the model's weights again at every later call.

Read against vLLM 0.26. Each call gives token ids and gets token ids: vLLM tokenizes, detokenizes and renders nothing.
"""

from __future__ import annotations

import os
import random
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.generation.loop import Completion, Sampling
from posttrain.phases import phase

PAGE = 16  # tokens of a block of vLLM's cache, by its default


class Room(NamedTuple):
    """What the cache has to hold, and how much of the machine's memory that is."""

    rows: int  # decoded at a time
    tokens: int  # of the longest row, prompt and completion
    bytes_per_token: int
    memory_bytes: int

    @property
    def pages(self) -> int:
        return self.rows * -(-self.tokens // PAGE) + 1  # vLLM keeps one for itself


_started: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()


def complete(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    room: Room,
) -> list[list[Completion]]:
    """Completions of the prompts of these indices, in their order. A prompt's index fixes its draws, whatever else is asked.

    vLLM's models choose their own dtypes, so a trainer's autocast must not reach them.
    """
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        engine = _with_weights_of(model, tokenizer, room)
        asked = [{"prompt_token_ids": list(prompts[i])} for i in indices]
        with phase("decode"):
            outputs = engine.generate(asked, [_settings(sampling, i, tokenizer.eos_token_id) for i in indices], use_tqdm=False)
    return [[_as_completion(sample) for sample in output.outputs] for output in outputs]


def _with_weights_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, room: Room) -> Any:
    engine = _started.get(model)
    if engine is None:
        with phase("start"), _random_state_kept():
            engine = _started[model] = _start(model, tokenizer, room)
    else:
        with phase("hand_over"):
            engine.apply_model(lambda copy: _hand_over(model, copy))
            engine.reset_prefix_cache()  # its keys and values are of the weights before
    return engine


def _hand_over(model: PreTrainedModel, copy: Any) -> None:
    """Give vLLM's model the weights of ours, under the names that a file has. It copies them into its own tensors."""
    weights = revert_weight_conversion(model, dict(model.named_parameters()))
    loaded = copy.load_weights(weights.items())
    missing = sorted({name for name, _ in copy.named_parameters()} - loaded)
    assert not missing, f"vLLM's model kept its old weights: {', '.join(missing[:3])}"


def _start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, room: Room) -> Any:
    """An engine beside the model. It takes memory for `room` and its weights, where vLLM by default takes the whole card."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in a process of its own no weights could be handed over by reference
    import vllm

    cache = room.pages * PAGE * room.bytes_per_token
    longest = getattr(model.config, "max_position_embeddings", None) or room.tokens
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return vllm.LLM(
            folder,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=min(longest, (room.pages - 1) * PAGE),  # later prompts may be longer than the first ones
            max_num_seqs=room.rows,
            kv_cache_memory_bytes=cache,
            gpu_memory_utilization=cache / room.memory_bytes,  # it then only says how much must be free at the start
            logprobs_mode="processed_logprobs",  # as sampled: those of the logits over the temperature
        )


def _settings(sampling: Sampling, index: int, stop_id: int) -> Any:
    """Every prompt has seeds of its own: vLLM draws by seed and position, so equal seeds would be equal draws."""
    import vllm

    return vllm.SamplingParams(
        n=sampling.num_samples,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=(sampling.seed * 1_000_003 + index * sampling.num_samples) % 2**62,  # sample i has this one + i
        logprobs=0 if sampling.temperature > 0 else None,  # of the sampled token; nobody reads those of greedy ones
        ignore_eos=True,  # without it every end token of generation_config.json would stop, and here one alone does
        stop_token_ids=[stop_id],
        detokenize=False,
    )


def _as_completion(sample: Any) -> Completion:
    ids = list(sample.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, sample.logprobs, strict=True)] if sample.logprobs else []
    return Completion(ids, "stop" if sample.finish_reason == "stop" else "length", logprobs)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds all generators of its process when it starts, and a trainer's draws must not depend on it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)

"""vLLM as far as posttrain calls it, with the names and the habits of 0.26, and a model of transformers inside.

`install` puts it into the place of the package. test_vllm_engine.py holds its names to the real one's where that is installed.
"""

import dataclasses
import importlib.machinery
import json
import random
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM

LLM_ARGUMENTS = {
    "model", "dtype", "max_model_len", "max_num_seqs", "kv_cache_memory_bytes", "gpu_memory_utilization", "logprobs_mode", "seed",
    "generation_config",
}  # fmt: skip


@dataclasses.dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclasses.dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str


@dataclasses.dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class _Model(torch.nn.Module):
    """Its tensors are its own: `load_weights` copies into them, and says into which."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.keeps = ()  # weights that it would not take

    def named_parameters(self, *args, **kwargs):
        return self.inner.named_parameters(*args, **kwargs)

    def load_weights(self, weights):
        own = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            if name not in self.keeps:
                own[name].data.copy_(tensor)
                loaded.add(name)
        return loaded


class LLM:
    started: ClassVar[list] = []  # the arguments of each

    def __init__(self, model, *, logprobs_mode="raw_logprobs", seed=0, **settings):
        if unknown := settings.keys() - LLM_ARGUMENTS:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {min(unknown)!r}")
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        self.model = _Model(AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, settings["dtype"])).eval())
        generation = Path(model, "generation_config.json")
        ends = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        self.logprobs_mode, self.settings, self._cache = logprobs_mode, settings, {}
        LLM.started.append(settings)

    def apply_model(self, func):
        return [func(self.model)]

    def reset_prefix_cache(self):
        self._cache.clear()
        return True

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert not torch.is_autocast_enabled("cpu"), "a trainer's autocast reaches vLLM's model"
        assert len(prompts) == len(sampling_params)
        return [
            RequestOutput([self._sample(prompt["prompt_token_ids"], params, number) for number in range(params.n)])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _sample(self, prompt, params, number):
        assert len(prompt) + params.max_tokens <= self.settings["max_model_len"]
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else self.ends)
        ids, logprobs = [], []
        while len(ids) < params.max_tokens and not (ids and ids[-1] in stops):
            logits = self._logits(prompt, ids)
            processed = logits / (params.temperature or 1.0)
            token = int(processed.argmax())
            if params.temperature:  # by seed and position alone
                noise = torch.Generator().manual_seed((params.seed + number) * 10_007 % 2**63 + len(prompt) + len(ids))
                token = int((processed.softmax(0) / torch.empty_like(logits).exponential_(generator=noise)).argmax())
            shown = processed if self.logprobs_mode == "processed_logprobs" else logits
            ids.append(token)
            logprobs.append({token: Logprob(float(shown.log_softmax(0)[token]))})
        stopped = bool(ids) and ids[-1] in stops
        return CompletionOutput(ids, None if params.logprobs is None else logprobs, "stop" if stopped else "length")

    def _logits(self, prompt, ids):
        """Of the next token. Those of a prompt alone are kept, as its keys and values would be."""
        rows = torch.tensor([[*prompt, *ids]])
        if ids:
            return self.model.inner(rows).logits[0, -1]
        if tuple(prompt) not in self._cache:
            self._cache[tuple(prompt)] = self.model.inner(rows).logits[0, -1]
        return self._cache[tuple(prompt)]


def install(monkeypatch):
    package = types.ModuleType("vllm")
    package.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    package.LLM, package.SamplingParams = LLM, SamplingParams
    LLM.started = []
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")

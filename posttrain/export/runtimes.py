"""What answers: transformers, or llama.cpp. Both are asked the same token ids, and both give tokens and logits."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.console import answering
from posttrain.errors import UserError
from posttrain.generation.engines import generate
from posttrain.generation.loop import Sampling
from posttrain.models.reference import reference_of

AT_ONCE = 16  # sequences that llama.cpp decodes together; on two cores 32 are no faster
INSTALL = "pip install 'posttrain[gguf]' (it compiles llama.cpp: a C++ compiler and minutes)"


class Answers(NamedTuple):
    """Greedy tokens of each prompt, the stop token included where there is one, and how fast they came."""

    tokens: list[list[int]]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


class Runtime(Protocol):
    name: str

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Answers:
        """Greedy answers, with the prompts' time in the seconds."""

    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """The logits that each token of the answer is chosen from, (tokens, vocabulary), fp32."""

    def tokenize(self, text: str) -> list[int]:
        """A rendered chat in token ids, nothing added."""


class Transformers:
    """A plain model in transformers; greedy tokens by this project's loop, which are `generate`'s."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.plain = reference_of(model)  # the same weights: decoding changes how a model attends

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Answers:
        begun = time.perf_counter()
        found = generate(self.model, prompts, Sampling(max_new_tokens), self.tokenizer).completions
        return Answers([completion.ids for (completion,) in found], time.perf_counter() - begun)

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *answer]], device=self.model.device)
        return self.plain(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float().cpu()

    def tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def llama_cpp() -> Any:
    """The bindings of llama.cpp, silent.

    Raises:
        UserError: they are not installed.
    """
    try:
        import llama_cpp as library
    except ImportError as error:
        raise UserError(f"--format gguf and ollama need llama-cpp-python: {INSTALL}") from error
    return library


class LlamaCpp:
    """A GGUF file in llama.cpp on the CPU, by its C functions: llama-cpp-python's own class decodes one sequence at a time."""

    name = "llama.cpp"

    def __init__(self, file: Path, stop_id: int, context: int) -> None:
        """`context` is the longest sequence, prompt and answer."""
        self.library = library = llama_cpp()
        self.stop_id = stop_id
        library.llama_backend_init()
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        with _silent() as said:
            self.model = library.llama_model_load_from_file(os.fsencode(file), library.llama_model_default_params())
            if not self.model:
                raise UserError(f"llama.cpp does not load this model as GGUF ({_last_line(said)}): use --format merged")
            settings = library.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = AT_ONCE * (-(-context // 256) * 256), AT_ONCE
            settings.n_batch = AT_ONCE * context
            settings.n_threads = settings.n_threads_batch = self.threads
            self.context = library.llama_init_from_model(self.model, settings)
        self.batch = library.llama_batch_init(AT_ONCE * context, 0, AT_ONCE)
        self.vocabulary = library.llama_model_get_vocab(self.model)
        self.size = library.llama_vocab_n_tokens(self.vocabulary)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = (self.library.llama_token * (len(data) + 1))()
        count = self.library.llama_tokenize(self.vocabulary, data, len(data), room, len(room), False, True)
        return list(room[:count])

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Answers:
        begun = time.perf_counter()
        answers: list[list[int]] = [[] for _ in prompts]
        waiting = list(range(len(prompts)))
        seated = {seat: waiting.pop(0) for seat in range(min(AT_ONCE, len(prompts)))}
        self._forget()
        while seated:
            seated = dict(sorted(seated.items()))
            feed = {seat: answers[number][-1:] or list(prompts[number]) for seat, number in seated.items()}
            starts = {seat: len(prompts[seated[seat]]) + len(answers[seated[seat]]) - len(ids) for seat, ids in feed.items()}
            chosen = self._decode(feed, starts, dict.fromkeys(feed, 1)).argmax(-1).tolist()
            for (seat, number), token in zip(list(seated.items()), chosen, strict=True):
                answers[number].append(token)
                if token == self.stop_id or len(answers[number]) == max_new_tokens:
                    answering.finished(1)
                    self._forget(seat)
                    del seated[seat]
                    if waiting:
                        seated[seat] = waiting.pop(0)
        return Answers(answers, time.perf_counter() - begun)

    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        self._forget()
        ids = [*prompt, *answer[:-1]]
        return self._decode({0: ids}, {0: 0}, {0: len(answer)})

    def _forget(self, seat: int = -1) -> None:
        """What one sequence holds, or all."""
        self.library.llama_memory_seq_rm(self.library.llama_get_memory(self.context), seat, -1, -1)

    def _decode(self, feed: dict[int, list[int]], starts: dict[int, int], wanted: dict[int, int]) -> torch.Tensor:
        """Feed tokens to sequences, and take the logits at the last `wanted` of each, (all wanted, vocabulary)."""
        # llama.cpp takes sequences with consecutive numbers, in their order, together: others in several passes.
        assert list(feed) == sorted(feed)
        batch, place, places = self.batch, 0, []
        for row, ids in feed.items():
            for offset, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, starts[row] + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                keep = offset >= len(ids) - wanted[row]
                batch.logits[place] = keep
                places += [place] if keep else []
                place += 1
        batch.n_tokens = place
        if status := self.library.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {status} for {place} tokens")
        pointers = [self.library.llama_get_logits_ith(self.context, place) for place in places]
        return torch.stack([torch.from_numpy(np.ctypeslib.as_array(one, (self.size,)).copy()) for one in pointers])

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        with _silent():
            self.library.llama_batch_free(self.batch)
            self.library.llama_free(self.context)
            self.library.llama_model_free(self.model)


QUANTS = {"f16": "LLAMA_FTYPE_MOSTLY_F16", "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}


def quantize(source: Path, target: Path, quant: str) -> None:
    """llama.cpp's own quantizer: which tensor gets how many bits is its choice."""
    library = llama_cpp()
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, QUANTS[quant])
    settings.nthread = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    with _silent():
        status = library.llama_model_quantize(os.fsencode(source), os.fsencode(target), settings)
    if status:
        raise UserError(f"llama.cpp's quantizer refuses {quant} for this model (status {status}): choose another --quant")


@contextmanager
def _silent() -> Iterator[BinaryIO]:
    """What llama.cpp's C code prints to file descriptors 1 and 2 goes into the file that this gives."""
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as said:
        try:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            yield said
        finally:
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


def _last_line(said: BinaryIO) -> str:
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it does not say why"

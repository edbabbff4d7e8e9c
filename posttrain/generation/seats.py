"""Decoding in seats: a batch has more rows than seats, and a seat that falls free takes the next prompt.

loop.py decodes a batch until its last row is done, with every row at the same place of one left-padded buffer. Here each row has
its own place. All of a step runs on the device, the choice of tokens and the test for the end included, and on CUDA as one graph;
the host looks every few steps for rows that are done. What a row draws depends on its batch, its row and its step, as in loop.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from posttrain.console import answering
from posttrain.generation import loop
from posttrain.generation.decoder import Decoder
from posttrain.generation.steps import release_graphs
from posttrain.kernels import decoding
from posttrain.phases import phase

STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}
# A step is made for these numbers of rows. Each is a graph, which takes about 0.07 s to make; below 64 rows a step of a small
# model takes as long for one row as for all (H100, 0.5B: 1.2 ms; 128 rows 1.4, 512 rows 2.3).
ROWS = (1, 4, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512)


def rows_for(n: int) -> int:
    """The number of rows of the step that decodes n."""
    return next((rows for rows in ROWS if rows >= n), -(-n // 128) * 128)


@torch.no_grad()
def decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: loop.Sampling,
    stop_id: int,
    batch: int = 0,
    max_seats: int = 512,
) -> tuple[list[list[loop.Completion]], int]:
    """loop.decode_batch with at most `max_seats` rows at a time."""
    seats = min(len(prompts) * sampling.num_samples, max(max_seats, sampling.num_samples))
    with _device_of(model):
        table = _Table(model, prompts, sampling, stop_id, batch, seats)
        while table.waiting or table.seated:
            table.admit()
            with phase("decode"):
                table.decode()
                table.leave()
        return table.completions(), table.num_slots


@torch.no_grad()
def greedy_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_steps: int
) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of each prompt, and the logits that they were chosen from, (prompts, num_steps, vocabulary)."""
    release_graphs(model)  # graphs that were made before do not write to `watched`
    with _device_of(model):
        table = _Table(model, prompts, loop.Sampling(num_steps), -1, 0, len(prompts))
        table.steps.watched = seen = torch.zeros(len(prompts), model.config.vocab_size, device=model.device)
        table.admit()
        logits = [seen.clone()]
        for _ in range(num_steps - 1):
            table.steps(len(prompts))
            logits.append(seen.clone())
        return table.steps.tokens[:, :num_steps].tolist(), torch.stack(logits, 1)


def _device_of(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which is the model's only where somebody has said so."""
    return torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()


class _Table:
    """The state of one batch. `seated` lists the rows of the front seats; the prompts from `waiting` on have none yet."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: loop.Sampling,
        stop_id: int,
        batch: int,
        seats: int,
    ) -> None:
        self.model, self.prompts, self.sampling, self.stop_id = model, prompts, sampling, stop_id
        self.device, self.num_seats = model.device, seats
        num_rows = len(prompts) * sampling.num_samples
        self.uniform = loop.draws(sampling, batch, num_rows).to(self.device)
        self.tokens = torch.full((num_rows, sampling.max_new_tokens), -1, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(num_rows, sampling.max_new_tokens, device=self.device)
        self.steps = _steps_of(model, seats, max(map(len, prompts)) + sampling.max_new_tokens, sampling)
        self.next_prompt, self.seated, self.num_slots = 0, list[int](), 0

    @property
    def waiting(self) -> int:
        return len(self.prompts) - self.next_prompt

    # --- prompts take their seats

    def admit(self) -> None:
        """Give free seats to the next prompts, a prompt with all of its samples, once an eighth of the seats is free."""
        free, k = self.num_seats - len(self.seated), self.sampling.num_samples
        worth = not self.seated or free >= min(self.num_seats // 8, self.waiting * k)
        many = min(self.waiting, free // k) if worth else 0
        asked = self.prompts[self.next_prompt : self.next_prompt + many]
        with phase("prefill"):
            for prompts in loop.slices(asked, loop.PREFILL_TOKENS[self.device.type]):
                self._prefill(prompts)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        k, first = self.sampling.num_samples, self.next_prompt * self.sampling.num_samples
        rows = torch.arange(first, first + len(prompts) * k, device=self.device)
        seats = slice(len(self.seated), len(self.seated) + len(rows))
        self.next_prompt += len(prompts)
        self.seated += rows.tolist()
        self.steps.uniform[seats, : self.uniform.shape[1]] = self.uniform[rows]
        logits = self.steps.decoder.prefill(prompts, range(seats.start, seats.stop, k))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.steps.share(seats, k, max(map(len, prompts)))
        self.steps.begin(seats, logits.repeat_interleave(k, 0), lengths.repeat_interleave(k), self.stop_id)

    # --- and go

    def decode(self) -> None:
        n = min(rows_for(len(self.seated)), self.num_seats)
        for _ in range(STEPS_BETWEEN_LOOKS[self.device.type]):
            self.steps(n)
            self.num_slots += n

    def leave(self) -> None:
        """Take what is done out of its seats. The rest moves to the front where that makes room or a smaller step."""
        live = self.steps.live[: len(self.seated)].tolist()
        num_live = sum(live)
        answering.within_batch(self.next_prompt - -(-num_live // self.sampling.num_samples))
        if num_live == len(live):
            return
        shrinks = rows_for(num_live) < rows_for(len(live)) if num_live else True
        fills = self.waiting and self.num_seats - num_live >= min(self.num_seats // 8, self.waiting * self.sampling.num_samples)
        if not (shrinks or fills):
            return
        done = [seat for seat, goes_on in enumerate(live) if not goes_on]
        at, rows = (torch.tensor(x, device=self.device) for x in (done, [self.seated[seat] for seat in done]))
        self.tokens[rows] = self.steps.tokens[at, : self.sampling.max_new_tokens]
        self.logprobs[rows] = self.steps.logprobs[at, : self.sampling.max_new_tokens]
        holes = [seat for seat in done if seat < num_live]
        movers = [seat for seat in range(num_live, len(live)) if live[seat]]
        self.steps.move(movers, holes)
        for mover, hole in zip(movers, holes, strict=True):
            self.seated[hole] = self.seated[mover]
        self.steps.vacate(num_live)
        del self.seated[num_live:]

    def completions(self) -> list[list[loop.Completion]]:
        return loop.as_completions(self.tokens, self.logprobs, self.stop_id, self.sampling.num_samples)


class Steps:
    """What the seats hold, and the step of the front seats. `live` seats decode; the others write where nobody reads."""

    def __init__(self, model: PreTrainedModel, num_seats: int, capacity: int, max_new_tokens: int) -> None:
        device = model.device
        self.sizes = num_seats, capacity, max_new_tokens
        self.decoder = Decoder(model, num_seats, capacity)
        self.ids, self.place, self.step = (torch.zeros(num_seats, dtype=torch.long, device=device) for _ in range(3))
        self.live = torch.zeros(num_seats, dtype=torch.bool, device=device)
        self.tokens = torch.full((num_seats, max_new_tokens), -1, dtype=torch.long, device=device)
        self.logprobs, self.uniform = (torch.zeros(num_seats, max_new_tokens, device=device) for _ in range(2))
        self.rows = decoding.Rows(self.ids, self.place, self.step, self.live, self.tokens, self.logprobs)
        # Read by a graph as it runs, so that one graph serves every limit and every stop token.
        self.limit, self.stop = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.sampling = loop.Sampling(1)
        self.watched: torch.Tensor | None = None  # gets the logits of each seat, (num_seats, vocabulary)
        self.captured: dict[Any, Callable[[], None]] = {}

    def share(self, seats: slice, num_samples: int, width: int) -> None:
        """Copy the keys and values of each prompt from the seat of its first sample to those of the others."""
        if num_samples > 1:
            for tensor in self.decoder.cached():
                of_prompt = tensor[seats].view(-1, num_samples, *tensor.shape[1:])
                of_prompt[:, 1:, :, :width] = of_prompt[:, :1, :, :width]

    def begin(self, seats: slice, logits: torch.Tensor, lengths: torch.Tensor, stop_id: int) -> None:
        """Choose the first token of these seats from their prompts' logits."""
        self.stop.fill_(stop_id)
        self.limit.fill_(self.sampling.max_new_tokens)
        self.step[seats], self.tokens[seats] = 0, -1
        self.place[seats], self.live[seats] = lengths - 1, True
        self._advance(logits, seats)

    def __call__(self, n: int) -> None:
        """One token for the front n seats."""
        key = n, self.sampling.temperature, self.sampling.top_p
        if key not in self.captured:
            run = functools.partial(self._run, slice(0, n))
            self.captured[key] = capture(run, self) if self.live.is_cuda else run
        self.captured[key]()

    def _run(self, front: slice) -> None:
        self._advance(self.decoder(self.ids[front], self.place[front]), front)

    def _advance(self, logits: torch.Tensor, seats: slice) -> None:
        if self.watched is not None:
            self.watched[seats] = logits
        uniform = self.uniform[seats].gather(1, self.step[seats][:, None]).squeeze(1)
        rows = decoding.Rows(*(state[seats] for state in self.rows))
        decoding.advance(rows, *self._choose(logits, uniform), self.stop, self.limit)

    def _choose(self, logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sampling.temperature > 0 and self.sampling.top_p == 1 and decoding.use_triton(logits):
            return decoding.draw_in_two_passes(logits, uniform, self.sampling.temperature)
        return loop.choose(logits, self.sampling, uniform if self.sampling.temperature > 0 else None)

    def move(self, movers: list[int], holes: list[int]) -> None:
        """The rows of some seats take other seats."""
        if not movers:
            return
        source, target = (torch.tensor(x, device=self.live.device) for x in (movers, holes))
        end = int(self.place[source].max()) + 1
        for tensor in self.decoder.cached():
            tensor[target, :, :end] = tensor[source, :, :end]
        for state in (*self.rows, self.uniform):
            state[target] = state[source]

    def vacate(self, num_live: int) -> None:
        self.live[num_live:] = False
        self.place[num_live:] = 0
        self.step[num_live:] = 0


def capture(run: Callable[[], None], owner: Steps) -> Callable[[], None]:
    """As steps.capture, with one pool of memory for all graphs of a table: they never run at the same time.

    The state is put back after the run that lets kernels set up what they need, and after nothing else: a capture runs nothing.
    """
    before = [state.clone() for state in owner.rows]
    run()
    for state, kept in zip(owner.rows, before, strict=True):
        state.copy_(kept)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    pool = owner.__dict__.setdefault("pool", torch.cuda.graph_pool_handle())
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def _steps_of(model: PreTrainedModel, num_seats: int, capacity: int, sampling: loop.Sampling) -> Steps:
    """The steps kept with the model, made anew for a batch that is larger than all before."""
    kept: Steps | None = model.__dict__.get("_graphs")
    wanted: tuple[int, ...] = num_seats, -(-capacity // 64) * 64, sampling.max_new_tokens
    if kept is None or any(have < want for have, want in zip(kept.sizes, wanted, strict=True)):
        if kept is not None:
            wanted = tuple(map(max, kept.sizes, wanted))
        model.__dict__["_graphs"] = kept = None  # its memory is needed
        model.__dict__["_graphs"] = kept = Steps(model, *wanted)
    kept.sampling, kept.watched = sampling, None
    kept.vacate(0)
    return kept

"""Which questions GRPO asks next, by what its own rollouts have shown. Nothing is generated only to measure.

Resting: a question whose completions were all right or all wrong teaches nothing now. It is left out for `rest_steps` steps and
then asked again, which measures it anew. Extra rounds are DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): groups whose
rewards are all equal are replaced within the step by groups of other questions, drawn in rounds of as many as are still missing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from posttrain.config.schema import Curriculum as CurriculumSettings
from posttrain.errors import UserError


@dataclass(frozen=True)
class Group:
    """The completions of one question, with what the rewards paid and logged for them."""

    question: int  # its place in the training data
    inputs: list[dict[str, Any]]  # the row of the data set, once for each completion
    output: dict[str, list[Any] | None]  # prompt_ids, completion_ids and logprobs, as a rollout returns them
    scores: torch.Tensor  # (completions, functions)
    extras: dict[str, list[Any]]
    has_signal: bool
    pass_rate: float


@dataclass(frozen=True)
class Window:
    """The groups that one update learns from."""

    groups: list[Group]

    @property
    def inputs(self) -> list[dict[str, Any]]:
        return [row for group in self.groups for row in group.inputs]

    @property
    def output(self) -> dict[str, Any]:
        keys = self.groups[0].output
        return {key: _joined([group.output[key] for group in self.groups]) for key in keys}

    @property
    def scores(self) -> torch.Tensor:
        return torch.cat([group.scores for group in self.groups])

    @property
    def extras(self) -> dict[str, list[Any]]:
        columns = {column: None for group in self.groups for column in group.extras}
        return {
            column: [value for group in self.groups for value in group.extras.get(column, [None] * len(group.inputs))]
            for column in columns
        }


def _joined(parts: Sequence[list[Any] | None]) -> list[Any] | None:
    return None if parts[0] is None else [value for part in parts for value in part or ()]


class Curriculum(TrainerCallback, ExportableState):
    """The order of the questions, which of them rest, and the groups of a window.

    Its state goes into every checkpoint (trainer_state.json): a resumed run draws what an uninterrupted one would have drawn.
    """

    def __init__(self, num_questions: int, seed: int, settings: CurriculumSettings) -> None:
        self.num_questions, self.seed, self.settings = num_questions, seed, settings
        self.epoch, self.place = 0, 0
        self.resting: dict[int, int] = {}  # question -> the step from which on it is asked again
        self.order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(self.num_questions))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return order

    # --- the state, in a checkpoint ---

    def state(self) -> dict[str, Any]:
        resting = sorted(self.resting.items())
        return {"args": {}, "attributes": {"epoch": self.epoch, "place": self.place, "resting": resting}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if saved := state.stateful_callbacks.get(type(self).__name__):
            there = saved["attributes"]
            self.epoch, self.place = there["epoch"], there["place"]
            self.resting = {question: step for question, step in there["resting"]}
            self.order = self._shuffled()

    # --- drawing ---

    def window(
        self, size: int, step: int, ask: Callable[[list[int]], list[Group]], report: Callable[[str, float], None]
    ) -> Window:
        """`size` groups, those with signal first. `ask` makes the groups of questions, `report` takes the counts."""
        if size > self.num_questions:
            raise UserError(f"a step asks {size} questions at once, and there are {self.num_questions}: lower the batch size")
        found = ask(self.draw(size, step, ()))
        self.learn(found, step)
        first, started = len(found), time.perf_counter()
        for _ in range(self.settings.extra_rounds):
            missing = size - sum(group.has_signal for group in found)
            more = self.draw(missing, step, {group.question for group in found}) if missing else []
            if not more:
                break
            groups = ask(more)
            self.learn(groups, step)
            found += groups
        chosen = sorted(found, key=lambda group: not group.has_signal)[:size]  # stable: else in the order of their drawing
        report("curriculum/extra_groups", len(found) - first)
        report("curriculum/extra_seconds", time.perf_counter() - started if len(found) > first else 0.0)
        report("curriculum/drawn_without_signal", sum(not group.has_signal for group in found) / len(found))
        report("curriculum/pass_rate", sum(group.pass_rate for group in found) / len(found))
        report("curriculum/resting", sum(until > step for until in self.resting.values()) / self.num_questions)
        return Window(chosen)

    def draw(self, count: int, step: int, taken: Collection[int]) -> list[int]:
        """The next questions that are awake and not taken; where all of those are used up, the ones that have rested longest."""
        found: list[int] = []
        for _ in range(self.num_questions):
            if len(found) == count:
                return found
            question = self._next()
            if self.resting.get(question, 0) <= step and question not in taken and question not in found:
                found.append(question)
        asleep = [question for question in self.resting if question not in taken and question not in found]
        return found + sorted(asleep, key=lambda question: (self.resting[question], question))[: count - len(found)]

    def _next(self) -> int:
        if self.place == self.num_questions:
            self.epoch, self.place = self.epoch + 1, 0
            self.order = self._shuffled()
        self.place += 1
        return self.order[self.place - 1]

    def learn(self, groups: Sequence[Group], step: int) -> None:
        """Let the questions that were solved always or never rest, and wake the others."""
        for group in groups:
            if self.settings.rest_steps and group.pass_rate in (0.0, 1.0):
                self.resting[group.question] = step + self.settings.rest_steps
            else:
                self.resting.pop(group.question, None)

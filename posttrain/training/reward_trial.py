"""Every reward tried before a run begins, on gold solutions and on wrong ones."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.records import Example, Message, column, columns_of
from posttrain.tasks.graders import NUMBERS, Grader
from posttrain.training.reward_calls import Function, text_of

TRIED = 4  # gold solutions, and as many wrong ones, before a run begins


@dataclass(frozen=True)
class Trial:
    """What a reward pays for gold solutions, and for the solutions of other questions."""

    name: str
    gold: list[float]
    wrong: list[float]

    def __str__(self) -> str:
        gold, wrong = (" ".join(f"{value:.3g}" for value in values) for values in (self.gold, self.wrong))
        return f"{self.name} pays {gold} for gold solutions, {wrong} for those of other questions"


def try_rewards(
    functions: Sequence[Function], examples: Sequence[Example], tokenizer: Any, grader: Grader = NUMBERS
) -> Iterator[Trial]:
    """Call each on gold solutions and on wrong ones. UserError if one raises or returns no numbers."""
    asked = list(examples[:TRIED])
    gold = [gold_completion(example, grader) for example in asked]
    wrong = [_solution_of_another(example, examples, grader) for example in asked]
    for function in functions:
        yield Trial(function.__name__, *(_called(function, asked, completions, tokenizer) for completions in (gold, wrong)))


def gold_completion(example: Example, grader: Grader) -> list[Message]:
    """The worked solution, or where there is none the line that would end it."""
    return example.completion or [{"role": "assistant", "content": grader.form.write(example.answer)}]


def _solution_of_another(example: Example, examples: Sequence[Example], grader: Grader) -> list[Message]:
    empty = [{"role": "assistant", "content": ""}]
    return next((gold_completion(other, grader) for other in examples if other.answer != example.answer), empty)


def _called(function: Function, asked: list[Example], completions: list[Any], tokenizer: Any) -> list[float]:
    from transformers import TrainerState

    values: dict[str, Any] = {
        name: [column(example, name) for example in asked] for name in columns_of(asked) if name != "prompt"
    }
    values |= {
        "prompts": [example.prompt for example in asked],
        "completions": completions,
        "completion_ids": [tokenizer(text_of(one), add_special_tokens=False)["input_ids"] for one in completions],
        "trainer_state": TrainerState(),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    returned = function(**values)
    paid: list[float] = asyncio.run(returned) if inspect.iscoroutine(returned) else returned
    return paid

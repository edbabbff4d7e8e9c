"""Which grader a data set has: the one that its manifest names, and what its answers are called.

Data preparation, both trainings, evaluation, `--regrade` and report ask `grader_of` for it, so a verdict means the same in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from posttrain.config.schema import HASHES
from posttrain.tasks import expressions
from posttrain.tasks.answer_kinds import LETTERS, Choice, Expression, NumberInForm, OneOfWords, Text
from posttrain.tasks.forms import Form
from posttrain.tasks.graders import NUMBERS, Grader


def grader_of(answer: Mapping[str, Any] | None) -> Grader:
    """The grader of a data set, from `answer` in its manifest or its config. None: a manifest from before there were others.

    Raises:
        UserError: the kind needs a package that is not installed.
    """
    spec = answer or {}
    options = spec.get("options")
    return _grader(spec.get("kind", "number"), spec.get("form", HASHES), tuple(options) if options else None)


@lru_cache
def _grader(kind: str, template: str, options: tuple[str, ...] | None) -> Grader:
    form = Form(template)
    match kind:
        case "number":
            return NUMBERS if template == HASHES else NumberInForm(form)
        case "choice":
            return Choice(form, options or LETTERS)
        case "text":
            return OneOfWords(form, options) if options else Text(form)
    expressions.check_installed()
    return Expression(form)


def other_answers(chain: Iterable[Mapping[str, Any]], data: Mapping[str, Any]) -> list[str]:
    """A sentence for each training run of an adapter whose data had another grader than `data` has.

    That is no mistake, as what is learnt may carry over. But then strict and format measure obedience to another prompt.
    """
    here = grader_of(data.get("answer")).name
    trained = [(link["name"], grader_of(link["data"].get("answer")).name) for link in chain if link.get("data")]
    return [f"{name} was trained on answers of grader {there}, this data has {here}" for name, there in trained if there != here]


def where_strict(data: Mapping[str, Any]) -> str:
    """Where an answer must stand to be strict, as a table or a card says it: `after ####`. For a run's `data` entry."""
    form = (data.get("answer") or {}).get("form", HASHES)
    return "after ####" if form == HASHES else f"in the form {form.replace('{answer}', '...')}"


def noun_of(data: Mapping[str, Any]) -> str:
    """What an answer is called, for a run's `data` entry."""
    kind = (data.get("answer") or {}).get("kind", "number")
    return {"number": "number", "choice": "letter", "text": "answer", "expression": "expression"}[kind]


def cue_of(data: Mapping[str, Any]) -> str:
    """The sign by which the form is found in a completion, for a run's `data` entry."""
    return Form((data.get("answer") or {}).get("form", HASHES)).cue

"""One record becomes a row: its question, solution and answer as texts, or why it has none."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from posttrain.config.schema import Fields, Mapped
from posttrain.errors import is_text
from posttrain.tasks.keys import MISSING, at, is_nan, paths_in, scalar, truth_as_json
from posttrain.tasks.rows import Record, Row, Table


class NotText(Exception):
    """Why a row has no text at a key."""


def to_row(table: Table, record: Record, split: str, source: Mapped, fields: Fields) -> Row:
    row = Row(table.name, record.line, split)
    if record.problem:
        return dataclasses.replace(row, problem=record.problem)
    try:
        question, solution, gold = texts_of(record.values, fields)
        columns = {name: plain(at(record.values, name), name) for name in source.columns or ()}
    except NotText as error:
        return dataclasses.replace(row, problem=str(error))
    return dataclasses.replace(row, question=question, answer=solution, gold=gold, solved=bool(solution.strip()), columns=columns)


def texts_of(values: Mapping[str, Any], fields: Fields) -> tuple[str, str, str | None]:
    """Question, worked solution ("" where there is none), and the answer where it has a key of its own."""
    if fields.messages:
        question, solution = turns(at(values, fields.messages), fields.messages)
    else:
        assert fields.question
        question = text_of(values, fields.question)
        solution = text_of(values, fields.solution, optional=bool(fields.answer)) if fields.solution else ""
    gold = text_of(values, fields.answer) if fields.answer else None
    if gold is not None:
        names = fields.answer_values or {}
        gold = names.get(gold, names.get(str(truth_as_json(gold)), gold))
    if fields.choices:
        question = with_choices(question, gold, lettered(at(values, fields.choices), fields.choices))
    if gold is None and not solution.strip():
        raise NotText(f"{fields.messages!r} has no turn of the assistant after the last question")
    return question, solution, gold


# --- one key ----------------------------------------------------------------------------------------------------------


def text_of(values: Mapping[str, Any], text: str, optional: bool = False) -> str:
    """What a key leads to; or a text in which each key in braces is replaced by what it leads to."""
    if paths_in(text) == [text]:
        return text_at(values, text, optional)
    found = {path: text_at(values, path, optional) for path in paths_in(text)}
    return re.sub(r"\{([^{}]+)\}", lambda key: found[key[1]], text) if any(found.values()) else ""


def text_at(values: Mapping[str, Any], path: str, optional: bool = False) -> str:
    value = at(values, path)
    text = scalar(value)
    if text is None and value is not MISSING and value is not None and not is_nan(value):
        name = {"dict": "an object", "list": "a list"}.get(type(value).__name__, f"of type {type(value).__name__}")
        raise NotText(f"{path!r} is {name}, not text" + (f": name a part of it, as {path}.0" if isinstance(value, list) else ""))
    if not (text or "").strip():
        if optional:
            return ""
        raise NotText(f"{path!r} is {'missing' if value is MISSING else 'empty'}")
    assert text is not None
    if not is_text(text):
        raise NotText(f"{path!r} holds half a character, as \\ud83d alone is")
    return text


def plain(value: Any, name: str) -> Any:
    """A column's value as JSON has it."""
    if value is MISSING or is_nan(value):
        return None
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise NotText(f"the column {name!r} cannot be kept: {error}") from error


def with_choices(question: str, gold: str | None, listed: Mapping[str, str]) -> str:
    """The question with its choices below it, of which the answer is a letter."""
    if gold not in listed:
        letters = f"{min(listed)} to {max(listed)}"
        raise NotText(f"the answer {gold!r} is none of {letters}: say by source.fields.answer_values which letter is meant")
    return "\n".join([question.rstrip(), *(f"{letter}) {choice}" for letter, choice in listed.items())])


def lettered(choices: Any, path: str) -> dict[str, str]:
    """The choices by their letters. Where each begins with its own, as `A)21`, that is cut off."""
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise NotText(f"{path!r} is no list of 2 to {len(ascii_uppercase)} choices")
    listed = {letter: (scalar(choice) or "").strip() for letter, choice in zip(ascii_uppercase, choices, strict=False)}
    if not all(listed.values()):
        raise NotText(f"{path!r} has a choice that is empty or not text")
    if all(re.match(rf"\(?{letter}\s*[).:]", choice) for letter, choice in listed.items()):
        return {letter: re.sub(rf"\A\(?{letter}\s*[).:]\s*", "", choice) for letter, choice in listed.items()}
    return listed


# --- a chat -----------------------------------------------------------------------------------------------------------

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}


def turns(chat: Any, path: str) -> tuple[str, str]:
    """The last question of a chat and the answer to it, or "". Both usual forms: role and content, from and value."""
    if not isinstance(chat, list) or not all(isinstance(turn, Mapping) for turn in chat):
        raise NotText(f"{path!r} is no list of chat turns")
    said = [(ROLES.get(str(turn.get("role", turn.get("from")))), turn.get("content", turn.get("value"))) for turn in chat]
    asked = max((place for place, (role, _) in enumerate(said) if role == "user"), default=None)
    if asked is None:
        raise NotText(f"{path!r} has no turn of the user")
    answers = [content for role, content in said[asked:] if role == "assistant"]
    return content_text(said[asked][1], path), content_text(answers[-1], path) if answers else ""


def content_text(content: Any, path: str) -> str:
    if isinstance(content, list):  # parts, as chats with images have them
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    if not isinstance(content, str) or not content.strip() or not is_text(content):
        raise NotText(f"a turn of {path!r} is empty or not text")
    return content

"""What a key of the settings leads to in a record, and what is said where no record has it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from posttrain.config.schema import Fields, Mapped
from posttrain.errors import UserError
from posttrain.tasks.rows import Table

GSM8K_FORM = Fields(question="question", solution="answer")  # the answer is in the last line of the solution
# What other data sets call these keys, most usual first; for the line of YAML that an error proposes.
USUAL = {
    "question": ("question", "problem", "query", "prompt", "instruction", "input", "text"),
    "solution": ("solution", "rationale", "explanation", "reasoning", "cot", "response", "output", "completion", "generation"),
    "answer": (
        "final_answer",
        "answer",
        "expected_answer",
        "ground_truth",
        "gold",
        "answerkey",
        "correct",
        "target",
        "label",
        "result",
    ),
    "choices": ("choices", "options"),
    "messages": ("messages", "conversations", "conversation", "chat"),
}
MISSING = object()  # what `at` returns where a path leads nowhere


def paths_in(text: str) -> list[str]:
    """The keys in braces of a text that is made of several, else the one key that it is."""
    return re.findall(r"\{([^{}]+)\}", text) or [text]


def at(values: Any, path: str) -> Any:
    """What a path leads to: a key, and after each dot a key or a place of what is there. MISSING if it leads nowhere."""
    if isinstance(values, Mapping) and path in values:
        return values[path]
    first, dot, rest = path.partition(".")
    if isinstance(values, Mapping):
        inner = values.get(first, MISSING)
    elif isinstance(values, list | tuple) and first.isdecimal() and int(first) < len(values):
        inner = values[int(first)]
    else:
        return MISSING
    return at(inner, rest) if dot and inner is not MISSING else inner


def scalar(value: Any) -> str | None:
    """A text, number or truth value as text, 18.0 as 18. None for anything else, and where there is nothing."""
    match value:
        case str():
            return value
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case float() | Decimal() if math.isfinite(value):
            text = f"{Decimal(str(value)):f}"  # never 1e-07, and 1e23 with its zeros
            return text.rstrip("0").rstrip(".") if "." in text else text
    return None


def truth_as_json(text: str | None) -> str | None:
    """`true` of `True`, as Python, pandas and `datasets` write it into a CSV. Only to compare: in a question it stays."""
    return text.lower() if text in ("True", "False") else text


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


# --- which keys there are ---------------------------------------------------------------------------------------------


def wanted_keys(source: Mapped) -> set[str]:
    """Every path into a row that the settings name."""
    fields = source.fields or GSM8K_FORM
    texts = (fields.question, fields.solution, fields.choices, fields.answer, fields.messages)
    named = [path for text in texts if text for path in paths_in(text)]
    return {path for path in (*named, source.split_column, *(source.where or ()), *(source.columns or ())) if path}


def check_keys(tables: Sequence[Table], source: Mapped, fields: Fields) -> None:
    """Refuse a key that no row of a table has. A solution may be in some tables alone: a test set often has none.

    Raises:
        UserError: one line with the keys that are there, and the line of YAML that maps them.
    """
    read = [table for table in tables if any(not record.problem for record in table.rows)]
    texts = {role: getattr(fields, role) for role in ("question", "messages", "choices", "answer")}
    texts |= {"solution": fields.solution} if not fields.answer else {}
    named: list[tuple[str, str | None]] = [
        (f"fields.{role}", path) for role, text in texts.items() if text for path in paths_in(text)
    ]
    named += [("split_column", source.split_column), *((f"where.{key}", key) for key in source.where or ())]
    named += [("columns", name) for name in source.columns or ()]
    for table in read:
        for setting, path in named:
            if path and not has(table, path):
                raise UserError(f"{table.name}: {no_such_key(table, setting, path, source)}")
    for path in paths_in(fields.solution) if read and fields.solution else ():
        if not any(has(table, path) for table in read):
            raise UserError(f"{read[0].name}: {no_such_key(read[0], 'fields.solution', path, source)}")


def has(table: Table, path: str) -> bool:
    inside = path.split(".")[0] in table.keys and any(at(row.values, path) is not MISSING for row in table.rows)
    return path in table.keys or inside


def no_such_key(table: Table, setting: str, path: str, source: Mapped) -> str:
    there = f"no row has {path!r}; the keys are {', '.join(table.shown[:20])}"
    if not setting.startswith("fields.") or setting == "fields.choices":
        return f"{there}: correct source.{setting}"
    return f"{there}. Say in the data config, under source: `{proposed(table.shown)}`"


def proposed(keys: list[str]) -> str:
    """The line of YAML that maps these keys, as far as their names tell."""
    last = {key.rpartition(".")[2].lower(): key for key in reversed(keys)}
    found = {role: next((last[name] for name in names if name in last), None) for role, names in USUAL.items()}
    if not found["question"] and found["messages"]:
        pairs = {"messages": found["messages"], "answer": found["answer"]}
    else:
        pairs = {"question": found["question"] or "KEY", "solution": found["solution"], "answer": found["answer"]}
        if not found["solution"] and not found["answer"]:
            pairs["answer"] = "KEY"
        pairs["choices"] = found["choices"] or next((key for key in keys if key.lower() == "choices.text"), None)
    return "fields: {" + ", ".join(f"{role}: {key}" for role, key in pairs.items() if key) + "}"

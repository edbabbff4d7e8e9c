"""Records of any schema become rows: which keys hold question, solution and answer, which are taken, and for which split."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from string import ascii_uppercase
from typing import Any

from posttrain.config.schema import Fields, Mapped
from posttrain.errors import UserError
from posttrain.tasks.rows import SPLIT_NAMES, SPLITS, Record, Row, Table, unit_hash

GSM8K_FORM = Fields(question="question", solution="answer")  # the answer is in the last line of the solution
POOL_TEST_FRACTION = 0.2  # of rows that come without a split
# What other data sets call the three, most usual first; for the line that an error proposes.
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
MISSING = object()


def mapped_rows(tables: Sequence[Table], source: Mapped) -> Iterator[Row]:
    """The rows of these tables that the source's settings take, dev before train, as `without_repeats` keeps the first of two.

    Raises:
        UserError: a key that the settings name is in no row, a split has an unknown name, or the filter leaves nothing.
    """
    fields = source.fields or GSM8K_FORM
    check_splits(tables, source)
    taken = [table for table in tables if source.split_column or split_of(table.split, table.name, source) is not None]
    check_keys(taken, source, fields)
    rows = [row for table, first in numbered(taken, source) for row in table_rows(table, first, source, fields)]
    if not rows:
        raise UserError(f"source.where leaves none of the rows: {values_there(taken, source)}")
    if source.test_fraction and any(row.split == "test" for row in rows):
        raise UserError("the source has test rows of its own: remove source.test_fraction")
    has_dev = any(row.split == "dev" for row in rows)
    rows = [dataclasses.replace(with_test(row, source), has_dev=has_dev) for row in rows]
    yield from sorted(rows, key=lambda row: ("dev", "train", "test").index(row.split))


def numbered(tables: Sequence[Table], source: Mapped) -> Iterator[tuple[Table, int]]:
    """Each table with the number before its first row's, so that no two rows of a split have the same.

    A row's number is its place among the rows, not its line: the header of a CSV, and blank lines, are no rows. So the same
    rows have the same ids in every kind of file.
    """
    last = Counter[str | None]()
    for table in tables:
        split = None if source.split_column else split_of(table.split, table.name, source)
        yield table, last[split]
        last[split] += len(table.rows)


def table_rows(table: Table, first: int, source: Mapped, fields: Fields) -> Iterator[Row]:
    for number, record in enumerate(table.rows, first + 1):
        split = split_of_record(table, record, source)
        if split is not None and fits(record, source):
            yield dataclasses.replace(to_row(table, record, split, source, fields), number=number)


# --- keys -------------------------------------------------------------------------------------------------------------


def wanted_keys(source: Mapped) -> set[str]:
    """Every path into a row that the settings name."""
    fields = source.fields or GSM8K_FORM
    texts = (fields.question, fields.solution, fields.choices, fields.answer, fields.messages)
    named = [path for text in texts if text for path in paths_in(text)]
    return {path for path in (*named, source.split_column, *(source.where or ()), *(source.columns or ())) if path}


def check_splits(tables: Sequence[Table], source: Mapped) -> None:
    """Refuse a name in source.splits that the source does not have."""
    there = [table.split for table in tables]
    if column := source.split_column:
        there = [scalar(at(record.values, column)) for table in tables for record in table.rows]
    names = [name for wanted in (source.splits or {}).values() for name in ([wanted] if isinstance(wanted, str) else wanted)]
    if lacking := [name for name in names if name not in there]:
        has = ", ".join(list(dict.fromkeys(name for name in there if name))[:8]) or "none"
        raise UserError(f"there is no split {lacking[0]!r}; the source has {has}: correct source.splits")


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


# --- which rows, for which split --------------------------------------------------------------------------------------


def fits(record: Record, source: Mapped) -> bool:
    """Whether a row is one of those that source.where takes. A broken row always is: it is to be told."""
    for key, wanted in (source.where or {}).items():
        texts = {scalar(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
        if not record.problem and truth_as_json(scalar(at(record.values, key))) not in map(truth_as_json, texts):
            return False
    return True


def values_there(tables: Sequence[Table], source: Mapped) -> str:
    records = [record for table in tables for record in table.rows if not record.problem]
    there = {key: Counter(str(scalar(at(record.values, key))) for record in records) for key in source.where or ()}
    return "; ".join(f"{key} is {', '.join(value for value, _ in counts.most_common(8))}" for key, counts in there.items())


def split_of_record(table: Table, record: Record, source: Mapped) -> str | None:
    """train, dev or test; "" where nothing says which; None for a row of a split that is not asked for."""
    if not source.split_column:
        return split_of(table.split, table.name, source)
    if record.problem:
        return ""
    return split_of(scalar(at(record.values, source.split_column)), f"source.split_column {source.split_column}", source)


def split_of(name: str | None, where: str, source: Mapped) -> str | None:
    """What the source's own name of a split means here."""
    if name is None:
        return ""
    if source.splits:
        names = {split: [wanted] if isinstance(wanted, str) else wanted for split, wanted in source.splits.items()}
        return next((split for split, wanted in names.items() if name in wanted), None)
    if name.lower() not in SPLIT_NAMES:
        raise UserError(
            f"{where} names the split {name!r}: say under source which are meant, `splits: {{train: {name}, test: NAME}}`"
        )
    return SPLIT_NAMES[name.lower()]


def with_test(row: Row, source: Mapped) -> Row:
    """A hash of the question takes test rows out of rows without a split, and out of train where source.test_fraction says so."""
    share = source.test_fraction
    if share is None:
        share = 0.0 if row.split else POOL_TEST_FRACTION
    if row.split not in ("", "train"):
        return row
    return dataclasses.replace(row, split="test" if unit_hash("test " + row.question) < share else "train")


# --- one row ----------------------------------------------------------------------------------------------------------


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
        listed = lettered(at(values, fields.choices), fields.choices)
        if gold not in listed:
            letters = f"{min(listed)} to {max(listed)}"
            raise NotText(f"the answer {gold!r} is none of {letters}: say by source.fields.answer_values which letter is meant")
        question = "\n".join([question.rstrip(), *(f"{letter}) {choice}" for letter, choice in listed.items())])
    if gold is None and not solution.strip():
        raise NotText(f"{fields.messages!r} has no turn of the assistant after the last question")
    return question, solution, gold


class NotText(Exception):
    """Why a row has no text at a key."""


def text_of(values: Mapping[str, Any], text: str, optional: bool = False) -> str:
    """What a key leads to; or a text in which each key in braces is replaced by what it leads to."""
    if paths_in(text) == [text]:
        return text_at(values, text, optional)
    found = {path: text_at(values, path, optional) for path in paths_in(text)}
    return re.sub(r"\{([^{}]+)\}", lambda key: found[key[1]], text) if any(found.values()) else ""


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
    if re.search("[\ud800-\udfff]", text):
        raise NotText(f"{path!r} holds half a character, as \\ud83d alone is")
    return text


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


def plain(value: Any, name: str) -> Any:
    """A column's value as JSON has it."""
    if value is MISSING or is_nan(value):
        return None
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise NotText(f"the column {name!r} cannot be kept: {error}") from error


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
    if not isinstance(content, str) or not content.strip() or re.search("[\ud800-\udfff]", content):
        raise NotText(f"a turn of {path!r} is empty or not text")
    return content


assert set(SPLIT_NAMES.values()) == set(SPLITS)

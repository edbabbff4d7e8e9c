"""SVAMP (arXiv:2103.07191): a test set of one-step problems, to see whether training carries over to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.tasks.gsm8k import read_plain
from posttrain.tasks.rows import Row

KEYS = ("Body", "Question", "Equation", "Answer")


def svamp_rows(file: Path) -> Iterator[Row]:
    """Rows with body and question joined, and the equation as the working. Every row is a test row."""
    for number, row in enumerate(read_list(file), 1):
        yield svamp_row(row, file.name, number)


def read_list(file: Path) -> list[Any]:
    """The rows of SVAMP.json.

    Raises:
        UserError: the file is not there, or is not a JSON list.
    """
    if not os.path.lexists(file):
        raise UserError(f"no SVAMP file at {file}: check source.path")
    try:
        rows = json.loads(read_plain(file).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({str(error).partition(';')[0]}): source.path is SVAMP.json") from error
    if not isinstance(rows, list):
        raise UserError(f"{file} is JSON, but no list of rows: source.path is SVAMP.json")
    return rows


def svamp_row(row: Any, file: str, number: int) -> Row:
    if not isinstance(row, dict):
        return Row(file, number, "test", problem="not a JSON object")
    if missing := [key for key in KEYS if not str(row.get(key, "")).strip()]:
        found = ", ".join(map(repr, list(row)[:8]))
        return Row(file, number, "test", problem=f"{', '.join(map(repr, missing))} missing or empty (the row has {found})")
    body, asked = str(row["Body"]).strip(), str(row["Question"]).strip()
    question = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {asked}"
    return Row(file, number, "test", question, f"{row['Equation']}\n#### {row['Answer']}")

"""SVAMP (arXiv:2103.07191): a test set of one-step problems, to see whether training carries over to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import UserError
from posttrain.tasks.rows import Row


def svamp_rows(file: Path) -> Iterator[Row]:
    """Rows with body and question joined, and the equation as the working. Every row is a test row."""
    if not file.is_file():
        raise UserError(f"no SVAMP file at {file}: check source.path")
    for number, row in enumerate(json.loads(file.read_text(encoding="utf-8")), 1):
        body = row["Body"].strip()
        question = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}"
        yield Row(file.name, number, "test", question, f"{row['Equation']}\n#### {row['Answer']}")

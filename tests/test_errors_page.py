"""docs/errors.md: every message that it lists is one of this code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
# The first cell of a row: between double backticks where it holds backticks itself.
MESSAGES = [wide or plain for wide, plain in re.findall(r"(?m)^\| (?:`` (.+?) ``|`([^`]+)`) \| ", PAGE)]


def texts() -> list[str]:
    """Every text in the source, with … for each value that is put into one."""
    files = [*sorted((ROOT / "posttrain").rglob("*.py")), *sorted(ROOT.glob("*.py"))]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    formatted = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return formatted + [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


TEXTS = texts()


def test_each_row_of_the_page_is_a_message():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| message")]
    assert len(MESSAGES) == len(rows) >= 40
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_listed_message_is_in_the_source(message):
    assert any(message in text for text in TEXTS), message


def test_a_message_that_is_not_in_the_source_would_be_found():
    assert not any("… belongs to a run with other colours (…)" in text for text in TEXTS)

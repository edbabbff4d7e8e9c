"""GSM8K (arXiv:2110.14168): its rows, how its worked solutions are read, and the one answer to "is this GSM8K?"."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import UserError, is_text
from posttrain.records import sha256_text
from posttrain.tasks.graders import NUMBERS, Grader
from posttrain.tasks.rows import Row, bare_words

HUB_ID = "openai/gsm8k"
MAP_THEM = "; other keys are mapped by `source: {kind: files, path: ..., fields: {question: KEY, answer: KEY}}`"
# `question_set_sha256` of the 1,319 test questions in test.jsonl of github.com/openai/grade-school-math. A score goes to the
# benchmark's own page, so a data set's name alone is not enough.
TEST_SHA256 = "7c7e3dd7a8e8403feee1cd3e7ff9ca4938ff6156cc686db1d3beb94fc20dcde3"


def is_gsm8k(data: Mapping[str, Any]) -> bool:
    """Whether a data set, as a manifest's `data` entry describes it, holds GSM8K's questions, in part or in other prompts."""
    sources = list(origins(data.get("source")))
    named = f"{data.get('name', '')} {' '.join(str(source.get('path', '')) for source in sources)}".lower()
    return any(source.get("repo_id") == HUB_ID for source in sources) or "gsm8k" in named


def is_whole_test_set(questions: Iterable[str]) -> bool:
    """Whether these are all of its test questions and no others, as a leaderboard's number requires."""
    return question_set_sha256(questions) == TEST_SHA256


def question_set_sha256(questions: Iterable[str]) -> str:
    return sha256_text("\n".join(sorted(map(bare_words, questions))))


def gives_away_its_test_set(data: Mapping[str, Any]) -> bool:
    """Whether this data set is made of test questions, as GSM-Symbolic's templates are (arXiv:2410.05229)."""
    return any(source["kind"] == "gsm_symbolic" for source in origins(data.get("source")))


def origins(source: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A source's entry in a manifest, then the entry of the source that its questions were sampled from, and so on."""
    while source:
        yield source
        source = source.get("sampled_from")


def jsonl_rows(folder: Path) -> Iterator[Row]:
    """train.jsonl and test.jsonl in GSM8K's schema, at least one of them. They are read as bytes: a bad line spoils no other."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; source.path is the folder that holds train.jsonl or test.jsonl")
    files = [folder / f"{split}.jsonl" for split in ("train", "test") if os.path.lexists(folder / f"{split}.jsonl")]
    if not files:
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) if folder.is_dir() else ""
        there = f"it holds {found or 'nothing'}" if folder.is_dir() else "it is not there"
        raise UserError(f"{folder} holds neither train.jsonl nor test.jsonl ({there}): check source.path")
    for file in files:
        yield from not_empty(file_rows(file, file.stem), str(file))


def not_empty(rows: Iterable[Row], name: str) -> Iterator[Row]:
    row = None
    for row in rows:
        yield row
    if row is None:
        raise UserError(f"{name} holds no row: fill it, or take the file away to go without this split")


def file_rows(file: Path, split: str) -> Iterator[Row]:
    for number, line in enumerate(read_plain(file).split(b"\n"), 1):
        if line.strip():
            yield parse_line(line, file.name, number, split)


PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def read_plain(file: Path) -> bytes:
    """The bytes of a text file.

    Raises:
        UserError: it is a folder or a link to nothing, never ends, or is packed in some way.
    """
    if not file.is_file():
        kind = (
            "a folder"
            if file.is_dir()
            else "a link to nothing"
            if file.is_symlink() and not file.exists()
            else "a device or pipe"
        )
        raise UserError(f"{file} is {kind}, not a file: check the path")
    content = file.read_bytes()
    if packed := next((kind for start, kind in PACKED.items() if content.startswith(start)), None):
        raise UserError(f"{file} is {packed}, not text: unpack it first")
    return content


def parse_line(line: bytes, file: str, number: int, split: str) -> Row:
    row = parsed(line)
    return Row(file, number, split, problem=row) if isinstance(row, str) else checked_row(row, file, number, split)


def parsed(line: bytes) -> dict[str, Any] | str:
    """The object on a line of JSONL, or what is wrong with the line."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is no JSONDecodeError
        return f"not JSON: {getattr(error, 'msg', str(error).partition(';')[0])}"
    return row if isinstance(row, dict) else "not a JSON object"


# A text's limit: what the longest contexts hold is less, and a row of 10 MB, which is some other file, would be tokenized first.
MOST_CHARACTERS = 1_000_000


def checked_row(row: Mapping[str, Any], file: str, number: int, split: str) -> Row:
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            found = f" (the row has {', '.join(map(repr, list(row)[:8]))}){MAP_THEM}" if key not in row else ""
            return Row(file, number, split, problem=f"{key!r} is missing, empty or not text{found}")
        if len(row[key]) > MOST_CHARACTERS:
            return Row(
                file, number, split, problem=f"{key!r} has {len(row[key]):,} characters; a text may have {MOST_CHARACTERS:,}"
            )
        if not is_text(row[key]):
            return Row(file, number, split, problem=f"{key!r} holds half a character, as \\ud83d alone is")
    return Row(file, number, split, row["question"], row["answer"])


def solution_text(answer: str, calculator_marks: str) -> str:
    answer = answer.strip()
    return answer if calculator_marks == "keep" else re.sub(r"<<[^<>]*>>", "", answer)


def count_steps(answer: str, grader: Grader = NUMBERS) -> int:
    """Lines of working before the answer: GSM8K's own measure of difficulty (arXiv:2110.14168)."""
    return sum(bool(line.strip()) for line in grader.split(answer)[0].splitlines())

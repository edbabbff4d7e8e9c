"""The two records that pass between the stages, and how they are stored.

`Example` is what data_prep.py writes and every later stage reads; `Prediction` is what evaluate.py writes and the report
reads. Both are one JSON object a line, so any tool can read them.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_origin, get_type_hints

from posttrain.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Message = dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One question. `prompt` and `completion` are chat messages; `answer` is the gold answer, canonical.

    `completion` is empty where the source has no worked solution: such a row can be asked and rewarded, not imitated. `columns`
    holds what source.columns of data_prep.py keeps of the source's row, by that name and as JSON has it (null where the row has
    nothing): `as_dataset` makes columns of them, which rewards are then given. Without any it is left out of the file.
    """

    id: str
    split: Literal["train", "dev", "test"]
    question: str
    prompt: list[Message]
    completion: list[Message]
    answer: str
    num_steps: int
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def reply(self) -> list[Message]:
        """The completion, or where there is none the answer alone: what a chat template is tried with."""
        return self.completion or [{"role": "assistant", "content": self.answer}]

    @property
    def solution(self) -> str:
        return self.completion[-1]["content"] if self.completion else ""


# What GRPO's data set holds of every example, and rewards may ask for by name; see `columns_of`.
COLUMNS = ("prompt", "answer", "id", "question", "solution", "num_steps")


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """One completion of one question and its verdict. `sample` counts from 0; `finish` says why generation ended."""

    id: str
    sample: int
    completion: str
    finish: Literal["stop", "length"]
    num_tokens: int
    value: str | None
    method: str
    num_markers: int
    correct: bool
    strict: bool
    format_ok: bool
    grader: str


Record = TypeVar("Record", Example, Prediction)

DAMAGED = "restore the file from a copy, or make it again"


def read_jsonl(path: Path | str, cls: type[Record]) -> list[Record]:
    """The records of a file of ours.

    Raises:
        UserError: a row is damaged; the text has file and line.
    """
    return [as_record(row, cls, f"{path}:{number}") for number, row in enumerate(read_rows(path), 1)]


def as_record(row: dict[str, Any], cls: type[Record], place: str) -> Record:
    """The record that a row holds.

    Raises:
        UserError: it holds another one, or none; the text begins with `place`.
    """
    known, needed, kinds = _form(cast(Any, cls))
    if odd := (needed - row.keys()) | (row.keys() - known):
        raise UserError(
            f"{place}: no {cls.__name__.lower()}, {min(odd)!r} is {'unknown' if min(odd) in row else 'missing'}: {DAMAGED}"
        )
    for name, value in row.items():
        if not isinstance(value, kinds[name]):
            raise UserError(f"{place}: {name!r} is {_shown(value)}: {DAMAGED}")
    return cls(**row)


@functools.cache
def _form(cls: type[Any]) -> tuple[set[str], set[str], dict[str, Any]]:
    """A record's fields, those that a row has to have, and what `isinstance` asks of each."""
    fields = dataclasses.fields(cls)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    kinds = {name: {Literal: str}.get(get_origin(hint), get_origin(hint) or hint) for name, hint in get_type_hints(cls).items()}
    unions = {name: hint for name, hint in get_type_hints(cls).items() if get_origin(hint) is UnionType}
    return {f.name for f in fields}, needed, kinds | unions


def read_rows(path: Path | str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, or of `path`.gz where only that is there: results/ keeps predictions compressed.

    Raises:
        UserError: a row is no JSON object; the text has file and line.
    """
    compressed = Path(f"{path}.gz")
    read = gzip.open if compressed.is_file() and not Path(path).is_file() else open
    with read(compressed if read is gzip.open else path, "rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                yield parse_object(line, f"{path}:{number}", DAMAGED)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{compressed}: damaged ({error}): {DAMAGED}") from error


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        UserError: it does not, or it is not there; the text ends with the remedy.
    """
    if not file.is_file():
        raise UserError(f"{file} is not there: {remedy}")
    return parse_object(file.read_bytes(), str(file), remedy)


def parse_object(text: bytes, place: str, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of thousands of digits; nested too deeply
        raise UserError(f"{place}: damaged ({' '.join(str(error).split())[:120]}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: {_shown(value)} is no JSON object: {remedy}")
    return value


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def holds_rows(path: Path | str) -> bool:
    return Path(path).is_file() or Path(f"{path}.gz").is_file()


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> None:
    """Write records or dicts, one a line; the file appears whole or not at all."""
    write_atomic(path, "".join(to_json(row) + "\n" for row in rows))


def write_atomic(path: Path | str, text: str) -> None:
    partial = Path(f"{path}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(partial.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk: without it a power loss may undo a rename (fsync(2))."""
    opened = os.open(folder, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


def cut_torn_tail(file: Path) -> None:
    """Cut off what follows the last line break: a row that a kill interrupted."""
    if file.is_file():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def to_json(row: Any) -> str:
    values = dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row  # type: ignore[arg-type]
    if isinstance(row, Example) and not row.columns:  # the files of data sets without columns stay the same bytes
        del values["columns"]
    return json.dumps(values, ensure_ascii=False)


def as_dataset(examples: list[Example], columns: tuple[str, ...]) -> Dataset:
    """The training view of examples: `columns` are fields of `Example`, or keys of its `columns`. Test rows are refused.

    Raises:
        UserError: an example of the test split, no example at all, or a column that data_prep.py did not keep.
    """
    if not examples:
        raise UserError("no examples to train on: check data.num_train and the data set's manifest.json")
    if leaked := [example.id for example in examples if example.split == "test"]:
        raise UserError(f"refusing to train on {len(leaked)} test rows (first: {leaked[0]}): use the train split")
    own = {*(field.name for field in dataclasses.fields(Example)), *COLUMNS}
    if lacking := [name for name in columns if name not in own | examples[0].columns.keys()]:
        raise UserError(f"the rows have no column {lacking[0]!r}: name it in source.columns and prepare them again")
    from datasets import Dataset

    return Dataset.from_list([{name: column(example, name) for name in columns} for example in examples])


def columns_of(examples: list[Example]) -> tuple[str, ...]:
    """What rewards may ask for by name: COLUMNS, and the columns that data_prep.py kept of the source's rows."""
    return (*COLUMNS, *(examples[0].columns if examples else ()))


def column(example: Example, name: str) -> Any:
    return example.columns[name] if name in example.columns else getattr(example, name)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_file(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Rows in files of any schema: JSON, JSONL, CSV, Parquet, and folders of `datasets`' save_to_disk.

JSON and CSV are read by the standard library, which gives each value as it is written. `datasets` 5.2 reads them by guesses: in a
CSV `007` becomes 7 and `N/A` nothing, in a JSON list of texts and numbers the text `three` becomes `"three"` with its quotes, and
a text that looks like a date becomes one. Formats that know their types are read by `datasets`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.config.schema import FilesSource
from posttrain.errors import UserError
from posttrain.tasks.gsm8k import parsed, read_plain
from posttrain.tasks.rows import SPLIT_NAMES, Record, Table

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def file_tables(source: FilesSource, wanted: set[str]) -> list[Table]:
    """The tables of a source's files, each with the name of its split where the path tells it.

    Raises:
        UserError: a file is not there, is of no known kind, or cannot be read.
    """
    if isinstance(source.path, dict):
        tables = [
            table for split, path in source.path.items() for file in found(path) for table in tables_of(file, split, wanted)
        ]
    else:
        files = found(source.path)
        names = {file: split_in_name(file) for file in files}
        if not source.split_column and any(names.values()) and (nameless := [file for file, name in names.items() if not name]):
            raise UserError(
                f"{source.path} holds files that name a split, and {nameless[0].name}, which names none: say which are meant, "
                f"`source.path={{train: FILE, test: FILE}}`"
            )
        tables = [table for file in files for table in tables_of(file, names[file], wanted)]
    if empty := [table.name for table in tables if not table.rows]:
        raise UserError(f"{empty[0]} holds no row: fill it, or take the file away to go without it")
    return tables


def found(path: str) -> list[Path]:
    """The files that a path means: itself, those of a folder, or those that its stars match."""
    here = Path(path)
    if is_saved(here) or here.is_file():
        return [here]
    if here.is_dir():
        files = sorted(file for file in here.iterdir() if file.suffix.lower() in KINDS and file.is_file())
        held = ", ".join(sorted(file.name for file in here.iterdir())[:8]) or "nothing"
        problem = f"{path} holds no file of a known kind ({', '.join(KINDS)}), but {held}"
    else:
        anchor = Path(here.anchor)
        files = sorted(anchor.glob(str(here.relative_to(anchor)))) if re.search(r"[*?\[]", path) else []
        problem = f"no file at {path}"
    if not files:
        raise UserError(f"{problem}: check source.path")
    return files


def split_in_name(file: Path) -> str | None:
    """train-00000-of-00001.parquet is train, gsm8k_test.csv test; problems.jsonl names no split."""
    words = [word for word in re.split(r"[\W_\d]+", file.stem.lower()) if word not in ("", "of")]
    return next((word for word in (*words[:1], *words[-1:]) if word in SPLIT_NAMES), None)


def tables_of(file: Path, split: str | None, wanted: set[str]) -> Iterator[Table]:
    match file.suffix.lower():
        case _ if is_saved(file):
            yield from saved_tables(file, split, wanted)
        case ".jsonl" | ".ndjson":
            yield table_of(file, split, json_lines(read_plain(file)))
        case ".json":
            yield table_of(file, split, json_records(file))
        case ".csv" | ".tsv":
            yield table_of(file, split, csv_records(file))
        case ".parquet":
            yield parquet_table(file, split, wanted)
        case _:
            raise UserError(f"{file} is of no known kind ({', '.join(KINDS)}): check source.path")


def table_of(file: Path, split: str | None, records: Iterable[Record]) -> Table:
    rows = list(records)
    keys = dict.fromkeys(key for row in rows for key in row.values)
    inside = {key: next((row.values[key] for row in rows if isinstance(row.values.get(key), dict)), None) for key in keys}
    return Table(file.name, split, list(keys), rows, paths_of(inside))


def paths_of(keys: Mapping[str, Any]) -> list[str]:
    """The keys, and in the place of one that leads to a row the paths to the keys of that row."""
    paths = []
    for key, value in keys.items():
        paths += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    return paths


# --- JSON and CSV -----------------------------------------------------------------------------------------------------


def json_lines(content: bytes) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            row = parsed(line)
            yield Record(number, problem=row) if isinstance(row, str) else Record(number, row)


def json_records(file: Path) -> Iterator[Record]:
    """The rows of a list, or of the one list in an object, as in {"version": 1, "data": [...]}; or lines of JSON."""
    text = plain_text(file)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value: lines under the other name
            yield from json_lines(text.encode())
            return
        raise UserError(f"{file}:{error.lineno} is not JSON: {error.msg}") from error
    if isinstance(value, dict):
        lists = [name for name, part in value.items() if isinstance(part, list) and part and isinstance(part[0], dict)]
        if len(lists) != 1:
            raise UserError(f"{file} is one object with {', '.join(list(value)[:8])}, no list of rows: write them as JSONL")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise UserError(f"{file} is JSON, but no list of rows")
    for number, row in enumerate(value, 1):
        yield Record(number, row) if isinstance(row, dict) else Record(number, problem="not a JSON object")


def csv_records(file: Path) -> Iterator[Record]:
    """The rows of a table with a header. Every value is text, as it is written."""
    text = plain_text(file)
    header = text.split("\n", 1)[0]
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names = next(reader, [])
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{file} has the column {min(twice)!r} twice in its first line, which names the columns")
        for row in filter(None, reader):
            if len(row) == len(names):
                yield Record(reader.line_num, dict(zip(names, row, strict=True)))
            else:
                yield Record(reader.line_num, problem=f"has {len(row)} values, and the first line {len(names)} names")
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num} is not CSV: {error}") from error


def plain_text(file: Path) -> str:
    content = read_plain(file)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        kind = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        raise UserError(
            f"{file}:{line} is not UTF-8 text (byte 0x{content[error.start]:02x}): convert it, say `iconv -f {kind} -t UTF-8`"
        ) from error


# --- what `datasets` reads --------------------------------------------------------------------------------------------


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved_tables(folder: Path, split: str | None, wanted: set[str]) -> Iterator[Table]:
    from datasets import DatasetDict, load_from_disk

    with read_by_datasets(folder):
        saved = load_from_disk(str(folder))
        if not isinstance(saved, DatasetDict):
            yield arrow_table(saved, folder.name, split, wanted)
        elif split:
            raise UserError(f"{folder} holds the splits {', '.join(saved)}: name the folder of one of them, or it alone")
        else:
            for name, part in saved.items():
                yield arrow_table(part, f"{folder.name}/{name}", name, wanted)


def parquet_table(file: Path, split: str | None, wanted: set[str]) -> Table:
    from datasets import load_dataset

    with read_by_datasets(file):
        # Streamed, nothing is copied into a cache.
        rows = load_dataset("parquet", data_files=[str(file)], split="train", streaming=True)
        return arrow_table(rows, file.name, split, wanted)


def arrow_table(rows: Any, name: str, split: str | None, wanted: set[str]) -> Table:
    """Rows of `datasets`, with the columns that are wanted alone: images and sound are not decoded for nothing."""
    keys = list(rows.column_names)
    chosen = [key for key in keys if key in wanted or any(path.startswith(f"{key}.") for path in wanted)]
    taken = rows.select_columns(chosen or keys[:1])
    return Table(name, split, keys, [Record(number, row) for number, row in enumerate(taken, 1)], paths_of(rows.features))


@contextmanager
def read_by_datasets(path: Path) -> Iterator[None]:
    """What `datasets` cannot read is one line, without its own log of it."""
    from datasets import logging
    from datasets.exceptions import DatasetsError

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except (ValueError, OSError, KeyError, TypeError, StopIteration, RuntimeError, DatasetsError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:300] or 'it is empty'}") from error
    finally:
        logging.set_verbosity(level)

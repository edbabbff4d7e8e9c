"""Tables of any schema become rows: which of their records are taken, and for which split."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

from posttrain.config.schema import Fields, Mapped
from posttrain.errors import UserError
from posttrain.tasks.fields import to_row
from posttrain.tasks.keys import GSM8K_FORM, at, check_keys, scalar, truth_as_json
from posttrain.tasks.rows import SPLIT_NAMES, SPLITS, Record, Row, Table, unit_hash

POOL_TEST_FRACTION = 0.2  # of rows that come without a split


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


# --- which records ----------------------------------------------------------------------------------------------------


def fits(record: Record, source: Mapped) -> bool:
    """Whether source.where takes a record. It takes every broken one, so that the user is told of it."""
    for key, wanted in (source.where or {}).items():
        texts = {scalar(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
        if not record.problem and truth_as_json(scalar(at(record.values, key))) not in map(truth_as_json, texts):
            return False
    return True


def values_there(tables: Sequence[Table], source: Mapped) -> str:
    records = [record for table in tables for record in table.rows if not record.problem]
    there = {key: Counter(str(scalar(at(record.values, key))) for record in records) for key in source.where or ()}
    return "; ".join(f"{key} is {', '.join(value for value, _ in counts.most_common(8))}" for key, counts in there.items())


# --- for which split --------------------------------------------------------------------------------------------------


def check_splits(tables: Sequence[Table], source: Mapped) -> None:
    """Refuse a name in source.splits that the source does not have."""
    there = [table.split for table in tables]
    if column := source.split_column:
        there = [scalar(at(record.values, column)) for table in tables for record in table.rows]
    names = [name for wanted in (source.splits or {}).values() for name in ([wanted] if isinstance(wanted, str) else wanted)]
    if lacking := [name for name in names if name not in there]:
        has = ", ".join(list(dict.fromkeys(name for name in there if name))[:8]) or "none"
        raise UserError(f"there is no split {lacking[0]!r}; the source has {has}: correct source.splits")


def split_of_record(table: Table, record: Record, source: Mapped) -> str | None:
    """train, dev or test; "" where nothing says which; None for a row of a split that is not asked for."""
    if not source.split_column:
        return split_of(table.split, table.name, source)
    if record.problem:
        return ""
    return split_of(scalar(at(record.values, source.split_column)), f"source.split_column {source.split_column}", source)


def split_of(name: str | None, where: str, source: Mapped) -> str | None:
    """The source's own name of a split as train, dev or test; "" where it has none; None where the settings leave it out."""
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


assert set(SPLIT_NAMES.values()) == set(SPLITS)

"""Predictions of one evaluation as they come: part files, one for each process, that survive a kill at any byte.

A batch counts once all of its rows are whole. A row that a kill tore is cut off, and its batch is generated again with the
same result; so is that of a row that is damaged, or that another policy wrote: each row of a part file is sealed.
`gather` puts one copy of every row into predictions.jsonl in the order of the questions. The number of a batch alone says which
process it belongs to, so processes that start at different moments, or go on after a kill, leave none out.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.records import (
    DAMAGED,
    Example,
    Prediction,
    as_record,
    cut_torn_tail,
    parse_object,
    sha256_text,
    to_json,
    write_jsonl,
)
from posttrain.runs.contents import completions_sha256
from posttrain.runs.process import num_processes, process_index
from posttrain.tasks.graders import NUMBERS, Grader

PARTS = "predictions.part*.jsonl"
GATHERED = "predictions.jsonl"
GONE_SECONDS = 3600.0  # no batch takes so long
SEAL = "seal"  # a key that the rows of part files have beside those of `Prediction`


def grade_completion(
    example: Example, sample: int, completion: str, finish: str, num_tokens: int, grader: Grader = NUMBERS
) -> Prediction:
    """A completion and its verdict: the one place where evaluation calls the grader."""
    verdict = grader.grade(completion, example.answer)
    return Prediction(
        id=example.id,
        sample=sample,
        completion=completion,
        finish="stop" if finish == "stop" else "length",
        num_tokens=num_tokens,
        value=verdict.value,
        method=verdict.method,
        num_markers=verdict.num_markers,
        correct=verdict.correct,
        strict=verdict.strict,
        format_ok=verdict.format_ok,
        grader=grader.name,
    )


def regraded(prediction: Prediction, example: Example, grader: Grader = NUMBERS) -> Prediction:
    return grade_completion(example, prediction.sample, prediction.completion, prediction.finish, prediction.num_tokens, grader)


def up_to_date(prediction: Prediction, example: Example, grader: Grader = NUMBERS) -> Prediction:
    """The row with a verdict of this grader; only another grader's row has to be graded again for it."""
    return prediction if prediction.grader == grader.name else regraded(prediction, example, grader)


class PartFiles:
    """The part files of one run directory.

    `policy` tells what answers, from any other: rows of another are not taken. `gathered` is the `completions_sha256` that
    predictions.jsonl must have to be taken, and None takes any.
    """

    def __init__(self, folder: Path, grader: Grader = NUMBERS, policy: str = "", gathered: str | None = None) -> None:
        self.folder, self.grader = folder, grader
        self.policy = policy
        self.gathered = gathered
        self.passed_over = 0  # rows that were damaged, or of another policy, when they were last read
        self.mine = folder / f"predictions.part{process_index()}.jsonl"
        cut_torn_tail(self.mine)

    def rows(self) -> dict[tuple[str, int], Prediction]:
        """Every whole row of every process, by question and sample."""
        found = [row for file in self.folder.glob(PARTS) for row in _whole_rows(file, self.policy)]
        # predictions.jsonl takes the place of the part files. Its rows have no seal: the manifest has their hash.
        gathered = [row for file in self.folder.glob(GATHERED) for row in _whole_rows(file, "")]
        if self.gathered in (None, completions_sha256(row for row in gathered if row)):
            found += gathered
        self.passed_over = found.count(None)
        return {(row.id, row.sample): row for row in found if row}

    def pending(self, batches: Iterable[list[int]], asked: Sequence[Example], num_samples: int) -> list[tuple[int, list[int]]]:
        """This process's numbered batches that are not on disk yet."""
        done = self.rows()
        return [
            (number, batch)
            for number, batch in enumerate(batches)
            if number % num_processes() == process_index()
            and any((asked[i].id, sample) not in done for i in batch for sample in range(num_samples))
        ]

    def append(self, predictions: Iterable[Prediction]) -> None:
        with open(self.mine, "a", encoding="utf-8") as file:
            rows = map(dataclasses.asdict, predictions)
            file.write("".join(to_json(row | {SEAL: _seal(self.policy, row)}) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def wait(self, num_rows: int) -> dict[tuple[str, int], Prediction]:
        """All rows, once every process has written its share.

        Raises:
            UserError: none came for an hour. A launcher that outlives one of its processes does not say so.
        """
        seen, since = -1, time.monotonic()
        while len(rows := self.rows()) < num_rows:
            if len(rows) != seen:
                seen, since = len(rows), time.monotonic()
            if time.monotonic() - since > GONE_SECONDS:
                raise UserError(
                    f"{self.folder} has {seen} of {num_rows} answers, and none came in {GONE_SECONDS / 60:.0f} minutes: another "
                    "process has ended; the same command goes on"
                )
            time.sleep(0.5)
        return rows

    def gather(
        self, asked: Sequence[Example], num_samples: int, record: Callable[[list[Prediction]], None] = lambda rows: None
    ) -> list[Prediction]:
        """Write predictions.jsonl in the order of the questions, every verdict by this grader, and drop the part files.

        `record` is called with the rows before the part files go: until it has ended, they are what counts.
        """
        rows = self.wait(len(asked) * num_samples)
        ordered = [
            up_to_date(rows[example.id, sample], example, self.grader) for example in asked for sample in range(num_samples)
        ]
        write_jsonl(self.folder / GATHERED, ordered)
        record(ordered)
        for file in self.folder.glob(PARTS):
            file.unlink()
        return ordered


def _whole_rows(file: Path, policy: str) -> Iterator[Prediction | None]:
    """The rows, and None for each that is damaged or of another policy."""
    for line in file.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn, or nothing
        try:
            row = parse_object(line, file.name, DAMAGED)
            seal = row.pop(SEAL, None)
            ours = seal == _seal(policy, row) if policy else seal is None or seal == _seal(policy, row)
            yield as_record(row, Prediction, file.name) if ours else None
        except UserError:
            yield None


def _seal(policy: str, row: dict[str, Any]) -> str:
    """What a row of a part file is whole by, and of this policy: a bit that flips in a completion leaves it JSON."""
    return sha256_text(f"{policy} {to_json(row)}")[:16]

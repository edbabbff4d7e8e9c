"""Predictions of one evaluation as they come: part files, one for each process, that survive a kill at any byte.

A batch counts once all of its rows are whole. A row that a kill tore is cut off, and its batch is generated again with the
same result. `gather` puts one copy of every row into predictions.jsonl in the order of the questions. The number of a batch
alone says which process it belongs to, so processes that start at different moments, or go on after a kill, leave none out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from posttrain.records import Example, Prediction, cut_torn_tail, to_json, write_jsonl
from posttrain.runs.process import num_processes, process_index
from posttrain.tasks.answers import NUMBERS, Grader

PARTS = "predictions.part*.jsonl"
GATHERED = "predictions.jsonl"


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
    """The part files of one run directory."""

    def __init__(self, folder: Path, grader: Grader = NUMBERS) -> None:
        self.folder, self.grader = folder, grader
        self.mine = folder / f"predictions.part{process_index()}.jsonl"
        cut_torn_tail(self.mine)

    def rows(self) -> dict[tuple[str, int], Prediction]:
        """Every whole row of every process, by question and sample."""
        files = [*self.folder.glob(PARTS), *self.folder.glob(GATHERED)]
        return {(row.id, row.sample): row for file in files for row in _whole_rows(file)}

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
            file.write("".join(to_json(prediction) + "\n" for prediction in predictions))
            file.flush()
            os.fsync(file.fileno())

    def wait(self, num_rows: int) -> dict[tuple[str, int], Prediction]:
        """All rows, once every process has written its share."""
        while len(rows := self.rows()) < num_rows:
            time.sleep(0.5)
        return rows

    def gather(self, asked: Sequence[Example], num_samples: int) -> list[Prediction]:
        """Write predictions.jsonl in the order of the questions, every verdict by this grader, and drop the part files."""
        rows = self.wait(len(asked) * num_samples)
        ordered = [
            up_to_date(rows[example.id, sample], example, self.grader) for example in asked for sample in range(num_samples)
        ]
        write_jsonl(self.folder / GATHERED, ordered)
        for file in self.folder.glob(PARTS):
            file.unlink()
        return ordered


def _whole_rows(file: Path) -> Iterator[Prediction]:
    for line in file.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn, or nothing
        yield Prediction(**json.loads(line))

"""The answer reader on real data: OpenAI's recorded model outputs, and every gold answer of GSM8K.

The files are those of openai/grade-school-math (grade_school_math/data). POSTTRAIN_DATA names the folder that
holds `gsm8k/`; by default it is `../shared/data` from the repository.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rewards import gold_answer, grade

DATA = Path(os.environ.get("POSTTRAIN_DATA", Path(__file__).parents[1] / "../shared/data")) / "gsm8k"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no GSM8K files in {DATA}; set POSTTRAIN_DATA")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def recorded_outputs() -> list[tuple[str, str, bool]]:
    """(solution, gold, is_correct) of the outputs with a last line `A: N`; the other 11 ran out of tokens."""
    outputs = [
        (row[model]["solution"], row["ground_truth"].rpartition("A: ")[2], row[model]["is_correct"])
        for row in rows("example_model_solutions.jsonl")
        for model in MODELS
    ]
    return [output for output in outputs if output[0].rstrip().rpartition("\n")[2].startswith("A: ")]


def test_agreement_with_the_recorded_verdicts() -> None:
    outputs = recorded_outputs()
    assert len(outputs) == 5265
    assert [solution for solution, gold, is_correct in outputs if grade(solution, gold).correct != is_correct] == []


def test_agreement_where_the_same_outputs_use_our_marker() -> None:
    for solution, gold, is_correct in recorded_outputs():
        working, _, answer = solution.rstrip().rpartition("A: ")
        verdict = grade(f"{working}#### {answer}", gold)
        assert (verdict.correct, verdict.strict) == (is_correct, is_correct), answer


def test_a_stated_answer_is_what_was_read() -> None:
    methods = [grade(solution, gold).method for solution, gold, _ in recorded_outputs()]
    assert methods.count("phrase") == 5264  # the other one states "10+John's age"


@pytest.mark.parametrize(("name", "count"), [("train.jsonl", 7473), ("test.jsonl", 1319)])
def test_every_gold_grades_itself(name: str, count: int) -> None:
    answers = [row["answer"] for row in rows(name)]
    assert len(answers) == count
    for answer in answers:
        verdict = grade(answer, gold_answer(answer))
        assert verdict.strict and verdict.format_ok and verdict.num_markers == 1, answer

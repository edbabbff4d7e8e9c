"""Part files: whatever is torn, missing or double in them, every question ends up with one verdict of one grader."""

import random
import time
from dataclasses import replace

import pytest

import rewards
from posttrain.errors import UserError
from posttrain.evaluation import predictions
from posttrain.evaluation.predictions import PartFiles, grade_completion, regraded
from posttrain.records import Example, Prediction, read_jsonl, write_jsonl

NUM_SAMPLES = 2
ASKED = [Example(f"q{number}", "test", "?", [], [], str(number), 2) for number in range(7)]
BATCHES = [[6, 2], [0, 1], [5, 4], [3]]


def answers(batch):
    """The rows of one batch; what stands in them follows from question and sample alone."""
    return [grade_completion(ASKED[i], s, f"Zoë 🦆\n#### {i + s}", "stop", 9) for i in batch for s in range(NUM_SAMPLES)]


WHOLE = [row for i in range(len(ASKED)) for row in answers([i])]


@pytest.fixture
def process(monkeypatch):
    def be(index, of):
        monkeypatch.setenv("RANK", str(index))
        monkeypatch.setenv("WORLD_SIZE", str(of))

    return be


def generate(folder, batches=None):
    """One process: its share of what is missing, or only the first batches of it."""
    parts = PartFiles(folder)
    for _, batch in parts.pending(BATCHES, ASKED, NUM_SAMPLES)[:batches]:
        parts.append(answers(batch))
    return parts


def test_a_verdict_is_the_graders():
    verdict = rewards.grade("so 3\n#### 4", "4")
    row = grade_completion(ASKED[4], 1, "so 3\n#### 4", "length", 5)
    assert all(getattr(row, name) == getattr(verdict, name) for name in type(verdict).__dataclass_fields__)
    assert (row.id, row.sample, row.finish, row.num_tokens, row.grader) == ("q4", 1, "length", 5, rewards.GRADER_VERSION)
    tampered = replace(row, correct=False, strict=False, value="9", method="none", num_markers=8, format_ok=False, grader="0")
    assert regraded(tampered, ASKED[4]) == row


def test_rows_are_gathered_in_the_order_of_the_questions(tmp_path):
    parts = generate(tmp_path)
    assert [row.id for row in parts.rows().values()][:2] == ["q6", "q6"]
    assert parts.gather(ASKED, NUM_SAMPLES) == WHOLE == read_jsonl(tmp_path / "predictions.jsonl", Prediction)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_torn_at_any_byte_nothing_is_lost_or_doubled(tmp_path):
    part = generate(tmp_path, batches=2).mine
    content = part.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for cut in sorted({*range(0, len(content), 11), *ends, *(end - 1 for end in ends)}):
        part.write_bytes(content[:cut])
        parts = PartFiles(tmp_path)
        assert part.read_bytes() == content[: max([0, *(end for end in ends if end <= cut)])]
        todo = [batch for _, batch in parts.pending(BATCHES, ASKED, NUM_SAMPLES)]
        assert todo == BATCHES[sum(cut >= ends[4 * n - 1] for n in (1, 2)) :]  # a batch is four rows, all or none
    for cut in random.Random(0).sample(range(len(content)), 20):
        for file in tmp_path.iterdir():
            file.unlink()
        part.write_bytes(content[:cut])
        assert generate(tmp_path).gather(ASKED, NUM_SAMPLES) == WHOLE


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_processes_share_the_work_however_late_they_start(tmp_path, process, num_processes):
    """Each looks at what is there when it starts, and by then another may be done: no batch may fall between them."""
    for index in range(num_processes):
        process(index, num_processes)
        parts = PartFiles(tmp_path)
        numbers = [number for number, _ in parts.pending(BATCHES, ASKED, NUM_SAMPLES)]
        assert numbers == list(range(index, len(BATCHES), num_processes))
        generate(tmp_path)
    process(0, num_processes)
    assert PartFiles(tmp_path).gather(ASKED, NUM_SAMPLES) == WHOLE


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
def test_another_number_of_processes_goes_on(tmp_path, process, before, after):
    for index in range(before):
        process(index, before)
        generate(tmp_path, batches=1)
    done = len(PartFiles(tmp_path).rows())
    assert 0 < done < len(WHOLE)
    for index in range(after):
        process(index, after)
        generate(tmp_path)
    process(0, after)
    rows = sum(len(file.read_bytes().splitlines()) for file in tmp_path.glob("predictions.part*"))
    assert rows == len(WHOLE)  # nothing was generated twice
    assert PartFiles(tmp_path).gather(ASKED, NUM_SAMPLES) == WHOLE


def test_the_main_process_waits_for_the_others(tmp_path, process):
    process(0, 2)
    parts = generate(tmp_path)
    process(1, 2)
    other = PartFiles(tmp_path)
    share = other.pending(BATCHES, ASKED, NUM_SAMPLES)

    class Clock:
        """Stands in for the module time: while the main process sleeps, the other one works."""

        monotonic = time.monotonic

        @staticmethod
        def sleep(seconds):
            other.append(answers(share.pop()[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.evaluation.predictions.time", Clock)
        assert parts.gather(ASKED, NUM_SAMPLES) == WHOLE and share == []


def test_rows_of_an_older_grader_are_judged_again(tmp_path):
    parts = PartFiles(tmp_path)
    parts.append([replace(row, grader="0", correct=not row.correct) for row in answers(BATCHES[0])])
    generate(tmp_path)
    assert parts.gather(ASKED, NUM_SAMPLES) == WHOLE


def test_a_completion_is_graded_once(tmp_path, monkeypatch):
    graded = []

    grade = rewards.grade

    def counted(completion, gold):
        graded.append((completion, gold))
        return grade(completion, gold)

    monkeypatch.setattr(rewards, "grade", counted)
    parts = generate(tmp_path)
    assert parts.gather(ASKED, NUM_SAMPLES) == WHOLE and len(graded) == len(WHOLE)
    assert sorted(graded) == sorted((row.completion, ASKED[int(row.id[1:])].answer) for row in WHOLE)
    older = replace(WHOLE[0], grader="0", correct=not WHOLE[0].correct)
    write_jsonl(tmp_path / "predictions.jsonl", [older, *WHOLE[1:]])
    assert parts.gather(ASKED, NUM_SAMPLES) == WHOLE and len(graded) == len(WHOLE) + 1  # the one of another grader


def test_killed_after_gathering_nothing_is_generated_again(tmp_path):
    generate(tmp_path).gather(ASKED, NUM_SAMPLES)
    parts = PartFiles(tmp_path)
    assert parts.pending(BATCHES, ASKED, NUM_SAMPLES) == [] and parts.gather(ASKED, NUM_SAMPLES) == WHOLE


def test_more_samples_than_before_are_missing_samples(tmp_path):
    write_jsonl(tmp_path / "predictions.part0.jsonl", [row for row in WHOLE if row.sample == 0])
    assert len(PartFiles(tmp_path).pending(BATCHES, ASKED, 1)) == 0
    assert len(PartFiles(tmp_path).pending(BATCHES, ASKED, NUM_SAMPLES)) == len(BATCHES)


def test_a_process_that_ended_is_not_waited_for_for_ever(tmp_path, process, monkeypatch):
    process(0, 2)
    parts = generate(tmp_path)
    monkeypatch.setattr(predictions, "GONE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"8 of 14 answers, and none came in .*: another process has ended; the same command"):
        parts.gather(ASKED, NUM_SAMPLES)

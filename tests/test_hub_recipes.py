"""The recipes for ARC, AQuA and BoolQ, on folders as theirs are on the Hub: the same columns in Parquet, by the same loader."""

import pytest
from scripts import CONFIGS, run

from posttrain.records import Example, read_jsonl
from posttrain.runs.data_sets import read_data_manifest

TEXTS = {
    "arc": ["Sunlight warms the soil", "Rain falls", "Wind blows", "Snow melts"],
    "aqua": ["A)21", "B)21.5", "C)22", "D)22.5", "E)23"],
}


def arc(number):
    labels = list("1234") if number % 3 == 0 else list("ABCD")
    question = f"Question {number}: why does ice melt on a roof?"
    return {
        "id": f"Mercury_{number}",
        "question": question,
        "choices": {"text": TEXTS["arc"], "label": labels},
        "answerKey": labels[number % 4],
    }


def aqua(number):
    letter = "ABCDE"[number % 5]
    return {
        "question": f"A person crosses road {number} in 5 minutes. What is his speed?",
        "options": TEXTS["aqua"],
        "rationale": f"speed = {number}/5.\nAnswer: {letter}" if number % 2 else f"It is {number}/5, answer {letter}",
        "correct": letter,
    }


def boolq(number):
    return {
        "question": f"is persian number {number} the same as dari",
        "answer": number % 2 == 0,
        "passage": f"Passage {number}. Persian is\nknown by names such as Dari.",
    }


# Where each has its files: data_dir of its configuration, and its splits.
HUB = {
    "arc": (arc, "ARC-Challenge", ("train", "validation", "test")),
    "aqua": (aqua, "raw", ("train", "validation", "test")),
    "boolq": (boolq, None, ("train", "validation")),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_model_dir):
    """The rows of a recipe's data config, run on a folder of the Hub's layout."""
    from datasets import Dataset

    place = tmp_path_factory.mktemp("hub")

    def prepare(name, *arguments):
        make, configuration, splits = HUB[name]
        folder = place / name
        for first, split in enumerate(splits):
            made = Dataset.from_list([make(number) for number in range(20 * first, 20 * first + 20)])
            made.to_parquet(folder / (configuration or "data") / f"{split}-00000-of-00001.parquet")
        files = [f"  - {{split: {split}, path: {configuration or 'data'}/{split}-*}}" for split in splits]
        lines = ["---", "configs:", f"- config_name: {configuration or 'default'}", "  data_files:", *files, "---", ""]
        (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
        out = place / f"{name}_prepared"
        done = run(
            "data_prep",
            *("--config", CONFIGS / "recipes" / f"data_{name}.yaml", f"source.repo_id={folder}", f"output_dir={out}"),
            *(f"tokenizer.name_or_path={tiny_model_dir}", *arguments),
        )
        assert done.code == 0, done
        return read_data_manifest(out), [row for split in splits_of(out) for row in read_jsonl(out / f"{split}.jsonl", Example)]

    return prepare


def splits_of(folder):
    return [split for split in ("train", "dev", "test") if (folder / f"{split}.jsonl").is_file()]


def test_arc(prepared):
    manifest, rows = prepared("arc")
    assert manifest["counts"] == {"train": 20, "dev": 20, "test": 20} and manifest["unsolved"] == 60
    by_question = {row.question.partition(":")[0]: row for row in rows}
    for number in (3, 4):  # the first has numbers for letters
        row = by_question[f"Question {number}"]
        assert row.answer == "ABCD"[number % 4] and row.completion == []
        assert row.question.splitlines()[1:] == [f"{letter}) {text}" for letter, text in zip("ABCD", TEXTS["arc"], strict=True)]


def test_aqua(prepared):
    manifest, rows = prepared("aqua")
    assert manifest["counts"] == {"train": 20, "dev": 20, "test": 20} and manifest["rejected"] == 0
    one, two = (next(row for row in rows if f"road {number} in" in row.question) for number in (1, 2))
    assert one.question.splitlines()[1:] == ["A) 21", "B) 21.5", "C) 22", "D) 22.5", "E) 23"]
    assert one.completion[0]["content"] == "speed = 1/5.\n#### B"  # its own last line is rewritten
    assert two.completion[0]["content"] == "It is 2/5, answer C\n#### C"


def test_boolq(prepared):
    manifest, rows = prepared("boolq", "dev_fraction=0.1")
    counts = manifest["counts"]
    assert counts["test"] == 20 and counts["train"] + counts["dev"] == 20
    one = next(row for row in rows if "number 1 the" in row.question)
    assert one.question == "Passage 1. Persian is\nknown by names such as Dari.\nQuestion: is persian number 1 the same as dari?"
    assert one.answer == "no" and {row.answer for row in rows} == {"yes", "no"}

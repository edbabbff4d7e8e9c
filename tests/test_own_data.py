"""Rows of any schema, from files of any kind: mapped, split and filtered by settings alone; and what is told where that fails."""

import csv
import json
from decimal import Decimal
from pathlib import Path

import pytest
from scripts import CONFIGS, run
from test_data_prep import prepare, refused  # noqa: F401

from posttrain.errors import UserError
from posttrain.records import Example, as_dataset, read_jsonl
from posttrain.tasks.keys import proposed, scalar

FIELDS = {"question": "problem", "solution": "solution", "answer": "final_answer"}


def own_rows(count, first=0):
    """Rows as somebody has them, with an answer beside the solution, columns of his own, and one nested row."""
    return [
        {
            "problem": f"Ann has {n} pens and buys {n + 1}, more than Tom. How many pens?",
            "solution": f"{n}+{n + 1}={2 * n + 1}.\nAnswer: {2 * n + 1}",
            "final_answer": str(2 * n + 1),
            "level": "hard" if n % 2 else "easy",
            "meta": {"gold": 2 * n + 1, "tags": [n, "pens"]},
        }
        for n in range(first, first + count)
    ]


def without_nested(rows):
    return [{key: value for key, value in row.items() if key != "meta"} for row in rows]


def write(file, rows):
    """The rows in the format that the file's name tells."""
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = without_nested(rows)
    match file.suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        case ".csv":
            with file.open("w", newline="", encoding="utf-8") as out:
                table = csv.DictWriter(out, flat[0])
                table.writeheader()
                table.writerows(flat)
        case ".parquet" | "":
            from datasets import Dataset

            made = Dataset.from_list(flat)
            made.to_parquet(str(file)) if file.suffix else made.save_to_disk(str(file))
    return str(file)


def files(path, **more):
    return {"kind": "files", "path": path, "fields": FIELDS} | more


def told(rows):
    return {(row.question, row.split, row.answer, tuple(m["content"] for m in row.completion)) for row in rows}


# --- formats ----------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_data_set(prepare, tmp_path):  # noqa: F811
    rows, found, hashes = own_rows(40), [], []
    for name in ("own.jsonl", "own.json", "own.csv", "own.parquet", "own"):
        prepare(files(write(tmp_path / "raw" / name, rows)))
        found.append(told(prepare.rows()))
        hashes.append((prepare.manifest()["files"], prepare.manifest()["source_sha256"]))
    assert all(same == hashes[0] for same in hashes)
    assert all(same == found[0] for same in found) and len(found[0]) == 40
    one = next(row for row in prepare.rows() if row.answer == "7")
    assert one.completion[0]["content"] == "3+4=7.\n#### 7" and one.num_steps == 1
    assert len({row.id for row in prepare.rows()}) == 40


AWKWARD = (
    'She said "six", or "7"', "a, b; c\td", "two\nlines\n", "two\r\nlines", " spaces ", "\u00e9\u00a0\U0001f600 \u0661", "007",
    "1e5", "N/A", "null", "True", "NaN", "2020-01-01", "'=1+1", "\\n \\", "[1, 2]", "{", "#### 3 of what",
)  # fmt: skip
NUMBERS_AND_TEXTS = {"kind": "number"}, {"test_fraction": 0.3}
TRUE_OR_FALSE = (
    {"kind": "text", "options": ["yes", "no"]},
    {"fields": FIELDS | {"answer_values": {"true": "yes", "false": "no"}}, "where": {"final_answer": [True, False]}},
)
# What a column of answers holds -> (its values, the `answer` of the config, the rest of its source).
ANSWERS = {
    "integers": ([0, -5, 42, 2**62, 10], *NUMBERS_AND_TEXTS),
    "integers of more than 64 bits": ([2**80, -(10**30)], *NUMBERS_AND_TEXTS),
    "decimals": ([0.1, 42.0, -2.5, 1e-07, 1e23, 1e16, 123456.789], *NUMBERS_AND_TEXTS),
    "exact decimals": ([Decimal("42.50"), Decimal("7.00"), Decimal("-0.05")], *NUMBERS_AND_TEXTS),
    "digits as texts": (["007", "1,234", "$5", "1/2", " 42 ", "42.0", "50%"], *NUMBERS_AND_TEXTS),
    "words": (["007", "1.10", 'say "x"', "a,b", "N/A", "None", "true", "1e5"], {"kind": "text"}, {}),
    "truth values": ([True, False, False], *TRUE_OR_FALSE),
}


def in_every_format(folder, rows):
    """The same rows in every kind of file, as usual writers leave them. JSON has no exact decimals, and Parquet 64 bits."""
    from datasets import Dataset

    plain = [{key: float(value) if isinstance(value, Decimal) else value for key, value in row.items()} for row in rows]
    for name in ("own.json", "own.jsonl", "plain.csv"):
        yield write(folder / name, plain)
    (folder / "spaced.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in plain), encoding="utf-8")
    yield str(folder / "spaced.jsonl")
    sizes = [abs(row["final_answer"]) for row in rows if type(row["final_answer"]) is int]
    if sizes and max(sizes) >= 2**63:
        rows = [row | {"final_answer": Decimal(row["final_answer"])} for row in rows]
    yield write(folder / "own.parquet", rows)
    yield write(folder / "saved", rows)
    Dataset.from_list(without_nested(rows)).to_csv(str(folder / "pandas.csv"))
    yield str(folder / "pandas.csv")


@pytest.mark.parametrize(("answers", "answer", "source"), ANSWERS.values(), ids=ANSWERS)
def test_awkward_cells_have_the_same_hashes_in_every_format(prepare, tmp_path, answers, answer, source):  # noqa: F811
    """Ids, texts and golds: the bytes of every file that later stages read."""
    solutions = ("so", None, "", 'on "two"\nlines, so', "so\r\nit is")
    rows = [
        {"problem": f"{cell}\n{n}?" if n else cell, "solution": solutions[n % 5], "final_answer": answers[n % len(answers)]}
        for n, cell in enumerate(AWKWARD)
    ]
    hashes = {}
    for file in in_every_format(tmp_path / "raw", rows):
        prepare(files(file) | source, answer=answer, prompt={"instruction": "{question}"}, dev_fraction=0.2)
        hashes[Path(file).name] = prepare.manifest()["files"]
    assert len(hashes) == 7 and len({tuple(found.items()) for found in hashes.values()}) == 1, hashes
    assert len(prepare.rows()) == len(AWKWARD)


def test_a_column_that_is_kept_has_the_type_of_its_file(prepare, tmp_path):  # noqa: F811
    """A CSV has texts alone. A reward would get another value, so the data set is another one, and its hash says so."""
    rows, found = [row | {"code": "007", "size": 7} for row in own_rows(9)], {}
    for columns in (["code"], ["size"]):
        for name in ("own.jsonl", "own.parquet", "own.csv"):
            prepare(files(write(tmp_path / "raw" / name, rows), columns=columns))
            found[name] = prepare.manifest()["files"]
        assert found["own.jsonl"] == found["own.parquet"]
        assert (found["own.csv"] == found["own.jsonl"]) == (columns == ["code"])


def test_a_number_in_the_files_keeps_its_row_whatever_stands_between(prepare, tmp_path):  # noqa: F811
    """An id is the row's place; faults name the line."""
    (tmp_path / "own.csv").write_text('problem,final_answer\n"1+\n1?",2\n\n1+2?,3\n1+3?,x\n1+4?,5\n')
    fields = {"question": "problem", "answer": "final_answer"}
    prepare(files(str(tmp_path / "own.csv"), fields=fields, test_fraction=0.0), dev_fraction=0, max_rejected=1)
    assert {row.id: row.answer for row in prepare.rows()} == {"tiny-train-1": "2", "tiny-train-2": "3", "tiny-train-4": "5"}
    assert '"line": 6' in (prepare.folder / "rejected.jsonl").read_text()


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 1, "data": [{"problem": "1+1?", "final_answer": 2}]}',
        '{"problem": "1+1?", "final_answer": 2}\n{"problem": "1+2?", "final_answer": 3}\n',
        '\ufeff[{"problem": "1+1?", "final_answer": 2.0}]',
    ],
    ids=["in an object", "lines", "byte order mark"],
)
def test_json_as_it_is_found(prepare, tmp_path, text):  # noqa: F811
    (tmp_path / "own.json").write_text(text, encoding="utf-8")
    prepare(files(str(tmp_path / "own.json"), fields={"question": "problem", "answer": "final_answer"}))
    assert "2" in {row.answer for row in prepare.rows()}


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_is_text_as_it_is_written(prepare, tmp_path, mark):  # noqa: F811
    (tmp_path / "own.csv").write_text(f'problem{mark}final_answer{mark}code\n"1{mark}1?"{mark}2{mark}007\nN/A{mark}3{mark}N/A\n')
    fields = {"question": "problem", "answer": "final_answer"}
    prepare(files(str(tmp_path / "own.csv"), fields=fields, columns=["code"]))
    assert {(row.question, row.columns["code"]) for row in prepare.rows()} == {(f"1{mark}1?", "007"), ("N/A", "N/A")}


# --- splits -----------------------------------------------------------------------------------------------------------


def test_one_file_is_split_by_a_hash_that_more_rows_do_not_move(prepare, tmp_path):  # noqa: F811
    splits = []
    for rows in (own_rows(100), own_rows(200)[::-1]):
        prepare(files(write(tmp_path / "own.jsonl", rows)))
        splits.append({row.question: row.split for row in prepare.rows()})
    fewer, more = splits
    assert fewer.items() <= more.items() and 20 <= list(more.values()).count("test") <= 60
    prepare(files(write(tmp_path / "own.jsonl", own_rows(100)), test_fraction=0.0))
    assert prepare.manifest()["counts"]["test"] == 0


@pytest.mark.parametrize("dev", ["dev.jsonl", "validation.csv", "own_valid-00000-of-00001.parquet"])
def test_a_dev_file_is_the_dev_split(prepare, tmp_path, dev):  # noqa: F811
    for name, first in (("train.jsonl", 0), (dev, 100), ("test.json", 200)):
        write(tmp_path / "raw" / name, own_rows(20, first))
    (tmp_path / "raw" / "README.md").write_text("no data")
    prepare(files(str(tmp_path / "raw")), dev_fraction=0.5)
    assert prepare.manifest()["counts"] == {"train": 20, "dev": 20, "test": 20}
    assert all(row.question.split()[2][0] == "1" for row in prepare.rows("dev"))


def test_a_file_for_each_split_and_several_files_for_one(prepare, tmp_path):  # noqa: F811
    for name, first in (("a-1.jsonl", 0), ("a-2.jsonl", 100), ("b.csv", 200)):
        write(tmp_path / name, own_rows(10, first))
    prepare(files({"train": str(tmp_path / "a-*.jsonl"), "test": str(tmp_path / "b.csv")}), dev_fraction=0)
    assert prepare.manifest()["counts"] == {"train": 20, "dev": 0, "test": 10}
    assert len({row.id for row in prepare.rows()}) == 30


def test_the_splits_of_a_saved_folder_under_any_name(prepare, tmp_path):  # noqa: F811
    from datasets import Dataset, DatasetDict

    parts = {"train_a": own_rows(5), "train_b": own_rows(5, 20), "held": own_rows(5, 40), "junk": [{"other": 1}]}
    DatasetDict({name: Dataset.from_list(without_nested(rows)) for name, rows in parts.items()}).save_to_disk(
        str(tmp_path / "raw")
    )
    source = files(str(tmp_path / "raw"))
    refused(prepare(source, ok=False), "raw/train_a names the split 'train_a'", "`splits: {train: train_a, test: NAME}`")
    prepare(source | {"splits": {"train": ["train_a", "train_b"], "test": "held"}}, dev_fraction=0)
    assert prepare.manifest()["counts"] == {"train": 10, "dev": 0, "test": 5}
    assert len({row.id for row in prepare.rows()}) == 15


def test_a_column_says_the_split_and_another_which_rows_are_meant(prepare, tmp_path):  # noqa: F811
    rows = [row | {"fold": ("training", "Validation", "test")[n % 3]} for n, row in enumerate(own_rows(30))]
    source = files(write(tmp_path / "train.jsonl", rows), split_column="fold")
    prepare(source)
    assert prepare.manifest()["counts"] == {"train": 10, "dev": 10, "test": 10}
    prepare(
        source | {"splits": {"train": ["training", "Validation"], "test": "test"}, "where": {"level": "hard"}}, dev_fraction=0
    )
    assert prepare.manifest()["counts"] == {"train": 10, "dev": 0, "test": 5}
    prepare(source | {"where": {"level": ["easy", "hard"], "meta.gold": [1, 3, 5]}})
    assert {row.answer for row in prepare.rows()} == {"1", "3", "5"}


# --- fields -----------------------------------------------------------------------------------------------------------


def test_paths_lead_into_nested_rows_and_columns_are_kept(prepare, tmp_path):  # noqa: F811
    fields = {"question": "problem", "answer": "meta.gold"}
    prepare(files(write(tmp_path / "train.jsonl", own_rows(4)), fields=fields, columns=["level", "meta.tags.1"]), dev_fraction=0)
    rows = prepare.rows("train")
    assert {(row.answer, *row.columns.values()) for row in rows} >= {("1", "easy", "pens"), ("3", "hard", "pens")}
    table = as_dataset(rows, ("prompt", "answer", "level"))
    assert table["level"][:] == [row.columns["level"] for row in rows]
    with pytest.raises(UserError, match="the rows have no column 'levle': name it in source.columns"):
        as_dataset(rows, ("prompt", "levle"))


CHATS = {
    "roles": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "so\n#### 3"},
    ],
    "from": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "so\n#### 3"}],
    "longer": [
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": "#### 9"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "so\n#### 3"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "so\n#### 3"}]},
    ],
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_a_chat_is_its_last_question_and_the_answer_to_it(prepare, tmp_path, chat):  # noqa: F811
    write(tmp_path / "train.jsonl", [{"messages": chat}])
    prepare(files(str(tmp_path / "train.jsonl"), fields={"messages": "messages"}), dev_fraction=0)
    (row,) = prepare.rows("train")
    assert (row.question, row.answer, row.completion[0]["content"]) == ("Q", "3", "so\n#### 3")


def test_gsm8ks_own_form_needs_no_map(prepare, tmp_path):  # noqa: F811
    rows = [{"question": f"{n}+{n}?", "answer": f"so\n#### {2 * n}"} for n in range(9)]
    prepare({"kind": "files", "path": write(tmp_path / "train.parquet", rows)}, dev_fraction=0)
    parquet = prepare.rows()
    write(tmp_path / "raw" / "train.jsonl", rows)
    prepare({"kind": "jsonl", "path": str(tmp_path / "raw")}, dev_fraction=0)
    assert prepare.rows() == parquet and "columns" not in (prepare.folder / "train.jsonl").read_text()


STATED = {  # (form, solution, answer) -> the solution that is learnt
    "in the form": ("#### {answer}", "so\n#### 42", "42", "so\n#### 42"),
    "in another form": ("#### {answer}", "so\nAnswer: 42", "42", "so\n#### 42"),
    "in tags": ("Answer: {answer}", "so\n<answer>42</answer>", "42", "so\nAnswer: 42"),
    "in a box": ("Answer: {answer}", "so $\\boxed{42}$", "42", "so $42$\nAnswer: 42"),
    "behind hashes": ("Answer: {answer}", "so\n#### 42", "42", "so\nAnswer: 42"),
    "nowhere": ("<answer>{answer}</answer>", "so it is", "42", "so it is\n<answer>42</answer>"),
    "in other digits": ("Answer: {answer}", "so\nAnswer: 1,000", "1000.0", "so\nAnswer: 1,000"),
}


@pytest.mark.parametrize(("form", "solution", "gold", "learnt"), STATED.values(), ids=STATED)
def test_a_solution_states_its_answer_once_and_in_the_form(prepare, tmp_path, form, solution, gold, learnt):  # noqa: F811
    write(tmp_path / "own.jsonl", [{"q": "6*7?", "s": solution, "a": gold}])
    source = files(str(tmp_path / "own.jsonl"), fields={"question": "q", "solution": "s", "answer": "a"}, test_fraction=0.0)
    prepare(source, answer={"form": form}, prompt={"instruction": "{question}"}, dev_fraction=0)
    (row,) = prepare.rows("train")
    assert row.completion[0]["content"] == learnt
    write(tmp_path / "own.jsonl", [{"q": "6*7?", "s": solution, "a": "41"}])
    done = prepare(source, answer={"form": form}, prompt={"instruction": "{question}"}, ok=solution == "so it is")
    assert done.code == 0 or ("the solution ends in" in done.err and "and the row's answer is '41'" in done.err)


def test_a_question_of_several_keys_with_choices_and_answers_by_other_names(prepare, tmp_path):  # noqa: F811
    rows = [{"text": "A cat {sat}.", "ask": f"Who sat {n}", "options": [1, "dog", 2.0], "label": n % 3} for n in range(3)]
    fields = {"question": "{text}\n{ask}?", "choices": "options", "answer": "label", "answer_values": {0: "A", "1": "B", 2: "C"}}
    source = files(write(tmp_path / "own.jsonl", rows), fields=fields, test_fraction=0.0)
    settings = {"answer": {"kind": "choice"}, "prompt": {"instruction": "{question}"}, "dev_fraction": 0}
    prepare(source, **settings)
    assert [(row.question, row.answer) for row in prepare.rows("train")] == [
        (f"A cat {{sat}}.\nWho sat {n}?\nA) 1\nB) dog\nC) 2", "ABC"[n]) for n in range(3)
    ]
    source["fields"] = {"question": "{text} {ask}", "solution": "{label} of {options.0}", "answer": "ask"}
    prepare(source, answer={"kind": "text"}, prompt={"instruction": "{question}"}, dev_fraction=0)
    assert [row.completion[0]["content"].splitlines()[0] for row in prepare.rows("train")] == ["0 of 1", "1 of 1", "2 of 1"]


def test_the_recipe_for_svamp_reads_its_keys(tmp_path, tiny_model_dir):
    rows = [
        {"ID": f"chal-{n}", "Body": f"Dan had $ {n + 3} left", "Question": "How much was it?", "Equation": f"( {n}.0 + 3.0 )"}
        | {"Answer": n + 3.0, "Type": "Addition"}
        for n in range(20)
    ]
    place = (f"source.path={write(tmp_path / 'SVAMP.json', rows)}", f"output_dir={tmp_path / 'out'}")
    done = run("data_prep", "--config", CONFIGS / "recipes/data_svamp.yaml", *place, f"tokenizer.name_or_path={tiny_model_dir}")
    assert done.code == 0, done
    one = read_jsonl(tmp_path / "out/train.jsonl", Example)[0]
    assert one.question == f"Dan had $ {one.answer} left\nHow much was it?"
    assert one.completion[0]["content"] == f"( {int(one.answer) - 3}.0 + 3.0 )\n#### {one.answer}"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            ["id", "question", "choices.text", "choices.label", "answerKey"],
            "question: question, answer: answerKey, choices: choices.text",
        ),
        (
            ["question", "options", "rationale", "correct"],
            "question: question, solution: rationale, answer: correct, choices: options",
        ),
        (["conversations"], "messages: conversations"),
        (["a", "b"], "question: KEY, answer: KEY"),
    ],
)
def test_the_line_that_is_proposed(keys, line):
    assert proposed(keys) == f"fields: {{{line}}}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "x"), (18, "18"), (18.0, "18"), (1.5, "1.5"), (1e-7, "0.0000001"), (1e23, f"1{'0' * 23}"), (Decimal("4.50"), "4.5"),
        (100, "100"), (Decimal(100), "100"), (True, "true"), ("True", "True"), (None, None), ([], None), ({}, None),
        (float("nan"), None), (Decimal("NaN"), None),
    ],
)  # fmt: skip
def test_a_value_as_text(value, text):
    assert scalar(value) == text


def test_without_solutions_sft_says_so_and_the_rest_goes_on(prepare, tmp_path, tiny_model_dir):  # noqa: F811
    fields = {"question": "problem", "answer": "final_answer"}
    done = prepare(files(write(tmp_path / "train.jsonl", own_rows(8)), fields=fields), dev_fraction=0.4)
    assert "8 rows without a worked solution, which SFT needs" in done.out and prepare.manifest()["unsolved"] == 8
    assert all(row.completion == [] and row.answer for row in prepare.rows())
    place = (f"model.name_or_path={tiny_model_dir}", f"data.path={prepare.folder}", f"run_dir={tmp_path / 'run'}")
    done = run("sft_train", "--config", CONFIGS / "sft_tiny.yaml", *place)
    refused(done, "training rows in", "have no worked solution, which SFT learns from: map one (source.fields.solution")
    assert run("grpo_train", "--config", CONFIGS / "grpo_tiny.yaml", *place, "--dry-run").code == 0
    place = (*place[:2], "data.split=train", f"run_dir={tmp_path / 'run'}")
    assert run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", *place, "--dry-run").code == 0


def test_some_rows_may_lack_a_solution(prepare, tmp_path):  # noqa: F811
    rows = [row | {"solution": None if n % 2 else row["solution"]} for n, row in enumerate(own_rows(6))]
    prepare(files(write(tmp_path / "train.parquet", rows)), dev_fraction=0)
    assert [bool(row.completion) for row in prepare.rows()] == [True, False] * 3


# --- what is told -----------------------------------------------------------------------------------------------------

ROW = {"problem": "1+1?", "solution": "so", "final_answer": "2", "level": 1, "meta": {"gold": 2, "two": ["x", "y"]}}
MAPS = {
    "no map": (
        {"fields": None},
        "no row has 'question'; the keys are problem, solution, final_answer, level, meta.gold, meta.two. Say",
    ),
    "its line": ({"fields": None}, "`fields: {question: problem, solution: solution, answer: final_answer}`"),
    "a wrong key": ({"fields": FIELDS | {"answer": "anser"}}, "own.jsonl: no row has 'anser'"),
    "a wrong path": ({"fields": FIELDS | {"answer": "meta.golden"}}, "no row has 'meta.golden'; the keys are"),
    "a wrong solution": ({"fields": FIELDS | {"solution": "cot"}}, "no row has 'cot'"),
    "a row for a text": ({"fields": FIELDS | {"question": "meta"}}, "'meta' is an object, not text"),
    "no chat": ({"fields": {"messages": "level"}}, "'level' is no list of chat turns"),
    "nothing named": ({"fields": {"answer": "a"}}, "source.fields.question: missing: the key of a row's question"),
    "no answer": ({"fields": {"question": "problem"}}, "source.fields.answer: missing: the key of a row's answer"),
    "a part of a question": ({"fields": FIELDS | {"question": "{problem} {more}"}}, "no row has 'more'; the keys are"),
    "no choices": ({"fields": FIELDS | {"choices": "options"}}, "no row has 'options'; the keys are"),
    "choices that are none": ({"fields": FIELDS | {"choices": "level"}}, "'level' is no list of 2 to 26 choices"),
    "choices without an answer": (
        {"fields": {"question": "problem", "solution": "solution", "choices": "level"}},
        "source.fields.choices: goes with answer: give the key of a row's answer",
    ),
    "an answer that is no choice": (
        {"fields": FIELDS | {"choices": "meta.two"}},
        "the answer '2' is none of A to B: say by source.fields.answer_values which letter is meant",
    ),
    "twice": ({"fields": {"question": "problem", "messages": "meta"}}, "is the last user turn of messages: remove one"),
    "a filter's key": (
        {"where": {"levle": 1}},
        "no row has 'levle'; the keys are problem, solution, final_answer, level",
    ),
    "a filter's value": ({"where": {"level": [2, 3]}}, "source.where leaves none of the rows: level is 1"),
    "a column": ({"columns": ["levle"]}, "no row has 'levle'"),
    "a taken column": ({"columns": ["prompt"]}, "source.columns: prompt is given to rewards already"),
    "a split column": ({"split_column": "fold"}, "no row has 'fold'"),
    "its values": ({"split_column": "problem"}, "source.split_column problem names the split '1+1?': say under source which"),
    "two ways to split": ({"path": {"train": "a"}, "split_column": "level"}, "does not go with a path for each split"),
    "an unknown split": ({"path": {"eval": "a"}}, "source.path"),
    "no such file": ({"path": "nowhere.jsonl"}, "no file at nowhere.jsonl: check source.path"),
    "no such files": ({"path": "no*.jsonl"}, "no file at no*.jsonl: check source.path"),
    "another kind": ({"path": "LICENSE"}, "LICENSE is of no known kind (.json, .jsonl"),
    "a folder without data": ({"path": "empty"}, "empty holds no file of a known kind"),
    "a file without a split": ({"path": "mixed"}, "mixed holds files that name a split, and other.jsonl, which names none"),
}


@pytest.mark.parametrize(("changes", "said"), MAPS.values(), ids=MAPS)
def test_a_bad_map_is_one_line(prepare, tmp_path, monkeypatch, changes, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.jsonl", [ROW])
    for name in ("train.jsonl", "other.jsonl"):
        write(tmp_path / "mixed" / name, [ROW])
    (tmp_path / "empty").mkdir()
    (tmp_path / "LICENSE").write_text("free")
    source = {key: value for key, value in (files("own.jsonl") | changes).items() if value is not None}
    done = prepare(source, ok=False)
    assert done.code == 2 and said in done.err and not prepare.folder.exists()
    assert len(done.err.splitlines()) == 1 or "1 bad rows" in done.err.splitlines()[0]


CSV_ROW = b"problem,solution,final_answer\n1+1?,so,2\n"
BROKEN = {
    "binary.jsonl": (bytes(range(128, 256)) * 9, "bad rows, nothing written"),
    "binary.csv": (bytes(range(256)) * 9, "binary.csv:2 is not UTF-8 text (byte 0x80): convert it"),
    "binary.json": (b"\x80\x81", "binary.json:1 is not UTF-8 text"),
    "packed.jsonl": (b"\x1f\x8b\x08abc", "packed.jsonl is gzip, not text: unpack it first"),
    "packed.csv": (b"PK\x03\x04abc", "packed.csv is a zip archive, not text"),
    "empty.jsonl": (b"", "empty.jsonl holds no row"),
    "empty.json": (b"", "empty.json:1 is not JSON"),
    "empty_list.json": (b"[]", "empty_list.json holds no row"),
    "empty.csv": (b"", "empty.csv holds no row"),
    "header.csv": (b"problem,final_answer\n", "header.csv holds no row"),
    "empty.parquet": (b"", "empty.parquet cannot be read"),
    "no.parquet": (b"PAR1 this is none PAR1", "no.parquet cannot be read"),
    "latin.csv": (
        CSV_ROW + b"caf\xe9,so,2\n",
        "latin.csv:3 is not UTF-8 text (byte 0xe9): convert it, say `iconv -f LATIN1",
    ),
    "utf16.csv": (
        CSV_ROW.decode().encode("utf-16"),
        "utf16.csv:1 is not UTF-8 text (byte 0xff): convert it, say `iconv -f UTF-16",
    ),
    "headless.csv": (b"1+1?,so,2\n2+2?,so,4\n", "headless.csv: no row has 'problem'; the keys are 1+1?, so, 2"),
    "twice.csv": (b"problem,problem\na,b\n", "has the column 'problem' twice in its first line"),
    "ragged.csv": (CSV_ROW + b"2+2?,so\n", "ragged.csv:3: has 2 values, and the first line 3 names"),
    "quote.csv": (CSV_ROW + b'"2+2?,so,4\n', "quote.csv:3 is not CSV: unexpected end of data"),
    "cut.json": (b'[{"problem": "1', "cut.json:1 is not JSON: Unterminated string"),
    "cut.jsonl": (json.dumps(ROW).encode() + b'\n{"problem": "1', "cut.jsonl:2: not JSON: Unterminated string"),
    "number.json": (b"3", "number.json is JSON, but no list of rows"),
    "object.json": (b'{"a": 1}', "object.json is one object with a, no list of rows"),
    "texts.json": (b'["a", "b"]', "texts.json:1: not a JSON object (2 rows)"),
    "none.jsonl": (b'{"problem": null, "solution": "so", "final_answer": 2}\n', "none.jsonl:1: 'problem' is empty"),
    "nan.jsonl": (b'{"problem": "1+1?", "solution": "so", "final_answer": NaN}\n', "nan.jsonl:1: 'final_answer' is empty"),
    "lists.jsonl": (b'{"problem": "1+1?", "solution": "so", "final_answer": [2]}\n', "is a list, not text: name a part of it"),
    "lone.jsonl": (b'{"problem": "\\ud83d", "solution": "so", "final_answer": 2}\n', "'problem' holds half a character"),
    "words.jsonl": (b'{"problem": "1+1?", "solution": "so", "final_answer": "two"}\n', "is not a number: ' two'"),
    "contrary_words.jsonl": (
        b'{"problem": "1+1?", "solution": "1+1 is 3. So the answer is 3.", "final_answer": 2}\n',
        ":1: the solution's last line says 3, and the row's answer is '2': '1+1 is 3. So the answer is 3.'",
    ),
    "contrary.jsonl": (
        b'{"problem": "1+1?", "solution": "#### 3", "final_answer": 2}\n',
        "contrary.jsonl:1: the solution ends in #### 3, and the row's answer is '2'",
    ),
}


@pytest.mark.parametrize(("name", "content", "said"), [(name, *case) for name, case in BROKEN.items()], ids=BROKEN)
def test_a_file_that_cannot_be_read_is_one_line(prepare, tmp_path, name, content, said):  # noqa: F811
    (tmp_path / name).write_bytes(content)
    done = prepare(files(str(tmp_path / name)), ok=False)
    lines = done.err.splitlines()
    assert done.code == 2 and said in done.err and not prepare.folder.exists(), done
    assert len(lines) == (3 if "bad rows" in lines[0] else 1)


def test_a_truncated_parquet_file_is_one_line(prepare, tmp_path):  # noqa: F811
    file = tmp_path / "own.parquet"
    write(file, own_rows(50))
    file.write_bytes(file.read_bytes()[:-40])
    refused(prepare(files(str(file)), ok=False), "own.parquet cannot be read: ")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    refused(prepare(files(str(tmp_path / "saved")), ok=False), "saved cannot be read: ")


def test_mixed_types_are_read_as_they_stand(prepare, tmp_path):  # noqa: F811
    """`datasets` 5.2 gives the text of such a JSON list with its quotes, and makes dates of texts."""
    rows = [
        row | {"final_answer": answer, "level": level}
        for row, answer, level in zip(own_rows(3), (1, "3", 5.0), (1, "x", "2020-01-01"), strict=True)
    ]
    for name in ("own.json", "own.jsonl"):
        write(tmp_path / name, rows)
        prepare(files(str(tmp_path / name), columns=["level"], test_fraction=0.0), dev_fraction=0)
        assert [(row.answer, row.columns["level"]) for row in prepare.rows()] == [("1", 1), ("3", "x"), ("5", "2020-01-01")]


def test_equal_faults_are_told_once_with_their_number(prepare, tmp_path):  # noqa: F811
    rows = [row | {"final_answer": None if n else "1"} for n, row in enumerate(own_rows(300))]
    done = prepare(files(write(tmp_path / "train.jsonl", rows)), ok=False)
    assert done.err.splitlines() == [
        "data_prep.py: 299 bad rows, nothing written:",
        "train.jsonl:2: 'final_answer' is empty (299 rows)",
        "mend them, or set max_rejected=299 to leave them out (they are then listed in rejected.jsonl)",
    ]


def test_a_test_fraction_beside_test_rows_is_refused(prepare, tmp_path):  # noqa: F811
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / "raw" / name, own_rows(5))
    refused(prepare(files(str(tmp_path / "raw"), test_fraction=0.5), ok=False), "remove source.test_fraction")


def test_rows_come_back_as_they_were_written(prepare, tmp_path):  # noqa: F811
    prepare(files(write(tmp_path / "own.jsonl", own_rows(6)), columns=["meta"]))
    rows = read_jsonl(prepare.folder / "train.jsonl", Example)
    assert all(row.columns == {"meta": {"gold": int(row.answer), "tags": [int(row.answer) // 2, "pens"]}} for row in rows)

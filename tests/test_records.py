"""Records come back as they were written, a file is whole or as before, and no test row is trained on."""

import gzip
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import UserError
from posttrain.records import (
    Example,
    Prediction,
    as_dataset,
    holds_rows,
    read_jsonl,
    read_rows,
    sha256_file,
    sha256_text,
    write_jsonl,
)

LINE_BREAKS = "\n \r \r\n \x0b \x0c \x1c \x85 \u2028 \u2029"  # str.splitlines() cuts at each, JSON lines end in the first
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def example(text, split="train", name="a"):
    turn = [{"role": "user", "content": text}]
    return Example(name, split, text, turn, [{"role": "assistant", "content": text}], "3", 2)


def prediction(text):
    return Prediction("a", 0, text, "stop", 3, None, "none", 0, False, False, False, "1")


@given(texts=st.lists(TEXT, max_size=4))
def test_what_is_written_comes_back(tmp_path_factory, texts):
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    for cls, make in ((Example, example), (Prediction, prediction)):
        rows = [make(text) for text in texts]
        write_jsonl(file, rows)
        assert read_jsonl(file, cls) == rows
        assert file.read_bytes().count(b"\n") == len(rows)


def test_a_row_is_one_line_of_readable_json(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [example(LINE_BREAKS), {"name": "Zoë 🦆"}])
    first, second = file.read_bytes().split(b"\n")[:-1]
    assert json.loads(first)["question"] == LINE_BREAKS and "Zoë 🦆".encode() in second
    assert [row.get("question") for row in read_rows(file)] == [LINE_BREAKS, None]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [example("before")])
    before = file.read_bytes()

    def rows():
        yield example("after")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_jsonl(file, rows())
    with pytest.raises(UnicodeEncodeError):
        write_jsonl(file, [example("after"), example("\ud83d")])
    assert file.read_bytes() == before
    write_jsonl(file, [example("after")])  # over what the failed attempt left
    assert read_jsonl(file, Example) == [example("after")] and [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_of_another_shape_is_no_record(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [prediction("x")])
    with pytest.raises(UserError, match=r"rows.jsonl:1: no example, 'answer' is missing"):
        read_jsonl(tmp_path / "rows.jsonl", Example)


def test_hashes_are_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"Zo\xc3\xab" * 100_000)
    assert sha256_file(tmp_path / "file") == sha256_text("Zoë" * 100_000) == hashlib.sha256(b"Zo\xc3\xab" * 100_000).hexdigest()
    assert sha256_text("\ud83d") != sha256_text("\ud83c")  # half a character has a hash, too


def test_the_training_view_has_the_asked_columns_in_order():
    rows = as_dataset([example("x", name="a"), example("y", "dev", name="b")], ("prompt", "answer"))
    assert rows.column_names == ["prompt", "answer"] and rows["prompt"][1] == [{"role": "user", "content": "y"}]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_test_row_among_others_is_refused(place):
    rows = [example("x", name=str(number)) for number in range(2)]
    rows.insert(place, example("x", "test", name="leaked-7"))
    with pytest.raises(UserError, match=r"refusing to train on 1 test rows \(first: leaked-7\)"):
        as_dataset(rows, ("prompt",))


def test_nothing_to_train_on_is_told():
    with pytest.raises(UserError, match="no examples to train on: check data.num_train"):
        as_dataset([], ("prompt",))


def test_rows_are_read_compressed_where_only_that_is_there(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [example("Zoë 🦆")])
    with gzip.open(f"{file}.gz", "wt", encoding="utf-8") as compressed:
        compressed.write(file.read_text(encoding="utf-8").replace("Zoë", "Ada"))
    assert [row.question for row in read_jsonl(file, Example)] == ["Zoë 🦆"]
    file.unlink()
    assert holds_rows(file) and [row.question for row in read_jsonl(file, Example)] == ["Ada 🦆"]
    file.with_suffix(".jsonl.gz").unlink()
    assert not holds_rows(file)
    with pytest.raises(FileNotFoundError):
        list(read_rows(file))


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-9], lambda whole: whole[:40] + b"\xff" * 20 + whole[60:], lambda _: b"PK"]
)
def test_a_damaged_archive_of_rows_is_one_line(tmp_path, damage):
    whole = gzip.compress(b"".join(b'{"row": %d}\n' % number for number in range(999)))
    (tmp_path / "rows.jsonl.gz").write_bytes(damage(whole))
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz: damaged .*restore the file"):
        list(read_rows(tmp_path / "rows.jsonl"))

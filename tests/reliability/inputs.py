"""Rows, files and configs that are broken or hostile, made by rule: each is a line to a user, or is taken, and none is slow."""

import json
import os
from pathlib import Path

GOOD = {"question": "Ann has 2 apples and finds 3. How many?", "answer": "2+3=5\n#### 5"}
DEEP, LONG = 100_000, 10_000_000


def rows():
    """200 lines of a train.jsonl."""
    good = json.dumps(GOOD).encode()
    yield from (good[:cut] for cut in range(1, len(good), max(1, len(good) // 40)))  # torn at forty places
    yield from (good[:at] + bytes([good[at] ^ 0x80]) + good[at + 1 :] for at in range(0, len(good), max(1, len(good) // 30)))
    yield from (text.encode() for text in ("[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, "9" * 5000, "-" * 9, "1e999999"))
    yield from (
        text.encode() for text in ("null", "true", "NaN", "Infinity", '""', "[]", "{}", "[1]", '"x"', "1.5", "{{}}", "\\")
    )
    odd = (None, 5, 1.5, True, [], {}, ["x"], "", "   ", "\u0000", "\ud83d", "\u202e#### 5", "9" * 5000, "x" * LONG, "#### " * 9)
    for value in odd:
        for key in GOOD:
            yield json.dumps(GOOD | {key: value}).encode()
    golds = (
        "",
        " ",
        "many",
        "5 6",
        "5#### 6",
        "1/0",
        "1e400",
        "--5",
        "0x10",
        "nan",
        "inf",
        "\u0665",
        "9" * 5000,
        "<script>",
        "$",
        "%",
        "5;",
    )
    yield from (json.dumps(GOOD | {"answer": f"2+3\n#### {gold}"}).encode() for gold in golds)
    marks = (
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "<script>alert(1)</script>",
        "{{ 7*7 }}",
        "{% for %}",
        "%s%n",
        "\x1b[2J",
    )
    yield from (json.dumps(GOOD | {"question": f"{mark} how many?"}).encode() for mark in marks)
    yield from (json.dumps(GOOD | {"answer": f"{mark}\n#### 5"}).encode() for mark in marks)
    numbers = ('{"question": %s, "answer": "#### 5"}' % ("9" * 5000), '{"x": %s}' % ("9" * 5000), '{"x": 1e%s}' % ("9" * 400))
    yield from (text.encode() for text in numbers)
    yield from (b"\xff" * n for n in (1, 100, 10_000))
    yield from (unit.encode() * 300_000 for unit in (" 1", "1,", "\\\\frac{", "#", "a ", "(", "- ", "<<1"))
    keys = ('{"question": "a", "question": "b", "answer": "#### 5"}', '{"Question": "a", "Answer": "#### 5"}', '{"": 1}')
    yield from (text.encode() for text in keys)


def files():
    """What stands where train.jsonl should: a function that makes each of them."""
    good = json.dumps(GOOD).encode() + b"\n"
    contents = (
        b"", b"\n", b" \n\n", b"\x00" * 4096, os.urandom(4096), good.decode().encode("utf-16"), b"\xef\xbb\xbf" + good,
        good.replace(b"\n", b"\r\n"), good.replace(b"\n", b"\r"), json.dumps([GOOD]).encode(), b"\x1f\x8b" + good, b"PK\x03\x04",
        b"PAR1" + good, b"BZh9", b"\xfd7zXZ", good * 3, b"question,answer\na,5\n", b"<html></html>", good[:-1], b"{" * 1_000_000,
    )  # fmt: skip
    yield from ((lambda path, content=content: path.write_bytes(content)) for content in contents)
    yield lambda path: path.mkdir()
    yield os.mkfifo
    yield lambda path: path.symlink_to("nowhere")
    yield lambda path: path.symlink_to(path.name)
    yield lambda path: path.symlink_to("/dev/zero")


def configs():
    """130 changes of the text of a config."""
    values = (
        "!!int abc", "!!float abc", "!!bool abc", "!!null abc", "!!python/object/apply:os.system [id]", "!!binary aGk=", "!x y",
        "&a [*a]", "*a", "9" * 5000, "0x" + "F" * 5000, "-" + "9" * 5000, "1e400", ".nan", ".inf", "[" * 5000, "{a: " * 2000,
        "- -", "'", '"', '"\\x"', "|", ">", "? x", "@x", "`x", "%x", "\t", "x: y: z", "[1, 2", "{a: 1", "\x07", "\u0085", "~",
        "null", "[]", "{}", "yes", "no", "0o7", "1_000", "2026-01-01", "''", "x" * 40_000, "<<: *x",
    )  # fmt: skip
    for value in values:
        for key in ("seed", "name", "max_length"):
            yield f"{key}: {value}\n"


def bulk():
    """Files that are no config, by their size or form."""
    yield "".join(f"key_{i}: {i}\n" for i in range(100_000))
    yield "a: " + "[" * 100_000
    yield "x" * 10_000_000
    yield "\x00" * 1000
    yield ""


def written(folder, make):
    """A source folder with train.jsonl as `make` makes it, and a good test.jsonl."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    make(folder / "train.jsonl")
    (folder / "test.jsonl").write_text(json.dumps({"question": "What is 4 + 4?", "answer": "#### 8"}) + "\n")
    return folder

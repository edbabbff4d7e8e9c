"""YAML 1.2 text, and `key=value` laid over it, with the line that each key came from.

A config says what it means: anchors, aliases, merges and tags are refused, and alias bombs with them. A key given twice is a
fault. Faults are collected and not raised: the reader wants all of them at once.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

KeyPath = tuple[str | int, ...]
MOST_BYTES = 50_000  # thirty times the longest of configs/; the parser takes two seconds for them
COMMAND_LINE = 0  # the line number of everything that was given as key=value

_CONVERTED = {"int", "float", "bool", "null"}
_TEXT = {
    "str",
    "timestamp",
    "merge",
    "value",
}  # dates, `<<` and `=` are not in YAML 1.2's core schema: they are text
_PASSWORD = re.compile(r"://[^\s/@]{1,200}@")
_CONSTRUCTOR = YAML(typ="safe", pure=True).constructor


class Fault(NamedTuple):
    line: int
    path: KeyPath
    message: str

    def at(self, file: str) -> str:
        where = f"{file}:{self.line}" if self.line else "command line"
        return f"{where}: {key}: {self.message}" if (key := dotted(self.path)) else f"{where}: {self.message}"


class NotYaml(ValueError):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def dotted(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


@dataclass
class Document:
    """A mapping, the line of each of its keys, and the faults found so far."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def line(self, path: KeyPath) -> int:
        """The line where `path` was given; for a missing key, the line of the block that should hold it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def fault(self, path: KeyPath, message: str, line: int | None = None) -> None:
        self.faults.append(Fault(self.line(path) if line is None else line, path, message))

    def override(self, assignment: str) -> None:
        """Apply one `nested.key=value`. The value is YAML and replaces the one in the file."""
        key, equals, text = assignment.partition("=")
        path = _key_path(key)
        if not equals or "" in path:
            return self.fault((), f"expected key=value, not {assignment!r}", COMMAND_LINE)
        parent: Any = self.values
        for depth, part in enumerate(path[:-1], 1):
            if not isinstance(parent.get(part), dict):
                parent[part], self.lines[path[:depth]] = {}, COMMAND_LINE
            parent = parent[part]
        self.lines = {p: line for p, line in self.lines.items() if p[: len(path)] != path} | {path: COMMAND_LINE}
        try:
            node = _compose(text)
        except NotYaml as error:
            return self.fault(path, str(error), COMMAND_LINE)
        if _cut_by_comment(node, text):
            quoted = shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")
            return self.fault(path, f"YAML takes the # for the begin of a comment: quote the value, {quoted}", COMMAND_LINE)
        parent[path[-1]] = self._build(node, path, COMMAND_LINE) if node else None

    def refuse_passwords(self) -> None:
        """A setting is printed, and stored beside what it made: none may hold a password, and no fault shows one."""
        for path, value in _leaves(self.values, ()):
            if isinstance(value, str) and _PASSWORD.search(value):
                self.fault(path, "holds an address with a password in it: log in instead, and leave it out")

    def _build(self, node: Node, path: KeyPath, line: int | None = None) -> Any:
        """The node's value in YAML 1.2's core types. `line` replaces the node's own."""
        self.lines.setdefault(path, _line(node) if line is None else line)
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if node.anchor:
            return self.fault(path, f"anchors and aliases are not supported: write the value of &{node.anchor} out")
        if isinstance(node, MappingNode) and kind == "map":
            return self._mapping(node, path, line)
        if isinstance(node, SequenceNode) and kind == "seq":
            return [self._build(item, (*path, i), line) for i, item in enumerate(node.value)]
        if kind in _CONVERTED:
            return self._converted(node, kind, path)
        return node.value if kind in _TEXT else self.fault(path, f"the tag {node.tag} is not supported")

    def _converted(self, node: Node, kind: str, path: KeyPath) -> Any:
        """The value of a number, a truth value or null, which a tag may have promised in vain."""
        try:
            value = _CONSTRUCTOR.construct_object(node)
        except (ValueError, KeyError, OverflowError):
            return self.fault(path, f"{_beginning(node.value)} is not of the kind {kind}")
        if isinstance(value, int) and value.bit_length() > 63:
            return self.fault(path, f"{_beginning(node.value)} is a larger number than any setting takes")
        return value

    def _mapping(self, node: MappingNode, path: KeyPath, line: int | None) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, ScalarNode) else "?"
            child, key_line = (*path, key), _line(key_node) if line is None else line
            if key in result:
                first = f", first given on line {self.lines[child]}" if self.lines[child] else ""
                self.fault(child, f"duplicate key{first}", key_line)
            else:
                self.lines[child] = key_line
                result[key] = self._build(value, child, line)
        return result


def _key_path(key: str) -> KeyPath:
    """rewards.my_rewards.py:brevity.weight -> rewards, my_rewards.py:brevity, weight"""
    block, _, rest = key.partition(".")
    file, colon, more = rest.rpartition(":")
    if not colon:
        return tuple(key.split("."))
    function, *inside = more.split(".")
    return (block, f"{file}:{function}", *inside)


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    match value:
        case dict():
            for key, child in value.items():
                yield from _leaves(child, (*path, key))
        case list():
            for i, child in enumerate(value):
                yield from _leaves(child, (*path, i))
        case _:
            yield path, value


def read(path: Path | str) -> Document:
    """The document in a file.

    Raises:
        NotYaml: the text is not UTF-8, not YAML, or not a mapping. The error has the line.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise NotYaml(1, f"more than {MOST_BYTES:,} bytes: this is no config")
    try:
        node = _compose(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise NotYaml(line, f"not UTF-8 text: byte 0x{data[error.start]:02x}") from error
    if not isinstance(node, MappingNode):
        raise NotYaml(1, "the file is empty" if node is None else "expected `key: value` lines")
    document = Document()
    document.values = document._build(node, ()) or {}
    return document


def _cut_by_comment(node: Node | None, text: str) -> bool:
    """Whether a # has ended the value of an override: "End with #### and the number" would be "End with"."""
    plain = isinstance(node, ScalarNode) and node.style is None
    return bool((node is None or plain) and re.search(r"(?:\A|\s)#", text))


def _compose(text: str) -> Node | None:
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except ReaderError as error:
        raise NotYaml(text.count("\n", 0, error.position) + 1, "not valid YAML: a control character") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise NotYaml(line, "not valid YAML: " + ", ".join(filter(None, (error.context, error.problem)))) from error
    except RecursionError as error:
        raise NotYaml(1, "not valid YAML: nested too deeply") from error


def _beginning(text: Any, most: int = 40) -> str:
    return f"{str(text)[:most]!r}{'...' if len(str(text)) > most else ''}"


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1

"""What every key of a config does, read off the schema: for `--help KEY`, for a page of docs and for an editor.

A key of ours has its description under its field in `schema`, and at its end in brackets its unit, if it has one, and the file
in which it acts: "Longer rows are counted. [tokens, in data_prep.py]". TRL's keys are described by TRL.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from posttrain.config.messages import did_you_mean
from posttrain.config.schema import DataConfig, EvalConfig, GrpoConfig, Settings, SftConfig
from posttrain.errors import UserError

# By the first word of a config's name, which its schema has, too.
STAGES: dict[str, type[Settings]] = {"data": DataConfig, "sft": SftConfig, "grpo": GrpoConfig, "eval": EvalConfig}
NAMES = {
    "integer": "whole number",
    "boolean": "true or false",
    "string": "text",
    "array": "list",
    "object": "block",
    "null": "null",
}


@dataclass(frozen=True)
class Entry:
    """A key: its dotted path, the `source.kind` it goes with, what it may hold, and what is said of it."""

    path: str
    kind: str
    type: str
    default: str
    text: str
    unit: str
    where: str
    stages: tuple[str, ...] = ()

    @property
    def block(self) -> str:
        return self.path.rpartition(".")[0]


@cache
def entries(cls: type[Settings]) -> list[Entry]:
    schema = cls.model_json_schema()
    return list(dict.fromkeys(_entries(schema, schema.get("$defs", {}), "", "")))


def _entries(node: dict[str, Any], definitions: dict[str, Any], prefix: str, kind: str) -> Iterator[Entry]:
    if "$ref" in node:
        node = definitions[node["$ref"].rsplit("/", 1)[1]]
    for member in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _entries(member, definitions, prefix, kind)
    properties = node.get("properties", {})
    kind = ", ".join(_choices(properties.get("kind", {}))) or kind
    for name, child in properties.items():
        yield _entry(prefix + name, kind, child, definitions, name in node.get("required", ()))
        yield from _entries(child, definitions, f"{prefix}{name}.", kind)


def _entry(path: str, kind: str, node: dict[str, Any], definitions: dict[str, Any], required: bool) -> Entry:
    text = " ".join(node.get("description", "").split())
    ours = re.fullmatch(r"(.*) \[(?:([^\[\]]+), )?in ([\w./]+(?: and [\w./]+)*)\]", text)
    said, unit, where = ours.groups() if ours else (text, None, None)
    default = "required" if required else _shown(node.get("default"))
    return Entry(path, kind, _type(node, definitions), default, said, unit or "", where or "")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, dict) else "{}" if not value else "block"


def _choices(node: dict[str, Any]) -> list[str]:
    return [str(choice) for choice in node.get("enum", [node["const"]] if "const" in node else [])]


def _type(node: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a value may be, in a reader's words."""
    if members := (*node.get("anyOf", ()), *node.get("oneOf", ())):
        return " or ".join(dict.fromkeys(_type(member, definitions) for member in members))
    if "$ref" in node:
        return "block"
    if choices := _choices(node):
        return ", ".join(choices)
    return NAMES.get(node.get("type", ""), str(node.get("type", "any value")))


# --- one key ----------------------------------------------------------------------------------------------------------


def explained(cls: type[Settings], key: str) -> str:
    """The entry of a key, and the keys inside of it.

    Raises:
        UserError: there is no such key; the text has the nearest.
    """
    found = [entry for entry in entries(cls) if entry.path == key]
    if not found:
        known = {entry.path for entry in entries(cls)}
        named = [path for path in sorted(known) if path.rpartition(".")[2] == key]
        hint = f" (did you mean {named[0]!r}?)" if named else did_you_mean(key, known)
        raise UserError(f"--help {key}: no key of this config{hint}")
    inside = dict.fromkeys(entry.path for entry in entries(cls) if entry.block == key)
    lines = [line for entry in found for line in _lines(entry)]
    return "\n".join([*lines, *(["    keys: " + ", ".join(inside)] if inside else [])])


def _lines(entry: Entry) -> list[str]:
    default = entry.default if entry.default == "required" else f"{entry.default} where it is not set"
    kind = f", with {entry.path.split('.')[0]}.kind {entry.kind}" if entry.kind and not entry.path.endswith(".kind") else ""
    said = entry.text if entry.where else f"TRL: {entry.text}"
    facts = [f"unit: {entry.unit}" if entry.unit else "", f"acts in {entry.where}" if entry.where else ""]
    body = [said, "; ".join(filter(None, facts))]
    return [
        f"{entry.path}: {entry.type}; {default}{kind}",
        *(f"    {line}" for text in body for line in textwrap.wrap(text, 110)),
    ]


# --- the page and the schemas -----------------------------------------------------------------------------------------


def page() -> str:
    """docs/settings_reference.md: every key that is not TRL's, block by block."""
    found: dict[Entry, Entry] = {}
    for stage, cls in STAGES.items():
        for entry in entries(cls):
            if not entry.path.startswith("trainer."):
                before = found.get(entry, entry)
                found[entry] = replace(before, stages=(*before.stages, stage))
    lines = [INTRODUCTION]
    blocks = dict.fromkeys((entry.block, entry.kind) for entry in found.values())
    for block, kind in sorted(blocks, key=lambda block: block != ("", "")):
        lines += ["", f"## {_title(block, kind)}", "", "| key | default | what it does | acts in |", "| --- | --- | --- | --- |"]
        lines += [_row(entry) for entry in found.values() if (entry.block, entry.kind) == (block, kind)]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Every key of a config

Made from [posttrain/config/schema/](../posttrain/config/schema/) by `python -m posttrain.config --write`; a test holds it to
the schema. The keys of `trainer` are TRL's own. Each script explains any of its keys, TRL's included:

```bash
python sft_train.py --help data.num_dev
python grpo_train.py --help trainer.num_generations
```

Behind a description stand the configs that have the key, unless all four do."""


def _title(block: str, kind: str) -> str:
    return (f"`{block}`" if block else "Top level") + (f" with kind {kind}" if kind else "")


def _row(entry: Entry) -> str:
    default = entry.default if entry.default in ("required", "block") else f"`{entry.default}`"
    parts = [entry.text, f"One of {entry.type}." if ", " in entry.type else "", f"Unit: {entry.unit}." if entry.unit else ""]
    parts += [f"({', '.join(entry.stages)})" if len(entry.stages) < len(STAGES) else ""]
    text = " ".join(filter(None, parts)).replace("|", "\\|")
    return f"| `{entry.path}` | {default} | {text} | {entry.where} |"


def schemas() -> dict[str, str]:
    """configs/schemas/: for an editor, which finds it by the line `# yaml-language-server: $schema=...` of a config."""
    return {f"{stage}.json": json.dumps(cls.model_json_schema(), indent=1) + "\n" for stage, cls in STAGES.items()}

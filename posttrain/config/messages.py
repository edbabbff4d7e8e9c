"""pydantic's errors in a reader's words: the line, the key, what was expected, a suggestion."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from posttrain.config.trl_fields import SET_BY_POSTTRAIN
from posttrain.config.yaml_lines import Document, Fault, KeyPath

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "model_attributes_type": "a block of keys",
    "too_short": "a list of at least one item",
    "string_pattern_mismatch": "a full commit id of 40 hexadecimal digits",
}


def one_line_each(faults: Iterable[Fault], file: str) -> str:
    in_order = sorted(faults, key=lambda fault: fault.line or math.inf)
    return "\n".join(fault.at(file) for fault in in_order)


def add_faults(document: Document, error: ValidationError, cls: type[BaseModel]) -> None:
    """Add pydantic's errors to the document's faults, one for each key that has none yet."""
    broken = [fault.path for fault in document.faults if fault.path]
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_path.setdefault(_key_path(detail, document.values), []).append(detail)
    for path, details in by_path.items():
        inside = any(other[: len(path)] == path for other in by_path if other != path)
        if inside and all(detail["type"].endswith("_type") for detail in details):
            continue  # a value of several types: what is wrong inside of it says more
        if not any(path[: len(prefix)] == prefix for prefix in broken):
            document.fault(path, _message(path, details, cls))


def _key_path(detail: ErrorDetails, values: Any) -> KeyPath:
    """The key at fault: pydantic's path without the names of union members that it also holds."""
    path: KeyPath = ()
    if detail["type"] == "rule":  # its last key may be missing
        for part in detail["loc"]:
            if not (isinstance(values, dict) and part not in values and values.get("kind") == part):
                path, values = (*path, part), values.get(part) if isinstance(values, dict) else None
        return path
    for part in detail["loc"]:
        if isinstance(part, int) or (isinstance(values, dict) and part in values):
            path, values = (*path, part), values[part]
    if detail["type"] == "missing":
        return (*path, detail["loc"][-1])
    return (*path, "kind") if detail["type"].startswith("union_tag") else path


def _message(path: KeyPath, details: list[ErrorDetails], cls: type[BaseModel]) -> str:
    match details[0]["type"]:
        case "missing" | "union_tag_not_found":
            return "missing"
        case "rule":
            return details[0]["msg"]
        case "extra_forbidden":
            return _unknown_key(path, cls)
    return _wrong_value(details)


def _unknown_key(path: KeyPath, cls: type[BaseModel]) -> str:
    *block, key = map(str, path)
    if block in ([], ["trainer"]) and key in SET_BY_POSTTRAIN:
        return f"posttrain sets this itself: use {SET_BY_POSTTRAIN[key]}"
    known = known_keys(cls)
    if ".".join(map(str, path)) in known:
        return f"does not go with this {'.'.join([*block, 'kind'])}"
    names = [name.split(".") for name in known]
    beside = {name[-1]: ".".join(name) for name in names if name[:-1] == block}
    elsewhere = {name[-1]: ".".join(name) for name in reversed(names)}
    if key in elsewhere:  # TRL's own key at the top level, say
        return f"unknown key (did you mean {elsewhere[key]!r}?)"
    for candidates, cutoff in ((beside, 0.65), (elsewhere, 0.8)):
        if close := difflib.get_close_matches(key, candidates, 1, cutoff):
            return f"unknown key (did you mean {candidates[close[0]]!r}?)"
    return "unknown key"


def _wrong_value(details: list[ErrorDetails]) -> str:
    """One message for a value that fits none of the types its key may have."""
    value, expected, choices = details[0]["input"], [], []
    for detail in details:
        context = detail.get("ctx", {})
        allowed = str(context.get("expected") or context.get("expected_tags") or "")
        choices += re.findall(r"'([^']*)'", allowed)
        value = context.get("tag", value)
        expected.append(_EXPECTED.get(detail["type"]) or allowed or detail["msg"].removeprefix("Input should be "))
    hint, wanted = did_you_mean(value, choices), " or ".join(dict.fromkeys(expected))
    if hint and len(wanted) > 120:  # TRL knows dozens of optimizers
        wanted = f"one of {len(choices)} known values"
    return f"should be {wanted}, not {_shown(value)}{hint}"


def _shown(value: Any, num_chars: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= num_chars else text[: num_chars - 3] + "..."


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(choices), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@cache
def known_keys(cls: type[BaseModel]) -> list[str]:
    """Every dotted key that a config of this class may hold, the trainer block's included."""
    schema = cls.model_json_schema()
    return list(dict.fromkeys(_keys_under(schema, schema.get("$defs", {}), "")))


def _keys_under(node: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[str]:
    if "$ref" in node:
        node = definitions[node["$ref"].rsplit("/", 1)[1]]
    for member in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _keys_under(member, definitions, prefix)
    for name, child in node.get("properties", {}).items():
        yield prefix + name
        yield from _keys_under(child, definitions, f"{prefix}{name}.")

"""What a data set is made from: the rows of a source of any kind, their hash, and the manifest's entry."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from posttrain.config.schema import DataConfig
from posttrain.errors import UserError
from posttrain.places import found
from posttrain.records import sha256_text
from posttrain.tasks.answers import grader_of
from posttrain.tasks.files import file_tables
from posttrain.tasks.generated import generated_rows
from posttrain.tasks.gsm8k import file_rows, jsonl_rows
from posttrain.tasks.hub import hub_tables
from posttrain.tasks.keys import wanted_keys
from posttrain.tasks.made import made_rows
from posttrain.tasks.mapped import mapped_rows
from posttrain.tasks.rows import Row
from posttrain.tasks.sampled import sampled_rows, sampled_source
from posttrain.tasks.svamp import svamp_rows


@dataclasses.dataclass(frozen=True)
class Source:
    rows: list[Row]
    sha256: str
    describe: dict[str, Any]
    shots: list[Row]


def read_source(config: DataConfig) -> Source:
    source = config.source
    match source.kind:
        case "hub":
            rows = list(mapped_rows(hub_tables(source, wanted_keys(source)), source))
        case "files":
            rows = list(mapped_rows(file_tables(source, wanted_keys(source)), source))
        case "jsonl":
            rows = list(jsonl_rows(Path(source.path)))
        case "svamp":
            rows = list(svamp_rows(Path(source.path)))
        case "rejection_sampled":
            rows = list(sampled_rows(source, grader_of(config.answer.model_dump())))
        case "made_choice" | "made_yes_no" | "made_algebra":
            rows = list(made_rows(source, config.seed))
        case _:
            rows = list(generated_rows(source, config.seed))
    shots = written_shots(config.prompt.shots)
    digest = sha256_text("".join(map(_content, [*rows, *shots])))
    origin = {"sampled_from": sampled_source(source)} if source.kind == "rejection_sampled" else {}
    return Source(rows, digest, source.model_dump(mode="json", exclude_none=True) | origin, shots)


def _content(row: Row) -> str:
    """What of a row makes its data set another one."""
    apart = "" if row.gold is None and not row.columns else f"\0{row.gold}\0{json.dumps(row.columns, sort_keys=True)}"
    return f"{row.split}\0{row.question}\0{row.answer}\0{row.problem}{apart}\n"


def written_shots(file: str | None) -> list[Row]:
    """Solved examples from a file of their own. They go into prompts alone."""
    if file is None:
        return []
    if not found(file).exists():
        raise UserError(f"no solved examples at {file}: check prompt.shots, or leave it out for training rows")
    return list(file_rows(found(file), "train"))

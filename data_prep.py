"""Questions and worked solutions from a source -> one data set folder that every later stage reads.

    python data_prep.py --config configs/data_gsm8k.yaml                 # GSM8K from the Hub, at a pinned revision
    python data_prep.py --config configs/data_gsm8k_local.yaml source.path=my_folder
    python data_prep.py --config configs/data_demo.yaml                  # offline word problems

It writes <output_dir>/{train,dev,test}.jsonl, rejected.jsonl and manifest.json. It builds the prompt once and stores it: SFT,
GRPO and evaluation read the same messages. It grades every gold solution before it writes it, and each must be right.
A second run with the same settings and the same source changes nothing and says so.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from posttrain.config.load import config_sha256, from_command_line
from posttrain.config.schema import DataConfig
from posttrain.console import Bar
from posttrain.errors import UserError, exit_on_user_error
from posttrain.records import Example, sha256_file, write_atomic, write_jsonl
from posttrain.runs.alone import alone
from posttrain.runs.data_sets import read_data_manifest
from posttrain.runs.directory import check_writable, make_folder
from posttrain.runs.manifest import git_state
from posttrain.tasks.answers import grader_of
from posttrain.tasks.contamination import train_test_overlap
from posttrain.tasks.examples import (
    check_rows,
    contradictions,
    few_shot_rows,
    refuse_too_many,
    special_tokens,
    to_example,
    without_repeats,
)
from posttrain.tasks.gsm8k import gives_away_its_test_set
from posttrain.tasks.rows import SPLITS, Row
from posttrain.tasks.sources import Source, read_source


def main() -> None:
    config, args = from_command_line(DataConfig, __doc__)
    source = read_source(config)
    folder = Path(config.output_dir)
    refuse_foreign(folder)
    if is_current(config, source, folder):
        print(f"{folder} is up to date: same settings, same source, nothing to do")
        return

    from posttrain.models.chat import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    specials = special_tokens(tokenizer)
    rows, rejected = check_rows(source.rows, config, specials)
    refuse_too_many(rejected, config)
    refuse_none(rows, config)
    contrary = contradictions(rows, grader_of(config.answer.model_dump()))
    rows, repeats = without_repeats(rows, distinct_by_answer=config.source.kind == "rejection_sampled")
    refuse_emptied({row.split for row in source.rows} - {row.split for row in rows}, config)
    shots = few_shot_rows(rows, source.shots, config, specials)
    examples = [to_example(row, config, shots) for row in rows]
    manifest = describe(examples, config, source, repeats | {"contradictions": len(contrary)}, len(rejected), tokenizer)
    if not args.dry_run:
        write(folder, examples, rejected, manifest)
    print("\n".join([*shortened(contrary), summary(manifest), *([] if args.dry_run else [f"wrote {folder}"])]))


def refuse_none(rows: list[Row], config: DataConfig) -> None:
    if not rows:
        raise UserError(
            f"no row in the source of {config.name} ({config.source.kind}): nothing written; check source in its config"
        )


def refuse_emptied(splits: set[str], config: DataConfig) -> None:
    if splits:
        raise UserError(
            f"no {' and no '.join(sorted(splits))} row of {config.name} is left, for all are bad or in the test split too: "
            "nothing written; give the source others"
        )


def shortened(lines: list[str], most: int = 20) -> list[str]:
    return [*lines[:most], *([f"... and {len(lines) - most} more"] if len(lines) > most else [])]


# --- the folder -------------------------------------------------------------------------------------------------------


def describe(
    examples: list[Example], config: DataConfig, source: Source, repeats: dict[str, int], num_rejected: int, tokenizer: Any
) -> dict[str, Any]:
    return {
        "stage": "data",
        "name": config.name,
        "source": source.describe,
        "source_sha256": source.sha256,
        "config_sha256": config_sha256(config),
        "grader": grader_of(config.answer.model_dump()).name,
        "answer": config.answer.model_dump(),
        "prompt": config.prompt.model_dump(),
        **git_state(),
        "counts": {split: sum(example.split == split for example in examples) for split in SPLITS},
        "rejected": num_rejected,
        **repeats,
        **({"unsolved": unsolved} if (unsolved := sum(not example.completion for example in examples)) else {}),
        "ngram_overlap": ngram_overlap(examples),
        "warning": "made from GSM8K test questions (arXiv:2410.05229): never report GSM8K for a model trained on this"
        if gives_away_its_test_set({"source": source.describe})
        else None,
        **token_lengths(examples, config, tokenizer),
    }


def ngram_overlap(examples: list[Example]) -> dict[str, int]:
    """How many test questions share 13 words in a row with one of train or dev. Equal questions are dropped before this."""
    seen = [example.question for example in examples if example.split != "test"]
    overlap = train_test_overlap(seen, [example.question for example in examples if example.split == "test"])
    return {"ngram": overlap["ngram"], "test_questions": overlap["k"]}


def token_lengths(examples: list[Example], config: DataConfig, tokenizer: Any) -> dict[str, Any]:
    """Percentiles of the lengths of prompts and whole rows in the tokenizer's tokens, and the share over `max_length`.

    Raises:
        UserError: the chat template changes a message.
    """
    from posttrain.models.template_check import TemplateCheck

    check, prompts, wholes = TemplateCheck(tokenizer), [], []
    with contextlib.closing(Bar(len(examples), "rows tokenized")) as bar:
        for number, example in enumerate(examples):
            bar.show(number)
            prompt, whole = check.ids(example)
            prompts.append(len(prompt))
            wholes.append(len(whole))
    completions = [whole - prompt for whole, prompt, row in zip(wholes, prompts, examples, strict=True) if row.completion]
    assert all(length > 0 for length in completions), "a row without an answer"
    over = sum(length > config.max_length for length in wholes)
    return {
        "tokenizer": config.tokenizer.name_or_path,
        "prompt_tokens": percentiles(prompts),
        "total_tokens": percentiles(wholes),
        "completion_tokens": percentiles(completions),
        "max_length": config.max_length,
        "share_over_max_length": round(over / max(1, len(wholes)), 5),
    }


def percentiles(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99, 100)} if ordered else {}


def is_current(config: DataConfig, source: Source, folder: Path) -> bool:
    """Whether the folder holds, undamaged, what these settings and this source give."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = read_data_manifest(folder)
    now = {
        "config_sha256": config_sha256(config),
        "source_sha256": source.sha256,
        "grader": grader_of(config.answer.model_dump()).name,
    }
    same = all(manifest.get(key) == value for key, value in now.items())
    return (
        same
        and bool(manifest["files"])
        and all((folder / name).is_file() and sha256_file(folder / name) == digest for name, digest in manifest["files"].items())
    )


# What a kill in the first write leaves behind.
BEFORE_MANIFEST = frozenset((".lock", "manifest.json.partial"))


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that data_prep.py did not write: it may hold the only copy of something, say of the source.

    Raises:
        UserError: it holds no data set, a damaged one, or may not be written to.
    """
    check_writable(folder, "output_dir")
    if not folder.exists() or BEFORE_MANIFEST.issuperset(path.name for path in folder.iterdir()):
        return
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is not empty and holds no data set of data_prep.py: choose another output_dir")
    read_data_manifest(folder)


def write(folder: Path, examples: list[Example], rejected: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Write the files and last their hashes: until then, and after a kill, no stage takes the folder for a data set."""
    make_folder(folder)
    with alone(folder, "output_dir", appears=False):
        write_atomic(folder / "manifest.json", json.dumps(manifest | {"files": {}}, indent=2) + "\n")
        for split in SPLITS:
            write_jsonl(folder / f"{split}.jsonl", [example for example in examples if example.split == split])
        write_jsonl(folder / "rejected.jsonl", rejected)
        files = {name: sha256_file(folder / name) for name in (*(f"{split}.jsonl" for split in SPLITS), "rejected.jsonl")}
        write_atomic(folder / "manifest.json", json.dumps(manifest | {"files": files}, indent=2) + "\n")


def spread(what: str, tokens: dict[str, int]) -> str:
    if not tokens:
        return f"no {what}"
    return f"half of the {what}s have at most {tokens['p50']}, 99 of 100 at most {tokens['p99']}, all at most {tokens['p100']}"


def summary(manifest: dict[str, Any]) -> str:
    counts = " ".join(f"{split} {manifest['counts'][split]}" for split in SPLITS)
    lines = [
        f"{manifest['name']}: {counts}; {manifest['rejected']} rejected, {manifest['duplicates']} duplicates, "
        f"{manifest['train_test_overlap']} train rows that are in the test split (dropped), "
        "{test_questions} test questions that share {ngram} words in a row with train".format(**manifest["ngram_overlap"])
        + f"; {manifest['contradictions']} rows that contradict another"
        + (f"; {manifest['unsolved']} rows without a worked solution, which SFT needs" if "unsolved" in manifest else ""),
        f"tokens ({manifest['tokenizer']}): {spread('prompt', manifest['prompt_tokens'])}; "
        f"{spread('completion', manifest['completion_tokens'])}; "
        f"{manifest['share_over_max_length']:.2%} of rows over {manifest['max_length']}",
    ]
    return "\n".join([*lines, f"WARNING: {manifest['warning']}"] if manifest["warning"] else lines)


if __name__ == "__main__":
    exit_on_user_error(main)
    sys.exit(0)

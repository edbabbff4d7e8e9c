"""A release -> the files of its repository: by name, never a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config.schema import MODEL_FOLDER
from posttrain.errors import UserError
from posttrain.hub.card import model_card
from posttrain.hub.metadata import EVAL_RESULTS, eval_results_yaml
from posttrain.hub.redaction import VOCABULARIES, portable
from posttrain.hub.release import Base, Files, Release
from posttrain.lineage.origins import LINEAGE
from posttrain.records import sha256_file
from posttrain.runs.integrity import CONFIG, NOT_READ, WEIGHTS
from posttrain.runs.manifest import EXPORT, PUBLIC_MANIFEST, Manifest, lineage
from posttrain.tasks.prompts import PROMPT_FILE, prompt_form

TOKENIZER_FILES = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
BASE_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def all_files(release: Release) -> Files:
    """Everything that is sent: files by name, never a folder."""
    files: Files
    if release.manifest.all_weights:
        files = {**named(release.run_dir / MODEL_FOLDER, (*BASE_FILES, *TOKENIZER_FILES))}
    else:
        adapter = release.run_dir / "adapter"
        files = {WEIGHTS: adapter / WEIGHTS, CONFIG: adapter_config(adapter / CONFIG, release.base)}
        files |= named(adapter, TOKENIZER_FILES)
    files["README.md"] = model_card(release).encode()
    files[PUBLIC_MANIFEST] = public_manifest(release.manifest)
    if gsm8k := next((e for e in release.evaluations if e.is_of_this_adapter and e.is_gsm8k), None):
        files[EVAL_RESULTS] = eval_results_yaml(gsm8k).encode()
    if release.base.merged:
        base = named(release.base.merged, (*BASE_FILES, *TOKENIZER_FILES))
        files |= {f"merged_base/{name}": file for name, file in base.items()}
    for variant in release.variants:
        files |= {**variant.files, f"{variant.name}/{EXPORT}": to_json(portable(variant.made))}
    files |= prompt_file(release)
    return files | {LINEAGE: lineage_file(release, files)}


def prompt_file(release: Release) -> Files:
    """The data set's prompt, with which `python -m posttrain.chat` asks a download. Without the data set nobody knows it."""
    try:
        return {PROMPT_FILE: to_json(dataclasses.asdict(prompt_form(release.manifest.data)))}
    except UserError as why:
        print(f"note: no {PROMPT_FILE} is pushed, as the run's data set is not at hand: {why}", file=sys.stderr)
        return {}


def lineage_file(release: Release, files: Files) -> bytes:
    """What `python -m posttrain.lineage` asks a download: the records of the runs before, and the hash of every file."""
    before = [json.loads(public_manifest(manifest)) for _, manifest in lineage(release.run_dir)][:-1]
    hashes = {
        name: sha256_file(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        for name, content in files.items()
        if name not in NOT_READ
    }
    return to_json({"runs": before, "files": hashes})


def named(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    return {file.name: file for pattern in patterns for file in sorted(folder.glob(pattern))}


def adapter_config(file: Path, base: Base) -> Path | bytes:
    """The adapter's configuration. Where it names a folder of this disk, the base's Hub id stands instead, or null."""
    values = json.loads(file.read_text(encoding="utf-8"))
    name = None if base.merged else base.hub_id
    return file if values["base_model_name_or_path"] == name else to_json(values | {"base_model_name_or_path": name})


def public_manifest(manifest: Manifest) -> bytes:
    """The manifest without the tracker's run, and without keys that `Manifest` does not know: nobody has judged those."""
    return to_json(portable(dataclasses.replace(manifest, wandb_run_id="", tracked_as="", extra={}).as_json()))


def to_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()

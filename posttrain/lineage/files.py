"""Whether files are as they were written, by the hashes that were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.lineage.origins import LINEAGE, Origin
from posttrain.records import read_object, sha256_file
from posttrain.runs.integrity import NOT_READ, WEIGHTS, weights_sha256
from posttrain.runs.manifest import Entry, model_sha256


def changed(run: Origin, weights: Path) -> str:
    """Which file is not as training wrote it; "" where every one is."""
    manifest = run.manifest
    found = model_sha256(weights) if manifest.all_weights else weights_sha256(weights / WEIGHTS)
    if found != manifest.adapter_sha256:
        return f"its weights are others ({short(found)})"
    if (why := merged_base_changed(run)) or not run.downloaded:
        return why or first_changed(weights, manifest.adapter_files)
    file = weights / LINEAGE  # the push may have written another name for the base: it kept the hashes of what it sent
    return first_changed(weights, read_object(file, "download the repository again")["files"] if file.is_file() else {})


def merged_base_changed(run: Origin) -> str:
    """The base that an adapter of adapter_mode merge_and_new lies on is part of its run."""
    from posttrain.config.schema import Tokenizer
    from posttrain.models.checkpoint import found_here, weights_hash

    assert run.folder is not None
    name, recorded = run.manifest.model.get("name_or_path", ""), run.manifest.model.get("weights")
    here = found_here(Tokenizer(name_or_path=str(run.folder / "merged_base"))) if Path(name).name == "merged_base" else None
    if here is None or recorded in (None, weights_hash(Tokenizer(name_or_path=str(here)))):
        return ""
    return "its merged_base holds other weights"


def first_changed(folder: Path, files: Entry) -> str:
    """The first file that is here with another content. What was left out of a download is not missed."""
    there = {name: folder / name for name in files if (folder / name).is_file() and name not in NOT_READ}
    return next((f"{name} has changed since" for name, file in there.items() if sha256_file(file) != sha256_in(files[name])), "")


def sha256_in(entry: Any) -> str:
    return str(entry["sha256"] if isinstance(entry, dict) else entry)


def short(sha256: str | None) -> str:
    """A hash as a line shows it."""
    return (sha256 or "none")[:12]

"""A data set as data_prep.py left it: its own manifest.json, and what a run's manifest says of it."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.errors import UserError
from posttrain.records import sha256_file
from posttrain.runs.manifest import ROOT, Entry


def read_data_manifest(folder: Path | str) -> Entry:
    """manifest.json of a data set: what data_prep.py wrote, which has little in common with that of a run."""
    values: Entry = json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))
    return values


def data_entry(path: Path | str, split: str) -> Entry:
    """What the manifest says of the data.

    Raises:
        UserError: the data set is not prepared, or not as data_prep.py left it; the text has the command that prepares it.
    """
    file, command = Path(path, f"{split}.jsonl"), f"python data_prep.py --config {_data_config(path)}"
    if not file.is_file() or not Path(path, "manifest.json").is_file():
        raise UserError(f"no {split} examples at {file}: prepare them with `{command}`")
    manifest, sha256 = read_data_manifest(path), sha256_file(file)
    if manifest["files"].get(file.name) != sha256:
        raise UserError(f"{file} is not what {path}/manifest.json says it is: prepare it again with `{command}`")
    if not file.stat().st_size:
        held = " ".join(f"{name} {count}" for name, count in manifest.get("counts", {}).items())
        raise UserError(
            f"{file} holds no question ({path} has {held or 'none'}): choose another split, or a source that has this one"
        )
    return {
        "name": manifest["name"],
        "path": str(path),
        "split": split,
        "sha256": sha256,
        "source": manifest["source"],
        **({"answer": manifest["answer"]} if "answer" in manifest else {}),  # without: numbers behind ####
        "num_shots": manifest.get("prompt", {}).get("num_shots", 0),
    }


def _data_config(path: Path | str) -> str:
    """The YAML in configs/ that writes this folder."""
    for candidate in sorted((ROOT / "configs").rglob("data_*.yaml")):
        if f"output_dir: {Path(path)}\n" in candidate.read_text(encoding="utf-8"):
            return str(candidate.relative_to(ROOT))
    return "configs/data_<name>.yaml"

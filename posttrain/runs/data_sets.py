"""A data set as data_prep.py left it: its own manifest.json, and what a run's manifest says of it."""

from __future__ import annotations

from pathlib import Path

from posttrain.errors import UserError
from posttrain.places import ROOT
from posttrain.records import read_object, sha256_file
from posttrain.runs.manifest import Entry


def read_data_manifest(folder: Path | str) -> Entry:
    """manifest.json of a data set: what data_prep.py wrote, which has little in common with that of a run.

    Raises:
        UserError: it is damaged, or of something else.
    """
    remedy = f"take {folder} away, and prepare it again with `python data_prep.py --config {_data_config(folder)}`"
    values = read_object(Path(folder, "manifest.json"), remedy)
    if values.get("stage") != "data" or not isinstance(values.get("files"), dict):
        raise UserError(f"{folder} is not empty and holds no data set of data_prep.py: choose another folder")
    return values


def data_entry(path: Path | str, split: str) -> Entry:
    """What the manifest says of the data.

    Raises:
        UserError: the data set is not prepared, not as data_prep.py left it, or has no row of this split.
    """
    file = Path(path, f"{split}.jsonl")
    sha256, manifest = check_split(path, split), read_data_manifest(path)
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


def check_split(path: Path | str, split: str) -> str:
    """The sha256 of a split's file, which is as data_prep.py left it.

    Raises:
        UserError: it is not there, or has changed; the text has the command that prepares it.
    """
    file, command = Path(path, f"{split}.jsonl"), f"python data_prep.py --config {_data_config(path)}"
    if not file.is_file() or not Path(path, "manifest.json").is_file():
        raise UserError(f"no {split} examples at {file}: prepare them with `{command}`")
    sha256 = sha256_file(file)
    if read_data_manifest(path)["files"].get(file.name) != sha256:
        raise UserError(f"{file} is not what {path}/manifest.json says it is: prepare it again with `{command}`")
    return sha256


def _data_config(path: Path | str) -> str:
    """The YAML in configs/ that writes this folder."""
    for candidate in sorted((ROOT / "configs").rglob("data_*.yaml")):
        if f"output_dir: {Path(path)}\n" in candidate.read_text(encoding="utf-8"):
            return str(candidate.relative_to(ROOT))
    return "configs/data_<name>.yaml"

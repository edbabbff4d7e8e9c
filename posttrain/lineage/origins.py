"""The runs that a folder comes from, as records on this machine tell of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.config.schema import MODEL_FOLDER
from posttrain.records import read_object
from posttrain.runs.integrity import CONFIG
from posttrain.runs.manifest import EXPORT, MANIFEST, PUBLIC_MANIFEST, Entry, Manifest, manifest_of, read_manifest, run_of

LINEAGE = "lineage.json"  # of a pushed repository: the manifests of the runs before, and the hashes of all files


@dataclass(frozen=True, slots=True)
class Origin:
    """A run as it is known here: what it recorded, and its folder where that is here."""

    manifest: Manifest
    folder: Path | None  # with adapter/ or model/ in it, or the folder of a download
    downloaded: bool = False

    @property
    def weights(self) -> Path | None:
        """The folder with the weights that training made."""
        if self.folder is None:
            return None
        return self.folder if self.downloaded else self.folder / (MODEL_FOLDER if self.manifest.all_weights else "adapter")


def run_behind(folder: Path) -> Origin | None:
    """The run that a folder is, lies in, or was made of."""
    for place in (folder, folder.parent):
        if (place / PUBLIC_MANIFEST).is_file():
            return Origin(read_manifest(place, PUBLIC_MANIFEST), place, downloaded=True)
    if (folder / MANIFEST).is_file():
        return Origin(read_manifest(folder), folder)
    if (run_dir := run_of(folder)) is not None:
        return Origin(read_manifest(run_dir), run_dir)
    if (folder / EXPORT).is_file():
        parent = read_object(folder / EXPORT, "export the run again")["parent"]
        return beside(parent, folder)
    return None


def ancestors(run: Origin) -> list[Origin]:
    """The training runs before, oldest first: out of their folders, or out of what a push wrote of them."""
    if run.downloaded:
        assert run.folder is not None
        file = run.folder / LINEAGE
        records = read_object(file, "download the repository again")["runs"] if file.is_file() else []
        return [Origin(manifest_of(record, str(file)), None) for record in records]
    if run.manifest.parent is None or (found := beside(run.manifest.parent, run.folder)) is None:
        return []
    return [*ancestors(found), found]


def beside(parent: Entry, folder: Path | None) -> Origin | None:
    """The run that a `parent` entry names: there, or beside this one, for run directories are moved together."""
    named = Path(parent["run_dir"])
    named = named.parent if named.name == "checkpoints" else named
    places = [named, *([folder.parent / named.name] if folder else [])]
    found = next((place for place in places if (place / MANIFEST).is_file()), None)
    return Origin(read_manifest(found), found) if found else None


def artefacts_of(run: Origin) -> list[Path]:
    """The exports that lie in a run, and the variants beside a downloaded adapter."""
    if run.folder is None:
        return []
    return [file.parent for file in sorted(run.folder.glob(f"*/{EXPORT}" if run.downloaded else f"export/*/{EXPORT}"))]


def published_base(run: Origin) -> tuple[str, str | None] | None:
    """The Hub id and commit that a push gave a base: training may have known a folder."""
    file = run.folder / CONFIG if run.downloaded and run.folder else None
    if file is None or not file.is_file():
        return None
    values = read_object(file, "download the repository again")
    name = values["base_model_name_or_path"]
    return (name, values.get("revision")) if name else None

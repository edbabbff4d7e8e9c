"""Artefacts of `python -m posttrain.export` as named variants of a repository: each in a folder of its own beside the adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.lineage.files import sha256_in, short
from posttrain.records import read_object, sha256_file
from posttrain.runs.integrity import NOT_READ
from posttrain.runs.manifest import EXPORT, Manifest

FIDELITY = "fidelity.json"


@dataclass(frozen=True, slots=True)
class Variant:
    """A finished artefact of the run that is pushed, every file of it as it was written."""

    folder: Path
    made: dict[str, Any]  # export.json
    fidelity: dict[str, Any]  # what it lost, beside the policy that training measured; {} where nobody measured

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def format(self) -> str:
        return str(self.made["format"])

    @property
    def files(self) -> dict[str, Path]:
        """By their names in the repository. Its own README.md stays here: the repository has one card."""
        return {f"{self.name}/{name}": self.folder / name for name in self.made["files"] if name not in NOT_READ}

    @property
    def gguf(self) -> str | None:
        return next((name for name in self.made["files"] if name.endswith(".gguf")), None)

    @property
    def size(self) -> str:
        return f"{sum(file.stat().st_size for file in self.files.values()) / 1e6:,.1f} MB"

    def row(self) -> list[str]:
        """Its line in the card's table."""
        kind = " ".join(filter(None, (self.format, self.made.get("quant"), self.made.get("into"))))
        if not self.fidelity:
            return [self.name, kind, self.size, "", "", "", "not measured"]
        lost = self.fidelity
        numbers = [f"{lost['kl_mean']:.2g}", f"{lost['top1_agreement']:.2%}", f"{lost['greedy_equal']:.1%}"]
        return [self.name, kind, self.size, *numbers, "; ".join(lost["faults"]) or "the same but for rounding and chance"]


def read_variants(folders: Sequence[Path], manifest: Manifest) -> tuple[Variant, ...]:
    """The artefacts in these folders.

    Raises:
        UserError: one of them is none, is of another adapter, has changed since, or has the name of another.
    """
    variants = tuple(read_variant(folder, manifest) for folder in folders)
    names = [variant.name for variant in variants]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two artefacts are called {twice}, and each is a folder of the repository: rename one")
    return variants


def read_variant(folder: Path, manifest: Manifest) -> Variant:
    if not (folder / EXPORT).is_file():
        raise UserError(f"{folder} holds no artefact (no {EXPORT}): make one with python -m posttrain.export")
    made = read_object(folder / EXPORT, "export the run again")
    if lacking := {"format", "parent", "files"} - made.keys():
        raise UserError(f"{folder}/{EXPORT} is not that of an artefact, it has no {min(lacking)}: export the run again")
    if (of := made["parent"]["adapter_sha256"]) != manifest.adapter_sha256:
        raise UserError(
            f"{folder} was made of adapter {short(of)}, and the run has {short(manifest.adapter_sha256)}: export it again"
        )
    for name in sorted(set(made["files"]) - NOT_READ):
        file = folder / name
        if not file.is_file() or sha256_file(file) != sha256_in(made["files"][name]):
            raise UserError(f"{file} is missing or not what was exported: export the run again")
    if not re.fullmatch(r"[\w-][\w.-]*", name := folder.absolute().name, re.ASCII) or name in ("merged_base", "adapter"):
        raise UserError(f"{folder} cannot be a folder of the repository under that name: rename it, as gguf-q8_0")
    fidelity = read_object(folder / FIDELITY, "export the run again") if (folder / FIDELITY).is_file() else {}
    return Variant(folder, made, fidelity)

"""What a push is asked for, and what is known of the finished run: its base, its evaluations, its artefacts."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from posttrain.hub.variants import Variant
from posttrain.runs.manifest import Manifest

# By the name of the base. Qwen2.5-3B and -72B have licences of their own, so they are left out.
LICENSES = {
    r"llama-3\.2": "llama3.2",
    r"llama-3\.1": "llama3.1",
    r"meta-llama-3-": "llama3",
    r"smollm": "apache-2.0",
    r"qwen2\.5(?!.*-(3b|72b))|qwen3": "apache-2.0",
}
STAGES = {  # whose runs leave weights, in the words of the card
    "sft": "supervised fine-tuning on worked solutions, with the loss on the solution only",
    "grpo": "GRPO, rewarded for right answers and for their format",
}

Files = dict[str, Path | bytes]  # path in the repository -> a file of the run, or what is written for the Hub


@dataclass(frozen=True, slots=True)
class Request:
    """What to push and how. As text it is the command that asks for it."""

    run_dir: Path
    repo_id: str
    private: bool = True
    evals: tuple[Path, ...] = ()  # evaluation runs, for the card
    with_base: bool = False  # push the merged base that the adapter belongs to, too
    base_model: str | None = None  # Hub id of a base that was loaded from a folder
    variants: tuple[Path, ...] = ()  # artefacts of the run, for folders of their own
    predictions: bool = False  # push what the evaluations wrote, too, as a data set

    def __str__(self) -> str:
        parts = ["python", "-m", "posttrain.hub", str(self.run_dir), "--repo-id", self.repo_id]
        parts += ["--private" if self.private else "--public"]
        parts += ["--eval", *map(str, self.evals)] if self.evals else []
        parts += ["--with-base"] if self.with_base else []
        parts += ["--base-model", self.base_model] if self.base_model else []
        parts += ["--with", *map(str, self.variants)] if self.variants else []
        parts += ["--predictions"] if self.predictions else []
        return shlex.join(parts)


@dataclass(frozen=True, slots=True)
class Base:
    """The model that the adapter belongs to, or that training of all weights began with."""

    name: str  # as the configuration has it
    hub_id: str | None  # None: only on the disk of the run
    revision: str | None
    quantization: str
    merged: Path | None  # the folder of a base that has an earlier adapter folded in

    @property
    def folder(self) -> str:
        """What a base from a disk is called where its path must not be told."""
        return PurePath(self.name).name

    @property
    def is_packed(self) -> bool:
        """Whether a reader has to pack it as training did. A merged base was trained on, and is pushed, in 16 bits."""
        return self.quantization != "none" and not self.merged

    @property
    def is_llama(self) -> bool:
        return (self.license or "").startswith("llama")

    @property
    def license(self) -> str | None:
        name = (self.hub_id or self.name).lower()
        return next((license for pattern, license in LICENSES.items() if re.search(pattern, name)), None)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation run. `label` says what was evaluated: this adapter, an earlier one of its chain, or the base."""

    label: str
    folder: Path
    manifest: Manifest
    results: dict[str, Any]
    dataset_id: str | None  # on the Hub
    is_gsm8k: bool  # all of its test questions

    @property
    def is_of_this_adapter(self) -> bool:
        return self.label in ("this adapter", "this model")

    @property
    def decoding(self) -> str:
        generation = self.manifest.generation
        if generation["temperature"] == 0:
            return f"greedy, at most {generation['max_new_tokens']} tokens"
        return f"mean of {generation['samples']} samples at temperature {generation['temperature']}"


@dataclass(frozen=True, slots=True)
class Artefact:
    """An export of a run, as its card tells it."""

    format: str  # merged, gguf or ollama
    what: str  # the beginning of the card's first sentence
    load: str  # the command that loads it; "" for a model folder
    fidelity: str
    accuracy: str
    faults: tuple[str, ...]
    command: str  # that made it


@dataclass(frozen=True, slots=True)
class Release:
    """A finished run and what is said of it on the Hub."""

    repo_id: str
    run_dir: Path
    manifest: Manifest
    settings: dict[str, Any]  # config.yaml
    base: Base
    evaluations: tuple[Evaluation, ...]
    variants: tuple[Variant, ...] = ()
    predictions: str | None = None  # the data set of the evaluations' answers, where that is pushed, too
    artefact: Artefact | None = None  # None: the adapter, or the weights of a run that trained all

    @property
    def is_local(self) -> bool:
        """Whether the card lies beside the run's files: `repo_id` is then the absolute path of their folder."""
        return self.repo_id.startswith("/")

    def exported_as(self, artefact: Artefact) -> Release:
        return dataclasses.replace(self, artefact=artefact)

    @property
    def name(self) -> str:
        return self.manifest.name if self.is_local else self.repo_id.split("/")[1]

    @property
    def base_path(self) -> str:
        """What a reader loads the base from, where it has no Hub id."""
        return os.path.abspath(self.base.merged or self.base.name) if self.is_local else "PATH_OF_THE_BASE"

    @property
    def base_hashes(self) -> str:
        """What tells the base from every other, as the manifest has it: see posttrain/models/checkpoint.py."""
        known = {"weights": "weights", "fingerprint": "norms"}
        said = [f"{name} `{self.manifest.model[key]}`" for key, name in known.items() if key in self.manifest.model]
        return ", ".join(said)

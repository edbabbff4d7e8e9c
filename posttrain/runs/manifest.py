"""What a run says of itself in manifest.json: `Manifest`, how it is opened and read, and the runs that it came from.

`Manifest` stands here and not in records.py: a run opens it from its settings, from git and from the machine, which the
ground floor does not know, and every reader of a manifest is above this room.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttrain.config.load import config_sha256
from posttrain.config.schema import MODEL_FOLDER, Settings
from posttrain.errors import UserError
from posttrain.places import ROOT, SHIPPED, is_command
from posttrain.records import read_object, sha256_file, sha256_text
from posttrain.runs.process import launcher, num_processes

PACKAGES = (
    "posttrain", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers",
    "liger-kernel", "reasoning-gym", "vllm",
)  # fmt: skip
EXPORT = "export.json"  # of a model folder that `python -m posttrain.export` wrote
MANIFEST = "manifest.json"
PUBLIC_MANIFEST = "training_manifest.json"  # the same of a pushed run, without what it says of its machine's folders

Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json of a training or evaluation run, its fields in the order of the file.

    A field with a default is in the file once something else was recorded for it: published manifests lack the newer ones,
    and a run has none of another stage. To published runs the names are a promise: add fields, never rename one.
    """

    parent: Entry | None  # run_dir and adapter_sha256 of the run whose adapter this one began with, or evaluated
    chain: list[Entry]  # stage, name, adapter_sha256 and data of each training run up to that adapter, oldest first
    adapter_sha256: str | None  # what training made, or what was evaluated
    stage: str
    name: str
    command: str
    commit: str | None
    dirty: bool
    versions: dict[str, str]
    hardware: Entry
    installed: bool = False  # a wheel ran, of that commit; else a checkout
    num_processes: int | None = None
    launcher: str = ""
    seed: int | None
    finished: str | None
    exit: str  # `running`, `ok`, `interrupted at step N of M`, or `failed: ` and the error
    config_sha256: str
    notes: list[str]  # settings that could not be honoured as written
    started: str
    seconds: float  # those of interrupted attempts included
    data: Entry = dataclasses.field(default_factory=dict)  # what `data_sets.data_entry` says
    limit: int | None = 0  # an evaluation's, where None is every question; 0 for all other runs
    model: Entry = dataclasses.field(default_factory=dict)  # the base as it was loaded

    all_weights: bool = False  # training was of all weights: `adapter_sha256` is the hash of model/ and not of adapter/
    rewards: list[Entry] = dataclasses.field(default_factory=list)  # those by name: weight, and file and hash of the user's own
    special_tokens: list[Entry] | None = None  # one for each that the template emits; none before they are looked at
    parent_files: Entry = dataclasses.field(default_factory=dict)  # sha256 of weights and config of the parent's adapter
    adapter_files: Entry = dataclasses.field(default_factory=dict)  # sha256 of every file of the finished adapter

    start_sha256: str = ""  # the adapter before the first step
    global_batch: int | None = None  # rows of SFT, completions of GRPO, in an optimizer step of all processes
    rows_cut: int = 0  # rows of SFT that trainer.max_length cut
    wandb_run_id: str = ""  # of runs from before there was `tracked_as`
    tracked_as: str = ""  # the id of this run with its trackers
    peak_gib: float | None = None
    steps: int | None = None
    train_seconds: float | None = None  # in the training loop, those of interrupted attempts included

    engine: str = ""
    engine_difference: float | None = None  # of decoded logits from the model's own, by generation/guard.py
    decoding: str | None = None  # loop or seats: what model.decoding came to
    generation: Entry = dataclasses.field(default_factory=dict)
    batch_size: int | None = None
    generated_seconds: float | None = None
    completions_sha256: str = ""  # of what the policy said (evaluation/predictions.py), verdicts left out
    questions_sha256: str = ""  # of questions.jsonl, unpacked

    extra: Entry = dataclasses.field(default_factory=dict)  # keys of the file that are none of these, written as they were read

    def as_json(self) -> Entry:
        """What stands in manifest.json."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {name: value for name, value in values.items() if name not in UNSAID or value != UNSAID[name]} | self.extra


FIELDS = tuple(field.name for field in dataclasses.fields(Manifest) if field.name != "extra")
# What each field that may be left out of the file holds then.
UNSAID = {
    field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    for field in dataclasses.fields(Manifest)
    if (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
}


def read_manifest(folder: Path | str, file: str = MANIFEST) -> Manifest:
    """The manifest of a run, of this version or an earlier one.

    Raises:
        UserError: manifest.json is damaged, or not that of a run.
    """
    return manifest_of(read_object(Path(folder, file), "restore it from a copy, or use another run_dir"), f"{folder}/{file}")


def manifest_of(values: Entry, place: str) -> Manifest:
    """The manifest that an object holds. UserError, which begins with `place`: it holds none."""
    if lacking := [name for name in FIELDS if name not in UNSAID and name not in values]:
        raise UserError(f"{place} is not that of a run, it has no {lacking[0]}: give the run_dir of a run")
    known = {name: values.pop(name) for name in FIELDS if name in values}
    return Manifest(**known, extra=values)


def opening_manifest(config: Settings, stage: str, folder: Path) -> Manifest:
    """The manifest of a run as it opens: of an earlier attempt stands what this one does not say anew."""
    said: Entry = {
        "stage": stage,
        "name": getattr(config, "name", None) or folder.name,
        "command": typed(),
        **git_state(),
        "versions": versions(),
        "hardware": hardware(),
        "num_processes": num_processes(),
        "launcher": launcher(),
        "seed": getattr(config, "seed", None),
        "finished": None,
        "exit": "running",
        "config_sha256": config_sha256(config),
        "notes": [],
    }
    if (folder / "manifest.json").is_file():
        return dataclasses.replace(read_manifest(folder), **said)
    return Manifest(parent=None, chain=[], adapter_sha256=None, started=utc(), seconds=0.0, **said)


# --- where a run comes from -------------------------------------------------------------------------------------------


def parent_of(adapter_folder: Path, adapter_sha256: str) -> tuple[Entry, list[Entry]]:
    """The `parent` entry for a run that starts from this adapter, and the chain that leads to it."""
    parent = {"run_dir": str(adapter_folder.parent), "adapter_sha256": adapter_sha256}
    run_dir = run_of(adapter_folder)
    if run_dir is None:
        return parent, [{"stage": "adapter", "name": str(adapter_folder), "adapter_sha256": adapter_sha256}]
    made = read_manifest(run_dir)
    link = {"stage": made.stage, "name": made.name, "adapter_sha256": adapter_sha256, "data": made.data or None}
    return parent, [*made.chain, link]


def parent_of_model(name_or_path: str) -> tuple[Entry | None, list[Entry], str | None]:
    """The same for a run whose model is the folder of a run that trained all weights, or one that was exported, and that
    folder's hash; else nothing.

    Raises:
        UserError: the folder holds other weights than the run finished with.
    """
    folder = Path(name_or_path)
    if (folder / EXPORT).is_file():
        return _parent_of_export(folder)
    run_dir = _trainer_of(folder)
    if run_dir is None:
        return None, [], None
    sha256 = model_sha256(folder)
    if folder.name == MODEL_FOLDER and sha256 != read_manifest(run_dir).adapter_sha256:
        raise UserError(f"{folder} holds other weights than the run finished with: train it again, or restore the folder")
    return *parent_of(folder, sha256), sha256


def _parent_of_export(folder: Path) -> tuple[Entry, list[Entry], str]:
    made, sha256 = read_object(folder / EXPORT, "export the run again"), model_sha256(folder)
    if sha256 != made.get("weights_sha256"):
        raise UserError(f"{folder} holds other weights than {EXPORT} says: export the run again, or restore the folder")
    return made["parent"], made["chain"], sha256


def refuse_unfinished_model(name_or_path: str) -> str | None:
    """`refuse_unfinished` for a model folder, if a run that trained all weights has made it."""
    folder = Path(name_or_path)
    return refuse_unfinished(folder) if _trainer_of(folder) else None


def _trainer_of(folder: Path) -> Path | None:
    """The run that trained all of a model folder's weights."""
    run_dir = run_of(folder)
    return run_dir if run_dir and read_manifest(run_dir).all_weights else None


def model_sha256(folder: Path) -> str:
    """Hash of a model folder's weights: of their file, or over the hashes of their files."""
    hashes = [sha256_file(file) for file in sorted(folder.glob("model*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else sha256_text(" ".join(hashes))


def run_of(adapter_folder: Path) -> Path | None:
    """The run directory that an adapter, or a model folder, lies in."""
    above = (adapter_folder.parent, adapter_folder.parent.parent)  # of adapter/, of checkpoints/checkpoint-5/
    return next((folder for folder in above if (folder / "manifest.json").is_file()), None)


def refuse_unfinished(adapter_folder: Path) -> str | None:
    """Refuse the adapter of a run that did not finish. A checkpoint that is named has its use: returns what to say of it.

    Raises:
        UserError: it is the adapter of a run that failed, or that is still running.
    """
    run_dir = run_of(adapter_folder)
    status = read_manifest(run_dir).exit if run_dir else "ok"
    if status == "ok":
        return None
    if adapter_folder.name.startswith("checkpoint-"):
        return f"{adapter_folder} is a checkpoint of a run that has not finished ({status})"
    what = "model" if adapter_folder.name == MODEL_FOLDER else "adapter"
    raise UserError(
        f"{run_dir} is not finished ({status}), and its {what} is no result: finish the run with --resume, train it again, or "
        f"name one of its checkpoints ({run_dir}/checkpoints/checkpoint-N)"
    )


def lineage(run_dir: Path) -> Iterator[tuple[Path, Manifest]]:
    """Folder and manifest of every run from the first training run to this one, as far back as their folders are there.

    A run whose adapter has become another one since is not where this run comes from.
    """
    manifest = read_manifest(run_dir)
    if manifest.parent and (found := _made(manifest.parent, run_dir)):
        yield from lineage(found)
    yield run_dir, manifest


def _made(parent: Entry, run_dir: Path) -> Path | None:
    """The folder of the training that made an adapter: where `parent` says, then beside this run, for run directories are moved
    together; of that name, or of another one, for a repeated run is published beside the first.
    """
    named = Path(parent["run_dir"])
    beside = (folder for folder in sorted(run_dir.absolute().parent.iterdir()) if folder.name != named.name)
    for folder in (named, run_dir.parent / named.name, *beside):
        with suppress(UserError):  # a damaged neighbour says nothing of this run
            if (folder / MANIFEST).is_file():
                manifest = read_manifest(folder)
                if manifest.stage != "eval" and manifest.adapter_sha256 == parent["adapter_sha256"]:
                    return folder
    return None


# --- what a run runs on -----------------------------------------------------------------------------------------------


def typed() -> str:
    """The command that started this process."""
    if is_command():
        return f"{sys.argv[0]} {shlex.join(sys.argv[1:])}"
    return shlex.join([Path(sys.executable).name, *sys.argv])


def git_state() -> dict[str, Any]:
    """Commit of the code that runs, and whether it had changes: of this checkout, or of the one that the wheel was built in."""
    if ROOT == SHIPPED:
        return {**read_object(SHIPPED / "built.json", "install the wheel again"), "installed": True}
    if not (ROOT / ".git").exists() or not shutil.which("git"):  # git itself would answer for a checkout around this folder
        return {"commit": None, "dirty": False}

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {"commit": git("rev-parse", "--verify", "--quiet", "HEAD") or None, "dirty": bool(git("status", "--porcelain"))}


def versions() -> dict[str, str]:
    return {name: found for name in PACKAGES if (found := _version(name))} | {"python": platform.python_version()}


def hardware() -> dict[str, Any]:
    import torch

    ram_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "ram_gib": round(ram_gib, 1),
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "num_gpus": torch.cuda.device_count() if cuda else 0,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

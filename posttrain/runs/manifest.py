"""What a manifest says."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttrain.config.load import config_sha256
from posttrain.config.schema import Settings
from posttrain.errors import UserError
from posttrain.records import sha256_file

PACKAGES = (
    "posttrain", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers",
    "liger-kernel", "reasoning-gym", "vllm",
)  # fmt: skip


ROOT = Path(__file__).resolve().parents[2]


def _opening(config: Settings, stage: str, folder: Path) -> dict[str, Any]:
    return {
        "stage": stage,
        "name": getattr(config, "name", None) or folder.name,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        **git_state(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))} | {"python": platform.python_version()},
        "hardware": hardware(),
        "seed": getattr(config, "seed", None),
        "finished": None,
        "exit": "running",
        "config_sha256": config_sha256(config),
        "notes": [],
    }


def read_manifest(folder: Path | str) -> dict[str, Any]:
    return json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))


def parent_of(adapter_folder: Path, adapter_sha256: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The `parent` entry for a run that starts from this adapter, and the chain that leads to it."""
    parent = {"run_dir": str(adapter_folder.parent), "adapter_sha256": adapter_sha256}
    above = (adapter_folder.parent, adapter_folder.parent.parent)  # of adapter/, of checkpoints/checkpoint-5/
    run_dir = next((folder for folder in above if (folder / "manifest.json").is_file()), None)
    if run_dir is None:
        return parent, [{"stage": "adapter", "name": str(adapter_folder), "adapter_sha256": adapter_sha256}]
    manifest = read_manifest(run_dir)
    link = {
        "stage": manifest["stage"],
        "name": manifest["name"],
        "adapter_sha256": adapter_sha256,
        "data": manifest.get("data"),
    }
    return parent, [*manifest["chain"], link]


def data_entry(path: Path | str, split: str) -> dict[str, Any]:
    """What the manifest says of the data.

    Raises:
        UserError: the data set is not prepared, or not as data_prep.py left it; the text has the command that prepares it.
    """
    file, command = Path(path, f"{split}.jsonl"), f"python data_prep.py --config {_data_config(path)}"
    if not file.is_file() or not Path(path, "manifest.json").is_file():
        raise UserError(f"no {split} examples at {file}: prepare them with `{command}`")
    manifest, sha256 = read_manifest(path), sha256_file(file)
    if manifest["files"].get(file.name) != sha256:
        raise UserError(f"{file} is not what {path}/manifest.json says it is: prepare it again with `{command}`")
    return {
        "name": manifest["name"],
        "path": str(path),
        "split": split,
        "sha256": sha256,
        "source": manifest["source"],
        "num_shots": manifest.get("prompt", {}).get("num_shots", 0),
    }


def _data_config(path: Path | str) -> str:
    """The YAML in configs/ that writes this folder."""
    for candidate in sorted((ROOT / "configs").glob("data_*.yaml")):
        if f"output_dir: {Path(path)}\n" in candidate.read_text(encoding="utf-8"):
            return f"configs/{candidate.name}"
    return "configs/data_<name>.yaml"


def git_state() -> dict[str, Any]:
    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {"commit": git("rev-parse", "--verify", "--quiet", "HEAD") or None, "dirty": bool(git("status", "--porcelain"))}


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


def _utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

"""Whether the machine has room for a run: what its plan certainly takes, against what is there, before anything is made.

Both are lower bounds. What a step needs beside the weights hangs on the lengths of rows (--dry-run estimates it), and a full disk
or memory that runs out later is one line all the same (posttrain/errors.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.config.schema import EvalConfig, GrpoConfig, SftConfig
from posttrain.errors import UserError
from posttrain.models.adapters import targets_met
from posttrain.models.base import device
from posttrain.runs.process import is_sharded
from posttrain.training.planner import NF4_BYTES
from posttrain.training.plans import checkpoint_bytes, gib, num_checkpoints

MEMORY = Path("/proc/meminfo")


def check_room(config: SftConfig | GrpoConfig | EvalConfig, base: PreTrainedModel, adapter: Path | None, num_rows: int) -> None:
    """Refuse a run whose weights do not fit the memory, or whose checkpoints do not fit the disk.

    `base` is the skeleton, `adapter` the folder that the run begins with, `num_rows` what an epoch has.

    Raises:
        UserError: there is less than the run takes for certain.
    """
    trains = 0 if isinstance(config, EvalConfig) else adapter_parameters(config, base, adapter)
    need = base_bytes(config, base) + 4 * trains
    have = free_memory()
    if have is not None and need > have and not is_sharded():
        smaller = "a smaller model" if config.quantization == "nf4" else "quantization=nf4, or a smaller model"
        raise UserError(
            f"the weights of {config.model.name_or_path} and its adapter take {gib(need)}, and {gib(have)} of memory are free: "
            f"choose {smaller}, or close other programs"
        )
    if isinstance(config, EvalConfig):
        return
    each, kept = checkpoint_bytes(config, trains), num_checkpoints(config, num_rows)
    disk, there = each * kept + 4 * trains + merged_bytes(config, base), size_of(Path(config.run_dir))
    free = shutil.disk_usage(nearest(Path(config.run_dir))).free
    if disk - there > free:
        raise UserError(
            f"{config.run_dir} will take {gib(disk)}, {kept} checkpoints of {gib(each)} among it, and the disk has "
            f"{gib(free)} free: free some, set trainer.save_total_limit=2, or choose a run_dir on another disk"
        )


# --- memory -----------------------------------------------------------------------------------------------------------


def base_bytes(config: SftConfig | GrpoConfig | EvalConfig, base: PreTrainedModel) -> float:
    """What the base's weights take as they are held."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    linear = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear | Conv1D) and m not in ends)
    width = 4 if config.model.dtype == "float32" else 2
    packed = NF4_BYTES if config.quantization == "nf4" else width
    return linear * packed + (base.num_parameters() - linear) * width


def free_memory() -> float | None:
    """Bytes that are free on the device of this process; None where the system does not say."""
    if device().type == "cuda":
        return float(torch.cuda.mem_get_info(device())[0])
    if not MEMORY.is_file():
        return None
    said = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    return float(said["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in said else None


# --- disk -------------------------------------------------------------------------------------------------------------


def adapter_parameters(config: SftConfig | GrpoConfig, base: PreTrainedModel, adapter: Path | None) -> float:
    """Trainable parameters: of the new adapter's matrices, or of the file of the one that is continued."""
    if config.lora is None:
        file = adapter / "adapter_model.safetensors" if adapter else None
        return file.stat().st_size / 4 if file and file.is_file() else 0
    last_parts = set(targets_met(base, config.lora))
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    met = [m for name, m in base.named_modules() if name.rpartition(".")[2] in last_parts and m not in ends]
    return config.lora.r * sum(sum(m.weight.shape) for m in met if isinstance(m.weight, torch.Tensor))


def merged_bytes(config: SftConfig | GrpoConfig, base: PreTrainedModel) -> float:
    """The merged base that `adapter_mode: merge_and_new` writes."""
    merges = isinstance(config, GrpoConfig) and config.adapter_mode == "merge_and_new"
    return base.num_parameters() * (4 if config.model.dtype == "float32" else 2) if merges else 0


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

"""Arguments for TRL's trainers: the config's `trainer` block, and what posttrain sets itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from posttrain.config.schema import Model, TrainConfig
from posttrain.errors import UserError
from posttrain.models.base import device
from posttrain.runs.directory import Run


def trainer_arguments(config: TrainConfig, run: Run) -> dict[str, Any]:
    """Keyword arguments of SFTConfig or GRPOConfig. What could not be honoured is noted."""
    if asks_for_pages(config):
        run.note(f"trainer.optim {config.trainer['optim']} pages to the host from CUDA; without CUDA adamw_torch is used instead")
    return plain_arguments(config, run.folder)


def plain_arguments(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The `trainer:` block, and what posttrain sets itself. Nothing is written."""
    half = config.model.dtype == "bfloat16"
    set_here = {
        "output_dir": str(folder / "checkpoints"),
        "run_name": folder.name,
        "seed": config.seed,
        "report_to": [],
        "push_to_hub": False,
        "bf16": half,
        "fp16": config.model.dtype == "float16",
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
    }
    trainer = dict(config.trainer)
    # Every run saves a checkpoint on SIGTERM. transformers' own way of it takes the signal away and calls the run finished.
    trainer.pop("enable_jit_checkpoint", None)
    if device().type == "cpu":
        set_here["use_cpu"] = True
    if asks_for_pages(config):
        trainer["optim"] = "adamw_torch"
    for key in ("bf16", "fp16"):
        if trainer.pop(key, set_here[key]) != set_here[key]:
            raise UserError(
                f"trainer.{key} contradicts model.dtype {config.model.dtype}: remove it, the precision follows model.dtype"
            )
    return trainer | set_here


def reference_arguments(settings: Model, model: nn.Module) -> dict[str, Any]:
    """How TRL loads the KL reference of a model whose weights all train: the checkpoint itself, as the policy was loaded."""
    # TRL warns that it ignores these for the model that it is given. For the reference it reads them (trl 1.16, grpo_trainer.py).
    logging.getLogger("trl.trainer.grpo_trainer").addFilter(lambda record: "model_init_kwargs" not in record.getMessage())
    return {
        "revision": settings.revision,
        "dtype": "float32",  # as the masters are: the KL term begins at 0
        "attn_implementation": model.config._attn_implementation,
        "device_map": {"": device()},
        "use_safetensors": True,
    }


def asks_for_pages(config: TrainConfig) -> bool:
    """Whether the optimizer pages to the host from a GPU that is not here."""
    return device().type == "cpu" and str(config.trainer.get("optim", "")).startswith("paged_")


def global_batch(args: TrainingArguments) -> int:
    """Rows of SFT, or completions of GRPO, that one optimizer step is made of, over all processes."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)

"""Arguments for TRL's trainers: the config's `trainer` block, what posttrain sets itself, and the trackers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from posttrain.config.schema import TrainConfig
from posttrain.errors import UserError
from posttrain.models.base import device
from posttrain.runs.directory import Run


def trainer_arguments(config: TrainConfig, run: Run) -> dict[str, Any]:
    """Keyword arguments of SFTConfig or GRPOConfig: the `trainer:` block, and what posttrain sets itself."""
    half = config.model.dtype == "bfloat16"
    set_here = {
        "output_dir": str(run.folder / "checkpoints"),
        "run_name": run.folder.name,
        "seed": config.seed,
        "report_to": tracking(config, run),
        "push_to_hub": False,
        "bf16": half,
        "fp16": config.model.dtype == "float16",
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
    }
    trainer = dict(config.trainer)
    if device().type == "cpu":
        set_here["use_cpu"] = True
        if str(trainer.get("optim", "")).startswith("paged_"):
            run.note(f"trainer.optim {trainer['optim']} pages to the host from CUDA; without CUDA adamw_torch is used instead")
            trainer["optim"] = "adamw_torch"
    for key in ("bf16", "fp16"):
        if trainer.pop(key, set_here[key]) != set_here[key]:
            raise UserError(
                f"trainer.{key} contradicts model.dtype {config.model.dtype}: remove it, the precision follows model.dtype"
            )
    return trainer | set_here


def tracking(config: TrainConfig, run: Run) -> list[str]:
    """The trackers for TRL, set up so that a resumed run continues its curve."""
    if config.tracking == "wandb":
        if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or Path("~/.netrc").expanduser().is_file()):
            os.environ["WANDB_MODE"] = "offline"
            run.note(
                "tracking wandb: no WANDB_API_KEY and no login, so this run is logged offline; `wandb sync` uploads it later"
            )
        run_id = run.manifest.setdefault("wandb_run_id", run.folder.name + "-" + run.manifest["config_sha256"][:8])
        os.environ |= {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow", "WANDB_DIR": str(run.folder)}
        os.environ.setdefault("WANDB_PROJECT", "posttrain")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
    return [] if config.tracking == "none" else [config.tracking]

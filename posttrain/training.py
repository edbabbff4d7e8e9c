"""What the two training scripts share: trainer arguments, resume, dev accuracy, and the finished adapter."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.callbacks import DevAccuracy, Metrics, MovedShare, PhaseTimes, StopOnNonFinite
from posttrain.config.schema import TrainConfig
from posttrain.errors import UserError
from posttrain.evaluation.stats import wilson
from posttrain.generation.engines import generate
from posttrain.generation.loop import Sampling
from posttrain.generation.steps import release
from posttrain.models.adapters import adapter_sha256, gathered
from posttrain.models.base import device
from posttrain.models.chat import chat_ids
from posttrain.models.policy_copy import PolicyCopy
from posttrain.phases import phase
from posttrain.records import Example
from posttrain.runs.directory import Run
from rewards import grade


def trainer_arguments(config: TrainConfig, run: Run) -> dict[str, Any]:
    """Keyword arguments of SFTConfig or GRPOConfig: the `trainer:` block, and what posttrain owns."""
    half = config.model.dtype == "bfloat16"
    owned = {
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
        owned["use_cpu"] = True
        if str(trainer.get("optim", "")).startswith("paged_"):
            run.note(f"trainer.optim {trainer['optim']} pages to the host from CUDA; without CUDA adamw_torch is used instead")
            trainer["optim"] = "adamw_torch"
    for key in ("bf16", "fp16"):
        if trainer.pop(key, owned[key]) != owned[key]:
            raise UserError(
                f"trainer.{key} contradicts model.dtype {config.model.dtype}: remove it, the precision follows model.dtype"
            )
    return trainer | owned


def tracking(config: TrainConfig, run: Run) -> list[str]:
    """The trackers, prepared so that a resumed run continues its curve."""
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


def add_callbacks(trainer: Trainer, run: Run, measure: Callable[[], dict[str, float]] | None, every: int | None) -> None:
    def report(key: str, value: float) -> None:
        trainer._metrics["train"][key].append(value)

    trainer.add_callback(MovedShare(report))
    trainer.add_callback(StopOnNonFinite())
    trainer.add_callback(PhaseTimes(report))
    trainer.add_callback(Metrics(run))
    if measure:
        # Past TRL's `log`, which would move what it has gathered of the training steps into this row.
        trainer.add_callback(DevAccuracy(measure, functools.partial(Trainer.log, trainer), every))


def dev_accuracy(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dev: list[Example],
    max_new_tokens: int,
    copy: PolicyCopy | None = None,
) -> dict[str, float]:
    """Greedy accuracy on dev questions, lenient and strict, with the Wilson interval of the lenient one."""
    prompts = [chat_ids(tokenizer, example.prompt, add_generation_prompt=True) for example in dev]
    with phase("dev", whole=True):
        policy = (copy or PolicyCopy(model)).refresh()
        completions = generate(policy, prompts, Sampling(max_new_tokens), tokenizer)
        release(policy)  # that of these, often more questions at once than a step has, is training's until the next time
    grades = [
        grade(tokenizer.decode(completion.ids, skip_special_tokens=True), example.answer)
        for example, (completion,) in zip(dev, completions, strict=True)
    ]
    correct = sum(verdict.correct for verdict in grades)
    low, high = wilson(correct, len(dev))
    return {
        "dev/accuracy": correct / len(dev),
        "dev/accuracy_low": low,
        "dev/accuracy_high": high,
        "dev/accuracy_strict": sum(verdict.strict for verdict in grades) / len(dev),
        "dev/clipped_ratio": sum(completion.finish == "length" for (completion,) in completions) / len(dev),
    }


def last_checkpoint(run: Run, resume: bool) -> str | None:
    """The newest complete checkpoint: `trainer_state.json` is what transformers writes last."""
    found = run.folder.glob("checkpoints/checkpoint-*/trainer_state.json")
    checkpoints = sorted((file.parent for file in found), key=lambda folder: int(folder.name.split("-")[1]))
    if not resume or not checkpoints:
        return None
    run.say(f"resuming from {checkpoints[-1]}")
    return str(checkpoints[-1])


def save_adapter(trainer: Trainer, run: Run, tokenizer: PreTrainedTokenizerBase, start_sha256: str) -> None:
    """Write the finished adapter and its tokenizer; refuse one that training did not change."""
    trainer.accelerator.wait_for_everyone()
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = gathered(model)
    if not run.is_main:
        return
    folder = run.folder / "adapter"
    model.save_pretrained(folder, selected_adapters=["default"], state_dict=state)
    tokenizer.save_pretrained(folder)
    end = adapter_sha256(folder)
    run.record(
        peak_gib=peak_memory_gib(),
        adapter_sha256=end,
        steps=trainer.state.global_step,
        train_seconds=next(row["train_runtime"] for row in reversed(trainer.state.log_history) if "train_runtime" in row),
    )
    if end == start_sha256:
        raise UserError(
            f"training left every adapter weight as it was: in none of its {trainer.state.global_step} steps were learning rate "
            f"and gradient both above 0; check trainer.learning_rate, trainer.warmup_steps and the rewards in {run.folder}"
        )
    print(f"adapter: {folder}  sha256 {end[:12]}")


def push_if_asked(config: TrainConfig, run: Run) -> None:
    """Push a finished run; a failure is told with the command to retry, and the run stays finished."""
    if config.hub.repo_id and run.is_main:
        from posttrain.hub.push import push_or_explain

        push_or_explain(run.folder, config.hub.repo_id, private=config.hub.private)


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)

"""What a training run leaves: checkpoints to go on from, and the finished adapter."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import MODEL_FOLDER, TrainConfig
from posttrain.errors import UserError
from posttrain.models.adapters import adapter_sha256, gather_sharded_adapter, trained_sha256
from posttrain.models.policy_copy import PolicyCopy
from posttrain.runs.directory import Run
from posttrain.runs.manifest import model_sha256


def last_checkpoint(run: Run, resume: bool) -> str | None:
    """The newest complete checkpoint: transformers writes `trainer_state.json` last."""
    found = run.folder.glob("checkpoints/checkpoint-*/trainer_state.json")
    checkpoints = sorted((file.parent for file in found), key=lambda folder: int(folder.name.split("-")[1]))
    if not resume or not checkpoints:
        return None
    run.say(f"resuming from {checkpoints[-1]}")
    return str(checkpoints[-1])


def save_adapter(trainer: Trainer, run: Run, tokenizer: PreTrainedTokenizerBase, start_sha256: str) -> None:
    """Write the finished adapter, or the model where all weights were trained, and the tokenizer.

    Raises:
        UserError: training has changed nothing, so there is nothing to write.
    """
    trainer.accelerator.wait_for_everyone()
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = gather_sharded_adapter(model)
    if not run.is_main:
        return
    what = "adapter" if isinstance(model, PeftModel) else MODEL_FOLDER
    folder = run.folder / what
    end = trained_sha256(model, state)
    run.record(
        peak_gib=peak_memory_gib(),
        steps=trainer.state.global_step,
        train_seconds=next(row["train_runtime"] for row in reversed(trainer.state.log_history) if "train_runtime" in row),
    )
    if end == start_sha256:
        raise UserError(
            f"training left every {what} weight as it was: in none of its {trainer.state.global_step} steps were learning rate "
            f"and gradient both above 0; check trainer.learning_rate, trainer.warmup_steps and the rewards in {run.folder}"
        )
    tokenizer.save_pretrained(folder)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, selected_adapters=["default"], state_dict=state)
        run.record(adapter_sha256=adapter_sha256(folder))
    else:
        PolicyCopy(model).model.save_pretrained(folder)  # in the dtype that it computes in; the masters are in the checkpoints
        run.record(adapter_sha256=model_sha256(folder))
    print(f"{what}: {folder}  sha256 {run.manifest.adapter_sha256:.12}")


def push_if_asked(config: TrainConfig, run: Run) -> None:
    """Push a finished run. If that fails, say the command to try again; the run stays finished."""
    if config.hub.repo_id and run.is_main:
        from posttrain.hub.push import push_or_explain

        push_or_explain(run.folder, config.hub.repo_id, private=config.hub.private)


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)

"""What a training run leaves: checkpoints to go on from, and the finished adapter."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import distributed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import MODEL_FOLDER, TrainConfig
from posttrain.errors import UserError, stop
from posttrain.models.adapters import adapter_sha256, gather_sharded_adapter, trained_sha256
from posttrain.models.policy_copy import PolicyCopy
from posttrain.records import write_atomic
from posttrain.runs.directory import Run
from posttrain.runs.integrity import WEIGHTS, commit, damage, numbered, read_commit, weights_sha256, written_hashes
from posttrain.runs.manifest import model_sha256
from posttrain.runs.process import num_processes
from posttrain.training.plans import LEAST_KEPT

ARITHMETIC = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")  # with others a run may round otherwise


def last_checkpoint(run: Run, resume: bool) -> str | None:
    """The newest checkpoint that verifies, and the run's record cut back to it. Those that are passed over are named.

    Raises:
        UserError: the checkpoint is of another number of processes.
    """
    found, passed_over = on_main(lambda: _newest_verified(run) if resume else (None, []))
    for name, why in passed_over:
        run.note(f"{name} is passed over: {why}")
    if found is None:
        cut_record(run, {})
        if passed_over:
            run.say("no checkpoint verifies: the run begins again at step 0")
        return None
    marker = read_commit(found)
    assert marker is not None
    if marker["num_processes"] != num_processes():
        raise UserError(
            f"{found} was written by {marker['num_processes']} processes and this run has {num_processes()}, whose batches are "
            f"others: launch {marker['num_processes']}, or choose another run_dir"
        )
    versions = [
        f"{name} {marker['versions'].get(name)}, now {run.manifest.versions.get(name)}"
        for name in ARITHMETIC
        if marker["versions"].get(name) != run.manifest.versions.get(name)
    ]
    if versions:
        run.note(f"{found.name} was written with {'; '.join(versions)}: the run goes on, and may round otherwise")
    cut_record(run, marker["record"])
    run.say(f"resuming from {found}")
    return str(found)


def _newest_verified(run: Run) -> tuple[Path | None, list[tuple[str, str]]]:
    passed_over: list[tuple[str, str]] = []
    for _, folder in numbered(run.folder / "checkpoints"):
        why = damage(folder) or _unfit(run, folder)
        if why is None:
            return folder, passed_over
        passed_over.append((folder.name, why))
    return None, passed_over


def _unfit(run: Run, folder: Path) -> str | None:
    marker = read_commit(folder)
    assert marker is not None
    if marker["config_sha256"] != run.manifest.config_sha256:
        return "it belongs to other settings"
    return None if marker["resumable"] else "trainer.save_only_model left out its optimizer"


def on_main(ask: Callable[[], Any]) -> Any:
    """What process 0 finds, for all of them: a disk may show one process what it does not show another yet."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ask()
    answer = [ask() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(answer, src=0)
    return answer[0]


# --- the run's record -------------------------------------------------------------------------------------------------

RECORD = ("metrics.jsonl", "samples.jsonl")


def record_sizes(run: Run) -> dict[str, int]:
    """Bytes of each file of rows."""
    return {name: file.stat().st_size for name in RECORD if (file := run.folder / name).is_file()}


def cut_record(run: Run, sizes: dict[str, int]) -> None:
    """Cut off the rows that were written after a checkpoint: the steps that follow it write them again."""
    if not run.is_main:
        return
    for name in RECORD:
        file, size = run.folder / name, sizes.get(name, 0)
        there = file.stat().st_size if file.is_file() else 0
        if there > size:
            with open(file, "r+b") as rows:
                rows.truncate(size)
        elif there < size:
            run.note(f"{file} has lost {size - there:,} bytes of rows that the checkpoint's steps had written")


# --- writing ----------------------------------------------------------------------------------------------------------


def clear_for(folder: Path) -> None:
    """Take away what an attempt that was cut off left where a checkpoint is to be written."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    elif folder.is_symlink() or folder.exists():
        folder.unlink()


def commit_checkpoint(run: Run, folder: Path, *, resumable: bool) -> None:
    """Mark a checkpoint as whole, all of its files being on disk."""
    write_card(run, folder, weights_sha256(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else None)
    commit(
        folder,
        format=1,
        step=int(folder.name.split("-")[1]),
        config_sha256=run.manifest.config_sha256,
        versions=run.manifest.versions,
        num_processes=num_processes(),
        resumable=resumable,
        record=record_sizes(run),
    )


def rotate(folder: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, and never one of the two newest that verify.

    `newest` was committed just now: it was hashed as it lies on disk.
    """
    if not limit or limit < 0:
        return
    verified = 0
    for _, path in numbered(folder):
        if verified >= max(limit, LEAST_KEPT) and (best is None or path.name != Path(best).name):
            clear_for(path)
        elif path == newest or damage(path) is None:
            verified += 1


# --- the end ----------------------------------------------------------------------------------------------------------


def save_adapter(trainer: Any, run: Run, tokenizer: PreTrainedTokenizerBase, start_sha256: str) -> None:
    """Write the finished adapter, or the model where all weights were trained, and the tokenizer.

    Raises:
        Interrupted: the trainer ended before the planned number of steps; nothing is written.
        UserError: training left every weight as it was; nothing is written.
    """
    refuse_early_end(trainer)
    trainer.accelerator.wait_for_everyone()
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = gather_sharded_adapter(model)
    if not run.is_main:
        return
    what = "adapter" if isinstance(model, PeftModel) else MODEL_FOLDER
    folder = run.folder / what
    end = trained_sha256(model, state)
    run.record(peak_gib=peak_memory_gib(), steps=trainer.state.global_step)
    if end == start_sha256:
        raise UserError(
            f"training left every {what} weight as it was: in none of its {trainer.state.global_step} steps were learning rate "
            f"and gradient both above 0; check trainer.learning_rate, trainer.warmup_steps and the rewards in {run.folder}"
        )
    tokenizer.save_pretrained(folder)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, selected_adapters=["default"], state_dict=state)
        sha256 = adapter_sha256(folder)
    else:
        PolicyCopy(model).model.save_pretrained(folder)  # in the dtype that it computes in; the masters are in the checkpoints
        sha256 = model_sha256(folder)
    write_card(run, folder, sha256)
    run.record(adapter_sha256=sha256, adapter_files=written_hashes(folder))
    print(f"{what}: {folder}  sha256 {sha256:.12}")


def write_card(run: Run, folder: Path, sha256: str | None) -> None:
    """README.md beside weights: what they are and how to load them, in the place of PEFT's, which says nothing."""
    from posttrain.hub.card import model_card
    from posttrain.hub.reading import local_release

    manifest = dataclasses.replace(run.manifest, adapter_sha256=sha256)
    write_atomic(folder / "README.md", model_card(local_release(folder, run.folder, manifest)))


def refuse_early_end(trainer: Any) -> None:
    """A trainer that ended by itself, for whatever reason, has finished only if every planned step was done."""
    done, planned = trainer.steps.done, trainer.steps.planned
    if done != planned:
        stop.leave(
            f"the trainer ended by itself at step {done} of {planned}: the same command with --resume goes on",
            f"interrupted at step {done} of {planned}",
        )


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

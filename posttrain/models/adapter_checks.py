"""May this run use this adapter? Its base, its kind, its files; asked before a run directory is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import Model
from posttrain.errors import UserError
from posttrain.models.adapter_kinds import (
    ADAPTER_FILE,
    check_packed,
    check_shapes,
    check_trainable,
    read_adapter_config,
)
from posttrain.models.adapters import adapter_sha256
from posttrain.models.base_tensors import check_numbers
from posttrain.models.checkpoint import chat_hashes, norms_hash, weights_hash
from posttrain.runs.integrity import adapter_hashes, check_adapter
from posttrain.runs.manifest import Manifest, read_manifest, run_of

DIVERGED = "its training has diverged; train it again with a lower learning rate, or take an earlier one"
MERGED_BASE = "merged_base"  # the folder of a run with adapter_mode merge_and_new


def check_adapter_fits(folder: Path, settings: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> PeftConfig:
    """Refuse an adapter of a kind that is not read, or one that was trained on another base.

    The run that made the adapter says what its base was. Without a run there is only a name: PEFT compares shapes.
    """
    config = read_adapter_config(folder)
    run_dir = run_of(folder)
    made = read_manifest(run_dir).model if run_dir else {}
    named = made.get("name_or_path") or config.base_model_name_or_path
    if "fingerprint" in made:
        _check_same_weights(folder, made, settings)
        if tokenizer is not None and not settings.same_base:
            _check_same_chat(folder, made, tokenizer)
    elif named and not settings.same_base and not _same_model(named, settings.name_or_path):
        raise _other_base(folder, named, settings, "no manifest.json beside it says which weights those are")
    return config


def check_start(
    folder: Path,
    settings: Model,
    quantization: str,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: bool,
    stores: bool,
) -> PeftConfig:
    """All that is asked of an adapter before a run directory is made. `base` has no weights.

    `train`: the adapter is trained on. `stores`: the folded model is written as a model folder.

    Raises:
        UserError: it is not what its run wrote, of another base, of a kind that this run cannot fold or train, or not whole, or
            it holds what is no number.
    """
    check_adapter(folder)
    config = check_adapter_fits(folder, settings, tokenizer)
    if train:
        check_trainable(folder, config)
    check_packed(folder, config, quantization)
    check_shapes(folder, config, base)
    check_numbers([folder / ADAPTER_FILE], f"adapter {folder}", "float32", DIVERGED)
    if stores and (getattr(config, "lora_bias", False) or config.peft_type == "BEFT"):
        raise UserError(
            f"adapter {folder} adds biases, and a model folder has no place for them: use another engine or adapter_mode"
        )
    return config


def check_begun(run_dir: Path | str, settings: Model, folder: Path | None) -> None:
    """Refuse to go on with a run whose base or adapter has changed since the run began with it. Writes nothing.

    Raises:
        UserError: the text names which of the two.
    """
    if not Path(run_dir, "manifest.json").is_file():
        return
    begun = read_manifest(run_dir)
    base = begun.model.get("weights") if begun.model.get("name_or_path") == settings.name_or_path else None
    if base and base != weights_hash(settings):
        raise UserError(
            f"the weights of {settings.name_or_path} have changed since {run_dir} was begun with them: restore them, or choose "
            "another run_dir"
        )
    if folder and begun.parent and _is_another(folder, begun):
        raise UserError(f"{folder} has changed since {run_dir} was begun with it: restore it, or choose another run_dir")


def _is_another(folder: Path, begun: Manifest) -> bool:
    """Whether an adapter is not the one that a run began with. A run of an earlier version knows its tensors alone."""
    if begun.parent_files:
        return begun.parent_files != adapter_hashes(folder)
    return begun.parent is not None and begun.parent["adapter_sha256"] != adapter_sha256(folder)


def _check_same_weights(folder: Path, made: dict[str, Any], settings: Model) -> None:
    """Compare the base of a run with the base of these settings: by their weights, or by the norms alone for an older run."""
    named = made["name_or_path"]
    if "weights" in made and made["weights"] == weights_hash(settings):
        return
    if "weights" not in made and _same_model(named, settings.name_or_path):
        return
    same_norms = norms_hash(settings, made["dtype"]) == made["fingerprint"]
    # A merged base has the norms of the base that it was merged from.
    told_apart = "weights" not in made and not {Path(named).name, Path(settings.name_or_path).name} & {MERGED_BASE}
    if same_norms and (told_apart or settings.same_base):
        return
    if same_norms:
        raise _other_base(folder, named, settings, "it has the same norms and may be a fine-tune of the other")
    raise UserError(
        f"adapter {folder} belongs to base {named}, not to {settings.name_or_path}: set model.name_or_path to match "
        f"(its weights are not those of the run in {run_of(folder)})"
    )


def _check_same_chat(folder: Path, made: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    now = chat_hashes(tokenizer)
    if made.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        raise UserError(
            f"adapter {folder} was trained with another vocabulary than that of {tokenizer.name_or_path}: "
            f"use the tokenizer in {folder}, or set model.same_base=true"
        )


def _other_base(folder: Path, named: str, settings: Model, why: str) -> UserError:
    return UserError(
        f"adapter {folder} belongs to base {named}, not to {settings.name_or_path}: set model.name_or_path to match, "
        f"or model.same_base=true if these are the same weights under another name ({why})"
    )


def _same_model(left: str, right: str) -> bool:
    return left == right or (Path(left).exists() and Path(right).exists() and Path(left).samefile(right))

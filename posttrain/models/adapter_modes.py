"""From SFT to GRPO: the adapter continued, rescaled, or merged into its base under a new one. The policy stays what it was."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import GrpoConfig, Lora
from posttrain.errors import UserError
from posttrain.models.adapter_checks import MERGED_BASE, check_start
from posttrain.models.adapters import merge, new_adapter
from posttrain.models.checkpoint import weights_hash
from posttrain.runs.integrity import sync_files
from posttrain.runs.process import process_index


def check_adapter_mode(config: GrpoConfig, start: PeftConfig) -> None:
    """Refuse a change of the adapter's shape that the mode does not allow.

    Raises:
        UserError: the text names what differs and the mode that fits.
    """
    if config.lora is None or config.adapter_mode == "merge_and_new":
        return
    assert isinstance(start, LoraConfig)
    if start.alpha_pattern:
        raise UserError("adapter_mode rescale knows one alpha for all layers, and the adapter has an alpha_pattern: use continue")
    wanted = {
        "r": config.lora.r,
        "target_modules": set(config.lora.target_modules),
        "use_rslora": config.lora.use_rslora,
    }
    there = {"r": start.r, "target_modules": set(start.target_modules or ()), "use_rslora": start.use_rslora}
    if wanted != there:
        changed = ", ".join(f"{key} {there[key]} -> {wanted[key]}" for key in wanted if wanted[key] != there[key])
        raise UserError(f"adapter_mode rescale can change lora.alpha alone, not {changed}: use adapter_mode=merge_and_new")


def check_grpo_start(folder: Path, config: GrpoConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an adapter that GRPO cannot begin with in this mode and on this engine."""
    train_it = config.adapter_mode != "merge_and_new"
    stores = not train_it or config.rollouts.engine == "vllm"
    start = check_start(folder, config.model, config.quantization, base, tokenizer, train=train_it, stores=stores)
    check_adapter_mode(config, start)


def in_mode(
    config: GrpoConfig, model: PeftModel, identity: dict[str, Any], tokenizer: PreTrainedTokenizerBase, run_dir: Path
) -> tuple[PeftModel, dict[str, Any]]:
    """The policy as `adapter_mode` has it, and the manifest's entry of its base. The policy stays what it was."""
    if config.adapter_mode == "continue":
        return model, identity
    assert config.lora is not None
    if config.adapter_mode == "rescale":
        rescale(model, config.lora.alpha)
        return model, identity
    model = merged_with_new(model, config.lora, tokenizer, run_dir / MERGED_BASE, config.seed)
    stored = config.model.model_copy(update={"name_or_path": str(run_dir / MERGED_BASE), "revision": None})
    merged = {"name_or_path": stored.name_or_path, "quantization": "none", "weights": weights_hash(stored)}
    return model, identity | merged


def rescale(model: PeftModel, alpha: int) -> None:
    """Change alpha without changing the policy: B grows by the factor by which alpha / r shrinks.

    The product scale * B @ A stays the same, exactly so for a power of two. The size of later steps changes.
    """
    config = model.peft_config["default"]
    factor = config.lora_alpha / alpha
    config.lora_alpha = alpha
    for module in model.modules():
        if isinstance(module, LoraLayer) and "default" in module.scaling:
            module.scaling["default"] /= factor
            module.lora_alpha["default"] = alpha
            module.lora_B["default"].weight.data *= factor
            if module.lora_B["default"].bias is not None:
                module.lora_B["default"].bias.data *= factor


def merged_with_new(model: PeftModel, lora: Lora, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int) -> PeftModel:
    """Fold the adapter into the base, store that base, and put a fresh adapter on it: the reference is then the base.

    The new adapter belongs to the base in the stored folder. Evaluation and the Hub need that folder.
    """
    merged = merge(model)
    if not (folder / "config.json").is_file():
        _store(folder, merged, tokenizer)
    merged.name_or_path = merged.config._name_or_path = str(folder)
    merged.requires_grad_(False)
    return new_adapter(merged, lora, tokenizer, seed)


def _store(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a model folder that appears whole or not at all, whichever process is the first to have written it."""
    partial = folder.with_name(f"{folder.name}.partial{process_index()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    sync_files(partial)
    with contextlib.suppress(OSError):  # another process has written it
        partial.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)

"""LoRA adapters: new, continued, frozen, merged; the base they belong to, and their hash.

LoRA weights are fp32 wherever the optimizer sees them. Autocast rounds them to bf16 for the matrix products.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import GrpoConfig, Lora, Model
from posttrain.errors import UserError
from posttrain.models.chat import looks_local
from posttrain.models.policy_copy import PolicyCopy
from posttrain.models.special_tokens import special_tokens_to_train

ADAPTER_FILE = "adapter_model.safetensors"


def new_adapter(base: PreTrainedModel, lora: Lora, tokenizer: PreTrainedTokenizerBase, seed: int) -> PeftModel:
    """A fresh LoRA adapter. The seed alone decides its random half; the settings decide whether rows of special tokens train."""
    rows = special_tokens_to_train(base, lora, tokenizer)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        trainable_token_indices=rows or None,
        task_type="CAUSAL_LM",
    )
    missing = [target for target in lora.target_modules if not any(n.endswith(target) for n, _ in base.named_modules())]
    if missing:
        raise UserError(f"lora.target_modules names no layer of this model: {', '.join(missing)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _with_fp32_masters(peft.get_peft_model(base, config))


def load_adapter(base: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
    """An adapter from disk, to continue it or to keep it frozen."""
    return _with_fp32_masters(PeftModel.from_pretrained(base, folder, is_trainable=trainable))


def _with_fp32_masters(model: PeftModel) -> PeftModel:
    """Make the masters fp32, and stop PEFT from casting activations up to them: autocast casts the masters down to bf16."""
    hold_fp32(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    return model


def hold_fp32(model: nn.Module) -> None:
    """Convert every trainable weight to fp32, whatever PEFT made of it; training/masters.py keeps it there.

    TRL casts the adapters of a quantized model to bf16 (sft_trainer.py, grpo_trainer.py: "the PEFT adapter weights are
    converted to bf16"). There an update of relative size below 2^-9 rounds to nothing: at a learning rate of 3e-5, most of
    them.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def resolve_adapter(adapter: str) -> Path:
    """A run directory, an adapter folder or a Hub id -> a local adapter folder.

    Raises:
        UserError: there is no adapter; the text has the command that makes one.
    """
    for folder in (Path(adapter), Path(adapter, "adapter")):
        if (folder / "adapter_config.json").is_file():
            if not (folder / ADAPTER_FILE).is_file():
                raise UserError(f"{folder} has no {ADAPTER_FILE}: only safetensors adapters are loaded")
            return folder
    if looks_local(adapter):
        raise UserError(f"no adapter at {adapter}: train one first (python sft_train.py --config ...) or correct `adapter`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(adapter, allow_patterns=["adapter_config.json", ADAPTER_FILE]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"adapter {adapter} is neither a local folder nor reachable on the Hub ({type(error).__name__})"
        ) from error


def check_adapter_fits(folder: Path, settings: Model) -> LoraConfig:
    """Refuse an adapter that was trained on another base. PEFT compares nothing but tensor shapes."""
    config = LoraConfig(**_known_fields(json.loads((folder / "adapter_config.json").read_text()), LoraConfig))
    trained_on = config.base_model_name_or_path
    if trained_on and not _same_model(trained_on, settings.name_or_path):
        raise UserError(
            f"adapter {folder} belongs to base {trained_on}, not to {settings.name_or_path}: set model.name_or_path to match"
        )
    return config


def _known_fields(values: dict[str, Any], cls: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in cls.__dataclass_fields__ and key != "peft_type"}


def _same_model(left: str, right: str) -> bool:
    return left == right or (Path(left).exists() and Path(right).exists() and Path(left).samefile(right))


def adapter_sha256(folder: Path) -> str:
    """Hash of an adapter's tensors by name: equal weights give equal hashes, whatever metadata the file has."""
    from safetensors.torch import load_file

    return tensors_sha256(load_file(folder / ADAPTER_FILE))


def live_adapter_sha256(model: PeftModel) -> str:
    """The hash that the adapter in memory will have on disk."""
    return tensors_sha256(peft.get_peft_model_state_dict(model, adapter_name="default"))


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def gather_sharded_adapter(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """Every trained tensor in one piece, if FSDP has sharded the model, else None. All processes must call this."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(isinstance(p, DTensor) for p in trained.values()):
        return None
    return {name: p.full_tensor().cpu() if isinstance(p, DTensor) else p for name, p in trained.items()}


def load_sharded_adapter(model: PeftModel, folder: Path) -> bool:
    """Give each process its part of a saved adapter if FSDP has sharded the model. Returns whether it has."""
    from safetensors.torch import load_file

    trained = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor) and p.requires_grad}
    if not trained:
        return False
    parameters = peft.get_peft_model_state_dict(model, state_dict=trained)  # by the names they are saved under
    saved = load_file(folder / ADAPTER_FILE)
    assert saved.keys() == parameters.keys()
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(distribute_tensor(saved[name].to(p.device), p.device_mesh, p.placements))
    return True


def count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def merge(model: PeftModel) -> PreTrainedModel:
    """The policy as a plain model: an unpacked copy of the base plus the adapter, summed in fp32 and rounded once.

    PEFT's `merge_and_unload` on packed NF4 would round the sum back to 4 bits (peft#1043, #2321).
    """
    merged = PolicyCopy(model).model
    merged.config._attn_implementation = model.get_base_model().config._attn_implementation
    return merged


# --- from SFT to GRPO -------------------------------------------------------------------------------------------------


def check_adapter_mode(config: GrpoConfig, start: LoraConfig) -> None:
    """Refuse a change of the adapter's shape that the mode does not allow.

    Raises:
        UserError: the text names what differs and the mode that fits.
    """
    if config.lora is None:
        return
    wanted = {
        "r": config.lora.r,
        "target_modules": set(config.lora.target_modules),
        "use_rslora": config.lora.use_rslora,
    }
    there = {"r": start.r, "target_modules": set(start.target_modules or ()), "use_rslora": start.use_rslora}
    if config.adapter_mode == "rescale" and wanted != there:
        changed = ", ".join(f"{key} {there[key]} -> {wanted[key]}" for key in wanted if wanted[key] != there[key])
        raise UserError(f"adapter_mode rescale can change lora.alpha alone, not {changed}: use adapter_mode=merge_and_new")


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


def merged_with_new(model: PeftModel, lora: Lora, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int) -> PeftModel:
    """Fold the adapter into the base, store that base, and put a fresh adapter on it: the reference is then the base.

    The new adapter belongs to the base in the stored folder. Evaluation and the Hub need that folder.
    """
    merged = merge(model)
    if not (folder / "config.json").is_file():
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    merged.name_or_path = merged.config._name_or_path = str(folder)
    merged.requires_grad_(False)
    return new_adapter(merged, lora, tokenizer, seed)

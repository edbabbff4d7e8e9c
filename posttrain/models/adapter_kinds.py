"""Which adapters are read: their kind, and whether their file holds what their config says.

PEFT drops settings that it does not know, and tensors that fit no layer. Here either is a mistake that is told.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from posttrain.errors import UserError

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# What PEFT merges into the weights exactly: tests/test_adapter_kinds.py compares each with PEFT's own forward. All others put
# vectors before the prompt or choose by what they read, and no plain model computes that.
FOLDED = (
    "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
    "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
# Settings of LoRA that no merged weight computes.
NOT_FOLDED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "megatron_config",
)
# PEFT draws these from data that a model without weights has not: their tensors are compared once they are loaded.
NEED_WEIGHTS = frozenset(("BOFT", "FROD", "SHIRA", "UNILORA"))
# LoRA whose layers PEFT would pack into 4 bits again.
MORE_THAN_LORA = ("use_dora", "lora_bias", "target_parameters", "use_qalora", "kasa_config", "velora_config")


def read_adapter_config(folder: Path) -> PeftConfig:
    """The adapter's config, of the class that its peft_type names.

    Raises:
        UserError: a kind of adapter that cannot be folded into the base, or settings that this PEFT does not know.
    """
    try:
        values: Any = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG_FILE} is not JSON ({error}): get a whole copy of the adapter") from error
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG_FILE} is no JSON object: get a whole copy of the adapter")
    kind = values.get("peft_type")
    if kind not in FOLDED:
        raise UserError(
            f"adapter {folder} is of peft_type {kind}, which cannot be folded into the base's weights: "
            f"only these can, {', '.join(sorted(FOLDED))}"
        )
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {key: value for key, value in values.items() if key in cls.__dataclass_fields__ and key != "peft_type"}
    # A number alone turns nothing on.
    unknown = [f"{key} {values[key]}" for key in values.keys() - cls.__dataclass_fields__.keys() if _turns_on(values[key])]
    if unknown:
        raise UserError(f"adapter {folder} has settings that PEFT {peft.__version__} does not know: {', '.join(sorted(unknown))}")
    try:
        config = cls(**known)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"adapter {folder}: PEFT refuses its {CONFIG_FILE}: {str(error).splitlines()[0]}") from error
    if found := [key for key in NOT_FOLDED if getattr(config, key, None)]:
        raise UserError(f"adapter {folder} has {found[0]}, which cannot be folded into the base's weights")
    return config


def _turns_on(value: Any) -> bool:
    return value is True or (isinstance(value, str | dict | list) and bool(value))


def check_packed(folder: Path, config: PeftConfig, quantization: str) -> None:
    """Refuse to fold more than plain LoRA into packed weights: PEFT would round them to 4 bits again."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    found = [key for key in MORE_THAN_LORA if getattr(config, key, None)]
    plain = (kind == "LORA" and not found) or kind in ("LN_TUNING", "TRAINABLE_TOKENS")
    if quantization == "nf4" and not plain:
        what = found[0] if found else f"peft_type {kind}"
        raise UserError(f"adapter {folder} has {what}, which is not folded into packed weights: set quantization=nf4_unpacked")


def check_trainable(folder: Path, config: PeftConfig) -> None:
    """Refuse to go on training what the trainers do not keep in fp32 or cannot compare with a reference."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    odd = {"bias": "none", "modules_to_save": None, "target_parameters": None, "use_qalora": False}
    found = [f"{key} {value}" for key in odd if (value := getattr(config, key, odd[key])) not in (odd[key], [])]
    if kind != "LORA" or found:
        raise UserError(
            f"adapter {folder} has {found[0] if found else f'peft_type {kind}'}: training goes on from LoRA alone. Evaluate it, "
            "merge it with PEFT's merge_and_unload and train on that base, or use GRPO with adapter_mode=merge_and_new"
        )


# --- its tensors ------------------------------------------------------------------------------------------------------


def check_shapes(folder: Path, config: PeftConfig, base: PreTrainedModel) -> None:
    """Refuse a file whose tensors are not those that the config gives the base. `base` has no weights."""
    if str(getattr(config.peft_type, "value", config.peft_type)) in NEED_WEIGHTS:
        return
    shape = copy.deepcopy(config)
    if isinstance(getattr(shape, "init_lora_weights", None), str):
        shape.init_lora_weights = True  # how it began says nothing of its shape
    try:
        with torch.device("meta"):
            model = PeftModel(copy.deepcopy(base), shape, low_cpu_mem_usage=True)
    except ValueError as error:  # it names no layer of this base
        raise UserError(f"adapter {folder} does not fit this base: {str(error).splitlines()[0]}") from error
    check_tensors(folder, model)


def check_tensors(folder: Path, model: PeftModel) -> None:
    """Refuse a file that lacks a tensor of the adapter, has one too many, or one of another shape."""
    wanted = {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(model, adapter_name="default").items()}
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as tensors:
            there = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / ADAPTER_FILE} cannot be read ({error}): get a whole copy of the adapter") from error
    differ = sorted(name for name in wanted.keys() & there.keys() if wanted[name] != there[name])
    told = [
        *(f"lacks {name}" for name in sorted(wanted.keys() - there.keys())[:1]),
        *(f"has {name}, which fits no layer" for name in sorted(there.keys() - wanted.keys())[:1]),
        *(f"has {name} as {there[name]} where the base needs {wanted[name]}" for name in differ[:1]),
    ]
    if told:
        count = len(wanted.keys() ^ there.keys()) + len(differ)
        raise UserError(
            f"{folder / ADAPTER_FILE} {' and '.join(told)} ({count} such tensors): it is not whole, or of another base"
        )

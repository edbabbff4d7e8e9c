"""The tensors of a base's files against its config.json: none is missing, unused, of another shape, or holds what is no number.

A config.json of fewer layers than the files hold would load: what nothing reads is dropped, and the run is of another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from posttrain.config.schema import Model
from posttrain.errors import UserError

WHOLE_COPY = "get a whole copy of the model, with its own config.json"
# Buffers that older checkpoints hold and every family computes. transformers lets these two pass, too
# (`_adjust_missing_and_unexpected_keys` of https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_utils.py).
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
# Layers that predict a token further ahead lie behind the last layer, and transformers builds none of them (DeepSeek-V3, GLM-4).
LAYERS_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_OF_PACKED = re.compile(r"(\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$")


def check_tensors_of(settings: Model, base: PreTrainedModel, files: list[Path]) -> None:
    """Refuse files that are not those of the model that config.json describes. `base` has no weights.

    A missing tensor would be drawn at random by transformers, with a warning, and one that is unused be dropped. Families whose
    tensors are stored otherwise than the model has them, as experts one by one, are left to `check_loaded`, but for whole layers.

    Raises:
        UserError: the text names the first such tensor, or the file that cannot be read.
    """
    there: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                there |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{file} cannot be read ({error}): get a whole copy of the model") from error
    converted = bool(get_model_conversion_mapping(base, add_legacy=False))
    if not converted:
        _check_shapes(settings, base, there)
    unused = [name for name in there if _is_unused(base, name, converted=converted)]
    if unused:
        raise _unused_tensors(settings, unused)


def _check_shapes(settings: Model, base: PreTrainedModel, there: dict[str, tuple[int, ...]]) -> None:
    found = {_without_prefix(base, name): shape for name, shape in there.items()}
    packed = any(_OF_PACKED.search(name) for name in there)
    for name, parameter in base.named_parameters():
        shape = found.get(_without_prefix(base, name))
        if shape is None or (shape != tuple(parameter.shape) and not packed):
            other = f"has {name} as {shape}, where its config.json says {tuple(parameter.shape)}"
            what = f"has no tensor {name}" if shape is None else other
            raise UserError(f"{settings.name_or_path} {what}: {WHOLE_COPY}")


def check_loaded(
    settings: Model, base: PreTrainedModel, missing: Iterable[str], misshapen: Iterable[tuple[object, ...]], unused: Iterable[str]
) -> None:
    """Refuse a loaded model of which tensors were drawn at random, for its files lack them or have others, or dropped.

    The names are those of transformers' `output_loading_info`.
    """
    if lacking := sorted(missing):
        raise UserError(f"{settings.name_or_path} has no tensor {lacking[0]} ({len(lacking)} are missing): {WHOLE_COPY}")
    if others := sorted(misshapen, key=str):
        name, shape, wanted = others[0]
        raise UserError(f"{settings.name_or_path} has {name} as {shape}, where its config.json says {wanted}: {WHOLE_COPY}")
    if dropped := sorted(name for name in unused if _is_unused(base, name)):
        raise _unused_tensors(settings, dropped)


def _unused_tensors(settings: Model, names: list[str]) -> UserError:
    return UserError(
        f"{settings.name_or_path} has {names[0]}, which its config.json has no place for ({len(names)} such tensors would go "
        f"unused): {WHOLE_COPY}, or if that is meant, load it with transformers and save it with save_pretrained"
    )


def _is_unused(base: PreTrainedModel, name: str, *, converted: bool = False) -> bool:
    """Whether a tensor of a part that the model has goes nowhere. Parts that it has not (a vision tower, `mtp`) may lie there."""
    if any(re.search(pattern, name) for pattern in (*COMPUTED, *(base._keys_to_ignore_on_load_unexpected or ()))):
        return False
    *path, last = _without_prefix(base, _OF_PACKED.sub(r"\1", name)).split(".")
    at: nn.Module = base if path and path[0] in dict(base.named_children()) else base.base_model
    for depth, part in enumerate(path):
        children = dict(at.named_children())
        if part not in children and isinstance(at, nn.ModuleList):
            return int(part) >= len(at) + _layers_ahead(base) if part.isdecimal() else not converted
        if part not in children:
            return depth > 0 and not converted
        at = children[part]
    known = at._parameters.keys() | at._buffers.keys()
    return bool(path) and not converted and last not in {key for key in known if getattr(at, key) is not None}


def _without_prefix(base: PreTrainedModel, name: str) -> str:
    """A model without its head is stored without the prefix."""
    return name.removeprefix(f"{base.base_model_prefix}.")


def _layers_ahead(base: PreTrainedModel) -> int:
    return max(int(getattr(base.config.get_text_config(), key, 0) or 0) for key in LAYERS_AHEAD)


# --- what they hold ---------------------------------------------------------------------------------------------------


def check_numbers(files: list[Path], of: str, dtype: str, remedy: str) -> None:
    """Refuse weights that are no numbers, or that are none any more in a run's dtype. Reads the files once, some GB a second.

    Packed as NF4 a NaN would be a number again, and another one.

    Raises:
        UserError: the text names the tensor.
    """
    largest = torch.finfo(getattr(torch, dtype)).max
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dict
                tensor = tensors.get_tensor(name)
                if tensor.dtype not in FLOATS or not tensor.numel():
                    continue
                low, high = (float(end) for end in tensor.aminmax())  # NaN where one is in it; ten times as fast as isfinite
                if not max(-low, high) < float("inf"):
                    raise UserError(f"{of} has NaN or infinity in {name}: {remedy}")
                if max(-low, high) > largest:
                    raise UserError(f"{of} has {max(-low, high):g} in {name}, beyond {dtype}: set model.dtype=bfloat16")


def check_tied(settings: Model, base: PreTrainedModel, files: list[Path]) -> None:
    """Refuse two ends of a tied model that differ in its files: transformers would not tie them, who reads config.json would.

    Raises:
        UserError: the text names both.
    """
    for one, other in getattr(base, "all_tied_weights_keys", {}).items():
        ends, found = {_without_prefix(base, name) for name in (one, other)}, []
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                found += [tensors.get_tensor(name) for name in tensors.keys() if _without_prefix(base, name) in ends]  # noqa: SIM118
        if len(found) == 2 and not torch.equal(*found):
            raise UserError(
                f"{settings.name_or_path} holds {one} and {other} with different values, where its config.json says that they "
                "are one (tie_word_embeddings): set that to false in config.json, or get a whole copy of the model"
            )

"""A base before its weights are loaded: its shape, what its files hold, and what tells one base from another.

`weights` of a manifest is the hash of three rows of every tensor, read from the files. A copy has it too, wherever it lies and
however it is cut into files. A fine-tune that was merged into the base has another one, while its norm weights, which
`fingerprint` is over, are the base's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from posttrain.config.schema import Model, Tokenizer
from posttrain.errors import UserError
from posttrain.models.base_tensors import check_numbers, check_tensors_of, check_tied
from posttrain.models.chat import config_of
from posttrain.models.special_tokens import template_specials
from posttrain.records import read_object

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def skeleton(settings: Tokenizer) -> PreTrainedModel:
    """The base without weights: names and shapes of its layers, in milliseconds."""
    config = config_of(settings)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.name_or_path = model.config._name_or_path = settings.name_or_path
    return model


def check_base(settings: Model, quantization: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Refuse a checkpoint that could not be loaded or could not read the template. Returns its skeleton.

    Raises:
        UserError: no safetensors, weights in a form that is not read, weights of another model or that are no numbers, or special
            tokens without a row.
    """
    _check_files(settings)
    _check_form(settings, quantization)
    base = skeleton(settings)
    files = checkpoint_files(settings)
    check_tensors_of(settings, base, files)
    check_tied(settings, base, files)
    check_numbers(
        files, settings.name_or_path, settings.dtype, "its training has diverged, or the copy is damaged; get another copy"
    )
    check_rows_for(base, tokenizer, [template_specials(tokenizer), [tokenizer.pad_token_id]])
    return base


def _check_files(settings: Model) -> None:
    if checkpoint_files(settings):
        return
    name = settings.name_or_path
    if Path(name).is_dir() and not any(file.suffix in (".bin", ".pt", ".pth", ".safetensors") for file in Path(name).iterdir()):
        raise UserError(f"{name} holds no weights: download the model whole; a dry run needs config.json and tokenizer alone")
    saved = f"{Path(name).name}-safetensors"
    raise UserError(
        f'{name} has no {WHOLE}: only safetensors are loaded. Convert it: python -c "import transformers as t; '
        f"t.AutoModelForCausalLM.from_pretrained('{name}', dtype='auto').save_pretrained('{saved}'); "
        f"t.AutoTokenizer.from_pretrained('{name}').save_pretrained('{saved}')\" and set model.name_or_path={saved}"
    )


def _check_form(settings: Model, quantization: str) -> None:
    form = getattr(config_of(settings), "quantization_config", None)
    if form is None:
        return
    values = form if isinstance(form, dict) else form.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if values.get("load_in_4bit") and values.get("bnb_4bit_quant_type") == "nf4":
        if quantization == "none":
            raise UserError(f"{settings.name_or_path} is packed as NF4 already: set quantization to nf4 or nf4_unpacked")
        return
    raise UserError(
        f"{settings.name_or_path} is quantized ({method}): only NF4 and unquantized checkpoints are loaded; "
        "set model.name_or_path to the unquantized original"
    )


def check_rows_for(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]]) -> None:
    """Refuse tokens that the embedding has no row for: the model was not resized when they were added to the tokenizer."""
    rows = base.get_input_embeddings().weight.shape[0]
    beyond = sorted({token for ids in sequences for token in ids if token >= rows})
    if beyond:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} {token}" for token in beyond[:4])
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} rows, none for {names}: resize the model "
            "(resize_token_embeddings) and save it with this tokenizer, or use the tokenizer that the model came with"
        )


def context_length(base: PreTrainedModel) -> int | None:
    """Positions that the model was made for; None if its config does not say."""
    length = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def check_context(base: PreTrainedModel, longest: int, new: int, key: str) -> None:
    """Refuse a run whose longest prompt and answer do not fit into the model's context."""
    context = context_length(base)
    if context is not None and longest + new > context:
        remedy = f"set {key} to {context - longest} or less" if longest < context else "shorten the prompts (fewer shots)"
        raise UserError(
            f"the longest prompt has {longest} tokens, and with {new} new ones ({key}) it leaves the model's context of "
            f"{context}: {remedy}, or use a model with a longer context"
        )


# --- which base it is -------------------------------------------------------------------------------------------------


def checkpoint_files(settings: Tokenizer) -> list[Path]:
    """The safetensors files of a checkpoint, in a folder or in the Hub's cache."""
    if index := _file(settings, INDEX):
        names = sorted({*read_object(index, "get a whole copy of the model")["weight_map"].values()})
    else:
        names = [WHOLE]
    return [file for name in names if (file := _file(settings, name))]


def _file(settings: Tokenizer, name: str) -> Path | None:
    found = cached_file(
        settings.name_or_path,
        name,
        revision=settings.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def found_here(settings: Tokenizer) -> Path | None:
    """The folder of a checkpoint, if its weights are on this machine: nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = Path(settings.name_or_path)
    if not folder.is_dir():
        with suppress(LocalEntryNotFoundError, HFValidationError):  # not in the cache; no id of the Hub
            folder = Path(snapshot_download(settings.name_or_path, revision=settings.revision, local_files_only=True))
    here = folder.is_dir() and checkpoint_files(Tokenizer(name_or_path=str(folder)))
    return folder if here else None


def weights_hash(settings: Tokenizer) -> str:
    """A short hash over name, shape and three rows of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for _, part in sorted(_samples(checkpoint_files(settings))):
        digest.update(part)
    return digest.hexdigest()[:16]


def _samples(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dict
                rows = tensors.get_slice(name)
                shape = tuple(rows.get_shape())
                chosen = sorted({0, shape[0] // 2, shape[0] - 1}) if len(shape) > 1 and shape[0] else []
                sample = torch.stack([rows[row] for row in chosen]) if chosen else tensors.get_tensor(name)
                yield name, f"{name} {shape} ".encode() + sample.float().contiguous().numpy().tobytes()


def norms_hash(settings: Model, dtype: str) -> str | None:
    """`base.fingerprint` of a checkpoint that is not loaded, at a dtype; None if its files name the norms otherwise."""
    wanted = [name for name, _ in skeleton(settings).named_parameters() if "norm" in name]
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint_files(settings):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in {*wanted} & {*tensors.keys()}}
    if found.keys() != {*wanted}:
        return None
    digest = hashlib.sha256()
    for name in wanted:
        digest.update(found[name].to(getattr(torch, dtype)).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def chat_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Short hashes of the vocabulary and of the chat template."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    texts: dict[str, Any] = {"tokenizer": vocabulary, "template": str(tokenizer.chat_template)}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}

"""LoRA adapters: new, continued, frozen, merged; the base they belong to, and their hash.

LoRA weights are fp32 wherever the optimizer sees them. Autocast rounds them to bf16 for the matrix products.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import MODEL_FOLDER, GrpoConfig, Lora, Model
from posttrain.errors import UserError
from posttrain.models.adapter_kinds import (
    ADAPTER_FILE,
    check_packed,
    check_shapes,
    check_tensors,
    check_trainable,
    read_adapter_config,
)
from posttrain.models.base import compute_dtype
from posttrain.models.chat import looks_local
from posttrain.models.checkpoint import chat_hashes, norms_hash, weights_hash
from posttrain.models.network import look_for_hub
from posttrain.models.policy_copy import PolicyCopy
from posttrain.models.special_tokens import special_tokens_to_train
from posttrain.runs.integrity import adapter_hashes, check_adapter, sync_files
from posttrain.runs.manifest import Manifest, read_manifest, refuse_unfinished, run_of
from posttrain.runs.process import process_index

MERGED_BASE = "merged_base"  # the folder of a run with adapter_mode merge_and_new


def new_adapter(base: PreTrainedModel, lora: Lora, tokenizer: PreTrainedTokenizerBase, seed: int) -> PeftModel:
    """A fresh LoRA adapter. The seed alone decides its random half; the settings decide whether rows of special tokens train."""
    rows = special_tokens_to_train(base, lora, tokenizer)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if ALL_LINEAR in lora.target_modules else list(lora.target_modules),
        use_rslora=lora.use_rslora,
        trainable_token_indices=rows or None,
        task_type="CAUSAL_LM",
    )
    targets_met(base, lora)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _with_fp32_masters(_naming_its_base(peft.get_peft_model(base, config)))


ALL_LINEAR = "all-linear"


def targets_met(base: PreTrainedModel, lora: Lora) -> dict[str, int]:
    """How many layers of the base each target names: by the whole last part of a name, as PEFT has it.

    Raises:
        UserError: a target names no layer, or the matrix at an end of the model.
    """
    ends = {name.rpartition(".")[2] for name, module in base.named_modules() if module in _ends(base)}
    if found := ends & {target.rpartition(".")[2] for target in lora.target_modules}:
        raise UserError(
            f"lora.target_modules names {', '.join(sorted(found))}: neither loss nor rollouts compute an adapter on the model's "
            "first or last matrix. Remove it; lora.train_special_tokens trains the rows of special tokens"
        )
    if ALL_LINEAR in lora.target_modules:
        linear = [name for name, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and m not in _ends(base)]
        return dict(Counter(name.rpartition(".")[2] for name in linear))
    names = [name for name, _ in base.named_modules()]
    met = {target: sum(name == target or name.endswith(f".{target}") for name in names) for target in lora.target_modules}
    taken = {
        m.__class__.__name__
        for n, m in base.named_modules()
        if n.rpartition(".")[2] in met and not isinstance(m, nn.Linear | Conv1D)
    }
    if taken:
        raise UserError(f"lora.target_modules names a {' and a '.join(sorted(taken))}: name the linear layers inside it")
    if missing := [target for target, count in met.items() if not count]:
        there = sorted({name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear)} - ends)
        raise UserError(
            f"lora.target_modules names no layer of this model: {', '.join(missing)} (it has {', '.join(there)}; or all-linear)"
        )
    return met


def targets_line(base: PreTrainedModel, lora: Lora) -> str:
    return "lora.target_modules meet " + ", ".join(f"{name} {count}" for name, count in targets_met(base, lora).items())


def _ends(base: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    return base.get_input_embeddings(), base.get_output_embeddings()


def load_adapter(base: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
    """An adapter from disk, to continue it or to keep it frozen."""
    model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    check_tensors(folder, model)
    return _with_fp32_masters(_naming_its_base(model))


def _naming_its_base(model: PeftModel) -> PeftModel:
    """Let the saved config say where the base is, whoever reads it from wherever: its Hub id and commit, or an absolute path."""
    base, config = model.get_base_model(), model.peft_config["default"]
    of_this_disk = Path(base.name_or_path).is_dir()
    config.base_model_name_or_path = os.path.abspath(base.name_or_path) if of_this_disk else base.name_or_path
    config.revision = None if of_this_disk else getattr(base.config, "_commit_hash", None)
    return model


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
    refuse_unfinished(Path(adapter, "adapter"))
    if Path(adapter, MODEL_FOLDER, "config.json").is_file():
        raise UserError(
            f"{adapter} trained all weights and has no adapter: set model.name_or_path={adapter}/{MODEL_FOLDER} and adapter=null "
            "(quantization=none reads it as it was trained)"
        )
    if looks_local(adapter):
        raise UserError(f"no adapter at {adapter}: train one first (python sft_train.py --config ...) or correct `adapter`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    look_for_hub()
    try:
        return Path(snapshot_download(adapter, allow_patterns=["adapter_config.json", ADAPTER_FILE, "chat_template.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"adapter {adapter} is neither a local folder nor reachable on the Hub ({type(error).__name__})"
        ) from error


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
        UserError: it is not what its run wrote, of another base, of a kind that this run cannot fold or train, or not whole.
    """
    check_adapter(folder)
    config = check_adapter_fits(folder, settings, tokenizer)
    if train:
        check_trainable(folder, config)
    check_packed(folder, config, quantization)
    check_shapes(folder, config, base)
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


def trained_sha256(model: nn.Module, gathered: dict[str, torch.Tensor] | None = None) -> str:
    """What tells whether training has changed anything: of an adapter its hash, of all weights that of the model as stored."""
    if isinstance(model, PeftModel):
        return live_adapter_sha256(model, gathered)
    dtype = compute_dtype(model)
    return tensors_sha256({name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()})


def adapter_sha256(folder: Path) -> str:
    """Hash of an adapter's tensors by name: equal weights give equal hashes, whatever metadata the file has."""
    from safetensors.torch import load_file

    return tensors_sha256(load_file(folder / ADAPTER_FILE))


def live_adapter_sha256(model: PeftModel, gathered: dict[str, torch.Tensor] | None = None) -> str:
    """The hash that the adapter in memory will have on disk. `gathered` holds its tensors where they are sharded."""
    return tensors_sha256(peft.get_peft_model_state_dict(model, state_dict=gathered, adapter_name="default"))


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

"""LoRA adapters: new, loaded, merged; their masters, their hash, and the parts of one that is sharded.

LoRA weights are fp32 wherever the optimizer sees them. Autocast rounds them to bf16 for the matrix products.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import MODEL_FOLDER, Lora
from posttrain.errors import UserError
from posttrain.kernels.sharded import whole
from posttrain.models.adapter_kinds import (
    ADAPTER_FILE,
    check_tensors,
)
from posttrain.models.base import compute_dtype
from posttrain.models.network import look_for_hub
from posttrain.models.policy_copy import PolicyCopy
from posttrain.models.special_tokens import special_tokens_to_train
from posttrain.places import looks_local
from posttrain.runs.manifest import refuse_unfinished


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
    return {name: whole(p).cpu() for name, p in trained.items()}


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

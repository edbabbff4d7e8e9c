"""What policy and artefact answer, each in its own runtime."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.export.source import Source, Target
from posttrain.records import sha256_file
from posttrain.tasks.answers import grader_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from posttrain.export.fidelity import Fidelity, Measured, Said


def ask_policy(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[Measured, dict[str, str]]:
    """What the policy answers, and the hash of each of its tensors. Its weights are let go of again."""
    from posttrain.export.fidelity import measure
    from posttrain.export.runtimes import Transformers
    from posttrain.models.policy import open_policy
    from posttrain.models.policy_copy import PolicyCopy

    model, _ = open_policy(source.settings, source.quantization, tokenizer, source.adapter, trainable=False)
    policy = PolicyCopy(model).model
    return measure(Transformers(policy, tokenizer), source.examples, tokenizer, source.max_new_tokens), tensor_hashes(policy)


def tensor_hashes(model: PreTrainedModel) -> dict[str, str]:
    import torch

    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in model.named_parameters()
    }


def ask_artefact(
    target: Target,
    source: Source,
    folder: Path,
    measured: Measured,
    hashes: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    asked: dict[str, Said],
) -> Fidelity:
    """Run the artefact in its own runtime. `asked` keeps what a GGUF file said, by its hash: that of Ollama is the same."""
    import torch

    from posttrain.export.fidelity import ask, compare_with, size_of
    from posttrain.export.merged import load_merged
    from posttrain.export.runtimes import LlamaCpp, Transformers
    from posttrain.models.base import device

    grader = grader_of(source.data.get("answer"))
    exact = target.into == "trained"
    same_weights, rounds_to = None, None
    if target.is_gguf:
        file = next(folder.glob("*.gguf"))
        if (sha256 := sha256_file(file)) not in asked:
            longest = max(map(len, measured.prompts)) + source.max_new_tokens
            with LlamaCpp(file, tokenizer.eos_token_id, longest) as runtime:
                asked[sha256] = ask(runtime, measured, tokenizer)
        said = asked[sha256]
        rounds_to = torch.float16 if exact and target.quant == "f16" else None
    else:
        model = load_merged(folder, device())
        same_weights = tensor_hashes(model) == hashes if exact else None
        said = ask(Transformers(model, tokenizer), measured, tokenizer)
        rounds_to = model.dtype if exact else None
    return compare_with(
        target.folder.name,
        measured,
        said,
        tokenizer,
        grader,
        size_bytes=size_of(folder),
        same_weights=same_weights,
        rounds_to=rounds_to,
    )

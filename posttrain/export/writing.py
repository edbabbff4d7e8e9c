"""An artefact's folder: weights, report, card and record. It appears whole or not at all."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.export.source import Source, Target
from posttrain.hub.card import model_card
from posttrain.hub.release import Artefact
from posttrain.records import sha256_file, write_atomic
from posttrain.runs.integrity import files_of
from posttrain.runs.manifest import EXPORT, git_state, hardware, model_sha256, utc, versions

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from posttrain.export.fidelity import Fidelity
    from posttrain.models.folded import FoldedWeights


def write(target: Target, source: Source, weights: FoldedWeights, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if not target.is_gguf:
        from posttrain.export.merged import write_merged

        return write_merged(weights, tokenizer, folder)
    import torch

    from posttrain.export.gguf_file import write_gguf
    from posttrain.export.ollama import modelfile
    from posttrain.export.runtimes import quantize

    name = f"{source.release.name}-{target.quant}"
    file, unrounded = folder / f"{name}.gguf", folder / "unrounded.gguf"
    assert target.quant
    if target.quant == "f16":
        write_gguf(weights, tokenizer, file, name, torch.float16)
    else:
        write_gguf(weights, tokenizer, unrounded, name, weights.dtype)
        quantize(unrounded, file, target.quant)
        unrounded.unlink()
    if target.format == "ollama":
        first = source.examples[0].prompt[0]
        system = first["content"] if first["role"] == "system" else None
        (folder / "Modelfile").write_text(modelfile(tokenizer, file.name, system), encoding="utf-8")


def write_report(target: Target, source: Source, folder: Path, fidelity: Fidelity) -> None:
    """fidelity.json, the card, and last export.json, which has the hashes of all files."""
    write_atomic(folder / "fidelity.json", json.dumps(fidelity.as_json(), indent=2, ensure_ascii=False) + "\n")
    (folder / "README.md").write_text(
        model_card(source.release.exported_as(artefact(target, source, folder, fidelity))), encoding="utf-8"
    )
    files = {name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for name, path in files_of(folder).items()}
    write_atomic(folder / EXPORT, json.dumps(provenance(target, source, folder) | {"files": files}, indent=2) + "\n")


def provenance(target: Target, source: Source, folder: Path) -> dict[str, Any]:
    """What export.json says of where the artefact comes from."""
    manifest = source.release.manifest
    link = {"stage": manifest.stage, "name": manifest.name, "adapter_sha256": manifest.adapter_sha256, "data": manifest.data}
    weights = {} if target.is_gguf else {"weights_sha256": model_sha256(folder)}
    return {
        "format": target.format,
        "into": target.into,
        "quant": target.quant if target.is_gguf else None,
        "parent": {"run_dir": str(source.release.run_dir), "adapter_sha256": manifest.adapter_sha256},
        "chain": [*manifest.chain, link],
        "base": manifest.model,
        **weights,
        "command": command_line(),
        **git_state(),
        "versions": versions(),
        "hardware": hardware(),
        "finished": utc(),
    }


def artefact(target: Target, source: Source, folder: Path, fidelity: Fidelity) -> Artefact:
    """What the card says of it."""
    file = next((path.name for path in folder.glob("*.gguf")), None)
    names = {"merged": "A model", "gguf": f"A GGUF file ({target.quant})", "ollama": f"A GGUF file ({target.quant}) for Ollama"}
    base = "its base as it was before NF4" if target.into == "original" else "the base that it was trained on"
    folded = f" with a LoRA adapter folded into {base}" if source.adapter else ""
    load = {
        "merged": "",  # the card's own lines for a whole model
        "gguf": f"llama-cli -m {file} --temp 0",
        "ollama": "ollama create NAME -f Modelfile && ollama run NAME",
    }[target.format]
    return Artefact(
        target.format, f"{names[target.format]}{folded}", load, fidelity.line(),
        fidelity.accuracy["sentence"], tuple(fidelity.faults), command_line(),
    )  # fmt: skip


def command_line() -> str:
    return shlex.join(["python", "-m", "posttrain.export", *sys.argv[1:]])

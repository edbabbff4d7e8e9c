"""A finished training run -> a model that others load, beside a report of what it lost.

    python -m posttrain.export runs/grpo --format merged                   # a model folder: transformers, vLLM
    python -m posttrain.export runs/grpo --format merged --into original   # the adapter on the base as it was before NF4
    python -m posttrain.export runs/grpo --format gguf --quant q4_k_m      # one file: llama.cpp
    python -m posttrain.export runs/grpo --format ollama --quant q8_0      # that file and a Modelfile
    python -m posttrain.export runs/grpo --format merged gguf --quant q8_0 q4_k_m      # all of these; the policy is asked once

An artefact goes to a folder of its own in RUN/export, or where --out says, and appears whole or not at all. It is run in its own
runtime on questions of the run's data and compared with the policy that training measured: fidelity.json. The run is only read.
Exit codes: 0 the same model but for rounding and chance; 2 something to mend first; 3 written, and not that model: the last line
says why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import MODEL_FOLDER, Model
from posttrain.errors import UserError
from posttrain.hub.card import Artefact, Release, model_card
from posttrain.hub.push import Request as PushRequest
from posttrain.hub.push import read_release
from posttrain.records import Example, read_jsonl, sha256_file, write_atomic
from posttrain.runs.data_sets import data_entry
from posttrain.runs.directory import check_writable
from posttrain.runs.integrity import files_of, sync_files
from posttrain.runs.manifest import EXPORT, git_state, hardware, model_sha256, utc, versions
from posttrain.tasks.answers import grader_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from posttrain.export.fidelity import Fidelity, Measured, Said
    from posttrain.models.folded import FoldedWeights

INTO = ("trained", "original")
CHANGED = 3  # the artefact was written, and it is not the model that training measured
FORMATS, QUANTS = ("merged", "gguf", "ollama"), ("f16", "q8_0", "q4_k_m")
BY_LLM_COMPRESSOR = ("awq", "gptq", "fp8")  # llm-compressor 0.14 takes transformers up to 5.17: not the one that runs here
LONGEST_ANSWER = 512  # as evaluate.py's, where the run's own settings do not say


@dataclass(frozen=True, slots=True)
class Target:
    """One artefact."""

    format: str
    quant: str | None  # None: a merged folder, which has the run's own dtype
    into: str
    folder: Path

    @property
    def is_gguf(self) -> bool:
        return self.quant is not None


@dataclass(frozen=True, slots=True)
class Request:
    run_dir: Path
    targets: tuple[Target, ...]
    split: str
    questions: int
    max_new_tokens: int | None
    evals: tuple[Path, ...]

    @property
    def into(self) -> str:
        return self.targets[0].into


@dataclass(frozen=True, slots=True)
class Source:
    """A finished run, as it is read for an export."""

    release: Release
    settings: Model  # of the base
    quantization: str  # that the policy's base has
    adapter: Path | None  # None: a run that trained all weights
    data: dict[str, Any]
    examples: list[Example]
    max_new_tokens: int


def main() -> None:
    changed = [fidelity for fidelity in export(from_command_line()) if fidelity.faults]
    for fidelity in changed:
        print(f"export: {fidelity.artefact} is not the model that training measured: {'; '.join(fidelity.faults)}")
    if changed:
        sys.exit(CHANGED)


def from_command_line() -> Request:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a finished run of sft_train.py or grpo_train.py")
    parser.add_argument(
        "--format", choices=(*FORMATS, *BY_LLM_COMPRESSOR), nargs="+", required=True, metavar=f"{{{','.join(FORMATS)}}}"
    )
    parser.add_argument("--into", choices=INTO, default="trained", help="which base the adapter is folded into")
    parser.add_argument("--quant", choices=QUANTS, nargs="+", help="of gguf and ollama; q8_0 if nothing is said")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the artefacts' folders go; RUN/export if nothing is said"
    )
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="whose questions are asked")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="how many of them; 100 if nothing is said")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer; the run's own limit if nothing is said")
    parser.add_argument("--eval", type=Path, nargs="+", default=[], metavar="DIR", help="evaluation runs, for the card")
    args = parser.parse_args()
    if elsewhere := sorted(set(args.format) & set(BY_LLM_COMPRESSOR)):
        raise UserError(
            f"--format {elsewhere[0]} is written by llm-compressor, which does not run beside this project's transformers: "
            "export --format merged, and give it that folder in an environment of its own (docs/export.md)"
        )
    if args.quant and args.format == ["merged"]:
        parser.error("--quant is of --format gguf and ollama: a merged folder has the run's own dtype")
    if args.questions < 1:
        parser.error("--questions must be 1 or more")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        parser.error("--max-new-tokens must be 1 or more")
    out = args.out or args.run_dir / "export"
    found = tuple(targets(args.format, args.quant or ["q8_0"], args.into, out))
    return Request(args.run_dir, found, args.split, args.questions, args.max_new_tokens, tuple(args.eval))


def targets(formats: list[str], quants: list[str], into: str, out: Path) -> Iterator[Target]:
    for kind in dict.fromkeys(formats):
        for quant in [None] if kind == "merged" else dict.fromkeys(quants):
            name = "-".join([kind, *([quant] if quant else []), *(["original"] if into == "original" else [])])
            yield Target(kind, quant, into, out / name)


def export(request: Request) -> list[Fidelity]:
    """Write each artefact with its report. Returns what each lost.

    Raises:
        UserError: the run, its data, a place or a package is not fit for it; nothing was written.
    """
    source = read_source(request)
    weights, tokenizer = check(request, source)
    measured, hashes = ask_policy(source, tokenizer)
    found, asked = [], dict[str, "Said"]()
    for target in request.targets:
        with appearing(target.folder) as folder:
            write(target, source, weights, tokenizer, folder)
            fidelity = ask_artefact(target, source, folder, measured, hashes, tokenizer, asked)
            write_report(target, source, folder, fidelity)
        print(f"wrote {target.folder}\n  {fidelity.line()}\n  {fidelity.accuracy['sentence']}")
        found.append(fidelity)
    return found


# --- what is read -----------------------------------------------------------------------------------------------------


def read_source(request: Request) -> Source:
    for target in request.targets:
        check_place(target.folder)
    release = read_release(PushRequest(request.run_dir, f"OWNER/{request.run_dir.absolute().name}", evals=request.evals))
    manifest = release.manifest
    data = data_entry(manifest.data["path"], request.split)
    examples = read_jsonl(Path(data["path"], f"{request.split}.jsonl"), Example)[: request.questions]
    trained, adapter = dict(manifest.model), request.run_dir / "adapter"
    quantization = trained["quantization"]
    if manifest.all_weights:
        trained |= {"name_or_path": str(request.run_dir / MODEL_FOLDER), "revision": None}
    if request.into == "original" and quantization == "none":
        raise UserError(f"{request.run_dir} was trained on its base as it is: leave --into out")
    kept = {"name_or_path", "revision", "chat_template", "template_kwargs", "dtype", "same_base"} & trained.keys()
    limit = release.settings["trainer"].get("max_completion_length", LONGEST_ANSWER)
    return Source(
        release,
        Model(**{key: trained[key] for key in kept}),
        quantization,
        None if manifest.all_weights else adapter,
        data,
        examples,
        request.max_new_tokens or limit,
    )


def check_place(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --out, or remove it")
    check_writable(folder, "--out")


def check(request: Request, source: Source) -> tuple[FoldedWeights, PreTrainedTokenizerBase]:
    """Everything that can be refused before a weight is read."""
    from transformers import AutoTokenizer

    from posttrain.models.adapters import check_start
    from posttrain.models.chat import chat_ids, load_tokenizer
    from posttrain.models.checkpoint import check_base, check_context
    from posttrain.models.folded import FoldedWeights

    as_gguf = any(target.is_gguf for target in request.targets)
    if as_gguf:
        check_gguf_packages()
    base_tokenizer = load_tokenizer(source.settings)
    base = check_base(source.settings, source.quantization, base_tokenizer)
    prompts = (chat_ids(base_tokenizer, example.prompt, add_generation_prompt=True) for example in source.examples)
    check_context(base, max(map(len, prompts)), source.max_new_tokens, "--max-new-tokens")
    trained_with: PreTrainedTokenizerBase = base_tokenizer
    if source.adapter:
        check_start(source.adapter, source.settings, source.quantization, base, base_tokenizer, train=False, stores=True)
        if (source.adapter / "tokenizer_config.json").is_file():
            trained_with = AutoTokenizer.from_pretrained(source.adapter)
    into = "none" if request.into == "original" else source.quantization
    weights = FoldedWeights(source.settings, into, source.adapter)
    if as_gguf:
        from posttrain.export.gguf_file import check_writable as check_gguf
        from posttrain.export.gguf_vocabulary import check_vocabulary

        check_gguf(weights)
        check_vocabulary(trained_with)
    if any(target.format == "ollama" for target in request.targets):
        from posttrain.export.ollama import pieces_of

        pieces_of(trained_with)
    return weights, trained_with


def check_gguf_packages() -> None:
    import importlib.util

    from posttrain.export.runtimes import INSTALL, llama_cpp

    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--format gguf and ollama need the package gguf: {INSTALL}")
    llama_cpp()


# --- what is asked ----------------------------------------------------------------------------------------------------


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


# --- what is written --------------------------------------------------------------------------------------------------


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when everything in it is there, and is gone if anything fails."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_files(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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

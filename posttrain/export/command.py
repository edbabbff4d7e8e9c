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
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import UserError
from posttrain.export.asking import ask_artefact, ask_policy
from posttrain.export.source import Request, Source, Target, check, check_place, read_source
from posttrain.export.writing import write, write_report
from posttrain.runs.alone import alone, appearing

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from posttrain.export.fidelity import Fidelity, Said
    from posttrain.models.folded import FoldedWeights

INTO = ("trained", "original")
CHANGED = 3  # the artefact was written, and it is not the model that training measured
FORMATS, QUANTS = ("merged", "gguf", "ollama"), ("f16", "q8_0", "q4_k_m")
BY_LLM_COMPRESSOR = ("awq", "gptq", "fp8")  # llm-compressor 0.14 takes transformers up to 5.17: not the one that runs here


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
        UserError: the run, its data, a place or a package is not fit for it, or another process writes there. Nothing is written.
    """
    source = read_source(request)
    weights, tokenizer = check(request, source)
    with ExitStack() as held:
        for target in request.targets:
            held.enter_context(alone(target.folder, "--out", appears=True))
            check_place(target.folder)  # again: another process may have written it since
        return export_each(request, source, weights, tokenizer)


def export_each(request: Request, source: Source, weights: FoldedWeights, tokenizer: PreTrainedTokenizerBase) -> list[Fidelity]:
    measured, hashes = ask_policy(source, tokenizer)
    found, asked = [], dict[str, "Said"]()
    for target in request.targets:
        with appearing(target.folder, "--out") as folder:
            write(target, source, weights, tokenizer, folder)
            fidelity = ask_artefact(target, source, folder, measured, hashes, tokenizer, asked)
            write_report(target, source, folder, fidelity)
        print(f"wrote {target.folder}\n  {fidelity.line()}\n  {fidelity.accuracy['sentence']}")
        found.append(fidelity)
    return found

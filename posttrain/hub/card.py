"""A finished run -> the text of its model card: what it is, its numbers, how to load it, how to make it again.

Nothing in a card depends on the day or on the machine that writes it, so the same run gives the same card.
"""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from posttrain.evaluation import summary
from posttrain.evaluation.comparison import compare
from posttrain.hub.metadata import metadata
from posttrain.hub.redaction import portable
from posttrain.hub.release import STAGES, Evaluation, Release
from posttrain.records import Prediction, read_jsonl, read_rows
from posttrain.runs.manifest import EXPORT, MANIFEST, PUBLIC_MANIFEST, Manifest, lineage
from posttrain.tasks.answers import noun_of, where_strict


def model_card(release: Release) -> str:
    """README.md of the repository: card.md.jinja, filled in.

    `ModelCard.from_template` would leave a hole where the template names what is not there; here that is an error.
    """
    from huggingface_hub import ModelCard
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    template = files("posttrain.hub").joinpath("card.md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        release=release,
        base=release.base,
        manifest=release.manifest,
        metadata=metadata(release),
        strict=where_strict(release.manifest.data),
        noun=noun_of(release.manifest.data),
        stage=STAGES[release.manifest.stage],
        stages=[link["stage"].upper() for link in links(release)],
        tests=paired_tests(release),
        variants=[[cell.replace("|", "/") for cell in variant.row()] for variant in release.variants],
        rank=adapter_rank(release.run_dir / "adapter" / "adapter_config.json"),
        rows=[[cell.replace("|", "/") for cell in result_row(evaluation)] for evaluation in release.evaluations],
        prompt=example_prompt(release),
        commands=commands(release),
        record=EXPORT if release.artefact else MANIFEST if release.is_local else PUBLIC_MANIFEST,
        machine=machine(release.manifest),
        links=portable(links(release)),
        settings=settings(release),
    )
    return str(ModelCard(text))  # parses the metadata again, so that what is wrong shows before anything is sent


def result_row(evaluation: Evaluation) -> list[str]:
    results, data = evaluation.results, evaluation.manifest.data
    subset = f", {results['subset']}" if results["subset"] else ""
    return [
        evaluation.label,
        f"{data['name']} ({data['split']}{subset})",
        f"{results['n']:,}",
        summary.with_interval(results["accuracy"]["lenient"]),
        summary.with_interval(results["accuracy"]["strict"]),
        f"{results['truncated']['value']:.1%}",
        evaluation.decoding,
        evaluation.manifest.model["quantization"],
    ]


def adapter_rank(file: Path) -> int | None:
    """What vLLM has to be told of an adapter; None where it would not take it, as it trained rows of tokens, too."""
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return None if values.get("trainable_token_indices") else values.get("r")


def paired_tests(release: Release) -> list[str]:
    """A sentence for each evaluation and the one before it, where both asked the same questions."""
    pairs = [(one, two) for one, two in pairwise(release.evaluations) if asked_the_same(one, two)]
    return [
        str(compare(*rows_of(one), *rows_of(two), names=(one.label, two.label), require_same_prompt=False)["sentence"])
        for one, two in pairs
    ]


def asked_the_same(one: Evaluation, two: Evaluation) -> bool:
    asked = [(e.manifest.data["sha256"], e.manifest.limit, e.results["n"], e.results["grader"]) for e in (one, two)]
    return asked[0] == asked[1]


def rows_of(evaluation: Evaluation) -> tuple[list[dict[str, Any]], list[Prediction]]:
    folder = evaluation.folder
    return list(read_rows(folder / "questions.jsonl")), read_jsonl(folder / "predictions.jsonl", Prediction)


def example_prompt(release: Release) -> str:
    """The messages of a training question, if the data set is still there; a test question has no place in a card."""
    file = Path(release.manifest.data["path"], "train.jsonl")
    row = next(read_rows(file), None) if file.is_file() else None
    return json.dumps(row["prompt"], indent=1, ensure_ascii=False) if row else ""


def commands(release: Release) -> list[str]:
    """From the first training run to this one, its evaluations, and the export."""
    trained = [manifest for _, manifest in lineage(release.run_dir)]
    evaluated = [evaluation.manifest for evaluation in release.evaluations if evaluation.is_of_this_adapter]
    exported = [release.artefact.command] if release.artefact else []
    return [portable(command) for command in (*(manifest.command for manifest in (*trained, *evaluated)), *exported)]


def links(release: Release) -> list[dict[str, Any]]:
    """The training runs that made the adapter, the one that is pushed at the end."""
    manifest = release.manifest
    last = {"stage": manifest.stage, "name": manifest.name, "adapter_sha256": manifest.adapter_sha256, "data": manifest.data}
    return [*manifest.chain, last]


def settings(release: Release) -> str:
    chosen = {key: portable(release.settings[key]) for key in ("lora", "rewards", "trainer") if release.settings.get(key)}
    return json.dumps(chosen, indent=1)


def machine(manifest: Manifest) -> str:
    hardware, versions = manifest.hardware, manifest.versions
    cores = f"{hardware['num_cpus']} cores of {hardware['cpu']}"
    several = [f"{count} processes by {manifest.launcher}"] if (count := manifest.num_processes or 1) > 1 else []
    packages = [f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft") if name in versions]
    return ", ".join([f"{hardware['num_gpus']} x {hardware['gpu']}" if hardware["gpu"] else cores, *several, *packages])

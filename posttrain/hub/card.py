"""A finished run -> the text of its model card: what it is, its numbers, how to load it, how to make it again.

Nothing in a card depends on the day or on the machine that writes it, so the same run gives the same card.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

from posttrain.errors import UserError
from posttrain.evaluation import summary
from posttrain.evaluation.comparison import compare
from posttrain.evaluation.recorded import check_results
from posttrain.hub.variants import Variant
from posttrain.records import Prediction, holds_rows, read_jsonl, read_object, read_rows
from posttrain.runs.contents import check_contents
from posttrain.runs.manifest import EXPORT, MANIFEST, PUBLIC_MANIFEST, Manifest, lineage, read_manifest
from posttrain.tasks import gsm8k
from posttrain.tasks.answers import noun_of, where_strict

# By the name of the base. Qwen2.5-3B and -72B have licences of their own, so they are left out.
LICENSES = {
    r"llama-3\.2": "llama3.2",
    r"llama-3\.1": "llama3.1",
    r"meta-llama-3-": "llama3",
    r"smollm": "apache-2.0",
    r"qwen2\.5(?!.*-(3b|72b))|qwen3": "apache-2.0",
}
# A path as it stands in a command or in a note: /home/me/x, ~/x, ../x, file:///x. A URL or an owner/name is none.
LOCAL_PATH = re.compile(r"""(?<![\w:/.<])(?:file:/*|~\w*|(?:\.\./)*\.\.)?/[^\s'"`,;:=]+""")
STAGES = {
    "sft": "supervised fine-tuning on worked solutions, with the loss on the solution only",
    "grpo": "GRPO, rewarded for right answers and for their format",
}


@dataclass(frozen=True, slots=True)
class Base:
    """The model that the adapter belongs to, or that training of all weights began with."""

    name: str  # as the configuration has it
    hub_id: str | None  # None: only on the disk of the run
    revision: str | None
    quantization: str
    merged: Path | None  # the folder of a base that has an earlier adapter folded in

    @property
    def folder(self) -> str:
        """What a base from a disk is called where its path must not be told."""
        return PurePath(self.name).name

    @property
    def is_packed(self) -> bool:
        """Whether a reader has to pack it as training did. A merged base was trained on, and is pushed, in 16 bits."""
        return self.quantization != "none" and not self.merged

    @property
    def is_llama(self) -> bool:
        return (self.license or "").startswith("llama")

    @property
    def license(self) -> str | None:
        name = (self.hub_id or self.name).lower()
        return next((license for pattern, license in LICENSES.items() if re.search(pattern, name)), None)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation run. `label` says what was evaluated: this adapter, an earlier one of its chain, or the base."""

    label: str
    folder: Path
    manifest: Manifest
    results: dict[str, Any]
    dataset_id: str | None  # on the Hub
    is_gsm8k: bool  # all of its test questions

    @property
    def is_of_this_adapter(self) -> bool:
        return self.label in ("this adapter", "this model")


@dataclass(frozen=True, slots=True)
class Artefact:
    """An export of a run, as its card tells it."""

    format: str  # merged, gguf or ollama
    what: str  # the beginning of the card's first sentence
    load: str  # the command that loads it; "" for a model folder
    fidelity: str
    accuracy: str
    faults: tuple[str, ...]
    command: str  # that made it


@dataclass(frozen=True, slots=True)
class Release:
    """A finished run and what is said of it on the Hub."""

    repo_id: str
    run_dir: Path
    manifest: Manifest
    settings: dict[str, Any]  # config.yaml
    base: Base
    evaluations: tuple[Evaluation, ...]
    variants: tuple[Variant, ...] = ()
    predictions: str | None = None  # the data set of them, where it is pushed, too

    @property
    def is_local(self) -> bool:
        """Whether the card lies beside the run's files: `repo_id` is then the absolute path of their folder."""
        return self.repo_id.startswith("/")

    artefact: Artefact | None = None  # None: the adapter, or the weights of a run that trained all

    def exported_as(self, artefact: Artefact) -> Release:
        return dataclasses.replace(self, artefact=artefact)

    @property
    def name(self) -> str:
        return self.manifest.name if self.is_local else self.repo_id.split("/")[1]

    @property
    def base_path(self) -> str:
        """What a reader loads the base from, where it has no Hub id."""
        return os.path.abspath(self.base.merged or self.base.name) if self.is_local else "PATH_OF_THE_BASE"

    @property
    def base_hashes(self) -> str:
        """What tells the base from every other, as the manifest has it: see posttrain/models/checkpoint.py."""
        known = {"weights": "weights", "fingerprint": "norms"}
        said = [f"{name} `{self.manifest.model[key]}`" for key, name in known.items() if key in self.manifest.model]
        return ", ".join(said)


def portable(value: Any) -> Any:
    """A value as it may be published: paths of this machine cut to their last part, secrets of this machine blotted."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(LOCAL_PATH, lambda path: PurePath(path[0]).name, without_secrets(value))


def without_secrets(text: str) -> str:
    for secret in secrets():
        text = text.replace(secret, "***")
    return re.sub(r"//[^/\s@]+@", "//***@", text)  # https://user:password@host


def secrets() -> list[str]:
    """What the environment and the Hub's login hold that must never be shown."""
    from huggingface_hub import get_token

    named = [value for name, value in os.environ.items() if re.search(r"(TOKEN|SECRET|PASSWORD|KEY)$", name)]
    return [text for text in {*named, get_token() or ""} if len(text) >= 8]  # a shorter value is `false` or `1`


# --- reading ----------------------------------------------------------------------------------------------------------


def read_evaluation(folder: Path, run: Manifest, base_name: str) -> Evaluation:
    """An evaluation run of the adapter, of one it grew from, or of the base.

    Raises:
        UserError: the folder holds no evaluation, an unfinished one, or one of something else.
    """
    if not (folder / "results.json").is_file() or not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} holds no finished evaluation: run evaluate.py with run_dir={folder}")
    manifest, results = read_manifest(folder), read_object(folder / "results.json", "evaluate.py --regrade writes it anew")
    if manifest.exit != "ok":
        raise UserError(f"{folder} is not finished ({manifest.exit}): the same evaluate.py command goes on with it")
    label = label_of(manifest, run, base_name)
    if label is None:
        trained, remedy = ("model", "model.name_or_path=RUN_DIR/model") if run.all_weights else ("adapter", "adapter=RUN_DIR")
        raise UserError(f"{folder} evaluates neither this {trained} nor one it grew from: run evaluate.py with {remedy}")
    data = manifest.data
    rows = list(read_rows(folder / "questions.jsonl"))
    if holds_rows(folder / "predictions.jsonl"):
        predictions = read_jsonl(folder / "predictions.jsonl", Prediction)
        check_contents(folder, manifest, predictions)
        check_results(folder, results, manifest, rows, predictions)
    is_gsm8k = gsm8k.is_whole_test_set(row["question"] for row in rows)
    dataset_id = gsm8k.HUB_ID if is_gsm8k else data.get("source", {}).get("repo_id")
    return Evaluation(label, folder, manifest, results, dataset_id, is_gsm8k)


def label_of(evaluated: Manifest, run: Manifest, base_name: str) -> str | None:
    """What an evaluation is of, seen from a run; None: of neither it nor what it grew from."""
    labels = {link["adapter_sha256"]: f"{link['stage']} ({link['name']})" for link in run.chain}
    labels[run.adapter_sha256] = "this model" if run.all_weights else "this adapter"
    name = evaluated.model["name_or_path"]
    if evaluated.adapter_sha256 in labels:
        return labels[evaluated.adapter_sha256]
    if evaluated.adapter_sha256 is None:
        return "base" if name == base_name else None
    # A merged folder has a hash of its own, and the adapter in it as its parent. Which base that was folded into, its name says.
    folded = labels.get((evaluated.parent or {}).get("adapter_sha256"))
    return folded and f"{folded}, as the folder {PurePath(name).name}"


def datasets(release: Release) -> list[str]:
    """Hub ids of what the chain was trained on."""
    ids: list[str] = []
    for data in (*(link.get("data") or {} for link in release.manifest.chain), release.manifest.data):
        ids += filter(None, [data.get("source", {}).get("repo_id") or (gsm8k.HUB_ID if gsm8k.is_gsm8k(data) else None)])
    return list(dict.fromkeys(ids))


# --- text -------------------------------------------------------------------------------------------------------------


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


def metadata(release: Release) -> str:
    from huggingface_hub import ModelCardData

    base, all_weights = release.base, release.manifest.all_weights
    relation, library = ("finetune", "transformers") if all_weights else ("adapter", "peft")
    if release.artefact:
        relation, library = ("finetune", "transformers") if release.artefact.format == "merged" else ("quantized", "gguf")
    of_maths = ["math"] if noun_of(release.manifest.data) in ("number", "expression") else []
    of_gsm8k = ["gsm8k"] if gsm8k.HUB_ID in datasets(release) else []
    data = ModelCardData(
        base_model=base.hub_id,
        base_model_relation=relation if base.hub_id else None,
        library_name=library,
        license=base.license,
        language="en",
        datasets=datasets(release) or None,
        tags=[*([] if all_weights else ["lora"]), release.manifest.stage, "trl", *of_maths, *of_gsm8k],
        pipeline_tag="text-generation",
        model_name=release.name,
        eval_results=[legacy_result(evaluation) for evaluation in scored(release)] or None,
    )
    if data.eval_results is None:
        data.model_name = None
    return str(data)


def scored(release: Release) -> list[Evaluation]:
    """Evaluations of this adapter on all of a data set that the Hub knows."""
    return [e for e in release.evaluations if e.is_of_this_adapter and e.dataset_id and not e.results["subset"]]


def legacy_result(evaluation: Evaluation) -> Any:
    from huggingface_hub import EvalResult

    data = evaluation.manifest.data
    return EvalResult(
        task_type="text-generation",
        dataset_type=evaluation.dataset_id or "",
        dataset_name=data["name"],
        dataset_split=data["split"],
        metric_type="accuracy",
        metric_name=f"accuracy ({decoding(evaluation)})",
        metric_value=round(evaluation.results["accuracy"]["lenient"]["value"], 6),
    )


def eval_results_yaml(evaluation: Evaluation) -> str:
    """.eval_results/gsm8k.yaml, which the Hub shows on the pages of model and benchmark (hub-docs, eval-results)."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from ruamel.yaml import YAML

    accuracy, strict = (evaluation.results["accuracy"][kind] for kind in ("lenient", "strict"))
    low, high = accuracy["wilson"]
    entry = EvalResultEntry(
        dataset_id=gsm8k.HUB_ID,
        task_id="gsm8k",
        value=round(accuracy["value"], 6),
        date=f"{evaluation.manifest.finished:.10}",
        notes=f"{decoding(evaluation)}, n {evaluation.results['n']}, 95% Wilson interval {low:.4f}-{high:.4f}, "
        f"strict ({where_strict(evaluation.manifest.data)}) {strict['value']:.4f}, "
        f"base {evaluation.manifest.model['quantization']}",
    )
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 1000
    yaml.dump(eval_result_entries_to_yaml([entry]), text)
    return text.getvalue()


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
        decoding(evaluation),
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


def decoding(evaluation: Evaluation) -> str:
    generation = evaluation.manifest.generation
    if generation["temperature"] == 0:
        return f"greedy, at most {generation['max_new_tokens']} tokens"
    return f"mean of {generation['samples']} samples at temperature {generation['temperature']}"


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

"""What the Hub itself reads of a model: the head of its card, and the file of its evaluation results."""

from __future__ import annotations

import io
from typing import Any

from posttrain.hub.release import Evaluation, Release
from posttrain.tasks import gsm8k
from posttrain.tasks.answers import noun_of, where_strict

EVAL_RESULTS = ".eval_results/gsm8k.yaml"


def metadata(release: Release) -> str:
    """The YAML between the `---` of a card."""
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


def datasets(release: Release) -> list[str]:
    """Hub ids of what the chain was trained on."""
    ids: list[str] = []
    for data in (*(link.get("data") or {} for link in release.manifest.chain), release.manifest.data):
        ids += filter(None, [data.get("source", {}).get("repo_id") or (gsm8k.HUB_ID if gsm8k.is_gsm8k(data) else None)])
    return list(dict.fromkeys(ids))


def scored(release: Release) -> list[Evaluation]:
    """Evaluations of this adapter on all of a data set that the Hub knows."""
    return [e for e in release.evaluations if e.is_of_this_adapter and e.dataset_id and not e.results["subset"]]


def legacy_result(evaluation: Evaluation) -> Any:
    """The result as the head of a card has it, in `model-index`."""
    from huggingface_hub import EvalResult

    data = evaluation.manifest.data
    return EvalResult(
        task_type="text-generation",
        dataset_type=evaluation.dataset_id or "",
        dataset_name=data["name"],
        dataset_split=data["split"],
        metric_type="accuracy",
        metric_name=f"accuracy ({evaluation.decoding})",
        metric_value=round(evaluation.results["accuracy"]["lenient"]["value"], 6),
    )


def eval_results_yaml(evaluation: Evaluation) -> str:
    """The text of EVAL_RESULTS, which the Hub shows on the pages of model and benchmark (hub-docs, eval-results)."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from ruamel.yaml import YAML

    accuracy, strict = (evaluation.results["accuracy"][kind] for kind in ("lenient", "strict"))
    low, high = accuracy["wilson"]
    entry = EvalResultEntry(
        dataset_id=gsm8k.HUB_ID,
        task_id="gsm8k",
        value=round(accuracy["value"], 6),
        date=f"{evaluation.manifest.finished:.10}",
        notes=f"{evaluation.decoding}, n {evaluation.results['n']}, 95% Wilson interval {low:.4f}-{high:.4f}, "
        f"strict ({where_strict(evaluation.manifest.data)}) {strict['value']:.4f}, "
        f"base {evaluation.manifest.model['quantization']}",
    )
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 1000
    yaml.dump(eval_result_entries_to_yaml([entry]), text)
    return text.getvalue()

"""Run directories -> a release: read, and refused where they are not finished, not whole, or of another adapter."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from posttrain.config.schema import MODEL_FOLDER
from posttrain.errors import UserError
from posttrain.evaluation.recorded import check_results
from posttrain.hub.predictions import repo_of
from posttrain.hub.release import STAGES, Base, Evaluation, Release, Request
from posttrain.hub.variants import read_variants
from posttrain.places import looks_local
from posttrain.records import Prediction, holds_rows, read_jsonl, read_object, read_rows
from posttrain.runs.contents import check_contents
from posttrain.runs.integrity import CONFIG, WEIGHTS, check_adapter
from posttrain.runs.manifest import Manifest, model_sha256, read_manifest
from posttrain.tasks import gsm8k


def read_release(request: Request) -> Release:
    """What is known of a run, checked.

    Raises:
        UserError: no finished training run, or its adapter is not the one that it finished with.
    """
    run_dir = request.run_dir
    if request.repo_id.count("/") != 1 or request.repo_id.startswith(("/", ".", "~")):
        shown = request.repo_id.rpartition("@")[2]  # what stands before an @ may be a password
        raise UserError(f"--repo-id {shown} is not of the form OWNER/NAME")
    if not (run_dir / "manifest.json").is_file():
        raise UserError(f"{run_dir} holds no run: give the run_dir of sft_train.py or grpo_train.py")
    manifest = read_manifest(run_dir)
    check_finished(run_dir, manifest)
    settings = read_settings(run_dir)
    base = read_base(run_dir, manifest, settings["model"], request.base_model)
    evaluations = tuple(read_evaluation(folder, manifest, base.name) for folder in request.evals)
    variants = read_variants(request.variants, manifest)
    if request.predictions and not evaluations:
        raise UserError("--predictions pushes the answers of evaluation runs: name them with --eval")
    data_set = repo_of(request.repo_id) if request.predictions else None
    return Release(request.repo_id, run_dir, manifest, settings, base, evaluations, variants, data_set)


def local_release(folder: Path, run_dir: Path, manifest: Manifest) -> Release:
    """The release of a run whose card lies beside its own files: training writes that card before the run has finished."""
    settings = read_settings(run_dir)
    base = read_base(run_dir, manifest, settings["model"], None)
    return Release(str(folder.absolute()), run_dir, manifest, settings, base, ())


def check_finished(run_dir: Path, manifest: Manifest) -> None:
    if manifest.stage not in STAGES:
        adapters = "give one of sft_train.py or grpo_train.py"
        raise UserError(f"{run_dir} is a run of stage {manifest.stage}, which has no adapter: {adapters}")
    if manifest.exit != "ok":
        raise UserError(f"{run_dir} is not finished ({manifest.exit}): finish it with --resume, then push")
    if manifest.all_weights:
        if model_sha256(run_dir / MODEL_FOLDER) != manifest.adapter_sha256:
            raise UserError(f"{run_dir}/{MODEL_FOLDER} holds other weights than the run finished with: train it again")
        return
    for name in (WEIGHTS, CONFIG):
        if not (run_dir / "adapter" / name).is_file():
            raise UserError(f"{run_dir}/adapter has no {name}: the run is not whole, train it again")
    check_adapter(run_dir / "adapter")


def read_settings(run_dir: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    settings: dict[str, Any] = YAML(typ="safe", pure=True).load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    return settings


def read_base(run_dir: Path, manifest: Manifest, model: dict[str, Any], base_model: str | None) -> Base:
    """The base, and the merged one on top of it if this run or one before it used adapter_mode merge_and_new.

    The loop follows bases, not adapters as `lineage` does: a new adapter on a merged base has no parent and yet that base.
    """
    folder = run_dir / "merged_base" if (run_dir / "merged_base").is_dir() else Path(model["name_or_path"])
    merged = folder if folder.name == "merged_base" else None
    while (earlier := Path(model["name_or_path"])).name == "merged_base" or (manifest.all_weights and is_trained_model(earlier)):
        model = read_settings(earlier.parent)["model"]
    name = model["name_or_path"]
    hub_id = base_model if looks_local(name) else name
    if base_model not in (None, hub_id):
        raise UserError(f"--base-model {base_model}: the run was trained on {hub_id}; leave the option out")
    return Base(name, hub_id, model["revision"], manifest.model["quantization"], merged)


def is_trained_model(folder: Path) -> bool:
    return folder.name == MODEL_FOLDER and (folder.parent / "config.yaml").is_file()


# --- evaluations ------------------------------------------------------------------------------------------------------


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

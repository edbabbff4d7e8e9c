"""Who answers: the policy of a run, of an evaluation, of an exported folder or of a download, before it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.chat.runs import run_at
from posttrain.config.schema import MODEL_FOLDER, Model
from posttrain.errors import UserError
from posttrain.records import read_object
from posttrain.runs.manifest import EXPORT, PUBLIC_MANIFEST, Manifest, read_manifest, refuse_unfinished
from posttrain.tasks.answers import grader_of
from posttrain.tasks.graders import Grader
from posttrain.tasks.prompts import PromptForm, prompt_form, read_prompt_form


@dataclass(frozen=True, slots=True)
class Policy:
    """Who answers: a base, packed or not, an adapter on it, and the prompt and grader of its run's data set."""

    label: str  # what answers are printed under: the folder, or the base's name
    model: Model
    quantization: str
    adapter: str | None
    weights: str | None  # checkpoint.weights_hash of the base, where the folder says which one it was
    prompt: PromptForm
    data: dict[str, Any]

    @property
    def grader(self) -> Grader:
        return grader_of(self.data.get("answer"))

    @property
    def base(self) -> Policy:
        return replace(self, label=f"base ({self.model.name_or_path})", adapter=None)


def all_policies(folders: list[Path], base: str | None, with_base: bool) -> Iterator[Policy]:
    policies = [read_policy(folder, base) for folder in folders]
    yield from [policies[0].base] if with_base else []
    yield from policies


def read_policy(folder: Path, base: str | None = None) -> Policy:
    """The policy that a folder stands for.

    Raises:
        UserError: it is no run, nothing of a run and no download of one, or its run has not finished.
    """
    if (folder / EXPORT).is_file():
        return exported_policy(folder)
    run_dir = run_at(folder)
    if (folder / PUBLIC_MANIFEST).is_file():
        return downloaded_policy(folder, base)
    if base is not None:
        raise UserError(f"--base {base}: {run_dir} says itself which base it has; leave the option out")
    manifest = read_manifest(run_dir)
    if not manifest.model:
        raise UserError(f"{run_dir} ended before its model was loaded: run it again, and ask it then")
    model, quantization, adapter = policy_of(run_dir, folder, manifest)
    return Policy(str(folder), model, quantization, adapter, None, prompt_form(manifest.data), manifest.data)


def policy_of(run_dir: Path, folder: Path, manifest: Manifest) -> tuple[Model, str, str | None]:
    """Base, quantization and adapter of a run, or of one of its checkpoints."""
    model, quantization = settings_of(manifest), manifest.model["quantization"]
    if manifest.stage == "eval":
        return model, quantization, evaluated_adapter(run_dir)
    note = refuse_unfinished(folder if folder != run_dir else run_dir / ("model" if manifest.all_weights else "adapter"))
    if note:
        print(f"note: {note}", file=sys.stderr)
    made = run_dir / (MODEL_FOLDER if manifest.all_weights else "adapter")
    if folder == run_dir and not made.is_dir():
        raise UserError(f"{run_dir} has finished, and its {made.name} is gone: give one of its checkpoints, or train it again")
    if manifest.all_weights:
        name = str(folder if folder != run_dir else run_dir / MODEL_FOLDER)
        return model.model_copy(update={"name_or_path": name, "revision": None}), "none", None
    return model, quantization, str(folder)


def settings_of(manifest: Manifest) -> Model:
    """The base's settings as the manifest has them; what fits another machine is chosen on it."""
    known = {name: manifest.model[name] for name in Model.model_fields if name in manifest.model}
    return Model(**known | {"attn_implementation": "auto", "kernels": "auto", "decoding": "loop"})


def evaluated_adapter(run_dir: Path) -> str | None:
    from ruamel.yaml import YAML

    adapter: str | None = YAML(typ="safe", pure=True).load((run_dir / "config.yaml").read_text(encoding="utf-8"))["adapter"]
    return adapter


def exported_policy(folder: Path) -> Policy:
    """A merged folder of posttrain.export, which is a model of its own."""
    made = read_object(folder / EXPORT, "export the run again")
    if made["format"] != "merged":
        raise UserError(f"{folder} is for llama.cpp or Ollama: ask the run that it was made of, {made['parent']['run_dir']}")
    model, data = Model(name_or_path=str(folder), dtype=made["base"]["dtype"], decoding="loop"), made["chain"][-1]["data"]
    return Policy(str(folder), model, "none", None, None, prompt_form(data), data)


def downloaded_policy(folder: Path, base: str | None) -> Policy:
    """The policy of a pushed run, as its repository has it."""
    manifest = read_manifest(folder, PUBLIC_MANIFEST)
    prompt, label = read_prompt_form(folder), str(folder)
    settings = settings_of(manifest).model_copy(update={"chat_template": str(folder / "chat_template.jinja")})
    if manifest.all_weights:
        own = settings.model_copy(update={"name_or_path": label, "revision": None, "template_kwargs": {}})
        return Policy(label, own, "none", None, None, prompt, manifest.data)
    adapter = read_object(folder / "adapter_config.json", "download the repository again")
    merged = folder / "merged_base"
    name = base or (str(merged) if merged.is_dir() else adapter["base_model_name_or_path"])
    if name is None:
        raise UserError(f"{folder} does not say where its base is, which was a folder: name it with --base")
    named: dict[str, Any] = {"name_or_path": name, "revision": None if base else adapter.get("revision"), "template_kwargs": {}}
    quantization = manifest.model["quantization"]
    # Its weights are compared with the hash that the run recorded: what the base is called does not matter.
    own = settings.model_copy(update=named | {"same_base": True})
    return Policy(label, own, quantization, label, manifest.model.get("weights"), prompt, manifest.data)

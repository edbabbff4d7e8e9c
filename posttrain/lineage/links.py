"""The links of a lineage: each is whole, broken, or cannot be checked, and says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.lineage.files import changed, first_changed, short
from posttrain.lineage.origins import Origin, published_base
from posttrain.records import Prediction, read_jsonl, read_object
from posttrain.runs.contents import content_hashes
from posttrain.runs.integrity import NOT_READ
from posttrain.runs.manifest import EXPORT, Entry, Manifest

State = Literal["whole", "broken", "unchecked"]


@dataclass(frozen=True, slots=True)
class Link:
    """One step of the way, and what was found of it."""

    stage: str  # base, sft, rft, grpo, eval, or an artefact's format
    name: str
    sha256: str
    state: State
    why: str

    def found(self, state: State, why: str) -> Link:
        return dataclasses.replace(self, state=state, why=why)


def base_link(first: Origin, run: Origin) -> Link:
    """The base by the hash over its tensors (posttrain/models/checkpoint.py)."""
    from posttrain.config.schema import Tokenizer
    from posttrain.models.checkpoint import found_here, weights_hash

    model = first.manifest.model
    recorded = model.get("weights", "")
    name, revision = published_base(run) or (model.get("name_or_path", "?"), model.get("revision"))
    shown = f"{name}@{revision[:12]}" if revision else name
    here = found_here(Tokenizer(name_or_path=name, revision=revision))
    if not recorded:
        return Link("base", shown, "", "unchecked", "the run is of an earlier version, which kept no hash of its base")
    if here is None:
        return Link("base", shown, recorded, "unchecked", "it is not on this machine")
    if (found := weights_hash(Tokenizer(name_or_path=str(here)))) != recorded:
        return Link("base", shown, recorded, "broken", f"the weights there are others ({found})")
    return Link("base", shown, recorded, "whole", "its weights are here and the same")


def run_link(run: Origin, before: list[Origin]) -> Link:
    manifest = run.manifest
    name = str(run.folder) if run.folder else manifest.name
    link = Link(stage_of(manifest), name, manifest.adapter_sha256 or "", "whole", "")
    if why := contradiction(manifest, before):
        return link.found("broken", why)
    begun = "trained from the base" if manifest.parent is None else "began with the adapter before"
    if manifest.exit != "ok":
        return link.found("unchecked", f"{begun}; not finished ({manifest.exit})")
    weights = run.weights
    if weights is None or not any(weights.glob("*.safetensors")):
        return link.found("unchecked", f"{begun}, as its record says; its weights are not here")
    if why := changed(run, weights):
        return link.found("broken", why)
    return link.found("whole", f"{begun}; its files are as they were written")


def stage_of(manifest: Manifest) -> str:
    """rft: SFT on a policy's own solutions."""
    kind = manifest.data.get("source", {}).get("kind")
    return "rft" if manifest.stage == "sft" and kind == "rejection_sampled" else manifest.stage


def contradiction(manifest: Manifest, before: list[Origin]) -> str:
    """Why a record does not begin where the record before it ended; "" where it does."""
    chain = [link["adapter_sha256"] for link in manifest.chain]
    if manifest.parent and (not chain or chain[-1] != manifest.parent["adapter_sha256"]):
        return "its record names two different adapters that it began with"
    known = [origin.manifest.adapter_sha256 for origin in before]
    for recorded, found, origin in zip(reversed(chain), reversed(known), reversed(before), strict=False):
        if recorded != found:
            where = origin.folder or origin.manifest.name
            return f"it began with adapter {short(recorded)}, and {where} holds {short(found)}"
    if len(known) > len(chain):
        return f"it names {len(chain)} runs before it, and there are records of {len(known)}"
    bases = [one.model for one in (*(origin.manifest for origin in before[-1:]), manifest) if "weights" in one.model]
    if len(bases) == 2 and bases[0]["name_or_path"] == bases[1]["name_or_path"] and bases[0]["weights"] != bases[1]["weights"]:
        return f"it was trained on other weights of {bases[1]['name_or_path']} than the run before"
    return ""


def artefact_link(folder: Path, adapter_sha256: str | None) -> Link:
    made = read_object(folder / EXPORT, "export the run again, or download it again")
    kind = "-".join(filter(None, (made["format"], made.get("quant"))))
    parent = made["parent"]["adapter_sha256"]
    link = Link(kind, str(folder), made.get("weights_sha256", parent), "whole", "")
    if parent != adapter_sha256:
        return link.found("broken", f"it was made of adapter {short(parent)}, not of {short(adapter_sha256)}")
    if why := first_changed(folder, made["files"]):
        return link.found("broken", why)
    lost = [name for name in made["files"] if not (folder / name).is_file() and name not in NOT_READ]
    if lost:
        return link.found("unchecked", f"{lost[0]} is not here")
    return link.found("whole", f"made of adapter {short(parent)}; its files are as they were written")


def eval_link(run: Origin, trained: list[Origin]) -> Link:
    """An evaluation is of the policy before it, and of the answers that it ended with."""
    manifest, folder = run.manifest, run.folder
    link = Link("eval", str(folder), manifest.completions_sha256, "whole", "its questions and answers are as they were written")
    last = trained[-1].manifest.adapter_sha256 if trained else None
    asked = manifest.parent["adapter_sha256"] if manifest.parent else None  # also where it was asked as a merged model
    if trained and asked != last:
        return link.found("broken", f"it is of adapter {short(asked)}, not {short(last)}")
    if folder is None or not manifest.completions_sha256 or not (folder / "predictions.jsonl").is_file():
        return link.found("unchecked", "its answers are not here, or their hash was not kept")
    found = content_hashes(folder, read_jsonl(folder / "predictions.jsonl", Prediction))
    same = found == {"questions_sha256": manifest.questions_sha256, "completions_sha256": manifest.completions_sha256}
    return link if same else link.found("broken", "its questions or answers have changed since")


# --- links of which there is a record alone ---------------------------------------------------------------------------


def unseen(run: Origin, before: list[Origin]) -> list[Link]:
    """The earliest runs of a chain, where nothing but the record of a later one tells of them."""
    chain = run.manifest.chain
    lost = chain[: max(0, len(chain) - len(before))]
    return [Link(one["stage"], one["name"], one["adapter_sha256"], "unchecked", "its record is not here") for one in lost]


def recorded(made: Entry) -> Iterator[Link]:
    """The chain of an artefact that lies alone, as its own record has it."""
    base, alone = made["base"], "only the artefact's own record says so"
    yield Link("base", base["name_or_path"], base.get("weights", ""), "unchecked", alone)
    for link in made["chain"]:
        yield Link(link["stage"], link["name"], link["adapter_sha256"], "unchecked", alone)

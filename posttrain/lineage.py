"""Where a model comes from: base -> SFT -> RFT -> GRPO -> artefact, with hashes, and whether each link still holds.

    python -m posttrain.lineage runs/grpo
    python -m posttrain.lineage runs/grpo/export/merged      # an artefact of `python -m posttrain.export`
    python -m posttrain.lineage me-llama-gsm8k --json        # what `hf download me/llama-gsm8k --local-dir me-llama-gsm8k` left

A link is whole if the files are here and have the hashes that were recorded, and the record begins where the link before ended.
It is broken if one of them does not. It cannot be checked where the files are elsewhere: the records then only agree, or not.
Nothing is downloaded. Exit codes: 0 no link is broken, 1 one is, 2 there is nothing to look at.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.config.schema import MODEL_FOLDER
from posttrain.errors import UserError, exit_on_user_error
from posttrain.records import Prediction, read_jsonl, read_object, sha256_file
from posttrain.runs.contents import content_hashes
from posttrain.runs.integrity import CONFIG, NOT_READ, WEIGHTS, weights_sha256
from posttrain.runs.manifest import (
    EXPORT,
    MANIFEST,
    PUBLIC_MANIFEST,
    Entry,
    Manifest,
    manifest_of,
    model_sha256,
    read_manifest,
    run_of,
)

LINEAGE = "lineage.json"  # of a pushed repository: the manifests of the runs before, and the hashes of all files
State = Literal["whole", "broken", "unchecked"]
SAID = {"whole": "whole", "broken": "BROKEN", "unchecked": "cannot be checked"}


@dataclass(frozen=True, slots=True)
class Link:
    """One step of the way, and what was found of it."""

    stage: str  # base, sft, rft, grpo, eval, or an artefact's format
    name: str
    sha256: str
    state: State
    why: str


@dataclass(frozen=True, slots=True)
class Origin:
    """A run as it is known here: what it recorded, and its folder where that is here."""

    manifest: Manifest
    folder: Path | None  # with adapter/ or model/ in it, or the folder of a download
    downloaded: bool = False

    @property
    def weights(self) -> Path | None:
        """The folder with the weights that training made."""
        if self.folder is None:
            return None
        return self.folder if self.downloaded else self.folder / (MODEL_FOLDER if self.manifest.all_weights else "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.lineage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN|FOLDER", help="a run, an adapter, an artefact, or a download of one")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    args = parser.parse_args()
    links = lineage_of(args.folder)
    print(as_json(links) if args.json else as_text(links))
    sys.exit(1 if any(link.state == "broken" for link in links) else 0)


def lineage_of(folder: Path) -> list[Link]:
    """Every link that leads to what a folder holds.

    Raises:
        UserError: it holds nothing of this project, or a record in it is damaged.
    """
    artefacts = [folder] if (folder / EXPORT).is_file() else []
    run = run_behind(folder)
    if run is None:
        if not artefacts:
            raise UserError(f"{folder} holds no run, no adapter of one, no artefact and no download of a pushed run")
        made = read_object(folder / EXPORT, "export the run again")
        return [*recorded(made), artefact_link(folder, made["parent"]["adapter_sha256"])]
    before = ancestors(run)
    trained = before if run.manifest.stage == "eval" else [*before, run]
    links = [base_link([*before, run][0], run), *unseen(run, before)]
    links += [run_link(origin, trained[:number]) for number, origin in enumerate(trained)]
    if run.manifest.stage == "eval":
        return [*links, eval_link(run, trained)]
    return [*links, *(artefact_link(one, run.manifest.adapter_sha256) for one in artefacts or artefacts_of(run))]


# --- what is known ----------------------------------------------------------------------------------------------------


def run_behind(folder: Path) -> Origin | None:
    """The run that a folder is, lies in, or was made of."""
    for place in (folder, folder.parent):
        if (place / PUBLIC_MANIFEST).is_file():
            return Origin(read_manifest(place, PUBLIC_MANIFEST), place, downloaded=True)
    if (folder / MANIFEST).is_file():
        return Origin(read_manifest(folder), folder)
    if (run_dir := run_of(folder)) is not None:
        return Origin(read_manifest(run_dir), run_dir)
    if (folder / EXPORT).is_file():
        parent = read_object(folder / EXPORT, "export the run again")["parent"]
        return beside(parent, folder)
    return None


def ancestors(run: Origin) -> list[Origin]:
    """The training runs before, oldest first: out of their folders, or out of what a push wrote of them."""
    if run.downloaded:
        assert run.folder is not None
        file = run.folder / LINEAGE
        records = read_object(file, "download the repository again")["runs"] if file.is_file() else []
        return [Origin(manifest_of(record, str(file)), None) for record in records]
    if run.manifest.parent is None or (found := beside(run.manifest.parent, run.folder)) is None:
        return []
    return [*ancestors(found), found]


def beside(parent: Entry, folder: Path | None) -> Origin | None:
    """The run that a `parent` entry names: there, or beside this one, for run directories are moved together."""
    named = Path(parent["run_dir"])
    named = named.parent if named.name == "checkpoints" else named
    places = [named, *([folder.parent / named.name] if folder else [])]
    found = next((place for place in places if (place / MANIFEST).is_file()), None)
    return Origin(read_manifest(found), found) if found else None


def unseen(run: Origin, before: list[Origin]) -> list[Link]:
    """The earliest runs of a chain, where nothing but the record of a later one tells of them."""
    chain = run.manifest.chain
    lost = chain[: max(0, len(chain) - len(before))]
    return [Link(one["stage"], one["name"], one["adapter_sha256"], "unchecked", "its record is not here") for one in lost]


def artefacts_of(run: Origin) -> list[Path]:
    """The exports that lie in a run, and the variants beside a downloaded adapter."""
    if run.folder is None:
        return []
    return [file.parent for file in sorted(run.folder.glob(f"*/{EXPORT}" if run.downloaded else f"export/*/{EXPORT}"))]


# --- what is found of it ----------------------------------------------------------------------------------------------


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


def published_base(run: Origin) -> tuple[str, str | None] | None:
    """The Hub id and commit that a push gave a base: training may have known a folder."""
    file = run.folder / CONFIG if run.downloaded and run.folder else None
    if file is None or not file.is_file():
        return None
    values = read_object(file, "download the repository again")
    name = values["base_model_name_or_path"]
    return (name, values.get("revision")) if name else None


def run_link(run: Origin, before: list[Origin]) -> Link:
    manifest = run.manifest
    name = str(run.folder) if run.folder else manifest.name
    link = Link(stage_of(manifest), name, manifest.adapter_sha256 or "", "whole", "")
    if why := contradiction(manifest, before):
        return dataclasses.replace(link, state="broken", why=why)
    begun = "trained from the base" if manifest.parent is None else "began with the adapter before"
    if manifest.exit != "ok":
        return dataclasses.replace(link, state="unchecked", why=f"{begun}; not finished ({manifest.exit})")
    weights = run.weights
    if weights is None or not any(weights.glob("*.safetensors")):
        return dataclasses.replace(link, state="unchecked", why=f"{begun}, as its record says; its weights are not here")
    if why := changed(run, weights):
        return dataclasses.replace(link, state="broken", why=why)
    return dataclasses.replace(link, why=f"{begun}; its files are as they were written")


def stage_of(manifest: Manifest) -> str:
    """rft: SFT on a policy's own solutions."""
    kind = manifest.data.get("source", {}).get("kind")
    return "rft" if manifest.stage == "sft" and kind == "rejection_sampled" else manifest.stage


def contradiction(manifest: Manifest, before: list[Origin]) -> str:
    """Where a record does not begin with what the record before ended with."""
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


def changed(run: Origin, weights: Path) -> str:
    """Which file is not as training wrote it, if one is."""
    manifest = run.manifest
    found = model_sha256(weights) if manifest.all_weights else weights_sha256(weights / WEIGHTS)
    if found != manifest.adapter_sha256:
        return f"its weights are others ({short(found)})"
    if (why := merged_base_changed(run)) or not run.downloaded:
        return why or first_changed(weights, manifest.adapter_files)
    file = weights / LINEAGE  # the push may have written another name for the base: it kept the hashes of what it sent
    return first_changed(weights, read_object(file, "download the repository again")["files"] if file.is_file() else {})


def merged_base_changed(run: Origin) -> str:
    """The base that an adapter of adapter_mode merge_and_new lies on is part of its run."""
    from posttrain.config.schema import Tokenizer
    from posttrain.models.checkpoint import found_here, weights_hash

    assert run.folder is not None
    name, recorded = run.manifest.model.get("name_or_path", ""), run.manifest.model.get("weights")
    here = found_here(Tokenizer(name_or_path=str(run.folder / "merged_base"))) if Path(name).name == "merged_base" else None
    if here is None or recorded in (None, weights_hash(Tokenizer(name_or_path=str(here)))):
        return ""
    return "its merged_base holds other weights"


def first_changed(folder: Path, files: Entry) -> str:
    """The first file that is here with another content. What was left out of a download is not missed."""
    there = {name: folder / name for name in files if (folder / name).is_file() and name not in NOT_READ}
    return next((f"{name} has changed since" for name, file in there.items() if sha256_file(file) != sha256_in(files[name])), "")


def sha256_in(entry: Any) -> str:
    return str(entry["sha256"] if isinstance(entry, dict) else entry)


def artefact_link(folder: Path, adapter_sha256: str | None) -> Link:
    made = read_object(folder / EXPORT, "export the run again, or download it again")
    kind = "-".join(filter(None, (made["format"], made.get("quant"))))
    parent = made["parent"]["adapter_sha256"]
    link = Link(kind, str(folder), made.get("weights_sha256", parent), "whole", "")
    if parent != adapter_sha256:
        return dataclasses.replace(
            link, state="broken", why=f"it was made of adapter {short(parent)}, not of {short(adapter_sha256)}"
        )
    if why := first_changed(folder, made["files"]):
        return dataclasses.replace(link, state="broken", why=why)
    lost = [name for name in made["files"] if not (folder / name).is_file() and name not in NOT_READ]
    if lost:
        return dataclasses.replace(link, state="unchecked", why=f"{lost[0]} is not here")
    return dataclasses.replace(link, why=f"made of adapter {short(parent)}; its files are as they were written")


def eval_link(run: Origin, trained: list[Origin]) -> Link:
    """An evaluation is of the policy before it, and of the answers that it ended with."""
    manifest, folder = run.manifest, run.folder
    link = Link("eval", str(folder), manifest.completions_sha256, "whole", "its questions and answers are as they were written")
    last = trained[-1].manifest.adapter_sha256 if trained else None
    asked = manifest.parent["adapter_sha256"] if manifest.parent else None  # also where it was asked as a merged model
    if trained and asked != last:
        return dataclasses.replace(link, state="broken", why=f"it is of adapter {short(asked)}, not {short(last)}")
    if folder is None or not manifest.completions_sha256 or not (folder / "predictions.jsonl").is_file():
        return dataclasses.replace(link, state="unchecked", why="its answers are not here, or their hash was not kept")
    found = content_hashes(folder, read_jsonl(folder / "predictions.jsonl", Prediction))
    same = found == {"questions_sha256": manifest.questions_sha256, "completions_sha256": manifest.completions_sha256}
    return link if same else dataclasses.replace(link, state="broken", why="its questions or answers have changed since")


def recorded(made: Entry) -> Iterator[Link]:
    """The chain of an artefact that lies alone, as its own record has it."""
    base, alone = made["base"], "only the artefact's own record says so"
    yield Link("base", base["name_or_path"], base.get("weights", ""), "unchecked", alone)
    for link in made["chain"]:
        yield Link(link["stage"], link["name"], link["adapter_sha256"], "unchecked", alone)


# --- what is said -----------------------------------------------------------------------------------------------------


def short(sha256: str | None) -> str:
    return (sha256 or "none")[:12]


def state_of(links: list[Link]) -> State:
    states = {link.state for link in links}
    return "broken" if "broken" in states else "unchecked" if "unchecked" in states else "whole"


def as_text(links: list[Link]) -> str:
    arrows = [link.stage if number == 0 else f"-> {link.stage}" for number, link in enumerate(links)]
    wide, long = max(map(len, arrows)), max(len(link.name) for link in links)
    lines = [
        f"{arrow:{wide}}  {link.name:{long}}  {short(link.sha256) if link.sha256 else '':12}  {SAID[link.state]}: {link.why}"
        for arrow, link in zip(arrows, links, strict=True)
    ]
    count = sum(link.state == state_of(links) for link in links)
    of = f"{count} of {len(links)} links"
    end = {"whole": "every link holds", "broken": f"{of} do not hold", "unchecked": f"no link is broken, {of} cannot be checked"}
    return "\n".join([*lines, end[state_of(links)]])


def as_json(links: list[Link]) -> str:
    return json.dumps({"state": state_of(links), "links": [dataclasses.asdict(link) for link in links]}, indent=2)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that closes the pipe early ends this, as it ends other programs
    exit_on_user_error(main)

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
import sys
from pathlib import Path

from posttrain.errors import UserError
from posttrain.lineage.files import short
from posttrain.lineage.links import Link, State, artefact_link, base_link, eval_link, recorded, run_link, unseen
from posttrain.lineage.origins import ancestors, artefacts_of, run_behind
from posttrain.records import read_object
from posttrain.runs.manifest import EXPORT

SAID = {"whole": "whole", "broken": "BROKEN", "unchecked": "cannot be checked"}


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


# --- what is said -----------------------------------------------------------------------------------------------------


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

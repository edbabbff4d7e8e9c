"""Hours and cost of a chain of commands, before any of it runs.

    python -m posttrain.plan --gpu a100 commands.txt
    ./reproduce.sh                                       # begins with the plan of all that it will run

A line of the file is a command as one types it: `python sft_train.py --config FILE key=value`. What has a `data_prep.py` is left
out, and so is what is finished. The plan is that of `--dry-run --gpu`: docs/planning.md says what it counts, and how well.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.load import load
from posttrain.config.schema import EvalConfig, GrpoConfig, SftConfig
from posttrain.console import duration
from posttrain.errors import UserError, exit_on_user_error
from posttrain.places import found
from posttrain.runs.manifest import read_manifest

if TYPE_CHECKING:
    from posttrain.training.machines import Machine
    from posttrain.training.plans import Stage

STAGES: dict[str, type[Any]] = {"sft_train.py": SftConfig, "grpo_train.py": GrpoConfig, "evaluate.py": EvalConfig}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("file", help="commands, one a line")
    parser.add_argument("--gpu", metavar="NAME", required=True, help="the card to plan for, as h100 or h100=2.50 (dollars)")
    args = parser.parse_args()

    from posttrain.training.machines import find_machine

    machine = find_machine(args.gpu)
    configs = list(read_commands(Path(args.file)))
    for line in told([Planned(config.run_dir, planned(config, machine)) for config in configs], machine):
        print(line)


@dataclass(frozen=True)
class Planned:
    """A run, and what it takes; None of one that is finished."""

    run_dir: str
    stage: Stage | None


def read_commands(file: Path) -> Iterator[SftConfig | GrpoConfig | EvalConfig]:
    """The settings of each command of a file.

    Raises:
        UserError: there is no such file, a line is no command of a stage, or its settings are wrong.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file: it has commands, one a line")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = [word for word in shlex.split(line, comments=True) if word not in ("python", "--resume", "--dry-run")]
        if not words or words[0] == "data_prep.py":
            continue
        if words[0] not in STAGES or words[1:2] != ["--config"] or len(words) < 3:
            raise UserError(f"{file}:{number}: no command of a stage: it begins with {', '.join(STAGES)} and --config FILE")
        yield load(found(words[2]), words[3:], STAGES[words[0]])


def planned(config: SftConfig | GrpoConfig | EvalConfig, machine: Machine) -> Stage | None:
    from posttrain.training.plans import stage_of

    manifest = Path(config.run_dir, "manifest.json")
    done = manifest.is_file() and read_manifest(Path(config.run_dir)).exit == "ok"
    return None if done else stage_of(config, machine)


def told(runs: list[Planned], machine: Machine) -> Iterator[str]:
    """A line a run, and their sum."""
    from posttrain.runs.process import num_processes
    from posttrain.training.machines import PRICED

    cards, width = num_processes(), max((len(run.run_dir) for run in runs), default=0)
    yield f"planned for {cards} x {machine.title}, before anything runs (computed, see docs/planning.md):"
    for run in runs:
        yield f"  {run.run_dir:<{width}}  {_row(run.stage)}"
    hours = sum(run.stage.seconds or 0 for run in runs if run.stage) / 3600
    price = machine.dollars
    cost = f", {hours * cards * price:,.2f} dollars at {price:.2f} an hour ({PRICED})" if price else ""
    yield f"{len(runs)} runs: {hours:.2f} hours{cost}"
    yield "GRPO and evaluations count completions that all reach their limit; loading, dev questions, checkpoints come on top"
    if any(run.stage and run.stage.seconds is None for run in runs):
        yield f"what does not fit a {machine.title} is not in the sum"


def _row(stage: Stage | None) -> str:
    if stage is None:
        return "finished"
    if stage.seconds is None:
        return f"{stage.what}: does not fit"
    changed = f"; it fits with {' '.join(stage.changed)}" if stage.changed else ""
    return f"{duration(stage.seconds):>11}  {stage.what}{changed}"


if __name__ == "__main__":
    exit_on_user_error(main)

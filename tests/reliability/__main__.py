"""Run the rows, print both tables, write results/reliability.md.

python -m reliability --short                     # minutes
python -m reliability                             # hours: the figures that are published
python -m reliability --rows "kills, SFT=20" "damaged runs" --out /tmp/one.md
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main():
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        prepare_environment(Path(folder))
        from reliability.workers import all_of

        began = time.monotonic()
        wanted = counts(args)
        protections = [] if args.no_switches else switches_of(wanted)
        done = all_of([*wanted.items(), *protections], Path(folder), args.jobs, args.minutes)
        table, unprotected = done[: len(wanted)], done[len(wanted) :]
        switched = [(off, row) for (_, _, off), row in zip(protections, unprotected, strict=True)]
        text = report(table, switched, time.monotonic() - began, args)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    sys.exit(any(row.failed for row in table) or any(not row.failed for _, row in switched))


def arguments():
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few of each kind")
    parser.add_argument("--rows", nargs="+", metavar="NAME[=COUNT]", help="only these rows, each with so many faults")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time; each takes a core and 2 GB (default 1)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), metavar="M", help="after which a row begins no further fault"
    )
    parser.add_argument("--no-switches", action="store_true", help="leave out the second table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there, too")
    return parser.parse_args()


def prepare_environment(folder):
    """What the fork server starts with: the library of faults, the canaries, no network, one thread."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import conftest  # noqa: F401  sets the environment of tests

    from reliability.place import build_fault
    from reliability.rows import CANARIES

    if library := build_fault(folder):
        os.environ["LD_PRELOAD"] = str(library)
    os.environ |= CANARIES | {"TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore"}


def counts(args):
    """Name -> how many faults of each row; None is all that there are."""
    from reliability.rows import ROWS

    asked = dict(word.partition("=")[::2] for word in args.rows or ROWS)
    usual = {name: few if args.short else full for name, (_, full, few) in ROWS.items()}
    return {name: int(count) if count else usual[name] for name, count in asked.items()}


def switches_of(wanted):
    """For each protection its row in the short form, with the protection off."""
    from reliability.rows import ROWS
    from reliability.switches import SWITCHES

    return [(switch.row, ROWS[switch.row][2], name) for name, switch in SWITCHES.items() if switch.row in wanted]


def report(table, switched, seconds, args):
    from posttrain.runs.manifest import git_state, hardware

    git, machine = git_state(), hardware()
    command = shlex.join(["python", "-m", "reliability", *sys.argv[1:]])
    lines = [
        "# Reliability", "",
        f"`{command}`, commit {(git['commit'] or 'unknown')[:10]}{' with changes' if git['dirty'] else ''}, {machine['cpu']}, "
        f"{machine['num_cpus']} CPUs, {machine['ram_gib']} GiB, {machine['gpu'] or 'no GPU'}; {seconds / 60:.0f} minutes"
        f"{', the short form' if args.short else ''}. A tiny Llama of two layers, every command in a process of its own.", "",
        "| Faults | Tried | Held | Failed | Seconds | What holds |", "| --- | ---: | ---: | ---: | ---: | --- |",
        *(f"| {row.name} | {row.tried} | {row.tried - len(row.failed)} | {len(row.failed)} | {row.seconds:.0f} | {row.says} |"
          for row in table), "",
    ]  # fmt: skip
    if failed := [f"- {row.name}: {line}" for row in table for line in row.failed]:
        lines += ["## What failed", "", *failed, ""]
    if switched:
        lines += [
            "## Each protection switched off", "",
            "| Without this | Faults | Tried | Failed, of them |", "| --- | --- | ---: | ---: |",
            *(f"| {name} | {row.name} | {row.tried} | {len(row.failed)} |" for name, row in switched), "",
        ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()

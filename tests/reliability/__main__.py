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
        prepare_environment(Path(folder), args.model)
        from reliability.workers import all_of

        began, here = time.monotonic(), where(args)  # before the file of the table is a change of the tree
        tasks = tasks_of(args)
        done = {}
        for number, row in all_of(tasks, Path(folder), args.jobs, args.minutes):
            done[number] = row
            rows = [(tasks[number][2], done[number]) for number in sorted(done)]  # with the protection that is off
            text = report(rows, len(tasks), time.monotonic() - began, here)
            if args.out:  # what was tried is kept, should this be stopped
                args.out.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(any(row.broken or bool(row.failed) != bool(off) for off, row in rows))


def arguments():
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few of each kind")
    parser.add_argument("--rows", nargs="+", metavar="NAME[=COUNT]", help="only these rows, each with so many faults")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time; each takes a core and 2 GB (default 1)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), metavar="M", help="after which a row begins no further fault"
    )
    parser.add_argument("--no-switches", action="store_true", help="leave out the second table")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="also the kills of SmolLM2-135M-Instruct in NF4 (make model)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there, too")
    return parser.parse_args()


def prepare_environment(folder, model=None):
    """What the fork server starts with: the library of faults, the canaries, no network, one thread."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import conftest  # noqa: F401  sets the environment of tests

    from reliability.place import build_fault
    from reliability.real import VARIABLE
    from reliability.rows import CANARIES

    if library := build_fault(folder):
        os.environ["LD_PRELOAD"] = str(library)
    os.environ |= CANARIES | {"TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore"}
    if model:
        os.environ[VARIABLE] = str(model)


def tasks_of(args):
    """Name, number of faults (None is all that there are) and no protection for each row; then, for each protection, its row in
    the short form with that switched off."""
    from reliability.real import REAL
    from reliability.switches import SWITCHES
    from reliability.workers import ROWS

    usual = {name: few if args.short else full for name, (_, full, few) in ROWS.items() if args.model or name not in REAL}
    asked = dict(word.partition("=")[::2] for word in args.rows or usual)
    if unknown := asked.keys() - usual.keys():
        sys.exit(f"no rows: {', '.join(sorted(unknown))}; there are {', '.join(usual)}, and with --model {', '.join(REAL)}")
    tasks = [(name, int(count) if count else usual[name], None) for name, count in asked.items()]
    if not args.no_switches:
        tasks += [(switch.row, ROWS[switch.row][2], off) for off, switch in SWITCHES.items() if switch.row in asked]
    return tasks


def where(args):
    """Command, commit and machine."""
    from posttrain.runs.manifest import git_state, hardware

    git, machine = git_state(), hardware()
    command = shlex.join(["python", "-m", "reliability", *sys.argv[1:]])
    return (
        f"`{command}`{', the short form' if args.short else ''}, commit {(git['commit'] or 'unknown')[:10]}"
        f"{' with changes' if git['dirty'] else ''}, {machine['cpu']}, {machine['num_cpus']} CPUs, {machine['ram_gib']} GiB, "
        f"{machine['gpu'] or 'no GPU'}"
    )


def report(rows, planned, seconds, here):
    table, switched = [row for off, row in rows if not off], [one for one in rows if one[0]]
    stopped = f", stopped after {len(rows)} of {planned} rows" if len(rows) < planned else ""
    lines = [
        "# Reliability", "",
        f"{here}; {seconds / 60:.0f} minutes{stopped}. A tiny Llama of two layers, every command in a process of its own.", "",
        "| Faults | Tried | Held | Failed | Seconds | What holds |", "| --- | ---: | ---: | ---: | ---: | --- |",
        *(f"| {row.name} | {row.tried} | {row.tried - len(row.failed)} | {len(row.failed)} | {row.seconds:.0f} | {row.told} |"
          for row in table), "",
    ]  # fmt: skip
    if failed := [f"- {row.name}: {line}" for row in table for line in row.failed]:
        lines += ["## What failed", "", *failed, ""]
    if switched:
        lines += [
            "## Each protection switched off", "",
            "| Without this | Faults | Tried | Failed, of them |", "| --- | --- | ---: | ---: |",
            *(f"| {off} | {row.name} | {row.broken or row.tried} | {len(row.failed)} |" for off, row in switched), "",
        ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Run the rows, print both tables, write results/reliability.md.

python -m reliability --short                     # minutes
python -m reliability                             # hours: the figures that are published
python -m reliability --rows "kills, SFT" --out /tmp/one.md
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
        from reliability.place import prepared
        from reliability.rows import ROWS

        began = time.monotonic()
        place = prepared(Path(folder))
        wanted = args.rows or list(ROWS)
        table = [timed(name, place, args.short) for name in wanted]
        switched = [] if args.no_switches else switch_table(place, wanted)
        text = report(table, switched, time.monotonic() - began, args)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    sys.exit(any(row.failed for row in table) or any(not row.failed for _, row in switched))


def arguments():
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few of each kind")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
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


def timed(name, place, short):
    from reliability.rows import ROWS

    function, full, few = ROWS[name]
    began = time.monotonic()
    row = function(place, few if short else full)
    row.seconds = time.monotonic() - began
    print(f"{name}: {row.tried - len(row.failed)} of {row.tried} in {row.seconds:.0f} s", flush=True)
    for line in row.failed:
        print(f"  {line}", flush=True)
    return row


def switch_table(place, wanted):
    """For each protection its row in the short form, with the protection off."""
    from reliability.place import Place
    from reliability.switches import SWITCHES

    return [
        (name, timed(switch.row, Place(place.folder, off=(name,)), short=True))
        for name, switch in SWITCHES.items()
        if switch.row in wanted
    ]


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

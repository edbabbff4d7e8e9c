"""What works on this machine, and what to do about what does not.

    python -m posttrain.doctor                                          # Python, packages, GPU, NF4, kernels
    python -m posttrain.doctor --config configs/sft_demo.yaml           # and the base, data, room and tracking of a run
    python -m posttrain.doctor --processes 2                            # and processes that torchrun starts
    python -m posttrain.doctor --config configs/sft_demo.yaml --report  # the same for a report of a fault, without secrets

Each line is ok, a warning, or broken with the remedy. The exit code is 1 if anything is broken, else 0. Nothing is written.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator

from posttrain.config.load import ConfigError
from posttrain.console import say
from posttrain.doctor import machine, run
from posttrain.doctor.findings import Check, Finding, examined, redacted
from posttrain.errors import exit_on_user_error
from posttrain.runs.manifest import git_state


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="of a run: its base, data, room and tracking are looked at, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the config")
    parser.add_argument("--processes", type=int, metavar="N", help="start N processes by torchrun, which takes some seconds")
    parser.add_argument("--report", action="store_true", help="as text to paste, without tokens, user name and home folder")
    args = parser.parse_intermixed_args()
    if args.overrides and not args.config:
        parser.error("key=value needs --config FILE")
    states = set[str]()
    if args.report:
        git = git_state()
        say(f"```\nposttrain at {git['commit'] or 'no commit'}{' with changes' if git['dirty'] else ''}")
    for finding in findings(args.config, args.overrides, args.processes):
        states.add(finding.state)
        say(redacted(finding.line()))
    if args.report:
        say("```")
    sys.exit("broken" in states)


def findings(config: str | None, overrides: list[str], processes: int | None) -> Iterator[Finding]:
    checks: dict[str, Check] = machine.checks()
    if processes:
        checks["processes"] = functools.partial(machine.processes, processes)
    for what, check in checks.items():
        yield from examined(what, check)
    if config:
        yield from of_config(config, overrides)


def of_config(path: str, overrides: list[str]) -> Iterator[Finding]:
    try:
        settings = run.read(path, overrides)
    except ConfigError as error:
        yield from (Finding("broken", "config", line) for line in str(error).splitlines())
        return
    yield Finding("ok", "config", f"{path}, for {type(settings).__name__.removesuffix('Config').lower()}")
    told = set[str]()
    for what, check in run.checks(settings).items():
        found = [
            finding for finding in examined(what, check) if finding.told not in told
        ]  # a base that is not there is told once
        told |= {finding.told for finding in found}
        yield from found


if __name__ == "__main__":
    exit_on_user_error(main)

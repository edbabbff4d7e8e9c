"""One YAML file, then `key=value` from the command line, then one check of all.

Every script begins with

    config, args = from_command_line(SftConfig, __doc__)

Wrong settings end the process with exit code 2, before it imports anything heavy or writes anything. It prints every fault at
once, one a line, as `FILE:LINE: key.path: message (did you mean 'x'?)`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML

from posttrain.config.messages import add_faults, did_you_mean, one_line_each
from posttrain.config.reference import explained
from posttrain.config.schema import Answer, EvalConfig, Settings
from posttrain.config.yaml_lines import Document, NotYaml, read
from posttrain.errors import UserError, go_on_unread
from posttrain.places import ROOT, as_typed, found


class ConfigError(UserError):
    """The settings are wrong. The text has one line for each fault."""


Config = TypeVar("Config", bound=Settings)


_FLAGS = {
    "dry_run": "print what follows from the config, and stop",
    "resume": "continue the run in run_dir",
    "print_config": "print the resolved YAML, and stop",
    "schema": "print the JSON schema of the config, for an editor, and stop",
}


def from_command_line(
    cls: type[Config], doc: str | None, argv: Sequence[str] | None = None, plans: bool = False, **flags: str
) -> tuple[Config, argparse.Namespace]:
    """A script's settings and flags. Wrong settings end the process with exit code 2.

    `plans` adds `--gpu NAME`, the card that a dry run plans for.
    `flags` adds switches that only this script has, name -> help: `regrade="..."` makes `--regrade`.
    """
    parser = argparse.ArgumentParser(
        description=as_typed(doc or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", metavar="KEY", nargs="?", const="", help="this text, or what a key of the config does")
    parser.add_argument("--config", metavar="FILE", help="YAML; configs/ holds one for every published run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="say, trainer.learning_rate=2e-4")
    for name, text in (_FLAGS | flags).items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    if plans:
        parser.add_argument("--gpu", metavar="NAME", help="with --dry-run: the card to plan for, as h100 or h100=2.50 (dollars)")
    args = parser.parse_intermixed_args(argv)
    if plans and args.gpu and not args.dry_run:
        parser.error("--gpu is what a dry run plans for: add --dry-run")
    if args.help is not None:
        _print_and_exit(explained(cls, args.help) if args.help else parser.format_help().rstrip())
    if args.schema:
        _print_and_exit(json.dumps(cls.model_json_schema(), indent=2))
    if args.config is None:
        parser.error("--config FILE is required")
    try:
        config = load(found(args.config), args.overrides, cls)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if args.print_config:
        _print_and_exit(dump(config).rstrip())
    go_on_unread()  # before the imports that print: transformers says so where wandb is offline
    return config, args


def _print_and_exit(text: str) -> NoReturn:
    print(text)
    sys.exit(0)


def load(path: Path | str, overrides: Sequence[str], cls: type[Config]) -> Config:
    """The settings in a YAML file, with `key=value` overrides laid over them.

    Raises:
        ConfigError: the text lists every fault, one a line.
    """
    document = _read(path)
    for assignment in overrides:
        document.override(assignment)
    document.refuse_passwords()
    try:
        config = cls.model_validate(document.values)
    except ValidationError as error:
        add_faults(document, error, cls)
    if document.faults:
        raise ConfigError(one_line_each(document.faults, str(path)))
    return config


def _read(path: Path | str) -> Document:
    try:
        return read(path)
    except NotYaml as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from error
    except FileNotFoundError as error:
        known = [*Path(path).parent.glob("*.yaml"), *(file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.yaml"))]
        hint = did_you_mean(str(path), map(str, known))
        raise ConfigError(f"{path}: no such file{hint}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a file: {error.strerror}") from error


def dump(config: Settings) -> str:
    """All settings, defaults included, as YAML that loads back to an equal config."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 110
    values, text = config.model_dump(), io.StringIO()
    # ruamel would write NEL as a line break; escaped, it comes back.
    yaml.allow_unicode = "\x85" not in json.dumps(values, ensure_ascii=False)
    yaml.dump(values, text)
    return text.getvalue()


# Keys that came after the first runs, unset. The hash leaves them out, and stays that of runs from before there were any.
LATER: dict[str, Any] = {
    "template_kwargs": {},
    "decoding": "auto",
    "curriculum": None,
    "lean_layers": False,
    "layer_graphs": False,
    "update_tokens": None,
    "weights": None,
}


def config_sha256(config: Settings) -> str:
    """Hash of every setting that can change a result; not of where it goes, what it is called and who is told."""
    label = {"name"} if isinstance(config, EvalConfig) else set()  # a data set's name is part of its ids
    apart = dict.fromkeys({"run_dir", "output_dir", "tracking", "hub", "unmet_after_steps"} | label, True)
    settings = config.model_dump(mode="json", exclude=apart | {"model": {"same_base"}})
    for block in (settings, *(settings.get(name, {}) for name in ("model", "tokenizer", "rollouts"))):
        for key in [key for key, unset in LATER.items() if key in block and block[key] == unset]:
            del block[key]
    if "source" in settings:  # the same of the keys that map a source's rows
        settings["source"] = {key: value for key, value in settings["source"].items() if value is not None}
    if settings.get("answer") == Answer().model_dump():  # the same for data sets from before there were other answers
        del settings["answer"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

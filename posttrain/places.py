"""Where the scripts and configs/ are: beside the package in a checkout, inside it in a wheel (setup.py puts them there).

A command of the console, `posttrain sft`, runs in any folder: what of configs/ that folder does not have is taken from here.
A name of a model may be a folder, too: `looks_local`.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "shipped"
ROOT = SHIPPED if SHIPPED.is_dir() else PACKAGE.parent

# Command of the console -> the script that it runs.
SCRIPTS = {"data": "data_prep", "sft": "sft_train", "grpo": "grpo_train", "eval": "evaluate"}


def found(path: Path | str) -> Path:
    """The path itself; or, where it names a file of configs/ that the working directory lacks, the one beside the scripts."""
    path = Path(path)
    if path.parts[:1] != ("configs",) or os.path.lexists(path) or not (ROOT / path).is_file():
        return path
    _say(f"{path} is not in this folder: taking {ROOT / path}")
    return ROOT / path


def looks_local(name: str) -> bool:
    """Whether a name means a folder on this disk and not an `owner/name` on the Hub."""
    return Path(name).exists() or name.startswith((".", "/", "~", "models/", "runs/")) or name.count("/") != 1


@functools.cache  # once, however often a file is asked for
def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def is_command() -> bool:
    """Whether this process was started as `posttrain STAGE`."""
    return sys.argv[0].startswith("posttrain ")


def as_typed(text: str) -> str:
    """A text that names the scripts, in the words of who started this process: `posttrain sft` for `python sft_train.py`."""
    if not is_command():
        return text
    text = text.replace("--config_file configs/", "--config_file $(posttrain where)/configs/")
    for stage, script in SCRIPTS.items():
        text = re.sub(rf"(?m)^(.*(?:accelerate launch|torchrun) .*?)\b{script}\.py", rf"\1-m posttrain {stage}", text)
        text = re.sub(rf"(?:python )?\b{script}\.py", f"posttrain {stage}", text)
    return text

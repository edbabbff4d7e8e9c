"""Nothing that is published tells a path or a secret of this machine: both are cut out, and every file is looked at once more."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from posttrain.errors import UserError
from posttrain.hub.release import Files

# A path as it stands in a command or in a note: /home/me/x, ~/x, ../x, file:///x. A URL or an owner/name is none.
LOCAL_PATH = re.compile(r"""(?<![\w:/.<])(?:file:/*|~\w*|(?:\.\./)*\.\.)?/[^\s'"`,;:=]+""")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")  # may hold any text


def portable(value: Any) -> Any:
    """A value as it may be published: paths of this machine cut to their last part, secrets of this machine blotted."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(LOCAL_PATH, lambda path: PurePath(path[0]).name, without_secrets(value))


def without_secrets(text: str) -> str:
    """The text with each secret of this machine, and each password in a URL, as ***."""
    for secret in secrets():
        text = text.replace(secret, "***")
    return re.sub(r"//[^/\s@]+@", "//***@", text)  # https://user:password@host


def secrets() -> list[str]:
    """What the environment and the Hub's login hold that must never be shown."""
    from huggingface_hub import get_token

    named = [value for name, value in os.environ.items() if re.search(r"(TOKEN|SECRET|PASSWORD|KEY)$", name)]
    return [text for text in {*named, get_token() or ""} if len(text) >= 8]  # a shorter value is `false` or `1`


def refuse_private_text(files: Files) -> None:
    """A last look at what is sent: no text holds a secret, and none but a vocabulary holds a path below the home."""
    home = f"{Path.home()}/"
    for name, content in files.items():
        if name.endswith(".safetensors"):
            continue
        if name.endswith(".gguf") and isinstance(content, Path):  # too large to be read at once
            if holds(content, [*secrets(), home]):
                raise UserError(
                    f"{name} would publish a secret of this environment, or a path below {home}: export the run again"
                )
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", "replace")
        if any(secret in text for secret in secrets()):
            raise UserError(f"{name} would publish a token or key of this environment: take it out, then push")
        if home in text and PurePath(name).name not in VOCABULARIES:
            raise UserError(f"{name} would publish a path below {home}: take it out, then push")


def holds(file: Path, texts: Sequence[str]) -> str | None:
    """The first of these texts that stands in a file of any size."""
    if not file.stat().st_size:
        return None
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return next((text for text in texts if content.find(text.encode()) >= 0), None)

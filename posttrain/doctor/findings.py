"""What a check found, how it is shown, and what never is."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import UserError, machine_trouble

State = Literal["ok", "warning", "broken"]
SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters: a shorter value of such a variable, as a 1, would blot out ordinary text


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. Where it is not ok, `remedy` says what to do."""

    state: State
    what: str
    told: str
    remedy: str = ""

    def line(self) -> str:
        return f"{self.state:8}{self.what:14}{self.told}{f': {self.remedy}' if self.remedy else ''}"


Check = Callable[[], Iterable[Finding]]


def examined(what: str, check: Check) -> Iterator[Finding]:
    """What a check finds. One that fails is a finding itself, and the others go on."""
    try:
        yield from check()
    except UserError as error:
        for line in str(error).splitlines():
            yield Finding("broken", what, line)
    except Exception as error:  # a driver, a kernel or a package of this machine may fail in any way
        trouble = machine_trouble(error) or f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
        yield Finding("broken", what, trouble, "if no line above says why, report it with --report")


def redacted(text: str) -> str:
    """The text without what is secret: values of variables that are named like secrets, stored tokens, and who the user is."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = text.replace(str(Path.home()), "~") if Path.home() != Path("/") else text
    return re.sub(rf"\b{re.escape(_user())}\b", "<user>", text)


def _secrets() -> set[str]:
    from huggingface_hub import get_token

    named = {value for name, value in os.environ.items() if SECRET_NAMES.search(name)}
    return {value for value in named | {get_token() or ""} if len(value) >= SHORTEST_SECRET}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return str(os.getuid())

"""Rewards by name: built in, or a function from a file or a package of the user's, in TRL's signature.

    rewards: {correctness: 1.0, my_rewards.py:brevity: 0.1, overlong: {weight: 0.5, args: {buffer_tokens: 64}}}

A function gets `completions`, `prompts`, `completion_ids` and the data set's columns, a list each, and returns a number for each
completion; `async def` is awaited beside others of its kind. What it returns is checked every time: TRL 1.16 takes None for "does
not apply", and a run would go on with half of its rewards missing. docs/rewards.md shows all of it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.schema import Rewards, is_own_reward
from posttrain.records import COLUMNS, sha256_file
from posttrain.training.built_in_rewards import built_in
from posttrain.training.own_rewards import own_reward
from posttrain.training.reward_calls import Function, checked


@dataclass(frozen=True)
class NamedReward:
    """A reward of the config. `name` is what logs and samples call it."""

    key: str
    name: str
    function: Function
    weight: float
    gate: str | None
    args: dict[str, Any]
    file: Path | None  # of the user's

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        said: dict[str, Any] = {"reward": self.key, "weight": self.weight}
        said |= {"gate": self.gate} if self.gate else {}
        said |= {"args": self.args} if self.args else {}
        return said | ({"file": str(self.file), "sha256": sha256_file(self.file)} if self.file else {})


def named_rewards(settings: Rewards, max_tokens: int, columns: Sequence[str] = COLUMNS) -> list[NamedReward]:
    """The rewards beside the two that grade. `max_tokens` is the longest that a completion can get, `columns` the data set's.

    Raises:
        UserError: a file, a package or a function is not there, or a function asks for what it will not be given.
    """
    found: list[NamedReward] = []
    for key, reward in settings.named().items():
        function, file = own_reward(key, reward, columns) if is_own_reward(key) else (built_in(key, reward, max_tokens), None)
        name = re.split("[:.]", key)[-1] if file else f"{key}_reward"
        if name in ("correctness_reward", "format_reward", "gated_format_reward", *(other.name for other in found)):
            name = key
        found.append(NamedReward(key, name, checked(key, name, function), reward.weight, reward.gate, reward.args, file))
    return found


def gated_columns(graded: Sequence[str], rewards: Sequence[NamedReward]) -> dict[int, int]:
    """Column of a reward -> column of the one that gates it. The `graded` come first."""
    keys = [*graded, *(reward.key for reward in rewards)]
    return {keys.index(reward.key): keys.index(reward.gate) for reward in rewards if reward.gate}


def keep_files(rewards: Sequence[NamedReward], folder: Path) -> None:
    """Copy the users' files into the run directory."""
    for file in dict.fromkeys(reward.file for reward in rewards if reward.file):
        folder.mkdir(exist_ok=True)
        taken = folder / file.name
        same = not taken.exists() or sha256_file(taken) == sha256_file(file)
        shutil.copyfile(file, taken if same else folder / f"{file.stem}_{sha256_file(file)[:8]}{file.suffix}")

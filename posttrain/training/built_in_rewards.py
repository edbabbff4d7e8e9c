"""Rewards that a config may name beside the two that grade: a function makes each, of `max_tokens` and the reward's arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.config.messages import did_you_mean
from posttrain.config.schema import Reward
from posttrain.errors import UserError
from posttrain.training.reward_calls import Function, text_of


def built_in(key: str, reward: Reward, max_tokens: int) -> Function:
    make = BUILT_IN[key]
    allowed = [name for name in inspect.signature(make).parameters if name != "max_tokens"]
    for name in reward.args:
        if name not in allowed:
            raise UserError(f"rewards.{key}: no argument {name!r}{did_you_mean(name, allowed)}: it takes {', '.join(allowed)}")
    try:
        return make(max_tokens=max_tokens, **reward.args)
    except (TypeError, ValueError) as error:
        raise UserError(f"rewards.{key}: {error}") from error


def overlong(max_tokens: int, buffer_tokens: int | None = None) -> Function:
    """0 up to `max_tokens - buffer_tokens`, then down to -1 at `max_tokens` (DAPO, arXiv 2503.14476, equation 13).

    The buffer is a fifth of the tokens where nothing is said: there it is 4,096 of 20,480.
    """
    from trl.rewards import get_soft_overlong_punishment

    buffer = max(1, max_tokens // 5) if buffer_tokens is None else buffer_tokens
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer_tokens must lie between 1 and max_completion_length ({max_tokens}), not {buffer}")
    return get_soft_overlong_punishment(max_tokens, buffer)


def repetition(max_tokens: int, ngram_size: int = 3) -> Function:
    """Minus the share of repeated n-grams among a completion's tokens (arXiv 2502.03373, appendix C.2)."""
    from trl.rewards import get_repetition_penalty_reward

    if ngram_size < 1:
        raise ValueError(f"ngram_size must be at least 1, not {ngram_size}")
    return get_repetition_penalty_reward(ngram_size)


def tags(max_tokens: int, names: Sequence[str] = ("think", "answer")) -> Function:
    """1 for a text that is `<think>...</think> <answer>...</answer>` and nothing else, each tag once; else 0."""
    listed = isinstance(names, list | tuple) and len(names) > 0
    if not listed or not all(isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w-]*", name) for name in names):
        raise ValueError(f"names must be a list of tags as [think, answer], not {names!r}")
    form = re.compile(r"\s*" + r"\s*".join(rf"<{name}>.*</{name}>" for name in names) + r"\s*", re.DOTALL)

    def tags_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [
            float(_each_once(text_of(completion)) and bool(form.fullmatch(text_of(completion)))) for completion in completions
        ]

    def _each_once(text: str) -> bool:
        return all(text.count(f"<{name}>") == text.count(f"</{name}>") == 1 for name in names)

    return tags_reward


BUILT_IN: dict[str, Callable[..., Function]] = {"overlong": overlong, "repetition": repetition, "tags": tags}

"""Whether the Hub answers, asked once. huggingface_hub asks six times, over 40 seconds, for each file that it looks for."""

from __future__ import annotations

import functools
import sys

from posttrain.console import say, speaks

SECONDS, TRIES = 5.0, 2  # a name that no server knows is told at once, a packet that is dropped is not


@functools.cache
def look_for_hub() -> None:
    """Where the Hub does not answer, this process goes on as under HF_HUB_OFFLINE=1: with what is in the cache, at once.

    That is where huggingface_hub and transformers end, too, after their retries.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode() or any(_answers(constants.ENDPOINT) for _ in range(TRIES)):
        return
    constants.HF_HUB_OFFLINE = True  # the environment was read when this was imported
    if datasets := sys.modules.get("datasets"):
        datasets.config.HF_HUB_OFFLINE = True
    if speaks():
        say(f"{constants.ENDPOINT} does not answer: looking in the cache alone", file=sys.stderr)


def _answers(address: str) -> bool:
    """Whether there is any answer, be it an error: through the session of huggingface_hub, which knows proxies."""
    from httpx2 import HTTPError
    from huggingface_hub import get_session

    try:
        get_session().head(address, timeout=SECONDS)
    except (HTTPError, OSError):
        return False
    return True

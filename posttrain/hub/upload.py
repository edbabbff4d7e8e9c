"""Files -> one commit on the Hub, and what the Hub answers where it takes none, in a line with its remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import PurePath

from posttrain.hub.metadata import EVAL_RESULTS
from posttrain.hub.redaction import without_secrets
from posttrain.hub.release import Files
from posttrain.runs.manifest import EXPORT
from posttrain.tasks.prompts import PROMPT_FILE

LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"


class PushFailed(Exception):
    """The Hub did not take it; the run is as it was. `retryable`: the same command may succeed later."""

    def __init__(self, text: str, retryable: bool = False) -> None:
        super().__init__(text)
        self.retryable = retryable


def upload(files: Files, repo_id: str, private: bool, message: str, kind: str = "model") -> str:
    """One commit with all files. What the Hub has already is not sent again; without a change there is no commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise PushFailed(f"no Hugging Face token: {LOG_IN}")
    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind)
    there = api.repo_info(repo_id, repo_type=kind)
    if private and there.private is False:
        raise PushFailed(f"{repo_id} is there already and public: add --public, or make it private in its settings")
    stale = not_renewed({file.rfilename for file in getattr(there, "siblings", None) or ()}, files)
    for folder in sorted({name.split("/")[0] for name in stale if name.endswith(f"/{EXPORT}")}):
        print(
            f"note: {folder} in {repo_id} is of an earlier push, and this one takes it away: name it with --with", file=sys.stderr
        )
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    deletions = [CommitOperationDelete(name) for name in sorted(stale)]
    api.create_commit(repo_id, [*deletions, *additions], commit_message=message, repo_type=kind, parent_commit=there.sha)
    return str(address)


def not_renewed(there: set[str], files: Files) -> set[str]:
    """What an earlier push left and this one does not bring: a score, a prompt, a variant, which may be of another adapter."""
    variants = tuple(f"{name.rpartition('/')[0]}/" for name in there if PurePath(name).name == EXPORT)
    return {name for name in there - set(files) if name in (EVAL_RESULTS, PROMPT_FILE) or name.startswith(variants)}


# --- what went wrong --------------------------------------------------------------------------------------------------


def explained(error: Exception, repo_id: str) -> PushFailed:
    """What an upload raised, in one line with its remedy."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    # The HTTP client's own class (httpx2's since huggingface_hub 2): the parent of HfHubHTTPError and of every failure to get
    # an answer.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # isort: skip

    for cause in causes(error):
        match cause:
            case OfflineModeIsEnabled():
                return PushFailed("HF_HUB_OFFLINE is set: unset it to push")
            case GatedRepoError():
                return PushFailed(f"{repo_id} is gated: accept its terms at https://huggingface.co/{repo_id}")
            case HfHubHTTPError():
                return refused(cause.response.status_code, one_line(cause.server_message or ""), repo_id)
            case HTTPError() | ConnectionError() | TimeoutError():
                return PushFailed(f"the connection to the Hub broke ({type(cause).__name__}): check the network", True)
            case json.JSONDecodeError():
                return PushFailed("the Hub answered with something that is not JSON: it may be down", True)
            case ValueError():
                return PushFailed(f"the Hub refuses it ({one_line(str(cause))})")
    return PushFailed(f"the upload broke off ({type(error).__name__}: {one_line(str(error))})", True)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from: huggingface_hub wraps the error of a single file in a RuntimeError."""
    while error is not None:
        yield error
        error = error.__cause__


def one_line(text: str) -> str:
    return without_secrets(" ".join(text.split()))[:200]


def refused(status: int, answer: str, repo_id: str) -> PushFailed:
    said = f" ({answer})" if answer else ""
    match status:
        case 401:
            return PushFailed(f"the Hub does not accept the token{said}: {LOG_IN}")
        case 403:
            owner = repo_id.split("/")[0]
            return PushFailed(
                f"the token may not write to {repo_id}{said}: give it write access to {owner} at "
                "https://huggingface.co/settings/tokens, or choose a --repo-id of your own"
            )
        case 404:
            return PushFailed(f"{repo_id} is not there or hidden from this token{said}: check --repo-id, or {LOG_IN}")
        case 408 | 409 | 412 | 429 | 500 | 502 | 503 | 504:
            return PushFailed(f"the Hub cannot take it now, status {status}{said}", retryable=True)
    return PushFailed(f"the Hub refuses it, status {status}{said}")

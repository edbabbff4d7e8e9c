"""A finished training run -> a model repository on the Hub: adapter, tokenizer, chat template, card and manifest.

    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo
    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo --public --eval runs/eval_base runs/eval_grpo
    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo --with-base     # adapter_mode merge_and_new
    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo --with runs/grpo/export/merged     # as a variant
    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo --eval runs/eval_grpo --predictions    # as a data set

Only named files are sent, in one commit, so a repository never holds half of a run. transformers' own
`push_to_hub` sends all of its folder, with training_args.bin, a pickle that may hold the token. The run is only read.
The token comes from `hf auth login` or HF_TOKEN. Exit codes: 0 pushed, 2 something to mend first, 75 try again later.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from posttrain.errors import Interrupted, UserError
from posttrain.hub.predictions import message_of, prediction_files
from posttrain.hub.reading import read_release
from posttrain.hub.redaction import portable, refuse_private_text, without_secrets
from posttrain.hub.release import Request
from posttrain.hub.repository import all_files
from posttrain.hub.upload import PushFailed, explained, upload

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def main() -> None:
    request = from_command_line()
    try:
        print(push(request))
    except PushFailed as failure:
        again = f"; try again with: {request}" if failure.retryable else ""
        print(f"hub: {failure}{again}", file=sys.stderr)
        sys.exit(TRY_AGAIN if failure.retryable else 2)


def from_command_line() -> Request:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="a finished run of sft_train.py or grpo_train.py")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="the default")
    visibility.add_argument("--public", action="store_true")
    parser.add_argument("--eval", type=Path, nargs="+", default=[], metavar="DIR", help="evaluation runs, for the card")
    parser.add_argument("--with-base", action="store_true", help="push the merged base of the adapter, too")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="Hub id of a base that was loaded from a folder")
    parser.add_argument(
        "--with", type=Path, nargs="+", default=[], metavar="DIR", dest="variants", help="artefacts of python -m posttrain.export"
    )
    parser.add_argument("--predictions", action="store_true", help="push the evaluations' answers, too, as a data set")
    args = parser.parse_args()
    return Request(
        args.run_dir, args.repo_id, not args.public, tuple(args.eval), args.with_base, args.base_model, tuple(args.variants),
        args.predictions,
    )  # fmt: skip


def push_or_explain(run_dir: Path, repo_id: str, private: bool) -> None:
    """Push at the end of training. Nothing is raised: what went wrong is told, with the command to use later."""
    request = Request(run_dir, repo_id, private, with_base=(run_dir / "merged_base").is_dir())
    try:
        print(f"pushed to {push(Request(run_dir, repo_id, private))}")
    except (Exception, Interrupted) as error:  # the run is finished and safe: no fault of the push may make it look failed
        told = isinstance(error, PushFailed | ValueError | Interrupted)
        text = str(error) if told else f"{type(error).__name__}: {error}"
        print(f"hub: not pushed: {without_secrets(text)}", file=sys.stderr)
        print(f"the run is finished and kept in {run_dir}; push it with: {request}", file=sys.stderr)


def push(request: Request) -> str:
    """Push a finished run, or bring the repository up to date with it. Returns the repository's address.

    Raises:
        UserError: the run is not finished, not whole, or needs another option; nothing was sent.
        PushFailed: the Hub refused it or did not answer.
    """
    release = read_release(request)
    if release.base.merged and not request.with_base:
        raise UserError(
            f"the adapter belongs to the merged base in {release.base.merged}, which nobody else has: "
            "add --with-base to push that, too"
        )
    files = all_files(release)
    data_set = prediction_files(release) if release.predictions else {}
    refuse_private_text(files | {f"{release.predictions}/{name}": content for name, content in data_set.items()})
    if release.base.is_llama and not release.name.lower().startswith("llama"):
        print("note: the Llama licence asks for a name that begins with Llama (section 1.b.i)", file=sys.stderr)
    what = "weights" if release.manifest.all_weights else "adapter"
    message = portable(f"{release.manifest.name}: {what} {release.manifest.adapter_sha256:.12}")
    try:
        if release.predictions:  # before the model, whose card links to it
            upload(data_set, release.predictions, request.private, message_of(release), "dataset")
        return upload(files, request.repo_id, request.private, message)
    except PushFailed:
        raise
    except Exception as error:
        raise explained(error, request.repo_id) from error

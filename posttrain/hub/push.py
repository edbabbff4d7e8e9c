"""A finished training run -> a model repository on the Hub: adapter, tokenizer, chat template, card and manifest.

    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo
    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo --public --eval runs/eval_base runs/eval_grpo
    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo --with-base     # adapter_mode merge_and_new
    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo --with runs/grpo/export/merged     # as a variant
    python -m posttrain.hub runs/grpo --repo-id me/llama-3.2-3b-gsm8k-grpo --eval runs/eval_grpo --predictions    # as a data set

Only the files named here are sent, in one commit, so a repository never holds half of a run. transformers' own
`push_to_hub` sends all of its folder, with training_args.bin, a pickle that may hold the token. The run is only read.
The token comes from `hf auth login` or HF_TOKEN. Exit codes: 0 pushed, 2 something to mend first, 75 try again later.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from posttrain.config.schema import MODEL_FOLDER
from posttrain.errors import Interrupted, UserError
from posttrain.hub.card import (
    STAGES,
    Base,
    Release,
    eval_results_yaml,
    model_card,
    portable,
    read_evaluation,
    secrets,
    without_secrets,
)
from posttrain.hub.predictions import message_of, prediction_files, repo_of
from posttrain.hub.variants import holds, read_variants
from posttrain.lineage import LINEAGE
from posttrain.places import looks_local
from posttrain.records import sha256_file
from posttrain.runs.integrity import CONFIG, NOT_READ, WEIGHTS, check_adapter
from posttrain.runs.manifest import EXPORT, PUBLIC_MANIFEST, Manifest, lineage, model_sha256, read_manifest
from posttrain.tasks.prompts import PROMPT_FILE, prompt_form

EVAL_RESULTS = ".eval_results/gsm8k.yaml"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_FILES = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
BASE_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"

Files = dict[str, Path | bytes]  # path in the repository -> a file of the run, or what is written for the Hub


@dataclass(frozen=True, slots=True)
class Request:
    """What to push and how. As text it is the command that asks for it."""

    run_dir: Path
    repo_id: str
    private: bool = True
    evals: tuple[Path, ...] = ()  # evaluation runs, for the card
    with_base: bool = False  # push the merged base that the adapter belongs to, too
    base_model: str | None = None  # Hub id of a base that was loaded from a folder
    variants: tuple[Path, ...] = ()  # artefacts of the run, for folders of their own
    predictions: bool = False  # push what the evaluations wrote, too, as a data set

    def __str__(self) -> str:
        parts = ["python", "-m", "posttrain.hub", str(self.run_dir), "--repo-id", self.repo_id]
        parts += ["--private" if self.private else "--public"]
        parts += ["--eval", *map(str, self.evals)] if self.evals else []
        parts += ["--with-base"] if self.with_base else []
        parts += ["--base-model", self.base_model] if self.base_model else []
        parts += ["--with", *map(str, self.variants)] if self.variants else []
        parts += ["--predictions"] if self.predictions else []
        return shlex.join(parts)


class PushFailed(Exception):
    """The Hub did not take it; the run is as it was. `retryable`: the same command may succeed later."""

    def __init__(self, text: str, retryable: bool = False) -> None:
        super().__init__(text)
        self.retryable = retryable


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


# --- the run ----------------------------------------------------------------------------------------------------------


def read_release(request: Request) -> Release:
    """What is known of a run, checked.

    Raises:
        UserError: no finished training run, or its adapter is not the one that it finished with.
    """
    run_dir = request.run_dir
    if request.repo_id.count("/") != 1 or request.repo_id.startswith(("/", ".", "~")):
        shown = request.repo_id.rpartition("@")[2]  # what stands before an @ may be a password
        raise UserError(f"--repo-id {shown} is not of the form OWNER/NAME")
    if not (run_dir / "manifest.json").is_file():
        raise UserError(f"{run_dir} holds no run: give the run_dir of sft_train.py or grpo_train.py")
    manifest = read_manifest(run_dir)
    check_finished(run_dir, manifest)
    settings = read_settings(run_dir)
    base = read_base(run_dir, manifest, settings["model"], request.base_model)
    evaluations = tuple(read_evaluation(folder, manifest, base.name) for folder in request.evals)
    variants = read_variants(request.variants, manifest)
    if request.predictions and not evaluations:
        raise UserError("--predictions pushes the answers of evaluation runs: name them with --eval")
    data_set = repo_of(request.repo_id) if request.predictions else None
    return Release(request.repo_id, run_dir, manifest, settings, base, evaluations, variants, data_set)


def local_release(folder: Path, run_dir: Path, manifest: Manifest) -> Release:
    """What is said of a run beside its own files, which training writes before it has finished."""
    settings = read_settings(run_dir)
    base = read_base(run_dir, manifest, settings["model"], None)
    return Release(str(folder.absolute()), run_dir, manifest, settings, base, ())


def check_finished(run_dir: Path, manifest: Manifest) -> None:
    if manifest.stage not in STAGES:
        adapters = "give one of sft_train.py or grpo_train.py"
        raise UserError(f"{run_dir} is a run of stage {manifest.stage}, which has no adapter: {adapters}")
    if manifest.exit != "ok":
        raise UserError(f"{run_dir} is not finished ({manifest.exit}): finish it with --resume, then push")
    if manifest.all_weights:
        if model_sha256(run_dir / MODEL_FOLDER) != manifest.adapter_sha256:
            raise UserError(f"{run_dir}/{MODEL_FOLDER} holds other weights than the run finished with: train it again")
        return
    for name in (WEIGHTS, CONFIG):
        if not (run_dir / "adapter" / name).is_file():
            raise UserError(f"{run_dir}/adapter has no {name}: the run is not whole, train it again")
    check_adapter(run_dir / "adapter")


def read_settings(run_dir: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    settings: dict[str, Any] = YAML(typ="safe", pure=True).load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    return settings


def read_base(run_dir: Path, manifest: Manifest, model: dict[str, Any], base_model: str | None) -> Base:
    """The base, and the merged one on top of it if this run or one before it used adapter_mode merge_and_new.

    The loop follows bases, not adapters as `lineage` does: a new adapter on a merged base has no parent and yet that base.
    """
    folder = run_dir / "merged_base" if (run_dir / "merged_base").is_dir() else Path(model["name_or_path"])
    merged = folder if folder.name == "merged_base" else None
    while (earlier := Path(model["name_or_path"])).name == "merged_base" or (manifest.all_weights and is_trained_model(earlier)):
        model = read_settings(earlier.parent)["model"]
    name = model["name_or_path"]
    hub_id = base_model if looks_local(name) else name
    if base_model not in (None, hub_id):
        raise UserError(f"--base-model {base_model}: the run was trained on {hub_id}; leave the option out")
    return Base(name, hub_id, model["revision"], manifest.model["quantization"], merged)


def is_trained_model(folder: Path) -> bool:
    return folder.name == MODEL_FOLDER and (folder.parent / "config.yaml").is_file()


# --- the files --------------------------------------------------------------------------------------------------------


def all_files(release: Release) -> Files:
    """Everything that is sent: files by name, never a folder."""
    files: Files
    if release.manifest.all_weights:
        files = {**named(release.run_dir / MODEL_FOLDER, (*BASE_FILES, *TOKENIZER_FILES))}
    else:
        adapter = release.run_dir / "adapter"
        files = {WEIGHTS: adapter / WEIGHTS, CONFIG: adapter_config(adapter / CONFIG, release.base)}
        files |= named(adapter, TOKENIZER_FILES)
    files["README.md"] = model_card(release).encode()
    files[PUBLIC_MANIFEST] = public_manifest(release.manifest)
    if gsm8k := next((e for e in release.evaluations if e.is_of_this_adapter and e.is_gsm8k), None):
        files[EVAL_RESULTS] = eval_results_yaml(gsm8k).encode()
    if release.base.merged:
        base = named(release.base.merged, (*BASE_FILES, *TOKENIZER_FILES))
        files |= {f"merged_base/{name}": file for name, file in base.items()}
    for variant in release.variants:
        files |= {**variant.files, f"{variant.name}/{EXPORT}": to_json(portable(variant.made))}
    files |= prompt_file(release)
    return files | {LINEAGE: lineage_file(release, files)}


def prompt_file(release: Release) -> Files:
    """The data set's prompt, with which `python -m posttrain.chat` asks a download. Without the data set nobody knows it."""
    try:
        return {PROMPT_FILE: to_json(dataclasses.asdict(prompt_form(release.manifest.data)))}
    except UserError as why:
        print(f"note: no {PROMPT_FILE} is pushed, as the run's data set is not at hand: {why}", file=sys.stderr)
        return {}


def lineage_file(release: Release, files: Files) -> bytes:
    """What `python -m posttrain.lineage` asks a download: the records of the runs before, and the hash of every file."""
    before = [json.loads(public_manifest(manifest)) for _, manifest in lineage(release.run_dir)][:-1]
    hashes = {
        name: sha256_file(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        for name, content in files.items()
        if name not in NOT_READ
    }
    return to_json({"runs": before, "files": hashes})


def named(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    return {file.name: file for pattern in patterns for file in sorted(folder.glob(pattern))}


def adapter_config(file: Path, base: Base) -> Path | bytes:
    """The adapter's configuration. Where it names a folder of this disk, the base's Hub id stands instead, or null."""
    values = json.loads(file.read_text(encoding="utf-8"))
    name = None if base.merged else base.hub_id
    return file if values["base_model_name_or_path"] == name else to_json(values | {"base_model_name_or_path": name})


def public_manifest(manifest: Manifest) -> bytes:
    """The manifest without the tracker's run, and without keys that `Manifest` does not know: nobody has judged those."""
    return to_json(portable(dataclasses.replace(manifest, wandb_run_id="", tracked_as="", extra={}).as_json()))


def to_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


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


# --- the Hub ----------------------------------------------------------------------------------------------------------


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

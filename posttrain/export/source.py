"""The run that is exported and what is asked for, with everything that can be refused before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import MODEL_FOLDER, Model
from posttrain.errors import UserError
from posttrain.hub.reading import read_release
from posttrain.hub.release import Release
from posttrain.hub.release import Request as PushRequest
from posttrain.records import Example, read_jsonl
from posttrain.runs.data_sets import data_entry
from posttrain.runs.directory import check_writable

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from posttrain.models.folded import FoldedWeights

LONGEST_ANSWER = 512  # as evaluate.py's, where the run's own settings do not say


@dataclass(frozen=True, slots=True)
class Target:
    """One artefact."""

    format: str
    quant: str | None  # None: a merged folder, which has the run's own dtype
    into: str
    folder: Path

    @property
    def is_gguf(self) -> bool:
        return self.quant is not None


@dataclass(frozen=True, slots=True)
class Request:
    run_dir: Path
    targets: tuple[Target, ...]
    split: str
    questions: int
    max_new_tokens: int | None
    evals: tuple[Path, ...]

    @property
    def into(self) -> str:
        return self.targets[0].into


@dataclass(frozen=True, slots=True)
class Source:
    """A finished run, as it is read for an export."""

    release: Release
    settings: Model  # of the base
    quantization: str  # that the policy's base has
    adapter: Path | None  # None: a run that trained all weights
    data: dict[str, Any]
    examples: list[Example]
    max_new_tokens: int


def read_source(request: Request) -> Source:
    for target in request.targets:
        check_place(target.folder)
    release = read_release(PushRequest(request.run_dir, f"OWNER/{request.run_dir.absolute().name}", evals=request.evals))
    manifest = release.manifest
    data = data_entry(manifest.data["path"], request.split)
    examples = read_jsonl(Path(data["path"], f"{request.split}.jsonl"), Example)[: request.questions]
    trained, adapter = dict(manifest.model), request.run_dir / "adapter"
    quantization = trained["quantization"]
    if manifest.all_weights:
        trained |= {"name_or_path": str(request.run_dir / MODEL_FOLDER), "revision": None}
    if request.into == "original" and quantization == "none":
        raise UserError(f"{request.run_dir} was trained on its base as it is: leave --into out")
    kept = {"name_or_path", "revision", "chat_template", "template_kwargs", "dtype", "same_base"} & trained.keys()
    limit = release.settings["trainer"].get("max_completion_length", LONGEST_ANSWER)
    return Source(
        release,
        Model(**{key: trained[key] for key in kept}),
        quantization,
        None if manifest.all_weights else adapter,
        data,
        examples,
        request.max_new_tokens or limit,
    )


def check_place(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} is there already: choose another --out, or remove it")
    check_writable(folder, "--out")


def check(request: Request, source: Source) -> tuple[FoldedWeights, PreTrainedTokenizerBase]:
    """Everything that can be refused before a weight is read."""
    from transformers import AutoTokenizer

    from posttrain.models.adapter_checks import check_start
    from posttrain.models.chat import chat_ids, load_tokenizer
    from posttrain.models.checkpoint import check_base, check_context
    from posttrain.models.folded import FoldedWeights

    as_gguf = any(target.is_gguf for target in request.targets)
    if as_gguf:
        check_gguf_packages()
    base_tokenizer = load_tokenizer(source.settings)
    base = check_base(source.settings, source.quantization, base_tokenizer)
    prompts = (chat_ids(base_tokenizer, example.prompt, add_generation_prompt=True) for example in source.examples)
    check_context(base, max(map(len, prompts)), source.max_new_tokens, "--max-new-tokens")
    trained_with: PreTrainedTokenizerBase = base_tokenizer
    if source.adapter:
        check_start(source.adapter, source.settings, source.quantization, base, base_tokenizer, train=False, stores=True)
        if (source.adapter / "tokenizer_config.json").is_file():
            trained_with = AutoTokenizer.from_pretrained(source.adapter)
    into = "none" if request.into == "original" else source.quantization
    weights = FoldedWeights(source.settings, into, source.adapter)
    if as_gguf:
        from posttrain.export.gguf_file import check_writable as check_gguf
        from posttrain.export.gguf_vocabulary import check_vocabulary

        check_gguf(weights)
        check_vocabulary(trained_with)
    if any(target.format == "ollama" for target in request.targets):
        from posttrain.export.ollama import pieces_of

        pieces_of(trained_with)
    return weights, trained_with


def check_gguf_packages() -> None:
    import importlib.util

    from posttrain.export.runtimes import INSTALL, llama_cpp

    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"--format gguf and ollama need the package gguf: {INSTALL}")
    llama_cpp()

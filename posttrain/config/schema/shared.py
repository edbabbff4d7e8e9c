"""What the settings of every stage are made of: what a block of keys is, what it asks of a machine, tokenizer and model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from posttrain.config.yaml_lines import KeyPath

MODEL_FOLDER = "model"  # of a run that trained all weights, as "adapter" is of others
Share = Annotated[float, Field(ge=0, lt=1)]
CommitId = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]  # a branch would move under a published number
Engine = Literal["transformers", "continuous_batching", "vllm"]
# nf4_unpacked holds the values of nf4 as bf16: faster, with nearly four times the memory
Quantization = Literal["nf4", "nf4_unpacked", "none"]
Attention = Literal[
    "auto", "matmul", "varlen", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
]
Kernels = Literal["auto", "liger", "torch"]
Tracker = Literal["wandb", "trackio", "tensorboard", "mlflow"]
Tracking = Tracker | Literal["none"] | Annotated[list[Tracker], Field(min_length=1)]


def _filled_in(path: str) -> str:
    """A path with its `~`. What a shell or another tool would fill in besides is told: else a folder would get that name."""
    if found := re.search(r"\$\{?[A-Za-z_]\w*\}?|\{[A-Za-z_]\w*\}", path):
        raise PydanticCustomError("rule", "{name} is not filled in here: write it out", {"name": found[0]})
    return os.path.expanduser(path)


Place = Annotated[str, AfterValidator(_filled_in)]  # a path; where the Hub has such things, one of its ids


class Need(NamedTuple):
    """What a machine or a launch must have for some setting."""

    what: Literal["cuda", "fp8", "unsharded", "one process"] | str  # or a package
    otherwise: str  # what to tell the user of a machine without it


def needs_cuda(setting: str, remedy: str) -> Need:
    return Need("cuda", f"{setting} needs CUDA, and this machine has none: {remedy}")


def needs_vllm(key: str) -> Need:
    return Need("vllm", f"{key} vllm needs the package: pip install 'posttrain[vllm]' on a GPU machine, or {key}=transformers")


def trackers_of(tracking: Tracking) -> list[str]:
    """The names, without those that are given twice."""
    names = tracking if isinstance(tracking, list) else [tracking]
    return [name for name in dict.fromkeys(names) if name != "none"]


def needs_trackers(tracking: Tracking) -> Iterator[Need]:
    for name in trackers_of(tracking):
        yield Need(name, f"tracking {name} needs the package: pip install {name}, or leave it out of tracking")


class Settings(BaseModel):
    """A block of keys. An int may stand for a float; nothing else is converted: "no" is text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True, use_attribute_docstrings=True
    )

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        """Faults of several keys together, each with the key that it is reported at."""
        yield from ()

    def needs(self) -> Iterator[Need]:
        """What these settings ask of the machine, in the order in which a lack is told."""
        yield from ()

    def less_memory(self, batch_size: int | None = None) -> str:
        """What to set when memory runs out. `batch_size` is that of a run that chose its own."""
        return "close other programs, or take a machine with more memory"

    @model_validator(mode="after")
    def _has_no_problems(self) -> Settings:
        details = [
            InitErrorDetails(type=PydanticCustomError("rule", "{text}", {"text": text}), loc=path, input=None)
            for path, text in self.problems()
        ]
        if details:
            raise ValidationError.from_exception_data(type(self).__name__, details)
        return self


class Tokenizer(Settings):
    name_or_path: Place
    """A folder, or an id of the Hub. [in posttrain/models/chat.py]"""
    revision: str | None = None
    """The commit of a Hub id; null is its newest. [in posttrain/models/chat.py]"""
    chat_template: Place | None = None
    """A .jinja file to use in place of the tokenizer's template, or where it has none. [in posttrain/models/chat.py]"""
    template_kwargs: dict[str, bool | int | float | str] = {}
    """Arguments of the chat template, as enable_thinking: false; they are saved with the adapter.
    [in posttrain/models/templates.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        for name in self.template_kwargs:
            if name in ("messages", "tools", "documents", "add_generation_prompt") or name.endswith("_token"):
                yield ("template_kwargs", name), "is not a setting: every rendering has its own"
            elif not name.isidentifier():
                yield ("template_kwargs", name), "is no name of a template's argument"


class Model(Tokenizer):
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """What weights and activations are computed in; an adapter's master weights are fp32 whatever this says.
    [in posttrain/models/base.py]"""
    attn_implementation: Attention = "auto"
    """How attention is computed; auto is varlen on a GPU and matmul on a CPU. [in posttrain/models/base.py]"""
    same_base: bool = False
    """true: this is the adapter's own base under another name, so the check of names and weights is left out.
    [in posttrain/models/adapter_checks.py]"""
    kernels: Kernels = "auto"
    """Norm, rotary embedding and MLP: auto is Liger's on a GPU where it is installed, torch the model's own.
    [in posttrain/kernels/liger.py]"""

    decoding: Literal["auto", "loop", "seats"] = "auto"
    """How completions are decoded: seats is a GPU's fast path, and auto takes it where model, card and dtype are for it.
    [in posttrain/generation/decoder.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        yield from super().problems()
        if self.decoding == "seats" and self.kernels == "torch":
            yield ("decoding",), "seats are fused kernels: use model.kernels=auto, or model.decoding=loop"
        if self.decoding == "seats" and self.dtype == "float32":
            yield ("decoding",), "seats compute in 16 bits: use model.dtype=bfloat16, or model.decoding=loop"

    def needs(self) -> Iterator[Need]:
        if self.decoding == "seats":
            yield needs_cuda("model.decoding seats", "use model.decoding=loop")
            yield Need("triton", "model.decoding seats needs the package: pip install 'posttrain[liger]', or model.decoding=loop")
        if self.attn_implementation.startswith("flash_attention_"):
            setting = f"model.attn_implementation {self.attn_implementation}"
            yield needs_cuda(setting, "use model.attn_implementation=sdpa")
        if self.kernels == "liger":
            install = "pip install 'posttrain[liger]', or model.kernels=torch"
            yield needs_cuda("model.kernels liger", "use model.kernels=torch")
            yield Need("liger_kernel", f"model.kernels liger needs the package: {install}")
        if self.dtype == "float16":
            yield needs_cuda("model.dtype float16", "use model.dtype=bfloat16")

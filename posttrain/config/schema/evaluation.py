"""evaluate.py: which questions, and how they are answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from posttrain.config.schema.shared import (
    MODEL_FOLDER,
    Engine,
    Model,
    Need,
    Place,
    Quantization,
    Settings,
    Tracking,
    needs_trackers,
    needs_vllm,
)
from posttrain.config.yaml_lines import KeyPath


class Generation(Settings):
    max_new_tokens: PositiveInt = 512
    """A completion is cut off here. [tokens, in posttrain/generation/loop.py]"""
    samples: PositiveInt = 1
    """Completions of each question; above 1 for pass@k and maj@k. [in evaluate.py]"""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of sampling; 0 is greedy. [in posttrain/generation/loop.py]"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens with this share of the probability. [share, in posttrain/generation/loop.py]"""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Completions that are decoded at once; auto fits them to memory. [completions, in evaluate.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.samples > 1 and self.temperature == 0:
            yield ("samples",), f"{self.samples} greedy samples would be equal: set temperature above 0"


class EvalData(Settings):
    path: Place
    """A folder that data_prep.py wrote. [in evaluate.py]"""
    split: Literal["train", "dev", "test"] = "test"
    """Which of its splits is asked. [in evaluate.py]"""
    limit: PositiveInt | None = None
    """The first so many questions alone: every report of the number says so; null is all. [questions, in evaluate.py]"""


class EvalConfig(Settings):
    """evaluate.py"""

    run_dir: Place
    """The run's folder; {adapter} in it becomes the name of the adapter's run, or base. [in posttrain/runs/directory.py]"""
    name: str | None = None
    """The label in the report; null is the folder's name. [in evaluate.py]"""
    model: Model
    """The base model. [in posttrain/models/base.py]"""
    quantization: Quantization = "nf4"
    """How the base is held: see quantization of the trainings. [in posttrain/models/base.py]"""
    adapter: Place | None = None
    """A run directory, an adapter's folder or a Hub id; null is the base alone. [in posttrain/models/adapters.py]"""
    data: EvalData
    """Which questions are asked. [in evaluate.py]"""
    generation: Generation = Generation()
    """How they are answered. [in evaluate.py]"""
    engine: Engine = "transformers"
    """What makes the completions: transformers is this project's own loop. [in posttrain/generation/engines.py]"""
    seed: NonNegativeInt = 0
    """Of sampling. [in posttrain/generation/loop.py]"""
    tracking: Tracking = "none"
    """Who is told the result, one or a list: in the tracked run of the adapter, or one of its own. [in posttrain/tracking.py]"""

    def needs(self) -> Iterator[Need]:
        if self.engine == "vllm":
            yield needs_vllm("engine")
        yield from self.model.needs()
        yield from needs_trackers(self.tracking)

    def less_memory(self, batch_size: int | None = None) -> str:
        size = batch_size or self.generation.batch_size
        smaller = [f"generation.batch_size={max(1, size // 2) if isinstance(size, int) else 8}"]
        more = [] if self.quantization == "nf4" else ["quantization=nf4"]
        return f"smaller batches take less: {' '.join([*smaller, *more])} run_dir={self.run_dir}_smaller"

    @model_validator(mode="before")
    @classmethod
    def _one_run_dir_for_each_adapter(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("run_dir"), str):
            adapter = _run_name(str(values.get("adapter") or _model_folder(values.get("model")) or "base"))
            return values | {"run_dir": values["run_dir"].replace("{adapter}", adapter)}
        return values


def _model_folder(model: Any) -> str | None:
    """The name of a base that a run with all weights trained has left: runs/sft/model."""
    name = str(model.get("name_or_path", "")) if isinstance(model, dict) else ""
    return name if PurePath(name).name == MODEL_FOLDER and PurePath(name).parent.name else None


def _run_name(trained: str) -> str:
    """runs/grpo/adapter, runs/grpo, runs/grpo/model, me/grpo -> grpo"""
    path = PurePath(trained)
    return path.parent.name if path.name in ("adapter", MODEL_FOLDER) else path.name

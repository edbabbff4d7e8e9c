"""What both trainings share, and SFT.

The `trainer` block holds TRL's own keys. The installed TRL says which there are (trl_fields.py): no key is renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
)

from posttrain.config.schema.shared import Model, Need, Place, Quantization, Settings, Share, Tracking, needs_cuda, needs_trackers
from posttrain.config.trl_batches import less_at_once, sft_problems
from posttrain.config.trl_fields import TrlKeys
from posttrain.config.yaml_lines import KeyPath


def needs_whole_model(setting: str, why: str, remedy: str) -> Need:
    return Need("unsharded", f"{setting} {why}, and FSDP shards the model: launch with configs/accelerate/ddp.yaml, or {remedy}")


class Lora(Settings):
    """A new adapter. Its weights are fp32 for the optimizer, whatever `model.dtype` says."""

    r: PositiveInt
    """Rank of the two matrices. [in posttrain/models/adapters.py]"""
    alpha: PositiveInt
    """The adapter is scaled by alpha / r. [in posttrain/models/adapters.py]"""
    dropout: Share = 0.0
    """Share of the adapter's inputs that a training step drops; GRPO trains without. [share, in posttrain/models/adapters.py]"""
    target_modules: Annotated[
        list[str], Field(min_length=1), BeforeValidator(lambda value: [value] if value == "all-linear" else value)
    ]
    """Which layers get an adapter: whole last parts of their names, or all-linear. [in posttrain/models/adapters.py]"""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r. [in posttrain/models/adapters.py]"""
    train_special_tokens: Literal["auto", "always", "never"] = "auto"
    """Train the rows of the template's special tokens: auto those that the base left untrained.
    [in posttrain/models/adapters.py]"""


class PassRate(Settings):
    """Keep the questions that an evaluation run over the train split solved in some samples, not in all."""

    run_dir: Place
    """An evaluation run of the train split with several samples of each question. [in posttrain/training/examples.py]"""
    low: Share = 0.1
    """Leave out questions that it solved in a smaller share of samples. [share, in posttrain/training/examples.py]"""
    high: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Leave out questions that it solved in a larger share of samples. [share, in posttrain/training/examples.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.low >= self.high:
            yield ("low",), f"low {self.low} must be below high {self.high}"


class TrainData(Settings):
    path: Place
    """A folder that data_prep.py wrote. [in posttrain/training/examples.py]"""
    num_train: PositiveInt | None = None
    """The first so many rows of the train split; null is all. [rows, in posttrain/training/examples.py]"""
    num_dev: NonNegativeInt = 200
    """The first so many rows of the dev split, for dev accuracy; 0 measures none. [rows, in posttrain/training/examples.py]"""
    pass_rate: PassRate | None = None
    """Keep the questions that an evaluation solved sometimes. [in posttrain/training/examples.py]"""


class Hub(Settings):
    repo_id: str | None = None
    """Where the finished adapter is pushed; null pushes nothing. [in posttrain/training/checkpoints.py]"""
    private: bool = True
    """Whether a repository that the push creates is private. [in posttrain/hub/push.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.repo_id is not None and not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", self.repo_id, re.ASCII):
            yield ("repo_id",), "is not of the form OWNER/NAME, of letters, digits, `-`, `_` and `.`"


class TrainConfig(Settings):
    """What SFT and GRPO share."""

    run_dir: Place
    """The run's folder: config, manifest, metrics, checkpoints, adapter. [in posttrain/runs/directory.py]"""
    model: Model
    """The base model. [in posttrain/models/base.py]"""
    quantization: Quantization = "nf4"
    """nf4 holds the base in 4 bits; nf4_unpacked holds the same values as bf16, faster and nearly four times as large.
    [in posttrain/models/base.py]"""
    adapter: Place | None = None
    """What is continued: a run directory, an adapter's folder or a Hub id. [in posttrain/models/adapters.py]"""
    lora: Lora | None = None
    """The shape of a new adapter; null, and no adapter: all weights train. [in posttrain/models/adapters.py]"""
    data: TrainData
    """What it trains on. [in posttrain/training/examples.py]"""
    trainer: dict[str, Any] = {}
    """TRL's own keys, checked against the installed TRL. [in posttrain/training/arguments.py]"""
    tracking: Tracking = "none"
    """Who is told beside the run directory, one or a list: settings, curves, sampled completions. [in posttrain/tracking.py]"""
    hub: Hub = Hub()
    """Whether the finished adapter is pushed. [in posttrain/training/checkpoints.py]"""
    seed: NonNegativeInt = 42
    """Of a new adapter, the order of rows, dropout and sampling. [in posttrain/training/arguments.py]"""
    fast_adapter: bool = True
    """Compute a layer and its LoRA adapter as one operation, in place of PEFT's dozen. [in posttrain/training/masters.py]"""
    lean_layers: bool = False
    """Compute norms and gated products again in the backward pass instead of keeping them. [in posttrain/training/masters.py]"""
    layer_graphs: bool = False
    """Replay each decoder layer of a training step as a CUDA graph; it needs packed rows. [in posttrain/training/masters.py]"""
    dev_every_steps: PositiveInt | None = None
    """Dev accuracy every so many steps; null: before and after training alone. [steps, in sft_train.py and grpo_train.py]"""
    trl_class: ClassVar[str]

    @property
    def trains_all_weights(self) -> bool:
        return self.adapter is None and self.lora is None

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.trains_all_weights and "lora" not in self.model_fields_set:
            yield (
                ("lora",),
                "missing: the shape of the new adapter (or give adapter, to continue one; or lora: null, to train all weights)",
            )
        elif self.trains_all_weights and self.quantization != "none":
            yield (
                ("quantization",),
                f"lora null trains all weights, and {self.quantization} cannot be trained: set none, or lora",
            )
        if self.lean_layers and not self.fast_adapter:
            yield ("lean_layers",), "runs each adapted layer as one operation: set fast_adapter to true, or this to false"
        if self.lean_layers and self.trains_all_weights:
            yield ("lean_layers",), "runs layers that have an adapter: set false, or give lora"
        if self.layer_graphs and self.trains_all_weights:
            yield ("layer_graphs",), "replays layers that have an adapter: set false, or give lora"
        if self.layer_graphs and self.trainer.get("activation_offloading"):
            yield ("layer_graphs",), "keeps activations where they are: set false, or remove trainer.activation_offloading"

    def needs(self) -> Iterator[Need]:
        if self.trains_all_weights:
            yield needs_whole_model("lora null", "trains all weights, and that is tried with whole ones alone", "give lora")
        yield from self.model.needs()
        yield from needs_trackers(self.tracking)
        if self.trainer.get("tf32"):
            yield needs_cuda("trainer.tf32 True", "remove it")
        if self.trainer.get("activation_offloading"):
            yield needs_cuda("trainer.activation_offloading", "remove it")
        if self.trainer.get("use_liger_kernel"):
            yield Need("liger_kernel", "trainer.use_liger_kernel needs the package: pip install 'posttrain[liger]', or remove it")
        if self.layer_graphs:
            yield needs_cuda("layer_graphs", "set it to false")
            yield Need("one process", "layer_graphs is tried in one process alone: launch with python, or set it to false")

    def less_memory(self, batch_size: int | None = None) -> str:
        """Overrides with which an optimizer step has the same rows, fewer of them at once."""
        more = [] if self.quantization == "nf4" else ["quantization=nf4"]
        changes = [*less_at_once(self.trainer, self.trl_class), *more]
        return f"the same batch in smaller parts takes less: {' '.join(changes)} run_dir={self.run_dir}_smaller"


class SftConfig(TrainConfig):
    """sft_train.py: trains a new adapter (`lora`), continues one (`adapter`), or trains all weights (`lora: null`)."""

    trainer: Annotated[dict[str, Any], TrlKeys("SFTConfig")] = {}
    """TRL's keys of SFTConfig, checked against the installed TRL. [in posttrain/training/arguments.py]"""
    fast_loss: bool = True
    """Score labelled positions alone with a head of our own; its loss is compared with the model's once a run.
    [in sft_train.py]"""
    compile: bool = False
    """Compile the decoder layers, which takes a minute at the start. [in sft_train.py]"""
    trl_class: ClassVar[str] = "SFTConfig"

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        yield from super().problems()
        if self.adapter and self.lora:
            yield ("lora",), "an adapter that is continued keeps its shape: remove lora or adapter"
        if self.compile and self.lean_layers:
            yield ("lean_layers",), "compile chooses itself what a layer keeps: set one of the two to false"
        if self.compile and self.layer_graphs:
            yield ("layer_graphs",), "compile runs the layers itself: set one of the two to false"
        if self.layer_graphs and self.lora and self.lora.dropout:
            yield ("layer_graphs",), "would drop the same values in every step: set false, or lora.dropout to 0"
        if self.layer_graphs and not self.trainer.get("packing"):
            yield ("layer_graphs",), "replays packed rows alone: set trainer.packing to true, or this to false"
        if self.compile and self.model.kernels == "liger":
            yield ("model", "kernels"), "compile fuses these operations itself: set auto or torch, or compile to false"
        if self.trainer.get("eval_strategy", "no") != "no" and not self.data.num_dev:
            yield ("trainer", "eval_strategy"), "needs dev rows: set data.num_dev above 0, or eval_strategy to no"
        if self.trainer.get("eval_on_start") and not self.data.num_dev:
            yield ("trainer", "eval_on_start"), "needs dev rows: set data.num_dev above 0, or remove it"
        for key, text in sft_problems(self.trainer):
            yield ("trainer", key), text

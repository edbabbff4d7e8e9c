"""GRPO: rewards, rollouts, which questions come next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
)

from posttrain.config.messages import did_you_mean
from posttrain.config.schema.shared import Engine, Need, Place, Settings, needs_vllm
from posttrain.config.schema.training import TrainConfig, needs_whole_model
from posttrain.config.trl_batches import SHARDED_LAUNCH, group_problems
from posttrain.config.trl_fields import TrlKeys
from posttrain.config.yaml_lines import KeyPath


class Reward(Settings):
    """A reward by name, where it needs more than a weight."""

    weight: float
    """What its values are multiplied by. [reward, in posttrain/training/named_rewards.py]"""
    gate: str | None = None
    """The name of another reward: this one pays only where that one pays more than 0.
    [in posttrain/training/named_rewards.py]"""
    args: dict[str, Any] = {}
    """Keyword arguments of its function. [in posttrain/training/named_rewards.py]"""


def _weight_or_block(value: Any) -> str:
    return "block" if isinstance(value, dict | Reward) else "weight"


BUILT_IN_REWARDS = ("overlong", "repetition", "tags")  # beside the two that grade (training/built_in_rewards.py)


class Rewards(Settings):
    """Weights. Further keys are rewards by name: one of BUILT_IN_REWARDS, file.py:function or package.module.function."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[
        str, Annotated[Annotated[float, Tag("weight")] | Annotated[Reward, Tag("block")], Discriminator(_weight_or_block)]
    ] = Field(init=False)

    correctness: float = 1.0
    """Paid for a right answer. [reward, in posttrain/training/rollouts.py]"""
    format: float = 0.2
    """Paid for an answer in the asked form. [reward, in posttrain/training/rollouts.py]"""
    gate_format: bool = False
    """Pay for the form only where the answer is right. [in posttrain/training/rollouts.py]"""

    def named(self) -> dict[str, Reward]:
        """The rewards by name, in the order of the config."""
        more = self.__pydantic_extra__ or {}
        return {name: said if isinstance(said, Reward) else Reward(weight=said) for name, said in more.items()}

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        named = self.named()
        for name, reward in named.items():
            if not is_own_reward(name) and name not in BUILT_IN_REWARDS:
                hint = did_you_mean(name, ("correctness", "format", "gate_format", *BUILT_IN_REWARDS)).replace(
                    "'", "'rewards.", 1
                )
                names = f": built in are {', '.join(BUILT_IN_REWARDS)}; your own is file.py:function or package.module.function"
                yield (name,), f"unknown key{hint or names}"
            others = [other for other in ("correctness", "format", *named) if other != name]
            if reward.gate is not None and reward.gate not in others:
                yield (name,), f"gate {reward.gate!r} is no other reward of this config{did_you_mean(reward.gate, others)}"
        if not any([self.correctness, self.format, *(reward.weight for reward in named.values())]):
            yield (), "every weight is 0, and nothing would be learnt: give one reward a weight"


def is_own_reward(name: str) -> bool:
    return ":" in name or "." in name


class Rollouts(Settings):
    engine: Literal[Engine, "trl"] = "transformers"
    """What makes the completions: transformers is this project's own loop, trl leaves it to TRL.
    [in posttrain/training/rollouts.py]"""
    batch_size: PositiveInt | None = None
    """Completions that are decoded at once; null is the whole generation batch.
    [completions, in posttrain/training/rollouts.py]"""
    skip_zero_signal: bool = False
    """Leave completions without an advantage out of the update; needs trainer.beta 0. [in posttrain/training/grpo_trainer.py]"""
    correct_mismatch: bool = False
    """Clip against the sampler's log-probabilities instead of the trainer's. [in posttrain/training/grpo_trainer.py]"""
    weights: Literal["fp8"] | None = None
    """fp8 rounds the copy that generates to 8 bits, and each token's gain is weighed for that; null keeps model.dtype.
    [in posttrain/kernels/fp8_linear.py]"""
    cache: Literal["fp8"] | None = None
    """fp8 keeps the keys and values of that copy in 8 bits, too; null keeps model.dtype. [in posttrain/kernels/decoding.py]"""


class Curriculum(Settings):
    """Which questions are asked next, by what the rollouts have shown (posttrain/training/curriculum.py)."""

    rest_steps: NonNegativeInt = 0
    """A question solved always or never is not asked for so many steps; 0: none rests.
    [steps, in posttrain/training/curriculum.py]"""
    extra_rounds: NonNegativeInt = 0
    """How often in a window groups without signal are replaced by those of other questions.
    [in posttrain/training/curriculum.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if not self.rest_steps and not self.extra_rounds:
            yield (), "does nothing as it is: set rest_steps or extra_rounds above 0, or remove it"


class GrpoConfig(TrainConfig):
    """grpo_train.py: continues an adapter, or merges it into the base and trains a new one (`lora`).

    With `adapter: null` it starts from the model itself: a new adapter (`lora`), or all of its weights (`lora: null`).
    """

    adapter: Place | None
    """What GRPO starts from: a run directory, an adapter's folder or a Hub id; null: the model itself.
    [in posttrain/models/adapters.py]"""
    adapter_mode: Literal["continue", "rescale", "merge_and_new"] = "continue"
    """continue its adapter, rescale it to lora.alpha, or merge it into the base under a new one.
    [in posttrain/models/adapter_modes.py]"""
    rewards: Rewards = Rewards()
    """What a completion is paid for, and how much: further keys are rewards by name (docs/rewards.md).
    [in posttrain/training/rollouts.py]"""
    curriculum: Curriculum | None = None
    """Which questions are asked next; null: every question once an epoch. [in posttrain/training/curriculum.py]"""
    unmet_after_steps: PositiveInt = 10
    """Say after so many steps which share of groups each reward has paid anything. [steps, in grpo_train.py]"""
    rollouts: Rollouts = Rollouts()
    """How completions are made and used. [in posttrain/training/rollouts.py]"""
    update_tokens: PositiveInt | None = None
    """Positions that the update runs at once, padding included; null: those of a micro-batch.
    [tokens, in posttrain/training/grpo_trainer.py]"""
    trainer: Annotated[dict[str, Any], TrlKeys("GRPOConfig")] = {}
    """TRL's keys of GRPOConfig, checked against the installed TRL. [in posttrain/training/arguments.py]"""
    trl_class: ClassVar[str] = "GRPOConfig"

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        yield from super().problems()
        if self.adapter is None and self.adapter_mode != "continue":
            yield ("adapter_mode",), f"{self.adapter_mode} needs an adapter: give adapter, or remove adapter_mode"
        if self.adapter and self.adapter_mode == "continue" and self.lora:
            other = "rescale (another alpha) or merge_and_new"
            yield ("lora",), f"adapter_mode continue keeps the adapter's shape: remove lora, or use {other}"
        if self.adapter and self.adapter_mode != "continue" and not self.lora:
            yield ("lora",), f"missing: adapter_mode {self.adapter_mode} needs the shape of the new adapter"
        for key in ("use_vllm", "use_transformers_continuous_batching"):
            if self.trainer.get(key) and self.rollouts.engine != "trl":
                yield ("trainer", key), "needs rollouts.engine trl; posttrain's own engines are named there"
        if self.curriculum and self.rollouts.engine != "transformers":
            why = f"{self.rollouts.engine} does not draw the same completions again after an interruption"
            yield ("curriculum",), f"needs rollouts.engine transformers: {why}; set that, or remove curriculum"
        if self.rollouts.weights:
            yield from self._problems_of_8_bits()
        elif self.rollouts.cache:
            yield (
                ("rollouts", "cache"),
                "is of a copy that is weighed for: set rollouts.weights fp8, or remove it",
            )
        if self.rollouts.cache and self.model.decoding == "loop":
            yield ("rollouts", "cache"), "is of seats: remove it, or model.decoding loop"
        if self.layer_graphs and not self.update_tokens:
            yield ("layer_graphs",), "replays packed rows of a known size: set update_tokens, or this to false"
        if self.rollouts.skip_zero_signal and self.trainer.get("beta"):
            yield ("rollouts", "skip_zero_signal"), "needs trainer.beta 0: a KL term reaches every completion"
        if self.trainer.get("eval_strategy", "no") != "no" or self.trainer.get("eval_on_start"):
            yield (
                ("trainer", "eval_strategy"),
                "GRPO has no evaluation loss: dev_every_steps measures accuracy on the dev questions",
            )
        if self.trainer.get("fsdp"):
            yield ("trainer", "fsdp"), SHARDED_LAUNCH
        for key, text in group_problems(self.trainer):
            yield ("trainer", key), text

    def _problems_of_8_bits(self) -> Iterator[tuple[KeyPath, str]]:
        key = "rollouts", "weights"
        if self.rollouts.engine != "transformers":
            yield key, f"is of posttrain's own rollouts: remove it, or rollouts.engine {self.rollouts.engine}"
        if self.rollouts.correct_mismatch:
            yield key, "weighs for the mismatch that rollouts.correct_mismatch clips against: remove one of the two"
        if self.trains_all_weights:
            yield key, "rounds a base with its adapter folded in: remove it, or give lora"
        if self.model.dtype != "bfloat16":
            yield key, "is tried on a base in bfloat16 alone: set model.dtype to that, or remove it"

    def needs(self) -> Iterator[Need]:
        if self.rollouts.weights:
            yield Need("fp8", "rollouts.weights fp8 needs a GPU with products in 8 bits (Hopper or later): set it to null")
            ddp = "launch with configs/accelerate/ddp.yaml, or set it to null"
            yield Need("unsharded", f"rollouts.weights fp8 is not tried under FSDP: {ddp}")
        if self.rollouts.engine == "vllm":
            yield needs_vllm("rollouts.engine")
        if self.trainer.get("use_vllm"):
            yield Need("vllm", "trainer.use_vllm needs the package: pip install 'posttrain[vllm]' on a GPU machine, or remove it")
        if self.curriculum:
            yield Need("one process", "curriculum draws questions in one process: launch with python alone, or remove curriculum")
        if self.rollouts.engine == "trl":
            yield needs_whole_model(
                "rollouts.engine trl", "generates with the model that trains", "use rollouts.engine=transformers"
            )
        if self.update_tokens:
            yield needs_whole_model("update_tokens", "cuts each process's rows into parts of its own", "remove it")
        if self.adapter_mode == "merge_and_new":
            yield needs_whole_model(
                "adapter_mode merge_and_new", "writes a merged base in every process", "use rescale or continue"
            )
        yield from super().needs()

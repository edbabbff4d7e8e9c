"""What a config may say: the typed blocks of every YAML, the rules between keys, and what settings ask of a machine.

The `trainer` block holds TRL's own keys. The installed TRL says which there are (trl_fields.py): no key is renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from posttrain.config.trl_batches import SHARDED_LAUNCH, group_problems, less_at_once, sft_problems
from posttrain.config.trl_fields import TrlKeys
from posttrain.config.yaml_lines import KeyPath

Share = Annotated[float, Field(ge=0, lt=1)]
CommitId = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]  # a branch would move under a published number
Engine = Literal["transformers", "continuous_batching", "vllm"]
# nf4_unpacked holds the values of nf4 as bf16: faster, with nearly four times the memory
Quantization = Literal["nf4", "nf4_unpacked", "none"]
Attention = Literal[
    "auto", "matmul", "varlen", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
]
Kernels = Literal["auto", "liger", "torch"]
Tracking = Literal["wandb", "trackio", "tensorboard", "none"]


class Need(NamedTuple):
    """What a machine or a launch must have for some setting."""

    what: Literal["cuda", "vllm", "liger_kernel", "triton", "unsharded"]
    otherwise: str  # what to tell the user of a machine without it


def _needs_cuda(setting: str, remedy: str) -> Need:
    return Need("cuda", f"{setting} needs CUDA, and this machine has none: {remedy}")


def _needs_vllm(key: str) -> Need:
    return Need("vllm", f"{key} vllm needs the package: pip install 'posttrain[vllm]' on a GPU machine, or {key}=transformers")


def _needs_whole_policy(what: str, remedy: str = "") -> Need:
    launch = "launch with configs/accelerate/ddp.yaml"
    return Need("unsharded", f"{what} come from a whole copy of the policy, and FSDP shards it: {remedy}{launch}")


class Settings(BaseModel):
    """A block of keys. An int may stand for a float; nothing else is converted: "no" is text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

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


# --- blocks -------------------------------------------------------------------------------------------------


class Tokenizer(Settings):
    name_or_path: str  # a folder or a Hub id
    revision: str | None = None
    chat_template: str | None = None  # a .jinja file, for a model that ships no template, or to pin the template
    template_kwargs: dict[str, bool | int | float | str] = {}  # arguments of the template, as enable_thinking: false

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        for name in self.template_kwargs:
            if name in ("messages", "tools", "documents", "add_generation_prompt") or name.endswith("_token"):
                yield ("template_kwargs", name), "is not a setting: every rendering has its own"
            elif not name.isidentifier():
                yield ("template_kwargs", name), "is no name of a template's argument"


class Model(Tokenizer):
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    attn_implementation: Attention = "auto"  # varlen on a GPU, matmul on a CPU (posttrain/kernels/attention.py)
    same_base: bool = False  # true: these are the adapter's own base, under another name (posttrain/models/adapters.py)
    kernels: Kernels = "auto"  # of norm, rotary embedding, MLP: Liger's on a GPU (posttrain/kernels/liger.py), else torch's own

    decoding: Literal["loop", "seats"] = "loop"  # seats: a GPU's fast path (posttrain/generation/seats.py), not yet the default

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        yield from super().problems()
        if self.decoding == "seats" and self.kernels == "torch":
            yield ("decoding",), "seats are fused kernels: use model.kernels=auto, or model.decoding=loop"
        if self.decoding == "seats" and self.dtype == "float32":
            yield ("decoding",), "seats compute in 16 bits: use model.dtype=bfloat16, or model.decoding=loop"

    def needs(self) -> Iterator[Need]:
        if self.decoding == "seats":
            yield _needs_cuda("model.decoding seats", "use model.decoding=loop")
            yield Need("triton", "model.decoding seats needs the package: pip install 'posttrain[liger]', or model.decoding=loop")
        if self.attn_implementation.startswith("flash_attention_"):
            setting = f"model.attn_implementation {self.attn_implementation}"
            yield _needs_cuda(setting, "use model.attn_implementation=sdpa")
        if self.kernels == "liger":
            install = "pip install 'posttrain[liger]', or model.kernels=torch"
            yield _needs_cuda("model.kernels liger", "use model.kernels=torch")
            yield Need("liger_kernel", f"model.kernels liger needs the package: {install}")
        if self.dtype == "float16":
            yield _needs_cuda("model.dtype float16", "use model.dtype=bfloat16")


class Lora(Settings):
    """A new adapter. Its weights are fp32 for the optimizer, whatever `model.dtype` says."""

    r: PositiveInt
    alpha: PositiveInt
    dropout: Share = 0.0
    # whole last parts of layers' names, or all-linear
    target_modules: Annotated[
        list[str], Field(min_length=1), BeforeValidator(lambda value: [value] if value == "all-linear" else value)
    ]
    use_rslora: bool = False  # scale by alpha / sqrt(r) instead of alpha / r
    train_special_tokens: Literal["auto", "always", "never"] = "auto"  # auto: those whose rows are untrained


class PassRate(Settings):
    """Keep the questions that an evaluation run over the train split solved in some samples, not in all."""

    run_dir: str
    low: Share = 0.1
    high: Annotated[float, Field(gt=0, le=1)] = 0.9

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.low >= self.high:
            yield ("low",), f"low {self.low} must be below high {self.high}"


class TrainData(Settings):
    path: str  # a folder written by data_prep.py
    num_train: PositiveInt | None = None
    num_dev: NonNegativeInt = 200  # 0: no dev evaluation
    pass_rate: PassRate | None = None


class Hub(Settings):
    repo_id: str | None = None  # None: nothing is pushed
    private: bool = True

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.repo_id is not None and not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", self.repo_id, re.ASCII):
            yield ("repo_id",), "is not of the form OWNER/NAME, of letters, digits, `-`, `_` and `.`"


class Rewards(Settings):
    """Weights. A further field `x` is the weight of `x_reward` in rewards.py."""

    correctness: float = 1.0
    format: float = 0.2
    gate_format: bool = False  # pay for the format only where the answer is right

    def others(self) -> dict[str, float]:
        own = ("correctness", "format", "gate_format")
        return {name: weight for name, weight in self if name not in own and weight}


class Rollouts(Settings):
    engine: Literal[Engine, "trl"] = "transformers"
    batch_size: PositiveInt | None = None  # sequences decoded at once; None: the whole generation batch
    skip_zero_signal: bool = False  # leave completions without an advantage out of the update; needs beta 0
    correct_mismatch: bool = False  # clip against the sampler's log-probabilities instead of the trainer's


class Generation(Settings):
    max_new_tokens: PositiveInt = 512
    samples: PositiveInt = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: PositiveInt | Literal["auto"] = "auto"

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.samples > 1 and self.temperature == 0:
            yield ("samples",), f"{self.samples} greedy samples would be equal: set temperature above 0"


class EvalData(Settings):
    path: str
    split: Literal["train", "dev", "test"] = "test"
    limit: PositiveInt | None = None  # a subset; every report of its number says so


class Prompt(Settings):
    style: Literal["chat", "few_shot"] = "chat"
    system: str | None = None
    instruction: str  # holds {question}
    num_shots: NonNegativeInt = 0
    shots: str | None = None  # JSONL of solved examples, {question, answer} as in GSM8K; null: training rows, chosen by hash

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if "{question}" not in self.instruction:
            yield ("instruction",), "must contain {question}, where the question goes"
        if self.style == "few_shot" and self.num_shots == 0:
            yield ("num_shots",), "style few_shot needs at least 1"
        if self.style == "chat" and self.num_shots > 0:
            yield (
                ("num_shots",),
                f"style chat shows no solved examples: use style few_shot for {self.num_shots}",
            )
        if self.style == "chat" and self.shots is not None:
            yield ("shots",), f"style chat shows no solved examples: use style few_shot for {self.shots}"


class HubSource(Settings):
    kind: Literal["hub"]
    repo_id: str
    revision: CommitId
    config_name: str = "main"


class JsonlSource(Settings):
    kind: Literal["jsonl"]
    path: str  # a folder with train.jsonl and test.jsonl, rows {"question", "answer"}


class GeneratorSource(Settings):
    kind: Literal["leg_counting", "gsm_symbolic"]
    num_train: PositiveInt
    num_dev: PositiveInt
    num_test: PositiveInt
    options: dict[str, int | float | str] = {}  # for reasoning_gym.create_dataset


class SvampSource(Settings):
    kind: Literal["svamp"]
    path: str  # SVAMP.json; every row is a test row


class RejectionSampledSource(Settings):
    """The distinct, correct solutions among the samples of an evaluation run of the train split."""

    kind: Literal["rejection_sampled"]
    run_dir: str
    max_per_question: PositiveInt = 4
    prefer: Literal["first", "shortest"] = "first"  # which of a question's solutions, where it has more
    # rewritten: also right answers in another form, of completions that ended by themselves, with a last line `#### <number>`
    accept: Literal["strict", "rewritten"] = "strict"
    with_gold: bool = False  # the worked solutions of all questions as well, as in the paper (arXiv 2308.01825)


Source = HubSource | JsonlSource | GeneratorSource | SvampSource | RejectionSampledSource

# --- stages -------------------------------------------------------------------------------------------------


class DataConfig(Settings):
    """data_prep.py"""

    name: str
    output_dir: str
    seed: NonNegativeInt = 0
    source: Annotated[Source, Field(discriminator="kind")]
    calculator_marks: Literal["keep", "strip"] = "strip"
    prompt: Prompt
    dev_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.03  # of train, chosen by the hash of the question
    tokenizer: Tokenizer
    max_length: PositiveInt = 512
    max_rejected: NonNegativeInt = 0  # with more bad rows than this, nothing is written


class TrainConfig(Settings):
    """What SFT and GRPO share."""

    run_dir: str
    model: Model
    quantization: Quantization = "nf4"
    adapter: str | None = None  # a run directory, an adapter folder or a Hub id
    lora: Lora | None = None
    data: TrainData
    trainer: dict[str, Any] = {}  # TRL's own keys
    tracking: Tracking = "none"
    hub: Hub = Hub()
    seed: NonNegativeInt = 42
    fast_adapter: bool = True  # use posttrain/kernels/lora_linear.py instead of PEFT's layers
    lean_layers: bool = False  # compute norms and gated products again instead of keeping them (posttrain/kernels/lean_layers.py)
    dev_every_steps: PositiveInt | None = None  # None: dev accuracy only before and after
    trl_class: ClassVar[str]

    def needs(self) -> Iterator[Need]:
        yield from self.model.needs()
        if self.trainer.get("tf32"):
            yield _needs_cuda("trainer.tf32 True", "remove it")
        if self.trainer.get("activation_offloading"):
            yield _needs_cuda("trainer.activation_offloading", "remove it")
        if self.trainer.get("use_liger_kernel"):
            yield Need("liger_kernel", "trainer.use_liger_kernel needs the package: pip install 'posttrain[liger]', or remove it")
        if self.data.num_dev:
            yield _needs_whole_policy("dev accuracy", "set data.num_dev=0, or ")

    def less_memory(self, batch_size: int | None = None) -> str:
        """Overrides with which an optimizer step has the same rows, fewer of them at once."""
        more = [] if self.quantization == "nf4" else ["quantization=nf4"]
        changes = [*less_at_once(self.trainer, self.trl_class), *more]
        return f"the same batch in smaller parts takes less: {' '.join(changes)} run_dir={self.run_dir}_smaller"

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.lean_layers and not self.fast_adapter:
            yield ("lean_layers",), "runs each adapted layer as one operation: set fast_adapter to true, or this to false"


class SftConfig(TrainConfig):
    """sft_train.py: trains a new adapter (`lora`) or continues one (`adapter`)."""

    trainer: Annotated[dict[str, Any], TrlKeys("SFTConfig")] = {}
    fast_loss: bool = True
    compile: bool = False  # compile the decoder layers, a minute at the start
    trl_class: ClassVar[str] = "SFTConfig"

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.adapter is None and self.lora is None:
            yield ("lora",), "missing: the shape of the new adapter (or give adapter, to continue one)"
        if self.adapter and self.lora:
            yield ("lora",), "an adapter that is continued keeps its shape: remove lora or adapter"
        yield from super().problems()
        if self.compile and self.lean_layers:
            yield ("lean_layers",), "compile chooses itself what a layer keeps: set one of the two to false"
        if self.compile and self.model.kernels == "liger":
            yield ("model", "kernels"), "compile fuses these operations itself: set auto or torch, or compile to false"
        if self.trainer.get("eval_strategy", "no") != "no" and not self.data.num_dev:
            yield ("trainer", "eval_strategy"), "needs dev rows: set data.num_dev above 0, or eval_strategy to no"
        if self.trainer.get("eval_on_start") and not self.data.num_dev:
            yield ("trainer", "eval_on_start"), "needs dev rows: set data.num_dev above 0, or remove it"
        for key, text in sft_problems(self.trainer):
            yield ("trainer", key), text


class GrpoConfig(TrainConfig):
    """grpo_train.py: continues an adapter, or merges it into the base and trains a new one (`lora`)."""

    adapter: str
    adapter_mode: Literal["continue", "rescale", "merge_and_new"] = "continue"
    rewards: Rewards = Rewards()
    rollouts: Rollouts = Rollouts()
    update_tokens: PositiveInt | None = None  # positions that the update runs at once; None: those of a micro-batch
    trainer: Annotated[dict[str, Any], TrlKeys("GRPOConfig")] = {}
    trl_class: ClassVar[str] = "GRPOConfig"

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        yield from super().problems()
        if self.adapter_mode == "continue" and self.lora:
            other = "rescale (another alpha) or merge_and_new"
            yield ("lora",), f"adapter_mode continue keeps the adapter's shape: remove lora, or use {other}"
        if self.adapter_mode != "continue" and not self.lora:
            yield ("lora",), f"missing: adapter_mode {self.adapter_mode} needs the shape of the new adapter"
        for key in ("use_vllm", "use_transformers_continuous_batching"):
            if self.trainer.get(key) and self.rollouts.engine != "trl":
                yield ("trainer", key), "needs rollouts.engine trl; posttrain's own engines are named there"
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

    def needs(self) -> Iterator[Need]:
        if self.rollouts.engine == "vllm":
            yield _needs_vllm("rollouts.engine")
        yield _needs_whole_policy("rollouts")
        yield from super().needs()


class EvalConfig(Settings):
    """evaluate.py"""

    run_dir: str  # {adapter} in it becomes the name of the adapter's run, or "base"
    name: str | None = None  # the label in the report
    model: Model
    quantization: Quantization = "nf4"
    adapter: str | None = None
    data: EvalData
    generation: Generation = Generation()
    engine: Engine = "transformers"
    seed: NonNegativeInt = 0
    tracking: Tracking = "none"

    def needs(self) -> Iterator[Need]:
        if self.engine == "vllm":
            yield _needs_vllm("engine")
        yield from self.model.needs()

    def less_memory(self, batch_size: int | None = None) -> str:
        size = batch_size or self.generation.batch_size
        smaller = [f"generation.batch_size={max(1, size // 2) if isinstance(size, int) else 8}"]
        more = [] if self.quantization == "nf4" else ["quantization=nf4"]
        return f"smaller batches take less: {' '.join([*smaller, *more])} run_dir={self.run_dir}_smaller"

    @model_validator(mode="before")
    @classmethod
    def _one_run_dir_for_each_adapter(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("run_dir"), str):
            adapter = _run_name(str(values.get("adapter") or "base"))
            return values | {"run_dir": values["run_dir"].replace("{adapter}", adapter)}
        return values


def _run_name(adapter: str) -> str:
    """runs/grpo/adapter, runs/grpo, me/grpo -> grpo"""
    path = PurePath(adapter)
    return path.parent.name if path.name == "adapter" else path.name

"""What a config may say: the typed blocks of every YAML, the rules between keys, and what settings ask of a machine.

The `trainer` block holds TRL's own keys. The installed TRL says which there are (trl_fields.py): no key is renamed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from posttrain.config.messages import did_you_mean
from posttrain.config.trl_batches import SHARDED_LAUNCH, group_problems, less_at_once, sft_problems
from posttrain.config.trl_fields import TrlKeys
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

    what: Literal["cuda", "unsharded", "one process"] | str  # or a package
    otherwise: str  # what to tell the user of a machine without it


def _needs_cuda(setting: str, remedy: str) -> Need:
    return Need("cuda", f"{setting} needs CUDA, and this machine has none: {remedy}")


def _needs_vllm(key: str) -> Need:
    return Need("vllm", f"{key} vllm needs the package: pip install 'posttrain[vllm]' on a GPU machine, or {key}=transformers")


def trackers_of(tracking: Tracking) -> list[str]:
    """The names, without those that are given twice."""
    names = tracking if isinstance(tracking, list) else [tracking]
    return [name for name in dict.fromkeys(names) if name != "none"]


def _needs_trackers(tracking: Tracking) -> Iterator[Need]:
    for name in trackers_of(tracking):
        yield Need(name, f"tracking {name} needs the package: pip install {name}, or leave it out of tracking")


def _needs_whole_model(setting: str, why: str, remedy: str) -> Need:
    return Need("unsharded", f"{setting} {why}, and FSDP shards the model: launch with configs/accelerate/ddp.yaml, or {remedy}")


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


# --- blocks -------------------------------------------------------------------------------------------------


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


BUILT_IN_REWARDS = ("overlong", "repetition", "tags")  # beside the two that grade (posttrain/training/named_rewards.py)


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
    """Leave completions without an advantage out of the update; needs trainer.beta 0. [in posttrain/training/trainers.py]"""
    correct_mismatch: bool = False
    """Clip against the sampler's log-probabilities instead of the trainer's. [in posttrain/training/trainers.py]"""


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


class Prompt(Settings):
    style: Literal["chat", "few_shot"] = "chat"
    """chat: one question, one answer; few_shot: solved examples before it. [in posttrain/tasks/examples.py]"""
    system: str | None = None
    """The system message; "" is an empty one, null leaves it to the template. [in posttrain/tasks/examples.py]"""
    instruction: str
    """The user's message; {question} in it is where the question goes. [in posttrain/tasks/examples.py]"""
    num_shots: NonNegativeInt = 0
    """Solved examples before each question, with style few_shot. [examples, in posttrain/tasks/examples.py]"""
    shots: Place | None = None
    """JSONL of solved examples in GSM8K's form; null takes training rows, chosen by hash. [in posttrain/tasks/sources.py]"""

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


HASHES = "#### {answer}"
# By what a prompt names a form, and an example of it. "Answer:" that ends a prompt is where the model goes on.
FORM_CUES = {
    "####": HASHES,
    "Answer:": "Answer: {answer}",
    r"\boxed": r"\boxed{{answer}}",
    "<answer>": "<answer>{answer}</answer>",
}


# `\s*`, `.+`, `(?i)`. Solutions would be taught these very signs.
_OF_A_PATTERN = re.compile(r"\\[sSdDwWb](?![A-Za-z])|\.[*+]|\(\?[:=!<a-zP]")


class Answer(Settings):
    """What an answer is, and the last line of every solution. One grader follows from it for all stages (docs/answers.md)."""

    kind: Literal["number", "choice", "text", "expression"] = "number"
    """What an answer is, and so when two are equal. [in posttrain/tasks/answer_kinds.py]"""
    form: str = HASHES
    """The last line of every solution: a line with {answer} in it, as `Answer: {answer}`. [in posttrain/tasks/forms.py]"""
    options: list[str] | None = None
    """The only answers there are: letters of a choice (null: A to E), or words such as yes and no.
    [in posttrain/tasks/answer_kinds.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        before, *others = self.form.split("{answer}")
        if len(others) != 1 or "\n" in self.form:
            yield ("form",), "must be one line that contains {answer} once, where the answer goes"
        elif len(before.strip()) < 2 or re.search(r"[0-9]", self.form):
            yield ("form",), "needs two signs or more before {answer}, by which it is found, and no digit"
        elif _OF_A_PATTERN.search(self.form):
            yield ("form",), "is plain text, and this looks like a regular expression: write the line as solutions end in it"
        if self.options is not None and self.kind in ("number", "expression"):
            yield ("options",), f"kind {self.kind} has no list of answers: use kind choice or text"
        if self.options is not None and len(self.options) < 2:
            yield ("options",), "one answer alone, or none, leaves nothing to find: name two or more"
        for option in self.options or []:
            if self.kind == "choice" and not re.fullmatch("[A-Z]", option):
                yield ("options",), f"{option!r} is no capital letter: use kind text for words"
            elif option != option.strip() or not re.search(r"\w", option):
                yield ("options",), f"{option!r} is no word"
        folded = [option.casefold() for option in self.options or []]
        if len(set(folded)) < len(folded):
            yield ("options",), "holds an answer twice"


SplitName = Literal["train", "dev", "test"]
Scalar = str | int | float | bool
# What rewards are given under these names is the trainer's own (trl/trainer/grpo_trainer.py, `_calculate_rewards`).
TAKEN = {"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
# And these are an example's own (COLUMNS in posttrain/records.py).
TAKEN |= {"id", "question", "solution", "answer", "num_steps"}


def _keys_as_text(values: Any) -> Any:
    """YAML reads `{true: yes, 0: A}` with a truth value and a number as keys."""
    if not isinstance(values, dict):
        return values
    return {str(key).lower() if isinstance(key, bool | int) else key: value for key, value in values.items()}


class Fields(Settings):
    """Where in a row of the source its texts are. A dot leads into nested rows: `extra.answer`, `turns.0`.

    Keys in braces make one text of several: `"{passage}\\n{question}"`.
    """

    question: str | None = None
    """The key of a row's question, or a text with keys in braces. [in posttrain/tasks/fields.py]"""
    choices: str | None = None
    """The key of a row's list of choices; they stand below the question, as `A) ...`. [in posttrain/tasks/fields.py]"""
    solution: str | None = None
    """The key of a row's worked solution; without answer, its last line holds the answer. [in posttrain/tasks/fields.py]"""
    answer: str | None = None
    """The key of a row's answer. [in posttrain/tasks/fields.py]"""
    answer_values: Annotated[dict[str, str], Field(min_length=1), BeforeValidator(_keys_as_text)] | None = None
    """What the source's answers are called here, as {true: "yes", false: "no"} or {0: A, 1: B}; others stay as they are.
    [in posttrain/tasks/fields.py]"""
    messages: str | None = None
    """The key of a row's chat: its last user turn is the question, the assistant's after it the solution.
    [in posttrain/tasks/fields.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        if not (self.question or self.messages):
            yield ("question",), "missing: the key of a row's question (or give messages, the key of its chat)"
        if self.question and self.messages:
            yield ("question",), "is the last user turn of messages: remove one of the two"
        if self.solution and self.messages:
            yield ("solution",), "is the last assistant turn of messages: remove one of the two"
        if not (self.solution or self.answer or self.messages):
            yield ("answer",), "missing: the key of a row's answer (or give solution, where its last line holds the answer)"
        for key in ("choices", "answer_values"):
            if getattr(self, key) and not self.answer:
                yield (key,), "goes with answer: give the key of a row's answer"


class Mapped(Settings):
    """Rows of any schema: which of their keys are question, solution and answer, which rows are taken, and for what."""

    fields: Fields | None = None
    """Which keys of a row are what; null: GSM8K's, question and answer (a solution that ends in its answer).
    [in posttrain/tasks/fields.py]"""
    split_column: str | None = None
    """The key that says a row's split: train, dev (validation, valid, val) or test, or a name in splits.
    [in posttrain/tasks/fields.py]"""
    splits: Annotated[dict[SplitName, str | list[str]], Field(min_length=1)] | None = None
    """The source's own names of train, dev and test; its other splits are left out. [in posttrain/tasks/fields.py]"""
    test_fraction: Annotated[float, Field(ge=0, le=0.9)] | None = None
    """Share of train that becomes test, by a hash of the question; null: 0.2 of rows that nothing gives a split, else 0.
    [share, in posttrain/tasks/fields.py]"""
    where: dict[str, Scalar | list[Scalar]] | None = None
    """Only rows whose key has this value, or one of these. [in posttrain/tasks/fields.py]"""
    columns: list[str] | None = None
    """Further keys that prepared rows keep, for rewards. [in posttrain/tasks/fields.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        for name in self.columns or ():
            if name in TAKEN:
                yield ("columns",), f"{name} is given to rewards already: they get the prepared row's"


class HubSource(Mapped):
    kind: Literal["hub"]
    """A data set of the Hub. [in posttrain/tasks/sources.py]"""
    repo_id: str
    """Its id, or a folder of its files. [in posttrain/tasks/hub.py]"""
    revision: CommitId
    """Its commit: 40 hexadecimal digits. [in posttrain/tasks/hub.py]"""
    config_name: str | None = None
    """Its configuration; null where it has one alone. [in posttrain/tasks/hub.py]"""


class FilesSource(Mapped):
    kind: Literal["files"]
    """Files of any schema. [in posttrain/tasks/sources.py]"""
    path: Place | Annotated[dict[SplitName, Place], Field(min_length=1)]
    """A file, a folder, a pattern with stars, or one of these for each split; .json, .jsonl, .csv, .tsv, .parquet,
    save_to_disk.
    [in posttrain/tasks/files.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        yield from super().problems()
        if isinstance(self.path, dict):
            for key in ("split_column", "splits"):
                if getattr(self, key):
                    yield (key,), "does not go with a path for each split"


class JsonlSource(Settings):
    kind: Literal["jsonl"]
    """GSM8K's two files, read byte by byte: a bad line spoils no other. [in posttrain/tasks/sources.py]"""
    path: Place
    """A folder with train.jsonl and test.jsonl, rows of question and answer. [in posttrain/tasks/sources.py]"""


class GeneratorSource(Settings):
    kind: Literal["leg_counting", "gsm_symbolic"]
    """Word problems that reasoning-gym makes on this machine. [in posttrain/tasks/generated.py]"""
    num_train: PositiveInt
    """Training questions. [rows, in posttrain/tasks/generated.py]"""
    num_dev: PositiveInt
    """Dev questions. [rows, in posttrain/tasks/generated.py]"""
    num_test: PositiveInt
    """Test questions. [rows, in posttrain/tasks/generated.py]"""
    options: dict[str, int | float | str] = {}
    """Passed to reasoning_gym.create_dataset. [in posttrain/tasks/generated.py]"""


class SvampSource(Settings):
    kind: Literal["svamp"]
    """SVAMP, as a test set. [in posttrain/tasks/sources.py]"""
    path: Place
    """SVAMP.json; every row is a test row. [in posttrain/tasks/sources.py]"""


class RejectionSampledSource(Settings):
    """The distinct, correct solutions among the samples of an evaluation run of the train split."""

    kind: Literal["rejection_sampled"]
    """A policy's own right solutions of training questions. [in posttrain/tasks/sources.py]"""
    run_dir: Place
    """An evaluation run of the train split with several samples of each question. [in posttrain/tasks/sampled.py]"""
    max_per_question: PositiveInt = 4
    """At most so many solutions of a question. [rows, in posttrain/tasks/sampled.py]"""
    prefer: Literal["first", "shortest"] = "first"
    """Which of a question's solutions, where it has more. [in posttrain/tasks/sampled.py]"""
    accept: Literal["strict", "rewritten"] = "strict"
    """rewritten: also right answers in another form, of completions that ended by themselves, with the last line added.
    [in posttrain/tasks/sampled.py]"""
    with_gold: bool = False
    """The worked solutions of all questions as well (arXiv 2308.01825). [in posttrain/tasks/sampled.py]"""


class MadeSource(Settings):
    """Questions made here from a seed, with worked solutions (posttrain/tasks/made.py): one for each other kind of answer."""

    kind: Literal["made_choice", "made_yes_no", "made_algebra"]
    """Questions made here from a seed, with worked solutions. [in posttrain/tasks/sources.py]"""
    num_train: PositiveInt
    """How many training questions. [rows, in posttrain/tasks/made.py]"""
    num_dev: PositiveInt
    """How many dev questions. [rows, in posttrain/tasks/made.py]"""
    num_test: PositiveInt
    """How many test questions. [rows, in posttrain/tasks/made.py]"""


Source = HubSource | JsonlSource | GeneratorSource | MadeSource | SvampSource | RejectionSampledSource | FilesSource

# --- stages -------------------------------------------------------------------------------------------------


class DataConfig(Settings):
    """data_prep.py"""

    name: str
    """Of the data set; it begins the id of each row. [in posttrain/tasks/examples.py]"""
    output_dir: Place
    """The folder to write. [in data_prep.py]"""
    seed: NonNegativeInt = 0
    """Of generated questions. [in posttrain/tasks/sources.py]"""
    source: Annotated[Source, Field(discriminator="kind")]
    """What the rows are made from. [in posttrain/tasks/sources.py]"""
    answer: Answer = Answer()
    """What an answer is and how it is written; one grader follows from it for every stage (docs/answers.md).
    [in posttrain/tasks/answers.py]"""
    calculator_marks: Literal["keep", "strip"] = "strip"
    """Whether GSM8K's <<48/2=24>> stay in solutions. [in posttrain/tasks/examples.py]"""
    prompt: Prompt
    """What stands around each question. [in posttrain/tasks/examples.py]"""
    dev_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.03
    """Share of train that becomes dev, by a hash of the question, unless the source has a dev split.
    [share, in posttrain/tasks/examples.py]"""
    tokenizer: Tokenizer
    """Whose chat template and tokens the rows are checked with. [in data_prep.py]"""
    max_length: PositiveInt = 512
    """The share of longer rows is told; none is dropped. [tokens, in data_prep.py]"""
    max_rejected: NonNegativeInt = 0
    """With more bad rows than this, nothing is written. [rows, in posttrain/tasks/examples.py]"""

    def problems(self) -> Iterator[tuple[KeyPath, str]]:
        """A prompt that asks for one form and solutions that end in another teach a model to disobey."""
        instruction = re.sub(r"(?:Answer:)?\s*\Z", "", self.prompt.instruction)
        for key, text in (("system", self.prompt.system or ""), ("instruction", instruction)):
            named = {cue: form for cue, form in FORM_CUES.items() if cue in text}
            if named and not any(cue in self.answer.form for cue in named):
                cue, form = next(iter(named.items()))
                yield (
                    ("prompt", key),
                    f"asks for {cue!r}, and the solutions end in {self.answer.form!r}: "
                    f"set answer.form to {form!r}, or change the prompt",
                )


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
            yield _needs_whole_model("lora null", "trains all weights, and that is tried with whole ones alone", "give lora")
        yield from self.model.needs()
        yield from _needs_trackers(self.tracking)
        if self.trainer.get("tf32"):
            yield _needs_cuda("trainer.tf32 True", "remove it")
        if self.trainer.get("activation_offloading"):
            yield _needs_cuda("trainer.activation_offloading", "remove it")
        if self.trainer.get("use_liger_kernel"):
            yield Need("liger_kernel", "trainer.use_liger_kernel needs the package: pip install 'posttrain[liger]', or remove it")
        if self.layer_graphs:
            yield _needs_cuda("layer_graphs", "set it to false")
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
    [tokens, in posttrain/training/trainers.py]"""
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

    def needs(self) -> Iterator[Need]:
        if self.rollouts.engine == "vllm":
            yield _needs_vllm("rollouts.engine")
        if self.trainer.get("use_vllm"):
            yield Need("vllm", "trainer.use_vllm needs the package: pip install 'posttrain[vllm]' on a GPU machine, or remove it")
        if self.curriculum:
            yield Need("one process", "curriculum draws questions in one process: launch with python alone, or remove curriculum")
        if self.rollouts.engine == "trl":
            yield _needs_whole_model(
                "rollouts.engine trl", "generates with the model that trains", "use rollouts.engine=transformers"
            )
        if self.update_tokens:
            yield _needs_whole_model("update_tokens", "cuts each process's rows into parts of its own", "remove it")
        if self.adapter_mode == "merge_and_new":
            yield _needs_whole_model(
                "adapter_mode merge_and_new", "writes a merged base in every process", "use rescale or continue"
            )
        yield from super().needs()


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
            yield _needs_vllm("engine")
        yield from self.model.needs()
        yield from _needs_trackers(self.tracking)

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

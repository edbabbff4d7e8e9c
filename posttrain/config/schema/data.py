"""data_prep.py: sources of rows, what an answer is, and the prompt around a question."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
)

from posttrain.config.schema.shared import CommitId, Place, Settings, Tokenizer
from posttrain.config.yaml_lines import KeyPath


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
    [in posttrain/tasks/mapped.py]"""
    splits: Annotated[dict[SplitName, str | list[str]], Field(min_length=1)] | None = None
    """The source's own names of train, dev and test; its other splits are left out. [in posttrain/tasks/mapped.py]"""
    test_fraction: Annotated[float, Field(ge=0, le=0.9)] | None = None
    """Share of train that becomes test, by a hash of the question; null: 0.2 of rows that nothing gives a split, else 0.
    [share, in posttrain/tasks/mapped.py]"""
    where: dict[str, Scalar | list[Scalar]] | None = None
    """Only rows whose key has this value, or one of these. [in posttrain/tasks/mapped.py]"""
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

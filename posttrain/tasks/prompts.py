"""What stands around every question of a data set, so that a new question gets the prompt that data_prep.py would give it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError
from posttrain.records import Example, Message, as_record, read_object, read_rows
from posttrain.runs.data_sets import data_entry, read_data_manifest
from posttrain.runs.manifest import Entry

PROMPT_FILE = "prompt.json"  # beside a pushed model, whose data set is elsewhere


@dataclass(frozen=True, slots=True)
class PromptForm:
    """The messages of a data set without their question."""

    system: str | None
    shots: str  # solved examples, as they stand before the question
    instruction: str  # with {question} in it

    def ask(self, question: str) -> list[Message]:
        content = self.shots + self.instruction.replace("{question}", question.strip())
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": content}]


def prompt_form(data: Entry) -> PromptForm:
    """The form of the data set that a run's manifest names.

    Raises:
        UserError: the data set is not there, or is no longer the one that the run read.
    """
    folder = Path(data["path"])
    if data_entry(folder, data["split"])["sha256"] != data["sha256"]:
        raise UserError(f"{folder} has changed since the run read it: prepare it again with the settings of that time")
    prompt = read_data_manifest(folder).get("prompt")
    if prompt is None:
        raise UserError(f"{folder}/manifest.json is of an earlier version, which kept no prompt: prepare the data set again")
    first = as_record(next(read_rows(folder / f"{data['split']}.jsonl")), Example, str(folder))
    asked = prompt["instruction"].replace("{question}", first.question.strip())
    form = PromptForm(prompt["system"], first.prompt[-1]["content"].removesuffix(asked), prompt["instruction"])
    assert form.ask(first.question) == first.prompt, "data_prep.py builds prompts in another way than this"
    return form


def read_prompt_form(folder: Path) -> PromptForm:
    """The form that a push wrote beside a model.

    Raises:
        UserError: there is none, or it is damaged.
    """
    values = read_object(folder / PROMPT_FILE, "download the repository again; a push without its data set writes none")
    if values.keys() != {"system", "shots", "instruction"}:
        raise UserError(f"{folder / PROMPT_FILE} is no prompt of a data set: download the repository again")
    return PromptForm(**values)

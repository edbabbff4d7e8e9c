"""The chat template on the run's own messages: what is trained on is the answer and its end, or the run is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import UserError
from posttrain.models.chat import WITHOUT_SYSTEM, chat_ids, chat_text, pin_hint, rendered_differently
from posttrain.models.templates import pin_date

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from posttrain.records import Example, Message

NUM_SAMPLED = 4
PROBE = "72"  # an answer that no template rewrites
REASONING = ("<think>", "</think>")  # templates of reasoning models cut an answer at these


def check_template(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example]) -> None:
    """Refuse a template that changes the messages of a run: the first examples are tried, and one of every shape.

    Raises:
        UserError: one line with what differs and the way on.
    """
    check = TemplateCheck(tokenizer)
    for example in sampled(examples):
        check.ids(example)


def check_same_template(tokenizer: PreTrainedTokenizerBase, adapter: Path, examples: Iterable[Example]) -> None:
    """Refuse to ask an adapter in another format than the one it was trained in, which lies beside its weights.

    Raises:
        UserError: the adapter's own template renders a prompt of this run differently.
    """
    file = adapter / "chat_template.jinja"
    if not file.is_file():
        return
    trained, used = pin_date(file.read_text(encoding="utf-8")), tokenizer.get_chat_template()
    prompts = [example.prompt for example in sampled(examples)] if trained != used else []
    if any(chat_text(tokenizer, prompt, True, trained) != chat_text(tokenizer, prompt, True) for prompt in prompts):
        raise UserError(
            f"{adapter} was trained with another chat template: set model.chat_template={file}, and no model.template_kwargs"
        )


def sampled(examples: Iterable[Example]) -> Iterator[Example]:
    seen = set[tuple[object, ...]]()
    for number, example in enumerate(examples):
        if number < NUM_SAMPLED or shape(example) not in seen:
            seen.add(shape(example))
            yield example


def shape(example: Example) -> tuple[object, ...]:
    """What a template may branch on: the roles, whether a message is empty, and marks of reasoning in the answer."""
    answer = example.reply[0]["content"]
    roles = [(message["role"], not message["content"]) for message in example.prompt]
    return (*roles, *(mark in answer for mark in REASONING), answer == answer.strip())


class TemplateCheck:
    """Renders examples as TRL does (sft_trainer.py, `tokenize_fn`), and compares each with its messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._pin = pin_hint(tokenizer)
        self._frames: dict[tuple[str, ...], tuple[str, str]] = {}

    def ids(self, example: Example) -> tuple[list[int], list[int]]:
        """The ids of an example's prompt and of the whole row, once both are known to be right."""
        asked = chat_text(self.tokenizer, example.prompt, add_generation_prompt=True)
        self._check_prompt(asked, example)
        self._check_answer(asked, example)
        prompt = chat_ids(self.tokenizer, example.prompt, add_generation_prompt=True)
        whole = chat_ids(self.tokenizer, example.prompt + example.reply)
        self._check_ids(prompt, whole, example)
        return prompt, whole

    def _check_prompt(self, asked: str, example: Example) -> None:
        for message in example.prompt:
            if message["content"].strip() not in asked:
                way = self._way(message["role"])
                raise UserError(f"the chat template leaves out or rewrites the {message['role']} message: {way}")
        end = str(self.tokenizer.eos_token)
        if any(end in message["content"] for message in example.prompt + example.reply):
            raise UserError(f"{example.id} holds {end}, with which the chat template ends a turn: take that row out")

    def _check_answer(self, asked: str, example: Example) -> None:
        """Around the answer stands what stands around any other. Space at its own ends may go, as in Gemma's template."""
        content = example.reply[0]["content"].strip()
        said = self._said(asked, example.prompt, example.reply)
        opening, ending = self._frame(asked, example.prompt)
        inner = said.removesuffix(ending)
        if not said.endswith(ending) or content not in (inner.strip(), inner.removeprefix(opening).strip()):
            raise UserError(f"the chat template rewrites the answer: {_shown(content)} became {_shown(inner)}; {self._pin}")

    def _frame(self, asked: str, prompt: list[Message]) -> tuple[str, str]:
        """What the template writes before and after the content of an answer to such a prompt."""
        roles = tuple(message["role"] for message in prompt)
        if roles not in self._frames:
            opening, found, ending = self._said(asked, prompt, [{"role": "assistant", "content": PROBE}]).rpartition(PROBE)
            if not found:
                raise UserError(f"the chat template leaves out the answer: {self._pin}")
            self._frames[roles] = opening, ending
        return self._frames[roles]

    def _said(self, asked: str, prompt: list[Message], completion: list[Message]) -> str:
        """What the rendering of an answered prompt adds to that of the prompt."""
        answered = chat_text(self.tokenizer, prompt + completion)
        if not answered.startswith(asked):
            raise UserError(self._differs(prompt, completion))
        return answered[len(asked) :]

    def _check_ids(self, prompt: list[int], whole: list[int], example: Example) -> None:
        """Tokens may join across the border of two texts, and the tokenizer reads special tokens out of any text."""
        bos, stop, answer = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            raise UserError(f"{example.id}: {self._differs(example.prompt, example.reply)}")
        if bos is not None and prompt[:2] == [bos, bos]:
            raise UserError(f"the chat template begins a prompt with {self.tokenizer.bos_token} twice: {self._pin}")
        if stop not in answer:
            raise UserError(f"{example.id}: the answer does not end with {self.tokenizer.eos_token}: {self._pin}")

    def _differs(self, prompt: list[Message], completion: list[Message]) -> str:
        if self._right_without_system(prompt, completion):
            return f"the chat template shows the system prompt differently once somebody has answered: {self._way('system')}"
        asked = chat_ids(self.tokenizer, prompt, add_generation_prompt=True)
        return rendered_differently(self.tokenizer, asked, chat_ids(self.tokenizer, prompt + completion))

    def _right_without_system(self, prompt: list[Message], completion: list[Message]) -> bool:
        rest = [message for message in prompt if message["role"] != "system"]
        asked = chat_ids(self.tokenizer, rest, add_generation_prompt=True)
        return len(rest) < len(prompt) and chat_ids(self.tokenizer, rest + completion)[: len(asked)] == asked

    def _way(self, role: str) -> str:
        return f"{WITHOUT_SYSTEM}, or {self._pin}" if role == "system" else self._pin


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")

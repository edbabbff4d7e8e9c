"""Tokenizer and chat format: how a conversation becomes token ids, and on which token an answer ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from posttrain.config.schema import Tokenizer
from posttrain.errors import UserError
from posttrain.models.network import look_for_hub
from posttrain.models.templates import argument_names, pin_arguments, pin_date, steps_of
from posttrain.places import found, looks_local

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Llama-3 ships a token for right padding. With the end token as padding, whatever masks padding would mask the end, too.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]")
# What transformers raises at a config.json or a tokenizer that it cannot make sense of.
UNREADABLE = (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError)
WITHOUT_SYSTEM = "put the system prompt into prompt.instruction (data_prep: prompt.system=null)"
# What a template of a family has in it -> the one in configs/templates/ that can be trained on.
TEMPLATES = {
    "\uff5cAssistant\uff5c": "deepseek_reasoning",
    "<|channel|>": "harmony",
    "[INST]": "mistral",
    "<start_of_turn>": "gemma",
    "<think>": "chatml_reasoning",
}


def load_tokenizer(settings: Tokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer with the run's chat template, an end token that the template really emits, and a pad token.

    Raises:
        UserError: the model cannot be found or reached, or has no tokenizer or chat template; or the template ends no turn, or
            renders a prompt differently once it is answered or on another day.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = from_hub(AutoTokenizer, settings)
    except UNREADABLE as error:  # neither tokenizer.json nor what transformers makes one of
        config_of(settings)
        raise UserError(
            f"{settings.name_or_path} has no tokenizer: download the model whole, or copy its tokenizer.json and "
            "tokenizer_config.json there"
        ) from error
    if settings.chat_template:
        tokenizer.chat_template = _read_template(found(settings.chat_template))
    if not tokenizer.chat_template:
        raise UserError(
            f"{settings.name_or_path} ships no chat template: set model.chat_template "
            "(configs/templates/llama3.jinja for Llama-3 base models, configs/templates/plain.jinja for k-shot prompts)"
        )
    tokenizer.chat_template = pin_arguments(pin_date(tokenizer.get_chat_template()), settings.template_kwargs)
    tokenizer.eos_token = stop_token(tokenizer)
    tokenizer.pad_token = _pad_token(tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.response_template = None  # with one, TRL would grade what it parses, and evaluation the whole text
    return tokenizer


def _read_template(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"no chat template at {file}: check model.chat_template (relative to the working directory)")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}): convert it, or choose another model.chat_template") from error


def stop_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token with which the chat template ends an assistant turn: the one source of truth for "stop".

    A model that trains on one end token and stops on another runs every completion to its limit. TRL reads the
    tokenizer's `eos_token` both for generation and for the truncation mask (grpo_trainer.py, `eos_token_ids`).
    Special tokens before the content, as harmony's `<|channel|>final<|message|>`, belong to what the model says.
    """
    opening, ending = _around_the_content(tokenizer)
    specials = special_ids(tokenizer)
    stop = next((token for token in ending if token in specials), None)
    if stop is None:
        raise UserError(
            "the chat template never ends an assistant turn with a special token: generation could not stop; "
            f"{pin_hint(tokenizer)} that writes {{{{ eos_token }}}} after the answer"
        )
    name = str(tokenizer.convert_ids_to_tokens(stop))
    if stop in opening:
        raise UserError(f"the chat template ends a turn with {name}, which also stands before the answer: {pin_hint(tokenizer)}")
    return name


def _around_the_content(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids before and after an answer's content: what two answers of different contents have in common at both ends."""
    turn = [{"role": "user", "content": "1+1?"}]
    prompt = chat_ids(tokenizer, turn, add_generation_prompt=True)
    wholes = [chat_ids(tokenizer, [*turn, {"role": "assistant", "content": content}]) for content in ("2", "7")]
    if any(whole[: len(prompt)] != prompt for whole in wholes):
        raise UserError(rendered_differently(tokenizer, prompt, wholes[0]))
    answers = [whole[len(prompt) :] for whole in wholes]
    start = num_equal(*answers)
    if start == len(answers[0]):
        raise UserError(f"the chat template leaves out the answer: {pin_hint(tokenizer)}")
    end = num_equal(*(answer[start:][::-1] for answer in answers))
    return answers[0][:start], answers[0][len(answers[0]) - end :]


def num_equal(one: list[int], other: list[int]) -> int:
    """How many ids two lists have in common at their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def rendered_differently(tokenizer: PreTrainedTokenizerBase, prompt: list[int], whole: list[int]) -> str:
    """What stands where in the two renderings, and the way on."""
    same = num_equal(prompt, whole)
    there, here = (tokenizer.decode(ids[same : same + 8]) for ids in (prompt, whole))
    way = pin_hint(tokenizer)
    return f"the chat template renders a prompt differently once it is answered: {there!r} became {here!r}; {way}"


def pin_hint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The way on from a template that cannot be trained on: its own argument, ours of that family, or one of the user's."""
    template = tokenizer.get_chat_template()
    ours = next((f"configs/templates/{name}.jinja" for mark, name in TEMPLATES.items() if mark in template), "a template")
    pin = f"pin model.chat_template (data_prep: tokenizer.chat_template) to {ours}"
    if "enable_thinking" not in argument_names(template):
        return pin
    return f"set model.template_kwargs.enable_thinking=false (data_prep: tokenizer.template_kwargs), or {pin}"


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a rendered conversation. SFT, GRPO and evaluation build their prompts with this call."""
    encoded = _render(tokenizer, messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    add_generation_prompt: bool = False,
    template: str | None = None,
) -> str:
    """A rendered conversation, with the tokenizer's template or with another."""
    how = {"add_generation_prompt": add_generation_prompt, "chat_template": template, "tokenize": False}
    return str(_render(tokenizer, messages, **how))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **how: Any) -> Any:
    from jinja2 import TemplateError

    template = how.get("chat_template") or tokenizer.get_chat_template()
    try:
        steps_of(template).check(messages, how["add_generation_prompt"], tokenizer.special_tokens_map)
        return tokenizer.apply_chat_template(messages, **how)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:  # of its expressions
        way = f"{WITHOUT_SYSTEM}, or " if messages[0]["role"] == "system" else ""
        raise UserError(f"the chat template does not take these messages ({error}): {way}{pin_hint(tokenizer)}") from error


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = tokenizer.get_vocab()
    eos = str(tokenizer.eos_token)
    return next((token for token in PAD_TOKENS if token in vocabulary and token != eos), eos)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens. transformers' `all_special_ids` lacks those without a role, as a Llama-3 base's `<|eot_id|>`."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return marked | set(tokenizer.all_special_ids)


def from_hub(auto_class: Any, settings: Tokenizer, **kwargs: Any) -> Any:
    """`from_pretrained`, where an error that the user can mend is one line with the remedy."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = settings.name_or_path
    if looks_local(name) and not Path(name, "config.json").is_file():
        raise UserError(f"{name} holds no model (no config.json): check model.name_or_path, or run `make model`")
    if not looks_local(name):
        look_for_hub()
    try:
        # Never code out of a model's folder: transformers would ask on a terminal whether to run it.
        return auto_class.from_pretrained(name, revision=settings.revision, trust_remote_code=False, **kwargs)
    except OSError as error:
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError) or "gated" in str(error):
            raise UserError(
                f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN"
            ) from error
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise UserError(f"{name} is not on the Hub, or is private: check model.name_or_path and HF_TOKEN") from error
        if looks_local(name):
            raise UserError(f"{name} cannot be read ({str(error).splitlines()[0]}): get a whole copy of the model") from error
        raise UserError(
            f"{name} could not be loaded: no copy in the local cache and the Hub did not answer. "
            f"Connect to the network, or set model.name_or_path to a local folder ({str(error).splitlines()[0]})"
        ) from error


def config_of(settings: Tokenizer) -> PreTrainedConfig:
    """The config of a model.

    Raises:
        UserError: it cannot be reached, is damaged, or of a family that this transformers does not know.
    """
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = from_hub(AutoConfig, settings)
    except UNREADABLE as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"{settings.name_or_path}: transformers cannot read its config.json ({why}): get a whole copy, or another model"
        ) from error
    return config

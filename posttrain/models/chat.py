"""Tokenizer and chat format: how a conversation becomes token ids, and on which token an answer ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Tokenizer
from posttrain.errors import UserError
from posttrain.models.templates import pin_arguments, pin_date

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Llama-3 ships a token for right padding. With the end token as padding, whatever masks padding would mask the end, too.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>", "[PAD]")


def load_tokenizer(settings: Tokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer with the run's chat template, an end token that the template really emits, and a pad token.

    Raises:
        UserError: the model cannot be found or reached, or has no chat template; or the template ends no turn, or renders
            a prompt differently once it is answered or on another day.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = from_hub(AutoTokenizer, settings)
    if settings.chat_template:
        tokenizer.chat_template = _read_template(Path(settings.chat_template))
    if not tokenizer.chat_template:
        raise UserError(
            f"{settings.name_or_path} ships no chat template: set model.chat_template "
            "(configs/templates/llama3.jinja for Llama-3 base models, configs/templates/plain.jinja for k-shot prompts)"
        )
    tokenizer.chat_template = pin_arguments(pin_date(tokenizer.get_chat_template()), settings.template_kwargs)
    tokenizer.eos_token = stop_token(tokenizer)
    tokenizer.pad_token = _pad_token(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def _read_template(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"no chat template at {file}: check model.chat_template (relative to the working directory)")
    return file.read_text(encoding="utf-8")


def stop_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token with which the chat template ends an assistant turn: the one source of truth for "stop".

    A model that trains on one end token and stops on another runs every completion to its limit. TRL reads the
    tokenizer's `eos_token` both for generation and for the truncation mask (grpo_trainer.py, `eos_token_ids`).
    """
    turn = [{"role": "user", "content": "1+1?"}]
    prompt = chat_ids(tokenizer, turn, add_generation_prompt=True)
    whole = chat_ids(tokenizer, [*turn, {"role": "assistant", "content": "2"}])
    if whole[: len(prompt)] != prompt:
        raise UserError("the chat template renders a prompt differently once it is answered: pin model.chat_template")
    specials = special_ids(tokenizer)
    for token in whole[len(prompt) :]:
        if token in specials:
            return str(tokenizer.convert_ids_to_tokens(token))
    raise UserError("the chat template never ends an assistant turn with a special token: generation could not stop")


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a rendered conversation. SFT, GRPO and evaluation build their prompts with this call."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


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
    try:
        return auto_class.from_pretrained(name, revision=settings.revision, **kwargs)
    except OSError as error:
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError) or "gated" in str(error):
            raise UserError(
                f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN"
            ) from error
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise UserError(f"{name} is not on the Hub, or is private: check model.name_or_path and HF_TOKEN") from error
        raise UserError(
            f"{name} could not be loaded: no copy in the local cache and the Hub did not answer. "
            f"Connect to the network, or set model.name_or_path to a local folder ({str(error).splitlines()[0]})"
        ) from error


def looks_local(name: str) -> bool:
    """Whether a name means a folder on this disk and not an `owner/name` on the Hub."""
    return Path(name).exists() or name.startswith((".", "/", "~", "models/", "runs/")) or name.count("/") != 1

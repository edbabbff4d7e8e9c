"""A tokenizer as GGUF has it: tokens, their kinds, merges or scores, and by which rule a text is cut before merging.

llama.cpp knows the rules by name. Which one is meant is read off tokenizer.json. Whether it then makes the same tokens is asked
of llama.cpp itself, of every prompt (`fidelity.py`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.models.chat import special_ids
from posttrain.models.pre_tokenizers import rule_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

SPACE = "\u2581"  # what stands for a space in SentencePiece's vocabularies


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Tokens, special tokens and chat template. `rows` of the embedding without a token get one that nothing makes."""
    parts, rule = json.loads(tokenizer.backend_tokenizer.to_str()), check_vocabulary(tokenizer)
    byte_fallback = rule == "default"
    writer.add_tokenizer_model("llama" if byte_fallback else "gpt2")
    writer.add_tokenizer_pre(rule)
    tokens, kinds = _tokens(tokenizer, rows, byte_fallback)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in parts["model"]["merges"]]
    if byte_fallback:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix("Prepend" in json.dumps(parts["normalizer"]))
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    _add_special(writer, tokenizer)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of the rule that cuts texts; `default` is SentencePiece's, which cuts none.

    Raises:
        UserError: a tokenizer of another kind than byte-level BPE or SentencePiece's BPE, or of a rule without a name.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE":
        raise UserError(f"a tokenizer of type {parts['model']['type']} is not written as GGUF, only BPE: use --format merged")
    return "default" if parts["model"].get("byte_fallback") else rule_of(parts["pre_tokenizer"])


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int, byte_fallback: bool) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added, specials = tokenizer.added_tokens_decoder, special_ids(tokenizer)
    tokens, kinds = list[str](), list[int]()
    for index in range(rows):
        token = names.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", TokenType.UNUSED
        elif token == tokenizer.unk_token and byte_fallback:
            kind = TokenType.UNKNOWN
        elif index in specials:
            kind = TokenType.CONTROL
        elif index in added:
            token, kind = token.replace(SPACE, " "), TokenType.USER_DEFINED
        elif byte_fallback and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece merges first what scores highest: what tokenizer.json merges first."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault("".join(merge), place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """The ids of special tokens. The stop token ends a turn and a text: llama.cpp and Ollama stop at either."""
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_eot_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    writer.add_chat_template(str(tokenizer.chat_template))

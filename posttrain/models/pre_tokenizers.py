"""By which rule byte-level BPE cuts a text before it merges: llama.cpp's name of it, and the rule as tokenizer.json has it."""

from __future__ import annotations

import json
from typing import Any

from posttrain.errors import UserError

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# A regular expression of tokenizer.json -> llama.cpp's name for it (src/llama-vocab.cpp).
SPLITS = {WORDS + r"\p{N}" + REST: "qwen2", WORDS + r"\p{N}{1,3}" + REST: "llama-bpe"}


def rule_of(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name of a rule of tokenizer.json.

    Raises:
        UserError: it is none of those that are known here.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    match steps:
        case [last] if last == BYTE_LEVEL:
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, last] if last == BYTE_LEVEL:
            return "smollm"
        case [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel", "use_regex": False}] if regex in SPLITS:
            return SPLITS[regex]
    raise UserError(
        "the tokenizer cuts texts by a rule that is not known here as one of llama.cpp's "
        f"({json.dumps(pre_tokenizer)[:120]}): use --format merged"
    )


def pre_tokenizer_of(rule: str) -> Any:
    """The rule as the `tokenizers` library computes it.

    Raises:
        UserError: no rule of that name is known here.
    """
    from tokenizers import Regex, pre_tokenizers

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    regexes = {name: regex for regex, name in SPLITS.items()} | {"deepseek-r1-qwen": next(iter(SPLITS))}
    match rule:
        case "gpt-2" | "default":
            return whole
        case "smollm":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
        case _ if rule in regexes:
            split = pre_tokenizers.Split(Regex(regexes[rule]), behavior="isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise UserError(
        f"tokenizer.ggml.pre is {rule}, and only {', '.join(('gpt-2', 'smollm', *regexes))} are known: use another file"
    )

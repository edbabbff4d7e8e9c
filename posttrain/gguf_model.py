"""A GGUF file -> an ordinary model folder in bf16, which every stage takes as its base.

    python -m posttrain.gguf_model model-q8_0.gguf models/mine --sha256 HEX

The file is only read: nothing of it is imported or run. Weights are what the file's quantization has kept. Llama, Qwen2, Qwen3,
Gemma 2 and Gemma 3 are read. A file that keeps the embedding twice, in two quantizations, gives one matrix, the finer one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError, exit_on_user_error
from posttrain.records import sha256_file
from posttrain.runs.alone import alone, appearing

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
FIRST, HEAD = "token_embd.weight", "output.weight"
SAMPLED_ROWS = 64  # of both ends of the model, to see whether they are one matrix
SAME_ROW_COSINE = 0.98  # 4-bit blocks keep more of a row than that; rows of two matrices have nothing in common


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.gguf_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--sha256", metavar="HEX", help="what the file must be; without it its hash is only told")
    args = parser.parse_args()
    found = check_file(args.file, args.sha256)
    if args.folder.exists():
        raise UserError(f"{args.folder} is there already: remove it, or choose another folder")
    print(f"{args.file}: sha256 {found}{'' if args.sha256 else ' (not compared: --sha256 names what it must be)'}")
    with alone(args.folder, "folder", appears=True), appearing(args.folder, "folder") as partial:
        convert(args.file, partial)
    print(f"wrote {args.folder}")


def check_file(file: Path, sha256: str | None) -> str:
    """The file's hash.

    Raises:
        UserError: it is not there, no GGUF file, or another one than was asked for.
    """
    if not file.is_file():
        raise UserError(f"{file} is not there: give the path of a GGUF file")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"{file} is no GGUF file: it does not begin with GGUF")
    found = sha256_file(file)
    if sha256 is not None and found != sha256.lower():
        raise UserError(f"{file} has sha256 {found}, not {sha256.lower()}: get it again from where that hash is told")
    return found


def convert(file: Path, target: Path, rule: str | None = None) -> None:
    """Write the model folder. `rule` is by which texts are cut before merging; None takes the one that the file names.

    Raises:
        UserError: another architecture, a damaged file, or a rule that is not known here.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

    from posttrain.models.pre_tokenizers import pre_tokenizer_of

    # A bar for some seconds, in files and pipes too: https://github.com/huggingface/transformers, modeling_gguf_pytorch_utils.py
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **kwargs: tensors
    reader = read(file)
    folder, name = file.parent, file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if by_bytes := _text(reader, "tokenizer.ggml.model") == "gpt2":
        rule = rule or _text(reader, "tokenizer.ggml.pre") or "default"
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer_of(rule)
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    if head_dim := reader.fields.get(f"{_text(reader, 'general.architecture')}.attention.key_length"):
        config.head_dim = int(head_dim.contents())
    if hasattr(config, "query_pre_attn_scalar"):  # Gemma's; llama.cpp has no key for it
        config.query_pre_attn_scalar = config.head_dim
    # Without `dequantize` transformers keeps the weights packed and cannot save them.
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, config=config, quantization_config=unpacked, dtype=torch.float32
    )
    if tied := tied_matrix(reader):
        weight = torch.from_numpy(tied()).to(torch.float32)
        model.get_input_embeddings().weight.data = weight
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    if by_bytes:
        check_rule(target, rule or "")


def check_rule(folder: Path, rule: str) -> None:
    """Refuse a tokenizer that cuts texts otherwise once it is loaded again: some classes of transformers bring their own rule."""
    from transformers import AutoTokenizer

    from posttrain.models.pre_tokenizers import pre_tokenizer_of, rule_of

    again, wanted = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer, pre_tokenizer_of(rule)
    found, wanted = (rule_of(json.loads(one.__getstate__())) for one in (again, wanted))
    if found != wanted:
        raise UserError(
            f"the file cuts texts by {wanted}, and transformers' tokenizer of this family by {found}: use another file"
        )


def read(file: Path) -> GGUFReader:
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise UserError("reading a GGUF file needs the package gguf: run `pip install -e .[demo]` or `make setup`")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except ValueError as error:  # it ends too early, or is of another version
        raise UserError(f"{file} cannot be read as GGUF ({error}): get a whole copy") from error
    if (arch := _text(reader, "general.architecture")) not in ARCHITECTURES:
        raise UserError(f"{file} is of architecture {arch}: only {', '.join(ARCHITECTURES)} are read")
    return reader


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.fields.get(key)
    return str(field.contents()) if field else ""


def tied_matrix(reader: GGUFReader) -> Any:
    """What reads the finer copy, if the file keeps one matrix for both ends of the model twice; else None.

    Converters write the head of a tied model once more where it is to be quantized otherwise. transformers would read two.
    """
    import numpy as np
    from gguf.quants import dequantize

    ends = {tensor.name: tensor for tensor in reader.tensors if tensor.name in (FIRST, HEAD)}
    if HEAD not in ends:
        return None
    first, head = ends[FIRST], ends[HEAD]
    if tuple(first.shape) != tuple(head.shape):
        return None
    step = max(1, len(first.data) // SAMPLED_ROWS)
    one, other = (dequantize(tensor.data[::step], tensor.tensor_type).astype(np.float64) for tensor in (first, head))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines = (one * other).sum(1)[norms > 0] / norms[norms > 0]
    if not (cosines > SAME_ROW_COSINE).all():
        return None
    finer = max(first, head, key=lambda tensor: tensor.n_bytes)
    return lambda: dequantize(finer.data, finer.tensor_type).astype(np.float32)


if __name__ == "__main__":
    exit_on_user_error(main)

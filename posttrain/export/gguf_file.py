"""A policy as a GGUF file, in 16 bits: metadata, vocabulary and tensors as llama.cpp's own converter writes them.

What each name means: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The tensors are written one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.export.gguf_vocabulary import add_vocabulary
from posttrain.models.folded import FoldedWeights, Tensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

# transformers' class -> the architecture of llama.cpp that computes the same.
ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "GemmaForCausalLM": "GEMMA",
    "Gemma2ForCausalLM": "GEMMA2",
    "Gemma3ForCausalLM": "GEMMA3",
}
# llama.cpp has the order of layers with a window in its code (src/models/gemma*.cpp), one with full attention in so many.
WINDOW_PERIODS = {"GEMMA2": 2, "GEMMA3": 6}
ROPES = ("default", "linear", "llama3", "yarn")
# YaRN's own settings that are not written. llama.cpp takes these values, which are transformers' where a config has none.
YARN = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "beta_fast": 32, "beta_slow": 1, "truncate": True}
BIASED = ("LLAMA", "QWEN2")  # llama.cpp reads the biases of attention in these
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check_architecture(config: Any, class_name: str) -> str:
    """llama.cpp's name of the architecture.

    Raises:
        UserError: llama.cpp, or this writer, computes something else than this config says.
    """
    arch = ARCHITECTURES.get(class_name)
    if arch is None:
        raise UserError(f"{class_name} is not written as GGUF, only {', '.join(ARCHITECTURES)} are: use --format merged")
    why = next(_computed_otherwise(config, arch), None)
    if why:
        raise UserError(f"this {class_name} has {why}, which llama.cpp's {arch.lower()} does not compute: use --format merged")
    return arch


def _computed_otherwise(config: Any, arch: str) -> Iterator[str]:
    """What of this config llama.cpp leaves out, or has otherwise in its code."""
    kinds = list(getattr(config, "layer_types", None) or [])
    period = WINDOW_PERIODS.get(arch)
    expected = [
        "sliding_attention" if period and (layer + 1) % period else "full_attention" for layer in range(config.num_hidden_layers)
    ]
    if kinds and kinds != expected:
        yield "windows in other layers"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar not in (None, _head_dim(config)):
        yield f"query_pre_attn_scalar {scalar}"
    rope = _rope(config)
    if (kind := rope.get("rope_type", "default")) not in ROPES:
        yield f"positions of type {kind}"
    yield from (f"positions with {key} {rope[key]}" for key in YARN if rope.get(key) not in (None, YARN[key]))
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    # Gemma's is GELU by tanh there. The exact one, in the first Gemma's config, differs from it by less than fp16 rounds.
    if activation not in (("gelu", "gelu_pytorch_tanh") if arch.startswith("GEMMA") else ("silu", "swish")):
        yield f"the activation {activation}"
    if getattr(config, "attention_bias", False) and arch not in BIASED:
        yield "biases in its attention"


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    """The positions of the layers with full attention."""
    values = dict(config.rope_parameters or {})
    return dict(values.get("full_attention", values))


def check_writable(weights: FoldedWeights) -> None:
    """Refuse before a weight is read what `write_gguf` would refuse. UserError: an architecture, or a tensor without a place."""
    arch = check_architecture(weights.config, type(weights.plain).__name__)
    for _ in _entries(weights, arch, torch.float16):
        pass


def write_gguf(weights: FoldedWeights, tokenizer: PreTrainedTokenizerBase, file: Path, name: str, dtype: torch.dtype) -> None:
    """Write the policy; matrices in `dtype`, vectors in fp32.

    Raises:
        UserError: the architecture or the tokenizer has no place in GGUF.
    """
    import gguf

    arch = check_architecture(weights.config, type(weights.plain).__name__)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]])
    writer.add_type("model")
    writer.add_name(name)
    _add_shape(writer, weights.config, arch)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(DTYPES[dtype], f"MOSTLY_{DTYPES[dtype]}")])
    add_vocabulary(writer, tokenizer, weights.plain.get_input_embeddings().weight.shape[0])
    entries = list(_entries(weights, arch, dtype))
    for entry in entries:
        kind = gguf.GGMLQuantizationType[DTYPES[entry.dtype]]
        writer.add_tensor_info(
            entry.name, entry.shape, _numpy_dtype(entry.dtype), math.prod(entry.shape) * entry.dtype.itemsize, kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.read())
    writer.close()


def _numpy_dtype(dtype: torch.dtype) -> Any:
    import numpy as np

    return np.dtype(np.float32 if dtype == torch.float32 else np.float16)  # numpy has no bf16: its bytes go as another 2


def _add_shape(writer: GGUFWriter, config: Any, arch: str) -> None:
    heads = config.num_attention_heads
    head_dim = _head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    _add_rope(writer, config)
    if arch in WINDOW_PERIODS:
        writer.add_sliding_window(config.sliding_window)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if local := (config.rope_parameters or {}).get("sliding_attention"):
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


# --- tensors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file: its name there, its shape, and how it is computed when its turn has come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Callable[[], torch.Tensor]

    def read(self) -> Any:
        value = self.tensor().to(self.dtype).contiguous()
        return value.view(torch.float16).numpy() if self.dtype == torch.bfloat16 else value.numpy()


def _entries(weights: FoldedWeights, arch: str, dtype: torch.dtype) -> Iterator[_Entry]:
    import gguf

    config = weights.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_hidden_layers)
    if (rope := _rope(config)).get("rope_type") == "llama3":
        factors = _llama3_factors(rope, _head_dim(config))
        yield _Entry("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors)
    for tensor in weights.tensors:
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"llama.cpp's {arch.lower()} has no place for {tensor.name}: use --format merged")
        held = dtype if len(tensor.shape) > 1 else torch.float32
        yield _Entry(name, tensor.shape, held, _reader(weights, tensor, arch))


def _reader(weights: FoldedWeights, tensor: Tensor, arch: str) -> Callable[[], torch.Tensor]:
    """How a tensor is read, in fp32 or the policy's dtype, in the form that llama.cpp computes with."""
    config = weights.config
    part = tensor.name.rsplit(".", 2)[-2]
    if arch == "LLAMA" and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        return lambda: _pairs_beside(weights.read(tensor), heads)
    if arch.startswith("GEMMA") and tensor.name.endswith("norm.weight"):
        return lambda: weights.read(tensor).float() + 1  # Gemma's norm multiplies by 1 + weight, llama.cpp's by the weight
    return lambda: weights.read(tensor)


def _pairs_beside(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head in the order in which llama.cpp's Llama turns them: partners stand side by side, not half a head apart."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """What each frequency is divided by (transformers' `_compute_llama3_parameters`), (head_dim / 2,)."""
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()

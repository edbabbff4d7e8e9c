"""Models with random weights in Llama's shape, and a fresh adapter for each: speed does not depend on what weights are.

The tokenizer is a real one, whose stop token such a model practically never emits: every completion runs to its limit. Ids
above the tokenizer's vocabulary decode to nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

LLAMA_3B = {  # Llama-3.2-3B
    "vocab_size": 128_256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: Path, tokenizer: Path, shape: dict[str, Any]) -> None:
    """Write model, tokenizer and, last, adapter/. If adapter/ is there, the folder is complete, and nothing is done."""
    if (folder / "adapter" / "adapter_config.json").is_file():
        return
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    own = AutoTokenizer.from_pretrained(tokenizer)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    shape = {"vocab_size": len(own), "tie_word_embeddings": True} | shape | dict.fromkeys(tokens)
    if len(own) > shape["vocab_size"]:  # minutes later, every party would fail
        sys.exit(f"{tokenizer} has {len(own)} tokens, and the model {shape['vocab_size']}: give another --tokenizer")
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    # Only now: the row of a pad token that is known at the start is all 0, and a tokenizer may pad with its stop token.
    for settings in (model.config, model.generation_config):
        for name in tokens:
            setattr(settings, name, getattr(own, name))
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    model.name_or_path = str(folder)  # the adapter names it as its base
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder / "adapter", save_embedding_layers=False)

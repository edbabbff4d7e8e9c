"""`--dry-run`: what follows from a config before anything is trained. Arithmetic, two rows with their mask, memory, time, checks.

A dry run needs the data set and the tokenizer, never the weights. If it cannot reach the tokenizer, it says so and goes on.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.config.schema import EvalConfig, GrpoConfig, Model, SftConfig, TrainConfig
from posttrain.config.trl_fields import trl_fields
from posttrain.console import dimmed
from posttrain.errors import UserError
from posttrain.records import Example, columns_of
from posttrain.runs.process import num_processes
from posttrain.tasks.answers import NUMBERS, Grader
from posttrain.training import examples, planner
from posttrain.training.named_rewards import NamedReward, named_rewards, try_rewards
from posttrain.training.planner import Machine, Memory, Shape, Step


def show_sft_dry_run(config: SftConfig, grader: Grader = NUMBERS, machine: Machine | None = None) -> None:
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
    if shape := model_shape(config.model):
        show_plan(sft_step(config, shape, value, token_lengths(tokenizer, train), planned_on_gpu(machine)), steps, machine)


def sft_step(config: SftConfig, shape: Shape, value: dict[str, Any], lengths: list[int], on_gpu: bool) -> Step:
    """By the rows' tokens where they are known, else by rows of `trainer.max_length`."""
    rows, limit = value["per_device_train_batch_size"], value["max_length"] or 1024
    if value["packing"]:
        return step_of(config, shape, value, limit, rows * limit, on_gpu)
    cut = [min(length, limit) for length in lengths] or [limit]
    positions = planner.padded(cut, rows, value["train_sampling_strategy"] == "group_by_length")
    return step_of(config, shape, value, max(cut), positions, on_gpu)


def token_lengths(tokenizer: Any, examples: list[Example]) -> list[int]:
    """Tokens of the first thousand rows, none where the tokenizer is not at hand."""
    from posttrain.models.chat import chat_ids

    return [len(chat_ids(tokenizer, row.prompt + row.completion)) for row in examples[:1000]] if tokenizer else []


def show_grpo_dry_run(config: GrpoConfig, grader: Grader = NUMBERS, machine: Machine | None = None) -> None:
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
    if shape := model_shape(config.model):
        step = grpo_step(config, shape, value, window, machine)
        print("memory and time are those of completions that all reach their limit")
        show_plan(step, steps, machine, config.trainer.get("steps_per_generation"))


def grpo_step(config: GrpoConfig, shape: Shape, value: dict[str, Any], window: int, machine: Machine | None) -> Step:
    """For prompts of 256 tokens and completions as long as they may be."""
    prompt, new, group = 256, value["max_completion_length"], value["num_generations"]
    rows = value["per_device_train_batch_size"]
    # Without checkpointing, a group shares its prompt (posttrain/training/shared_prompts.py).
    row = new + (prompt if value["gradient_checkpointing"] else prompt // group)
    own, on_gpu = window // num_processes(), planned_on_gpu(machine)
    at_once = min(own, config.rollouts.batch_size or own)
    rollouts = planner.Rollouts(
        rows=at_once,
        prompt=prompt,
        new=new,
        steps=at_once / (rows * value["gradient_accumulation_steps"]),
        seats=config.model.decoding != "loop" and on_gpu and (machine is None or machine.has_bf16),
        reference=bool(value["beta"]),
        group=group,
    )
    step = step_of(config, shape, value, row, rows * row, on_gpu)
    learnt = min(rows, max(1, config.update_tokens // row)) if config.update_tokens else rows
    parts = math.ceil(rows / learnt)
    return replace(step, rows=learnt, micro_batches=step.micro_batches * parts, positions=learnt * row, rollouts=rollouts)


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


# --- memory and time ---------------------------------------------------------------------------------------------------

BYTES = {
    "nf4": planner.NF4_BYTES,
    "nf4_unpacked": 2.0,
    "none": 2.0,
}  # a weight of a linear layer


def step_of(config: TrainConfig, shape: Shape, value: dict[str, Any], length: float, positions: float, on_gpu: bool) -> Step:
    """One optimizer step as the config has it. `length` is of the longest row, `positions` of a micro-batch on average."""
    model = config.model
    return Step(
        shape,
        micro_batches=value["gradient_accumulation_steps"],
        rows=value["per_device_train_batch_size"],
        length=length,
        positions=positions,
        trained=shape.linear + shape.embedding if config.trains_all_weights else lora_parameters(config, shape),
        rank=config.lora.r if config.lora else 32,
        width=4 if model.dtype == "float32" else 2,
        all_weights=config.trains_all_weights,
        nf4=config.quantization == "nf4",
        checkpointing=value["gradient_checkpointing"],
        lean=config.lean_layers,
        replayed=config.layer_graphs,
        fused=model.kernels != "torch" if on_gpu else is_fused(model),
        fast_adapter=config.fast_adapter,
        probabilities=not on_gpu and keeps_probabilities(model),
    )


def show_memory(step: Step, on_gpu: bool) -> Memory:
    need = planner.memory(step, on_gpu)
    parts = f"base {gib(need.weights)}, adapter with optimizer {gib(need.optimizer)}"
    if step.all_weights:
        parts = f"all weights with optimizer {gib(need.optimizer)}, rounded for a step {gib(need.weights)}"
    others = {
        "logits": need.logits,
        "the copy that generates with its keys and values": need.rollouts,
        "the KL reference, the model as it was": need.reference,
        "the process itself": need.process,
    }
    more = "".join(f", {name} {gib(size)}" for name, size in others.items() if size)
    print(
        f"memory, computed: {parts}, activations of {step.rows} x {step.length:.0f} tokens {gib(need.activations)}"
        f"{' (checkpointed)' if step.checkpointing else ''}{more}; about {gib(need.total)}"
    )
    return need


def show_plan(step: Step, steps: int, machine: Machine | None, window: int | None = None) -> None:
    """Memory, and for a card that was named whether the step fits it, how long the run takes and what that costs.

    `window` is `trainer.steps_per_generation` where the config sets it: it counts micro-batches.
    """
    show_memory(step, planned_on_gpu(machine))
    if machine is None:
        return
    card = f"{machine.title} ({gib(machine.memory)})"
    if not machine.has_bf16:
        print(f"{machine.title} has no bf16: set model.dtype=float16")
    if planner.fits(step, machine):
        print(f"fits {card}")
    elif found := planner.fastest_that_fits(step, machine):
        smaller, changed = found
        if window and smaller.rows != step.rows:
            changed = [*changed, f"trainer.steps_per_generation={window * step.rows // smaller.rows}"]
        print(f"does not fit {card}; the same batch does, and is planned, with: {' '.join(changed)}")
        step = smaller
    else:
        print(f"does not fit {card}, nor would any smaller part of the batch: take a smaller model or another card")
        return
    show_time(step, steps, machine)


def show_time(step: Step, steps: int, machine: Machine) -> None:
    took, cards, price = planner.seconds(step, machine), num_processes(), machine.dollars
    hours = took.total * steps / 3600
    parts = f" ({took.rollouts:.2f} rollouts, {took.update:.2f} update, {took.reference:.2f} reference)" if step.rollouts else ""
    cost = f", {hours * cards * price:,.2f} dollars at {price:.2f} an hour ({planner.PRICED})" if price else ""
    print(
        f"time, computed: {took.total:.2f} s a step{parts}, {hours:.2f} hours for {steps} steps on {cards} x {machine.title}"
        f"{cost}; loading, dev questions and checkpoints come on top"
    )


def planned_on_gpu(machine: Machine | None) -> bool:
    from posttrain.models.base import device

    return machine.is_gpu if machine else device().type == "cuda"


def keeps_probabilities(model: Model) -> bool:
    """Whether attention keeps its probabilities, half a square for each head, until the backward pass."""
    from posttrain.models.base import device

    return model.attn_implementation == "matmul" or (model.attn_implementation == "auto" and device().type == "cpu")


def is_fused(model: Model) -> bool:
    """Whether norms and MLP keep only their inputs for the backward pass (posttrain/kernels/liger.py)."""
    from posttrain.models.base import device

    return model.kernels != "torch" and device().type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def lora_parameters(config: TrainConfig, shape: Shape) -> float:
    """Parameters of the adapter. For one that is continued: rank 32 on every linear layer."""
    rank = config.lora.r if config.lora else 32
    hidden, inner, kv = shape.hidden, shape.inner, shape.kv_width
    sizes = {"q_proj": 2 * hidden, "o_proj": 2 * hidden, "k_proj": hidden + kv, "v_proj": hidden + kv}
    sizes |= {name: hidden + inner for name in ("gate_proj", "up_proj", "down_proj")}
    targets = config.lora.target_modules if config.lora and config.lora.target_modules != ["all-linear"] else list(sizes)
    return rank * shape.layers * sum(sizes.get(target, 2 * hidden) for target in targets)


def model_shape(model: Model) -> Shape | None:
    """Sizes from the config.json of a local folder or of the local Hub cache."""
    file = Path(model.name_or_path, "config.json")
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.name_or_path, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            print("memory and time are not computed: the model's config.json is not on this machine yet")
            return None
        file = Path(cached)
    return planner.shape_of(json.loads(file.read_text(encoding="utf-8")))


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

"""A config's steps, memory, disk and time in the planner's terms: by its data set, config.json and tokenizer, without weights."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.config.schema import EvalConfig, GrpoConfig, Model, SftConfig, TrainConfig
from posttrain.config.trl_fields import trl_fields
from posttrain.console import duration
from posttrain.errors import UserError
from posttrain.records import Example, read_jsonl
from posttrain.runs.process import num_processes
from posttrain.training import examples, fitting, machines, planner
from posttrain.training.machines import Machine
from posttrain.training.planner import Shape, Step

LEAST_KEPT = 2  # checkpoints: one is left if the disk damages the other
PROMPT = 256  # tokens, where prompts are not counted

# --- steps ------------------------------------------------------------------------------------------------------------


def trainer_values(config: TrainConfig) -> dict[str, Any]:
    """The trainer's fields with TRL's defaults filled in."""
    return {key: config.trainer.get(key, field.default) for key, field in trl_fields(config.trl_class).items()}


def num_steps(value: dict[str, Any], num_rows: int, batch: int) -> int:
    if value["max_steps"] > 0:
        return value["max_steps"]
    return math.ceil(num_rows / batch) * math.ceil(value["num_train_epochs"])


def num_packed(tokenizer: Any, train: list[Example], size: int) -> int:
    """How many rows of `size` tokens TRL packs the training rows into, by the first thousand: it packs a thousand at once."""
    from posttrain.models.chat import chat_ids
    from posttrain.training.packing import num_bins

    sample = train[:1000]
    lengths = [len(chat_ids(tokenizer, example.prompt + example.completion)) for example in sample]
    return math.ceil(num_bins(lengths, size) * len(train) / len(sample))


def token_lengths(tokenizer: Any, examples: list[Example]) -> list[int]:
    """Tokens of the first thousand rows, none where the tokenizer is not at hand."""
    from posttrain.models.chat import chat_ids

    return [len(chat_ids(tokenizer, row.prompt + row.completion)) for row in examples[:1000]] if tokenizer else []


def batch_of(value: dict[str, Any]) -> int:
    """Rows, or completions, of an optimizer step, over all processes."""
    return int(value["per_device_train_batch_size"] * value["gradient_accumulation_steps"] * num_processes())


def window_of(value: dict[str, Any]) -> int:
    """Completions that are sampled at once, over all processes."""
    each = value["per_device_train_batch_size"] * num_processes()
    return int(value["generation_batch_size"] or each * (value["steps_per_generation"] or value["gradient_accumulation_steps"]))


def sft_steps(value: dict[str, Any], train: list[Example], tokenizer: Any) -> int:
    """Optimizer steps. Of packed rows the tokenizer alone tells how many there are."""
    rows = num_packed(tokenizer, train, value["max_length"]) if value["packing"] and tokenizer else len(train)
    return num_steps(value, rows, batch_of(value))


def grpo_steps(value: dict[str, Any], train: list[Example]) -> int:
    return num_steps(value, len(train) * value["num_generations"], batch_of(value))


# --- what a step computes and keeps -----------------------------------------------------------------------------------


def sft_step(config: SftConfig, shape: Shape, value: dict[str, Any], lengths: list[int], on_gpu: bool) -> Step:
    """By the rows' tokens where they are known, else by rows of `trainer.max_length`."""
    rows, limit = value["per_device_train_batch_size"], value["max_length"] or 1024
    if value["packing"]:
        return step_of(config, shape, value, limit, rows * limit, on_gpu)
    cut = [min(length, limit) for length in lengths] or [limit]
    positions = planner.padded(cut, rows, value["train_sampling_strategy"] == "group_by_length")
    return step_of(config, shape, value, max(cut), positions, on_gpu)


def grpo_step(config: GrpoConfig, shape: Shape, value: dict[str, Any], machine: Machine | None) -> Step:
    """For completions as long as they may be."""
    prompt, new, group = PROMPT, value["max_completion_length"], value["num_generations"]
    rows = value["per_device_train_batch_size"]
    # Without checkpointing, a group shares its prompt (posttrain/training/shared_prompts.py).
    row = new + (prompt if value["gradient_checkpointing"] else prompt // group)
    own, on_gpu = window_of(value) // num_processes(), planned_on_gpu(machine)
    at_once = min(own, config.rollouts.batch_size or own)
    rollouts = planner.Rollouts(
        rows=at_once,
        prompt=prompt,
        new=new,
        steps=at_once / (rows * value["gradient_accumulation_steps"]),
        seats=has_seats(config.model, machine),
        reference=bool(value["beta"]),
        group=group,
        width=1 if config.rollouts.weights else 2,
        cached=1 if config.rollouts.cache else 2,
    )
    step = step_of(config, shape, value, row, rows * row, on_gpu)
    return replace(step, part_tokens=config.update_tokens, rollouts=rollouts)


def has_seats(model: Model, machine: Machine | None) -> bool:
    """Whether decoding is in seats: on a GPU with bf16, if nothing else stands in the way."""
    return model.decoding != "loop" and planned_on_gpu(machine) and (machine is None or machine.has_bf16)


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
        moments=moment_bytes(config),
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
    """Sizes from the config.json of a local folder or of the local Hub cache; None where it is in neither."""
    file = Path(model.name_or_path, "config.json")
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.name_or_path, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    return planner.shape_of(json.loads(file.read_text(encoding="utf-8")))


# --- disk -------------------------------------------------------------------------------------------------------------


def checkpoint_bytes(config: SftConfig | GrpoConfig, trains: float) -> float:
    """fp32 weights, and the optimizer's moments."""
    return trains * (4 + moment_bytes(config))


# How many numbers an optimizer keeps of each parameter, by what its name contains. Others keep none, or as few as Adafactor.
MOMENTS = {"ademamix": 3, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}
BYTES_OF_A_MOMENT = {"8bit": 1, "4bit": 0.5}  # and of the others 4


def moment_bytes(config: TrainConfig) -> float:
    """What `trainer.optim` keeps of a trained parameter. Paged moments are on the card as long as it has room for them."""
    name = str(config.trainer.get("optim", "adamw"))
    kept = next((kept for kind, kept in MOMENTS.items() if kind in name), 0)
    return kept * next((size for width, size in BYTES_OF_A_MOMENT.items() if width in name), 4)


def num_checkpoints(config: SftConfig | GrpoConfig, num_rows: int) -> int:
    """The most that lie on the disk at a time: a new one is written before an old one goes."""
    value = trainer_values(config)
    if value["save_strategy"] == "no":
        return 0
    steps = num_steps(value, num_rows * value.get("num_generations", 1), batch_of(value))
    every = steps if value["save_strategy"] != "steps" else value["save_steps"]
    made = max(1, int(steps // every if every >= 1 else 1 / every))  # below 1 it is a share of the steps
    return min(made, max(value["save_total_limit"], LEAST_KEPT) + 1) if value["save_total_limit"] else made


def samples_bytes(value: dict[str, Any], steps: int) -> float:
    """samples.jsonl, with every completion of a logged step as long as it may be, at some 4 bytes a token."""
    logged = steps / max(1, value["logging_steps"])
    return logged * window_of(value) * (4 * value["max_completion_length"] + 500)  # a question, rewards, keys


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


# --- a whole run, for a card ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What a run takes on a card: seconds, and what had to be changed for it to fit; None where it would not fit at all."""

    what: str
    seconds: float | None
    changed: tuple[str, ...] = ()


def stage_of(config: SftConfig | GrpoConfig | EvalConfig, machine: Machine) -> Stage:
    """Seconds of all steps, or of all questions. Loading, dev questions and checkpoints are left out.

    Raises:
        UserError: data, config.json or tokenizer are not on this machine.
    """
    shape = model_shape(config.model)
    if shape is None:
        name = config.model.name_or_path
        raise UserError(f"the config.json of {name} is not on this machine: `hf download {name} config.json` brings it")
    if isinstance(config, EvalConfig):
        num, seconds = evaluation(config, shape, machine)
        samples = f" x {config.generation.samples}" if config.generation.samples > 1 else ""
        return Stage(f"evaluation of {num} questions{samples}", seconds)
    train, _ = examples.load_examples(config)
    value = trainer_values(config)
    if isinstance(config, GrpoConfig):
        steps, step = grpo_steps(value, train), grpo_step(config, shape, value, machine)
    else:
        from posttrain.models.chat import load_tokenizer

        tokenizer = load_tokenizer(config.model)
        steps = sft_steps(value, train, tokenizer)
        step = sft_step(config, shape, value, token_lengths(tokenizer, train), machine.is_gpu)
    what = f"{'GRPO' if step.rollouts else 'SFT'}, {steps} steps"
    if found := fitted(step, machine, value):
        return Stage(what, steps * planner.seconds(found[0], machine).total, found[1])
    return Stage(what, None)


def expected(config: SftConfig | GrpoConfig, tokenizer: Any, train: list[Example]) -> str | None:
    """How long the steps of a run should take on this machine, in words; None on a card that the planner does not know."""
    machine, shape = this_machine(), model_shape(config.model)
    if machine is None or shape is None:
        return None
    value = trainer_values(config)
    if isinstance(config, GrpoConfig):
        seconds = grpo_steps(value, train) * planner.seconds(grpo_step(config, shape, value, machine), machine).total
        return f"expected: up to {duration(seconds)} of steps, if every completion reaches its limit{computed_for(machine)}"
    step = sft_step(config, shape, value, token_lengths(tokenizer, train), machine.is_gpu)
    seconds = sft_steps(value, train, tokenizer) * planner.seconds(step, machine).total
    return f"expected: about {duration(seconds)} of steps{computed_for(machine)}"


def computed_for(machine: Machine) -> str:
    return f" (computed for {machine.title}; docs/planning.md)"


def this_machine() -> Machine | None:
    """The planner's card that is in this machine; a CPU is taken for the one that was measured."""
    from posttrain.models.base import device

    if device().type != "cuda":
        return machines.MACHINES["cpu"]
    import torch

    return machines.named(torch.cuda.get_device_name(device()))


def fitted(step: Step, machine: Machine, value: dict[str, Any]) -> tuple[Step, tuple[str, ...]] | None:
    """The step as it fits a card, with the overrides that make it so; None where no part of the batch does."""
    if fitting.fits(step, machine):
        return step, ()
    if not (found := fitting.fastest_that_fits(step, machine)):
        return None
    smaller, changed = found
    if value.get("steps_per_generation") and smaller.rows != step.rows:  # it counts micro-batches
        changed = [*changed, f"trainer.steps_per_generation={value['steps_per_generation'] * step.rows // smaller.rows}"]
    return smaller, tuple(changed)


def evaluation(config: EvalConfig, shape: Shape, machine: Machine) -> tuple[int, float]:
    """Questions, and seconds to answer them on as many cards as the launch has, with completions as long as they may be."""
    asked = read_jsonl(Path(config.data.path, f"{config.data.split}.jsonl"), Example)[: config.data.limit]
    new, samples, prompt = config.generation.max_new_tokens, config.generation.samples, PROMPT
    size, seats = config.generation.batch_size, has_seats(config.model, machine)
    at_once = planner.rows_at_once(shape, prompt + new, machine)
    if not seats:
        at_once = max(1, at_once // samples) * samples if size == "auto" else size * samples
    rollouts = planner.Rollouts(at_once, prompt, new, 1, seats, False, samples)
    step = Step(shape, 1, 1, prompt, prompt, 0)
    total = math.ceil(len(asked) / num_processes()) * samples
    return len(asked), planner.evaluation_seconds(step, rollouts, total, machine)

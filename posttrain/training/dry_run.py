"""`--dry-run`: what follows from a config before anything is trained. Arithmetic, two rows with their mask, memory, time, checks.

A dry run needs the data set and the tokenizer, never the weights. If it cannot reach the tokenizer, it says so and goes on.
"""

from __future__ import annotations

from typing import Any

from posttrain.config.schema import EvalConfig, GrpoConfig, Model, SftConfig
from posttrain.console import dimmed
from posttrain.errors import UserError
from posttrain.records import Example, columns_of
from posttrain.runs.process import num_processes
from posttrain.tasks.graders import NUMBERS, Grader
from posttrain.training import examples, machines, planner, plans
from posttrain.training.machines import Machine
from posttrain.training.named_rewards import NamedReward, named_rewards
from posttrain.training.planner import Memory, Shape, Step
from posttrain.training.plans import gib
from posttrain.training.reward_trial import try_rewards


def show_sft_dry_run(config: SftConfig, grader: Grader = NUMBERS, machine: Machine | None = None) -> None:
    train, dev = examples.load_examples(config)
    value = plans.trainer_values(config)
    batch = plans.batch_of(value)
    tokenizer = tokenizer_or_none(config.model, train + dev)
    steps = plans.sft_steps(value, train, tokenizer)
    kind = f"rows of {value['max_length']} packed tokens" if value["packing"] else "rows"
    known = tokenizer or not value["packing"]
    what = "SFT of all weights" if config.trains_all_weights else "SFT"
    print(f"{what}: {len(train)} rows, {len(dev)} dev rows; {batch_line(value)} = {batch} {kind} a step", end="")
    print(f"; {steps} steps" if known else "; how many steps, the tokenizer would tell")
    print(grader_line(grader))
    if tokenizer:
        rows = plans.num_packed(tokenizer, train, value["max_length"]) if value["packing"] else len(train)
        show_tokens(tokenizer, train, value["max_length"] or 0, steps * batch / rows, batch * len(train) / rows)
        for example in train[:2]:
            print(with_prompt_dimmed(tokenizer, example))
        show_stop_token(tokenizer)
    if shape := shape_or_none(config.model):
        lengths = plans.token_lengths(tokenizer, train)
        step = plans.sft_step(config, shape, value, lengths, plans.planned_on_gpu(machine))
        show_plan(config, step, steps, machine, len(train))


def show_grpo_dry_run(config: GrpoConfig, grader: Grader = NUMBERS, machine: Machine | None = None) -> None:
    train, dev = examples.load_examples(config)
    value = plans.trainer_values(config)
    group, batch, window = value["num_generations"], plans.batch_of(value), plans.window_of(value)
    steps = plans.grpo_steps(value, train)
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
    if shape := shape_or_none(config.model):
        print("memory and time are those of completions that all reach their limit")
        show_plan(config, plans.grpo_step(config, shape, value, machine), steps, machine, len(train))


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


def show_eval_dry_run(config: EvalConfig, asked: list[Example], grader: Grader = NUMBERS, machine: Machine | None = None) -> None:
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
    if machine and (shape := shape_or_none(config.model)):
        seconds = plans.evaluation(config, shape, machine)[1]
        print(f"time, computed, of completions that all reach their limit: {hours_and_cost(seconds, machine)}")


def batch_line(value: dict[str, Any]) -> str:
    rows, accumulation = value["per_device_train_batch_size"], value["gradient_accumulation_steps"]
    return f"batch {rows} x accumulation {accumulation} x processes {num_processes()}"


# --- tokens -----------------------------------------------------------------------------------------------------------


def shape_or_none(model: Model) -> Shape | None:
    shape = plans.model_shape(model)
    if shape is None:
        print("memory and time are not computed: the model's config.json is not on this machine yet")
    return shape


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
        f"memory, computed: {parts}, activations of {step.rows_at_once:.0f} x {step.length:.0f} tokens {gib(need.activations)}"
        f"{' (checkpointed)' if step.checkpointing else ''}{more}; about {gib(need.total)}"
    )
    return need


def show_plan(config: SftConfig | GrpoConfig, step: Step, steps: int, machine: Machine | None, num_rows: int) -> None:
    """Memory and disk, and for a card that was named whether the step fits it, how long the run takes and what that costs."""
    show_memory(step, plans.planned_on_gpu(machine))
    show_disk(config, step, steps, num_rows)
    if machine is None:
        return
    card = f"{machine.title} ({gib(machine.memory)})"
    if not machine.has_bf16:
        print(f"{machine.title} has no bf16: set model.dtype=float16")
    if not (found := plans.fitted(step, machine, plans.trainer_values(config))):
        print(f"does not fit {card}, nor would any smaller part of the batch: take a smaller model or another card")
        return
    step, changed = found
    same = f"the same batch does, and is planned, with: {' '.join(changed)}"
    print(f"does not fit {card}; {same}" if changed else f"fits {card}")
    show_time(step, steps, machine)


def show_disk(config: SftConfig | GrpoConfig, step: Step, steps: int, num_rows: int) -> None:
    """What the run directory comes to. A result in 16 bits is half of a checkpoint's fp32 weights or less."""
    each, kept = plans.checkpoint_bytes(config, step.trained), plans.num_checkpoints(config, num_rows)
    result = step.trained * (step.width if step.all_weights else 4)
    value = plans.trainer_values(config)
    samples = plans.samples_bytes(value, steps) if isinstance(config, GrpoConfig) else 0.0
    more = f", samples.jsonl {gib(samples)}" if samples else ""
    name, whole = "model" if step.all_weights else "adapter", each * kept + result + samples
    print(f"disk, computed: {kept} x {gib(each)} of checkpoints, {name} {gib(result)}{more}; {gib(whole)}")


def show_time(step: Step, steps: int, machine: Machine) -> None:
    took = planner.seconds(step, machine)
    parts = f" ({took.rollouts:.2f} rollouts, {took.update:.2f} update, {took.reference:.2f} reference)" if step.rollouts else ""
    print(
        f"time, computed: {took.total:.2f} s a step{parts}, {hours_and_cost(took.total * steps, machine, f' for {steps} steps')}"
        "; loading, dev questions and checkpoints come on top"
    )


def hours_and_cost(seconds: float, machine: Machine, what: str = "") -> str:
    hours, cards, price = seconds / 3600, num_processes(), machine.dollars
    cost = f", {hours * cards * price:,.2f} dollars at {price:.2f} an hour ({machines.PRICED})" if price else ""
    return f"{hours:.2f} hours{what} on {cards} x {machine.title}{cost}"

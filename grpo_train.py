"""Stage 2: GRPO from the SFT adapter, or from a model as it is, rewarded by the grader that evaluation uses.

    python grpo_train.py --config configs/grpo_llama3.2-3b.yaml
    python grpo_train.py --config configs/grpo_llama3.2-3b.yaml adapter=runs/my_sft run_dir=runs/my_grpo
    python grpo_train.py --config configs/grpo_demo.yaml adapter=null 'lora={r: 32, alpha: 32, target_modules: all-linear}'
    python grpo_train.py --config configs/grpo_llama3.2-3b.yaml --dry-run    # batch arithmetic, checks, nothing trained
    python grpo_train.py --config configs/grpo_llama3.2-3b.yaml --resume     # after an interruption
    accelerate launch --config_file configs/accelerate/ddp.yaml grpo_train.py --config ...     # several GPUs
    torchrun --nproc_per_node 2 grpo_train.py --config ...                                     # several processes on CPUs

Departures from a plain TRL script: the starting policy and the KL reference are exactly the SFT policy (the hash of the
loaded adapter is checked); master weights stay fp32; completions come from a copy of the policy with the adapter folded in,
and each prompt is computed once for its whole group; dropout is off; a reward that is not a number stops the run, and a run
that changed nothing fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.load import from_command_line
from posttrain.config.schema import GrpoConfig
from posttrain.errors import exit_on_user_error, stop
from posttrain.runs.data_sets import data_entry
from posttrain.runs.directory import Run, check_machine, check_reusable, open_run
from posttrain.runs.manifest import parent_of, parent_of_model, refuse_unfinished, refuse_unfinished_model
from posttrain.runs.process import is_sharded, use_one_gpu
from posttrain.tasks.answers import grader_of, other_answers

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from posttrain.models.policy import Policy
    from posttrain.records import Example
    from posttrain.tasks.graders import Grader
    from posttrain.training.before import Ready
    from posttrain.training.grpo_trainer import GRPO

OTHER_ENGINE = "let transformers' own `generate` make the completions, rollouts.engine=trl"
NO_DEV = "and no dev accuracy, data.num_dev=0"


def main() -> None:
    config, args = from_command_line(GrpoConfig, __doc__, plans=True)
    data = data_entry(config.data.path, "train")
    grader = grader_of(data.get("answer"))  # it needs a package? Then say so before anything is made
    if args.dry_run:
        from posttrain.training.dry_run import show_grpo_dry_run
        from posttrain.training.machines import find_machine

        return show_grpo_dry_run(config, grader, find_machine(args.gpu) if args.gpu else None)
    check_reusable(config, config.run_dir, args.resume)
    use_one_gpu()

    from posttrain.training.arguments import global_batch
    from posttrain.training.checkpoints import last_checkpoint, push_if_asked, save_adapter
    from posttrain.training.progress import say_finished

    ready = get_ready(config, grader)
    with open_run(config, "grpo", config.run_dir, args.resume) as run:
        run.record(data=data)
        ready.tell(run, config)
        run.track(config.tracking, config.model_dump(mode="json"))
        model = load_policy(config, ready.adapter, ready.tokenizer, run)
        trainer = make_trainer(config, run, model, ready.tokenizer, ready.train, ready.dev)
        run.record(global_batch=global_batch(trainer.args))
        with stop.held():  # a signal ends the run at the next step's end, with a checkpoint
            trainer.train(resume_from_checkpoint=last_checkpoint(run, args.resume))
            save_adapter(trainer, run, ready.tokenizer, run.manifest.start_sha256)
    say_finished(config, run, len(ready.dev))
    push_if_asked(config, run)


def get_ready(config: GrpoConfig, grader: Grader) -> Ready:
    """What the run begins with. All that can be refused is refused here, before the run directory is made.

    Raises:
        UserError: adapter, base, tokenizer, template, questions, engine or the trainer's keys do not fit one another.
    """
    from trl import GRPOConfig

    from posttrain.generation.supported import check_engine
    from posttrain.models import adapter_checks, adapter_modes, adapters
    from posttrain.models.chat import load_tokenizer
    from posttrain.models.checkpoint import check_base
    from posttrain.models.template_check import check_same_template, check_template
    from posttrain.records import columns_of
    from posttrain.training.before import Ready, check_grpo, check_trainer, max_completion_length
    from posttrain.training.examples import load_examples
    from posttrain.training.named_rewards import named_rewards
    from posttrain.training.reward_trial import try_rewards
    from posttrain.training.room import check_room

    check_machine(config)
    train, dev = load_examples(config)
    named = named_rewards(config.rewards, max_completion_length(config), columns_of(train))
    folder = adapters.resolve_adapter(config.adapter) if config.adapter else None
    begun_with = refuse_unfinished(folder) if folder else refuse_unfinished_model(config.model.name_or_path)
    tokenizer = load_tokenizer(config.model)
    base = check_base(config.model, config.quantization, tokenizer)
    if folder:
        adapter_modes.check_grpo_start(folder, config, base, tokenizer)
    adapter_checks.check_begun(config.run_dir, config.model, folder)
    met = adapters.targets_line(base, config.lora) if config.lora else ""
    check_engine(config.model, config.rollouts.engine, OTHER_ENGINE)
    if dev:
        check_engine(config.model, "transformers", NO_DEV)
    check_template(tokenizer, train + dev)
    if folder:
        check_same_template(tokenizer, folder, train + dev)
    check_grpo(config, base, tokenizer, train, dev)
    for _ in try_rewards([reward.function for reward in named], train, tokenizer, grader):
        pass
    check_trainer(config, GRPOConfig, base)
    check_room(config, base, folder, len(train))
    return Ready(tokenizer, folder, train, dev, begun_with, met, rewards=named)


def load_policy(config: GrpoConfig, folder: Path | None, tokenizer: PreTrainedTokenizerBase, run: Run) -> Policy:
    """The policy to train on: the SFT adapter's, continued, rescaled or merged under a new adapter; or the model itself."""
    from posttrain.models import adapter_modes, adapters
    from posttrain.models.policy import open_policy
    from posttrain.runs.integrity import adapter_hashes

    sft_sha256 = adapters.adapter_sha256(folder) if folder else None
    parent, chain = parent_of(folder, sft_sha256) if folder and sft_sha256 else parent_of_model(config.model.name_or_path)[:2]
    for note in other_answers(chain, run.manifest.data):
        run.note(note)
    model, identity = open_policy(
        config.model, config.quantization, tokenizer, folder or config.lora, trainable=True, seed=config.seed
    )
    if folder:
        live = adapters.live_adapter_sha256(model)
        assert live == sft_sha256, f"the adapter in memory ({live[:12]}) is not the one in {folder} ({sft_sha256})"
        model, identity = adapter_modes.in_mode(config, model, identity, tokenizer, run.folder)
    begun = f" + {folder}" if folder else ""
    run.say(
        f"{config.model.name_or_path}{begun}: {adapters.count_trainable(model):,} trainable parameters, {config.quantization}"
    )
    run.record(
        model=identity,
        parent=parent,
        parent_files=adapter_hashes(folder) if folder else {},
        chain=chain,
        all_weights=config.trains_all_weights,
        start_sha256=adapters.trained_sha256(model),
    )
    return model


def make_trainer(
    config: GrpoConfig, run: Run, model: Policy, tokenizer: PreTrainedTokenizerBase, train: list[Example], dev: list[Example]
) -> GRPO:
    from trl import GRPOConfig

    from posttrain.generation.guard import EngineGuard
    from posttrain.models.policy_copy import GatheredCopy, PolicyCopy
    from posttrain.records import as_dataset, columns_of
    from posttrain.training.arguments import reference_arguments, trainer_arguments
    from posttrain.training.before import max_completion_length, told_in_one_line
    from posttrain.training.callbacks import Samples, UnmetRewards, add_callbacks
    from posttrain.training.curriculum import Curriculum
    from posttrain.training.dev import dev_accuracy
    from posttrain.training.grpo_trainer import GRPO
    from posttrain.training.named_rewards import gated_columns, named_rewards
    from posttrain.training.rollouts import Rollouts, reward_functions

    grader = grader_of(run.manifest.data.get("answer"))
    named = named_rewards(config.rewards, max_completion_length(config), columns_of(train))
    functions, weights = reward_functions(config.rewards, grader)
    functions += [reward.function for reward in named]
    weights += [reward.weight for reward in named]
    in_8_bits = config.rollouts.weights == "fp8"
    copy = GatheredCopy(model) if is_sharded() else PolicyCopy(model, in_8_bits, config.rollouts.cache == "fp8")
    remedy = f"{OTHER_ENGINE}, {NO_DEV}"
    guard = EngineGuard(remedy, run.record)
    rollouts = None if config.rollouts.engine == "trl" else Rollouts(copy, tokenizer, config.seed, config.rollouts, guard)
    arguments = {"disable_dropout": True} | trainer_arguments(config, run) | {"reward_weights": weights}
    if config.trains_all_weights:
        arguments["model_init_kwargs"] = reference_arguments(config.model, model)
    with told_in_one_line():
        trainer = GRPO(
            model=model,
            args=GRPOConfig(**arguments),
            reward_funcs=functions,
            train_dataset=as_dataset(train, columns_of(train)),
            processing_class=tokenizer,
            rollout_func=rollouts,
            fast_adapter=config.fast_adapter,
            lean_layers=config.lean_layers,
            layer_graphs=config.layer_graphs,
            skip_zero_signal=config.rollouts.skip_zero_signal,
            correct_mismatch=config.rollouts.correct_mismatch,
            weigh_mismatch=in_8_bits,
            reference_is_base=config.adapter is None,
            gates=gated_columns(("correctness", "format"), named),
            curriculum=Curriculum(len(train), config.seed, config.curriculum) if config.curriculum else None,
            update_tokens=config.update_tokens,
        )
    limit = trainer.max_completion_length
    # Dev questions are answered as evaluate.py answers them, not in 8 bits.
    asked, asks = (None, EngineGuard(remedy, run.record)) if in_8_bits else (copy, guard)
    measure = (lambda: dev_accuracy(model, tokenizer, dev, limit, asked, asks, grader)) if dev else None
    paying = dict(zip(trainer.reward_func_names, weights, strict=True))
    trainer.add_callback(UnmetRewards(run, paying, config.unmet_after_steps))
    add_callbacks(trainer, run, measure, config.dev_every_steps)
    trainer.add_callback(Samples(run, trainer.latest))
    return trainer


if __name__ == "__main__":
    exit_on_user_error(main)

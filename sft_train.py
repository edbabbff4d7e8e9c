"""Stage 1: supervised fine-tuning on worked solutions, of a LoRA adapter over an NF4 or bf16 base, or of all weights.

    python sft_train.py --config configs/sft_llama3.2-3b.yaml
    python sft_train.py --config configs/sft_llama3.2-3b.yaml trainer.learning_rate=2e-4 run_dir=runs/sft_2e-4
    python sft_train.py --config configs/sft_demo.yaml lora=null quantization=none run_dir=runs/sft_all     # all weights
    python sft_train.py --config configs/sft_llama3.2-3b.yaml --dry-run     # what would happen, and two rows with their mask
    python sft_train.py --config configs/sft_llama3.2-3b.yaml --resume      # after an interruption
    accelerate launch --config_file configs/accelerate/ddp.yaml sft_train.py --config ...     # several GPUs
    torchrun --nproc_per_node 2 sft_train.py --config ...                                     # several processes on CPUs

Departures from a plain TRL script: the loss is on the completion only; the adapter's master weights stay fp32 (over a quantized
base TRL makes them bf16, where small steps round to nothing); a run is refused unless its stop token is the one that the chat
template emits; dev accuracy is measured before and after; a non-finite gradient stops the run before it is applied.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.load import from_command_line
from posttrain.config.schema import SftConfig
from posttrain.errors import exit_on_user_error, stop
from posttrain.runs.data_sets import data_entry
from posttrain.runs.directory import Run, check_machine, check_reusable, open_run
from posttrain.runs.manifest import parent_of, parent_of_model, refuse_unfinished, refuse_unfinished_model
from posttrain.runs.process import use_one_gpu
from posttrain.tasks.answers import grader_of

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from posttrain.models.policy import Policy
    from posttrain.records import Example
    from posttrain.training.before import Ready
    from posttrain.training.sft_trainer import SFT

NO_DEV = "train without dev accuracy, data.num_dev=0"


def main() -> None:
    config, args = from_command_line(SftConfig, __doc__, plans=True)
    data = data_entry(config.data.path, "train")
    grader = grader_of(data.get("answer"))  # it needs a package? Then say so before anything is made
    if args.dry_run:
        from posttrain.training.dry_run import show_sft_dry_run
        from posttrain.training.machines import find_machine

        return show_sft_dry_run(config, grader, find_machine(args.gpu) if args.gpu else None)
    check_reusable(config, config.run_dir, args.resume)
    use_one_gpu()

    from posttrain.training.arguments import global_batch
    from posttrain.training.checkpoints import last_checkpoint, push_if_asked, save_adapter
    from posttrain.training.progress import say_finished

    ready = get_ready(config)
    with open_run(config, "sft", config.run_dir, args.resume) as run:
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


def get_ready(config: SftConfig) -> Ready:
    """What the run begins with. All that can be refused is refused here, before the run directory is made.

    Raises:
        UserError: adapter, base, tokenizer, template, rows or the trainer's keys do not fit one another.
    """
    from trl import SFTConfig

    from posttrain.generation.supported import check_engine
    from posttrain.models import adapter_checks, adapters
    from posttrain.models.chat import load_tokenizer
    from posttrain.models.checkpoint import check_base
    from posttrain.models.template_check import check_same_template, check_template
    from posttrain.training.before import Ready, check_sft, check_trainer
    from posttrain.training.examples import load_examples
    from posttrain.training.room import check_room

    check_machine(config)
    folder = adapters.resolve_adapter(config.adapter) if config.adapter else None
    tokenizer = load_tokenizer(config.model)
    base = check_base(config.model, config.quantization, tokenizer)
    begun_with = refuse_unfinished(folder) if folder else refuse_unfinished_model(config.model.name_or_path)
    if folder:
        adapter_checks.check_start(folder, config.model, config.quantization, base, tokenizer, train=True, stores=False)
    adapter_checks.check_begun(config.run_dir, config.model, folder)
    met = adapters.targets_line(base, config.lora) if config.lora else ""
    train, dev = load_examples(config)
    if dev:
        check_engine(config.model, "transformers", NO_DEV)
    check_template(tokenizer, train + dev)
    if folder:
        check_same_template(tokenizer, folder, train + dev)
    cut = check_sft(config, base, tokenizer, train, dev)
    check_trainer(config, SFTConfig, base)
    check_room(config, base, folder, len(train))
    return Ready(tokenizer, folder, train, dev, begun_with, met, cut)


def load_policy(config: SftConfig, folder: Path | None, tokenizer: PreTrainedTokenizerBase, run: Run) -> Policy:
    """The base with a new adapter or one to continue, or to be trained itself. The manifest gets what the policy is made of."""
    from posttrain.models.adapters import adapter_sha256, count_trainable, trained_sha256
    from posttrain.models.policy import open_policy
    from posttrain.models.special_tokens import special_token_report
    from posttrain.runs.integrity import adapter_hashes

    parent, chain = parent_of(folder, adapter_sha256(folder)) if folder else parent_of_model(config.model.name_or_path)[:2]
    # torch.compile fuses the layers itself. It cannot fuse across Liger's kernels.
    settings = config.model.model_copy(update={"kernels": "torch"}) if config.compile else config.model
    model, identity = open_policy(
        settings, config.quantization, tokenizer, folder or config.lora, trainable=True, seed=config.seed
    )
    run.say(f"{config.model.name_or_path}: {count_trainable(model):,} trainable parameters, {config.quantization}")
    run.record(
        model=identity,
        parent=parent,
        parent_files=adapter_hashes(folder) if folder else {},
        chain=chain,
        all_weights=config.trains_all_weights,
        special_tokens=special_token_report(model, tokenizer),
        start_sha256=trained_sha256(model),
    )
    return model


def make_trainer(
    config: SftConfig, run: Run, model: Policy, tokenizer: PreTrainedTokenizerBase, train: list[Example], dev: list[Example]
) -> SFT:
    from trl import SFTConfig

    from posttrain.generation.guard import EngineGuard
    from posttrain.models.base import compile_layers
    from posttrain.records import as_dataset
    from posttrain.training.arguments import trainer_arguments
    from posttrain.training.before import dev_tokens, told_in_one_line
    from posttrain.training.callbacks import add_callbacks
    from posttrain.training.dev import dev_accuracy
    from posttrain.training.sft_trainer import SFT

    if config.compile:
        compile_layers(model)
    columns = ("prompt", "completion")
    with told_in_one_line():
        trainer = SFT(
            model=model,
            args=SFTConfig(**trainer_arguments(config, run)),
            train_dataset=as_dataset(train, columns),
            eval_dataset=as_dataset(dev, columns) if dev else None,
            processing_class=tokenizer,
            score_labels_only=config.fast_loss,
            fast_adapter=config.fast_adapter,
            lean_layers=config.lean_layers,
            layer_graphs=config.layer_graphs,
        )
    limit = dev_tokens(config, model, tokenizer, dev)
    guard = EngineGuard(NO_DEV, run.record)
    grader = grader_of(run.manifest.data.get("answer"))
    measure = (lambda: dev_accuracy(model, tokenizer, dev, limit, guard=guard, grader=grader)) if dev else None
    add_callbacks(trainer, run, measure, config.dev_every_steps)
    return trainer


if __name__ == "__main__":
    exit_on_user_error(main)

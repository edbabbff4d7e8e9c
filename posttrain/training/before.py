"""What is looked at before a run directory is made: the rows against the model, and the trainer's keys against TRL."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.config.schema import EvalConfig, GrpoConfig, SftConfig, TrainConfig
from posttrain.config.trl_fields import trl_fields
from posttrain.errors import UserError
from posttrain.kernels.layer_graphs import check_family
from posttrain.models.checkpoint import check_context, check_rows_for, context_length
from posttrain.records import Example
from posttrain.runs.directory import Run
from posttrain.training.arguments import plain_arguments
from posttrain.training.named_rewards import NamedReward, keep_files
from posttrain.training.plans import expected

DEV_TOKENS = 512  # of a dev completion, where trainer.max_length says nothing


class Ready(NamedTuple):
    """What a training run begins with, once all that can be refused has been looked at."""

    tokenizer: PreTrainedTokenizerBase
    adapter: Path | None  # its folder
    train: list[Example]
    dev: list[Example]
    begun_with: str | None  # of an adapter from a run that has not ended
    met: str  # which layers each LoRA target met
    rows_cut: int = 0
    rewards: Sequence[NamedReward] = ()

    def tell(self, run: Run, config: SftConfig | GrpoConfig) -> None:
        """Say and record what a user should know of these."""
        name, what = run.manifest.data.get("name", "the data set"), "questions" if run.manifest.stage == "grpo" else "rows"
        dev = f", {len(self.dev)} dev questions" if self.dev else ""
        run.say(f"{run.manifest.stage.upper()} into {run.folder}: {len(self.train):,} {what} of {name}{dev}")
        if said := expected(config, self.tokenizer, self.train):
            run.say(said)
        if self.rows_cut:
            run.note(
                f"{self.rows_cut} of {len(self.train)} rows are cut at trainer.max_length: they are trained on without their end"
            )
            run.record(rows_cut=self.rows_cut)
        if self.begun_with:
            run.note(self.begun_with)
        if self.met:
            run.say(self.met)
        if self.rewards:
            run.record(rewards=[reward.entry() for reward in self.rewards])
            if run.is_main:
                keep_files(self.rewards, run.folder / "rewards")


def check_sft(
    config: SftConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: list[Example], dev: list[Example]
) -> int:
    """How many rows of SFT `trainer.max_length` cuts.

    Raises:
        UserError: it cuts all of them, or a row is longer than the model's context or has a token that the model lacks.
    """
    if config.layer_graphs:
        check_family(base.config)
    rows = token_ids(tokenizer, [example.prompt + example.completion for example in train])
    check_rows_for(base, tokenizer, [*rows, *prompt_ids(tokenizer, dev)])
    limit, context = max_length(config), context_length(base)
    longest = min(max(map(len, rows)), limit or 2**62)
    if context is not None and longest > context:
        raise UserError(
            f"a training row has {longest} tokens, and the model's context {context}: set trainer.max_length to {context} or less"
        )
    if limit is None or splits_rows(config):
        return 0
    cut = sum(len(ids) > limit for ids in rows)
    if cut == len(rows):
        raise UserError(
            f"trainer.max_length {limit} cuts every one of the {cut} rows: no answer would keep its end. "
            f"Set it to {max(map(len, rows))}, the longest"
        )
    return cut


def max_completion_length(config: GrpoConfig) -> int:
    return int(config.trainer.get("max_completion_length", trl_fields("GRPOConfig")["max_completion_length"].default))


def max_length(config: SftConfig) -> int | None:
    return config.trainer.get("max_length", trl_fields("SFTConfig")["max_length"].default)


def splits_rows(config: SftConfig) -> bool:
    return bool(config.trainer.get("packing")) and config.trainer.get("packing_strategy", "bfd") != "bfd"


def dev_tokens(config: SftConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dev: list[Example]) -> int:
    """How long a dev completion may get: as long as a training row, within the model's context."""
    limit = config.trainer.get("max_length", DEV_TOKENS) or DEV_TOKENS
    context = context_length(base)
    longest = max(map(len, prompt_ids(tokenizer, dev)), default=0)
    if context is None or longest + limit <= context:
        return int(limit)
    check_context(base, longest, 1, "trainer.max_length")
    return context - longest


def check_grpo(
    config: GrpoConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: list[Example], dev: list[Example]
) -> None:
    new = max_completion_length(config)
    longest = _check_prompts(base, tokenizer, [*train, *dev], new, "trainer.max_completion_length") + new
    if config.layer_graphs:
        check_family(base.config)
        if config.update_tokens is not None and config.update_tokens < longest:
            raise UserError(f"layer_graphs: a row may have {longest} tokens: set update_tokens to as many, or to several rows'")


def check_questions(config: EvalConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Example]) -> None:
    _check_prompts(base, tokenizer, asked, config.generation.max_new_tokens, "generation.max_new_tokens")


def _check_prompts(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Example], new: int, key: str) -> int:
    """Returns the tokens of the longest prompt."""
    prompts = prompt_ids(tokenizer, asked)
    check_rows_for(base, tokenizer, prompts)
    longest = max(map(len, prompts))
    check_context(base, longest, new, key)
    return longest


def prompt_ids(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[list[int]]:
    return token_ids(tokenizer, [example.prompt for example in examples], add_generation_prompt=True)


def token_ids(tokenizer: PreTrainedTokenizerBase, conversations: list[Any], **kwargs: Any) -> list[list[int]]:
    """`chat_ids` of many conversations at once, which takes a third of the time."""
    if not conversations:
        return []
    encoded: Any = tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **kwargs)
    return list(encoded["input_ids"])


# --- the trainer's keys -----------------------------------------------------------------------------------------------


def check_trainer(config: TrainConfig, cls: type[TrainingArguments], base: PreTrainedModel) -> None:
    """Build the trainer's arguments, the class of its optimizer and its schedule: what TRL refuses of them, it refuses here."""
    with told_in_one_line():
        args = cls(**plain_arguments(config, Path(config.run_dir)))
        Trainer.get_optimizer_cls_and_kwargs(args, base)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        more = {"num_warmup_steps": 1, "num_training_steps": 2, "scheduler_specific_kwargs": dict(args.lr_scheduler_kwargs or {})}
        if args.lr_scheduler_type != "greedy":  # it needs the trainer's metric
            get_scheduler(args.lr_scheduler_type, optimizer, **more)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Settings that TRL or a library below it refuses are the user's mistake. What is raised elsewhere stays a fault of ours."""
    try:
        yield
    except (ValueError, ImportError, NotImplementedError, TypeError, RuntimeError) as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        if "site-packages" not in last.filename and not isinstance(error, ImportError):
            raise
        text = " ".join(str(error).split())
        raise UserError(f"trainer: {text}") from error

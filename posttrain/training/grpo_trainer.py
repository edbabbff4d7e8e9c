"""TRL's GRPOTrainer with what this project changes in it: the head of posttrain/training/__init__.py lists it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from trl import GRPOTrainer

from posttrain.errors import UserError
from posttrain.phases import phase
from posttrain.training.batches import (
    by_length,
    gated,
    groups_paid,
    groups_without_signal,
    in_row_order,
    keep_rows,
    rows_by_length,
    rows_by_tokens,
    rows_with_signal,
    sampled_logps,
    share_kept,
    trim,
)
from posttrain.training.before import token_ids
from posttrain.training.curriculum import Curriculum, Group, Window
from posttrain.training.label_head import LabelHead
from posttrain.training.masters import MasterWeights, copy_to_reference
from posttrain.training.packing import as_packed, parts_of_groups, prompt_groups
from posttrain.training.shared_prompts import SharedPrompts

# Micro-batches that are scored at once without a gradient, as for the reference: nothing is kept for a backward pass, and with
# small batches a GPU waits for launches.
SCORED_AT_ONCE = {"cpu": 1, "cuda": 4}
# Losses that are the same whichever rows share a micro-batch. bnpo averages over the tokens of each micro-batch, and
# `top_entropy_quantile` is a quantile of each micro-batch.
SPLIT_INVARIANT_LOSSES = ("grpo", "dr_grpo", "dapo")


class GRPO(MasterWeights, GRPOTrainer):
    """GRPOTrainer that continues an adapter against an exact copy of it, on batches trimmed to their content.

    `skip_zero_signal` leaves out rows whose advantage is 0. With beta 0 they add nothing to the gradient: the update is
    the same, and the logged entropy and clip ratios cover fewer rows.
    `curriculum` draws the questions in the place of TRL's sampler, which then only counts the steps.
    `gates` holds columns of rewards, each with that of the reward without which it pays nothing.
    `correct_mismatch` takes the sampler's log-probabilities for the old policy's. The clipped ratio then corrects for an
    engine that does not compute exactly what the trainer does.
    `weigh_mismatch` is for a sampler that is further away, as one in 8 bits: each token's gain gets the weight p / s, p what the
    policy that is trained gives it and s what the sampler gave, cut off at TRL's vllm_importance_sampling_clip_max.
    `update_tokens` cuts a micro-batch into parts of rows of like length, of at most so many positions each. Each part has its
    gradient before the next begins, so that no more is ever kept; the update is the same.
    With `layer_graphs` the rows of a part are packed, and those of a prompt share it.
    """

    _buffered_inputs: Any  # TRL's: the micro-batches of a generation window
    rollout_func: Any  # TRL's
    _sampler: Any

    def __init__(
        self,
        *args: Any,
        skip_zero_signal: bool = False,
        correct_mismatch: bool = False,
        weigh_mismatch: bool = False,
        reference_is_base: bool = False,
        gates: Mapping[int, int] | None = None,
        curriculum: Curriculum | None = None,
        update_tokens: int | None = None,
        layer_graphs: bool = False,
        **kwargs: Any,
    ) -> None:
        self.update_tokens, self.layer_graphs = update_tokens, layer_graphs
        super().__init__(*args, layer_graphs=layer_graphs, **kwargs)
        self.gates, self.curriculum = gates or {}, curriculum
        self._window: Window | None = None  # of the curriculum, while TRL works on it
        if curriculum:
            if any(getattr(self._tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
                raise UserError("curriculum pays for plain text, and this tokenizer parses what a model says: remove curriculum")
            self.add_callback(curriculum)
        if self.ref_model is not None and self.label_head:  # all weights train: TRL has loaded the reference from the checkpoint
            LabelHead(self.ref_model, self.temperature, self.label_head.outputs)
        self.skip_zero_signal, self.correct_mismatch, self.weigh_mismatch = skip_zero_signal, correct_mismatch, weigh_mismatch
        self._to_weigh: dict[str, Any] | None = None  # a part of a micro-batch, until its log-probabilities are there
        self._step_prompts: SharedPrompts | None = None  # shared by all micro-batches of this optimizer step
        self._shared: tuple[SharedPrompts, torch.Tensor] | None = None  # while a micro-batch is scored, with its rows
        self._check_settings()
        copy_to_reference(self.model, reference_is_base)

    def _check_settings(self) -> None:
        """Refuse settings that TRL takes and under which this trainer would compute something else."""
        if self.use_transformers_continuous_batching:
            raise UserError(
                "trainer.use_transformers_continuous_batching casts the trained weights to bf16: "
                "use rollouts.engine=continuous_batching, which runs on a copy"
            )
        if self.skip_zero_signal and (self.beta or self._entropy_bonus_enabled or self.top_entropy_quantile < 1):
            raise UserError("rollouts.skip_zero_signal needs trainer.beta 0 and no entropy terms: those reach every completion")
        if self.update_tokens and (self._entropy_bonus_enabled or self.top_entropy_quantile < 1):
            raise UserError("update_tokens: entropy terms are of a whole micro-batch and not of its parts: remove one of the two")

    def packed_sizes(self) -> tuple[int, int]:
        prompts = token_ids(self.processing_class, list(self.train_dataset["prompt"]), add_generation_prompt=True)
        longest = max(map(len, prompts)) + self.max_completion_length
        assert self.update_tokens is not None and self.update_tokens >= longest, "check_grpo has let it pass"
        return self.update_tokens, longest

    def carried(self) -> dict[str, Any]:
        """What the window holds, if it has not ended: its completions were drawn from a policy that is gone."""
        window = self.args.steps_per_generation * self.num_iterations
        logs = {key: _as_lists(values) for key, values in self._logs.items() if key != "images"}
        held = self._buffered_inputs if self._step % window else None
        return super().carried() | {"micro_step": self._step, "window": held, "logs": logs}

    def carry_on(self, carried: dict[str, Any]) -> None:
        super().carry_on(carried)
        self._step, self._buffered_inputs = carried["micro_step"], carried["window"]
        for key, values in carried["logs"].items():
            columns = ((self._logs[key][name], rows) for name, rows in values.items()) if isinstance(values, dict) else ()
            for column, rows in columns or ((self._logs[key], values),):
                column.extend(rows)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler = super()._get_train_sampler(*args, **kwargs)
        return self._sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """TRL's sampler draws each epoch's order after the one before, and a resumed run would begin with the first again."""
        if kwargs["epoch"] == kwargs["epochs_trained"] and getattr(self._sampler, "shuffle", False):
            for _ in range(kwargs["epochs_trained"]):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        super()._run_epoch(*args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or self.loss_type not in SPLIT_INVARIANT_LOSSES or self.top_entropy_quantile < 1:
            return inputs
        self._buffered_inputs = by_length(self._buffered_inputs, self.args.gradient_accumulation_steps, self.skip_zero_signal)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with phase("forward"):
            shared = self._share_across_step(model, inputs)
        kept = self._kept(inputs)
        *earlier, last = self._parts(kept, shared is not None)
        before = torch.zeros((), device=kept["advantages"].device)
        for rows in earlier:
            loss = self._part_loss(model, inputs, kept, rows, shared)
            with phase("backward"), self.accelerator.no_sync(model):
                self.accelerator.backward(loss)
            before += loss.detach()
        return self._part_loss(model, inputs, kept, last, shared) + before

    def _parts(self, kept: dict[str, Any], shares_prompts: bool) -> list[torch.Tensor]:
        """The rows of a micro-batch, in parts of at most `update_tokens` positions if that is set."""
        if not self.update_tokens or not torch.is_grad_enabled():
            return [torch.arange(len(kept["advantages"]), device=kept["advantages"].device)]
        if self.layer_graphs:
            return self._packed_parts(kept["prompt_ids"], kept["prompt_mask"], kept["completion_mask"])
        prompt = 1 if shares_prompts else int(kept["prompt_mask"].sum(1).max())  # a shared prompt leaves its last token to each
        return rows_by_tokens(kept["completion_mask"], prompt, self.update_tokens)

    def _packed_parts(self, prompts: torch.Tensor, prompt_mask: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Rows that are packed together, those of a prompt as neighbours. prompts, prompt_mask and mask (rows, tokens)."""
        assert self.update_tokens is not None, "the schema has let it pass"
        before, after = prompt_mask.sum(1).tolist(), mask.sum(1).tolist()
        parts = parts_of_groups(before, after, prompt_groups(prompts, prompt_mask), self.update_tokens)
        return [torch.tensor(rows, device=mask.device) for rows in parts]

    def _part_loss(
        self,
        model: nn.Module,
        whole: dict[str, Any],
        kept: dict[str, Any],
        rows: torch.Tensor,
        shared: tuple[SharedPrompts, torch.Tensor] | None,
    ) -> torch.Tensor:
        """What some of the rows that are kept of a micro-batch add to its loss."""
        self._shared = shared and (shared[0], shared[1][rows])
        inputs = trim(keep_rows(kept, rows), shared[0].width + 1 if shared else None)
        if self.correct_mismatch:
            inputs["old_per_token_logps"] = sampled_logps(inputs)
        with phase("forward"):
            self.check_head_once(_as_labelled(inputs))
            self._to_weigh = inputs if self.weigh_mismatch else None
            loss: torch.Tensor = super().compute_loss(model, inputs)
        assert self._to_weigh is None, "TRL has asked for no log-probabilities, and nothing was weighed"
        self._shared = None
        self.check_loss(loss, inputs["prompt_ids"])
        self._log_mismatch(inputs)
        if not self.layer_graphs:  # packed rows have no padding
            self.log_useful_slots(inputs["completion_mask"])
        return loss * share_kept(self.loss_type, inputs, whole)

    def _kept(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return keep_rows(inputs, rows_with_signal(inputs["advantages"])) if self.skip_zero_signal else inputs

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._step_prompts is not None and self.accelerator.sync_gradients:
            with phase("backward"):
                self._step_prompts.backward()
            self._step_prompts = None
        return loss

    def _share_across_step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[SharedPrompts, torch.Tensor] | None:
        """The prompts of all micro-batches of a step, run at the first of them, and this one's rows; None: it runs its own.

        They stay in memory until the step ends, so there may be only as many as one micro-batch could have. With several
        processes they are not shared: those exchange gradients in the backward pass of the last micro-batch, and the prompts'
        gradients would come after it.
        """
        args = self.args
        undivided = args.gradient_accumulation_steps == 1 and not self.update_tokens
        alone = undivided or args.gradient_checkpointing or self.layer_graphs or self.accelerator.num_processes > 1
        number = next((i for i, buffered in enumerate(self._buffered_inputs or []) if buffered is batch), None)
        if alone or number is None or not torch.is_grad_enabled():
            return None
        first = number - number % args.gradient_accumulation_steps
        parts = [self._kept(part) for part in self._buffered_inputs[first : first + args.gradient_accumulation_steps]]
        if number == first:
            ids, mask = (torch.cat([part[key] for part in parts]) for key in ("prompt_ids", "prompt_mask"))
            longest = int(mask.sum(1).max())
            found = SharedPrompts(model, ids[:, -longest:-1], mask[:, -longest:-1])
            if longest > 1 and len(found.prompts) <= args.per_device_train_batch_size:
                with self.accelerator.autocast():
                    found.run(len(ids))
                found.detach()
                self._step_prompts = found
        if self._step_prompts is None:
            return None
        start = sum(len(part["advantages"]) for part in parts[: number - first])
        rows = torch.arange(start, start + len(parts[number - first]["advantages"]), device=batch["advantages"].device)
        return self._step_prompts, rows

    def _generate_and_score_completions(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with phase("logprobs"):  # of the old policy and the reference; the rest has phases of its own
            if self.curriculum is None:
                return super()._generate_and_score_completions(inputs, *args, **kwargs)
            size = len(inputs) // self.num_generations
            window = self._window = self.curriculum.window(size, self.state.global_step, self._ask, self.report)
            own_rollout, self.rollout_func = self.rollout_func, lambda prompts, trainer: window.output
            batch = super()._generate_and_score_completions(window.inputs, *args, **kwargs)
            self.rollout_func, self._window = own_rollout, None
            return batch

    def _ask(self, questions: list[int]) -> list[Group]:
        """Completions of these questions, scored, for the curriculum to choose among."""
        size = self.num_generations
        inputs = [dict(self.train_dataset[question]) for question in questions for _ in range(size)]
        prompts = [row["prompt"] for row in inputs]
        output = self.rollout_func(prompts, self)
        texts = self.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        scores = self._scores(inputs, prompts, completions, output["completion_ids"])
        extras = {column: list(values) for column, values in self._pending_extra_logs.items()}
        self._pending_extra_logs.clear()  # TRL gets those of the chosen groups, in `_calculate_rewards`
        return [
            Group(
                question,
                inputs[rows],
                {key: values and values[rows] for key, values in output.items()},
                scores[rows],
                {column: values[rows] for column, values in extras.items()},
                has_signal=groups_without_signal(scores[rows], self.reward_weights, size) == 0,
                pass_rate=(scores[rows, 0] > 0).float().mean().item(),  # the first reward is correctness
            )
            for number, question in enumerate(questions)
            for rows in [slice(number * size, (number + 1) * size)]
        ]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        trl_score, width = super()._get_per_token_logps_and_entropies, input_ids.shape[1] - logits_to_keep

        def score(model: Any, ids: torch.Tensor, mask: torch.Tensor, keep: int, size: int | None = None) -> Any:
            return trl_score(model, ids, mask, keep, size, *args, **kwargs)

        if self.label_head:  # nobody reads the reference's entropy, which costs passes over all of its logits
            self.label_head.outputs = ("entropy",) if kwargs.get("compute_entropy") else ()
        if self.layer_graphs and torch.is_grad_enabled():
            result = score(as_packed(model, width), input_ids, attention_mask, logits_to_keep)
        elif self.layer_graphs and model is self.model:
            result = self._score_packed(score, model, input_ids, attention_mask, width)
        elif self.args.gradient_checkpointing or self.is_fsdp_enabled or width < 2:
            # Checkpointed layers keep no keys and values to share, and FSDP2 gathers a layer for what it returns alone.
            result = score(model, input_ids, attention_mask, logits_to_keep, batch_size)
        elif self._shared:
            shared, rows = self._shared
            result = score(shared.scorer(rows), input_ids, attention_mask, logits_to_keep, batch_size)
        else:
            result = self._score_sharing_prompts(score, model, input_ids, attention_mask, width, batch_size or len(input_ids))
        self._last_logps = result[0].detach()
        if self._to_weigh is not None:
            self._weigh(self._to_weigh, self._last_logps)
            self._to_weigh = None
        return result

    def _score_packed(
        self, score: Callable[..., Any], model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, ...]:
        """By the reference or the old policy, packed as in the update, a part of it at a time. Prompts are `width` wide."""
        parts, longest = self._packed_parts(ids[:, :width], mask[:, :width], mask[:, width:]), ids.shape[1] - width
        scores = [score(as_packed(model, width), ids[rows], mask[rows], longest) for rows in parts]
        return tuple(in_row_order(column, parts, longest) for column in zip(*scores, strict=True))

    def _score_sharing_prompts(
        self, score: Callable[..., Any], model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, width: int, size: int
    ) -> tuple[torch.Tensor, ...]:
        """Each prompt is run once for its completions, and those are scored `size` rows at a time, of like length."""
        if not torch.is_grad_enabled():
            size *= SCORED_AT_ONCE[ids.device.type]
        shared = SharedPrompts(model, ids[:, : width - 1], mask[:, : width - 1])
        with self.accelerator.autocast():  # TRL begins it only within `score`
            shared.run(size)
        scores, parts = [], rows_by_length(mask[:, width:], size)
        for rows in parts:
            keep = max(1, int(mask[rows, width:].sum(1).max()))
            scores.append(score(shared.scorer(rows), ids[rows, : width + keep], mask[rows, : width + keep], keep))
        return tuple(in_row_order(column, parts, ids.shape[1] - width) for column in zip(*scores, strict=True))

    def _weigh(self, inputs: dict[str, Any], logps: torch.Tensor) -> None:
        """Weigh each token's advantage, which TRL reads after this: its loss is linear in it, and KL has none."""
        old = inputs.get("old_per_token_logps", logps)
        weights = (old - sampled_logps(inputs)).exp()
        most, tokens = self.vllm_importance_sampling_clip_max or math.inf, inputs["completion_mask"].bool()
        inputs["advantages"] = inputs["advantages"][:, None] * weights.clamp(max=most)
        self.report("rollout/mean_weight", weights.clamp(max=most)[tokens].mean().item())
        self.report("rollout/cut_weights", (weights > most)[tokens].float().mean().item())

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._window:  # paid already, to choose its groups
            scores = self._window.scores
            for column, values in self._window.extras.items():
                self._pending_extra_logs[column].extend(values)
        else:
            scores = self._scores(*args, **kwargs)
        for name, share in zip(self.reward_func_names, groups_paid(scores, self.num_generations), strict=True):
            self.report(f"rewards/{name}/groups_paid", share)
        self.report("frac_groups_without_signal", groups_without_signal(scores, self.reward_weights, self.num_generations))
        return scores

    def _scores(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What each reward pays each completion, behind its gate: (completions, functions)."""
        with phase("rewards"):
            scores = super()._calculate_rewards(*args, **kwargs)
        for name, column in zip(self.reward_func_names, scores.T, strict=True):
            if not column.isfinite().all():
                raise FloatingPointError(
                    f"reward {name} is not finite at step {self.state.global_step + 1}, "
                    f"completion {int((~column.isfinite()).nonzero()[0])} "
                    "of the batch: a grader that returns NaN is broken; nothing was applied"
                )
        return gated(scores, self.gates)

    def latest(self) -> Iterator[dict[str, Any]]:
        """The completions of the latest generation batch, each with prompt, rewards, advantage and what the rewards logged."""
        log = self._logs
        for index, (prompt, completion, advantage) in enumerate(
            zip(log["prompt"], log["completion"], log["advantages"], strict=True)
        ):
            yield {
                "prompt": prompt,
                "completion": completion,
                "advantage": advantage,
                "rewards": {name: values[index] for name, values in log["rewards"].items()},
                **{name: values[index] for name, values in log["extra"].items()},
            }

    def _log_mismatch(self, inputs: dict[str, Any]) -> None:
        """Report the mean absolute difference between the sampler's and the trainer's log-probability of a sampled token."""
        if "sampling_per_token_logps" in inputs:
            difference = (self._last_logps - inputs["sampling_per_token_logps"]).abs()
            mask = inputs["completion_mask"].bool()
            self.report("rollout/logp_difference", difference[mask].mean().item())


def _as_lists(values: Any) -> Any:
    return {key: list(rows) for key, rows in values.items()} if isinstance(values, dict) else list(values)


def _as_labelled(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Prompts and completions as SFT has them: ids, mask, and the completions' tokens as labels."""
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : inputs["prompt_ids"].shape[1]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

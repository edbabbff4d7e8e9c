"""TRL's two trainers with what this project changes in them. Every override of TRL's internals is in this file.

1. Master weights. Both trainers cast the adapter of a quantized model to bf16 (trl 1.16: sft_trainer.py and
   grpo_trainer.py, "the PEFT adapter weights are converted to bf16"). Here it stays fp32, bit for bit as it was given.
2. Output head. On CPU TRL's fused head scores every position, prompt included, and multiplies back in fp32
   (trl/trainer/utils.py, `add_fused_lm_head`: "every position is scored instead"); with trained token rows it fails on
   every device (it asks PEFT's TrainableTokensWrapper for `bias`). There ours scores the labelled positions, in bf16.
3. The KL reference. TRL copies the adapter to "ref" by matching ".default." in parameter names, which misses
   `trainable_tokens_delta.default` (grpo_trainer.py, `ref_name = name.replace(...)`), so KL would not start at 0.
4. Learner batches. TRL deals a step's completions out at random and pads each micro-batch to the longest of all; ours go by
   length, and each is cut to its own longest.
5. Shared prompts. TRL runs every completion behind a prompt of its own; ours runs each prompt once for all completions of an
   optimizer step, or of a micro-batch where a step has more prompts than a micro-batch has rows. Without a gradient several
   micro-batches are scored at once on a GPU.
6. TRL's own generation (rollouts.engine trl). It runs outside autocast, where bf16 activations do not fit fp32 masters; here
   inside. Its continuous batching is refused: it casts the trained model to bf16 for good (`unwrapped_model.to`).
7. Adapted layers. posttrain/kernels/lora_linear.py computes what PEFT's layers do in a third of the operations.
8. FSDP2. Weights are sent as they are stored: what packs NF4 into bf16 loses bits otherwise. Checkpoints hold the adapter alone,
   and are read back by each process: accelerate's gathering fails on packed weights, and its reading never ends.
9. Time. `_save_checkpoint` and `_generate_and_score_completions` are wrapped to be timed, nothing else.
Tests fail when upstream changes any of them: those of test_trainers.py, of FSDP2 test_pipeline.py, of the last test_callbacks.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import DynamicCache
from trl import GRPOTrainer, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from posttrain.errors import UserError
from posttrain.kernels import lora_linear
from posttrain.kernels.nf4 import packed_linears
from posttrain.models.adapters import gathered, scatter
from posttrain.phases import phase

MASTER_DTYPE = torch.float32
# Equal rewards of 0.2 leave advantages of 1e-8: fp32 rounds their mean. TRL's `frac_reward_zero_std` takes those for signal.
ROUNDING = 1e-6
# So many micro-batches are scored at once where no gradient is wanted, as of the reference: it keeps nothing for a backward
# pass, and a GPU waits for the launches of small batches.
SCORED_AT_ONCE = {"cpu": 1, "cuda": 4}
# Losses that are the same whichever rows share a micro-batch. bnpo averages over the tokens of each, and a
# `top_entropy_quantile` is taken of each.
ANY_SPLIT = ("grpo", "dr_grpo", "dapo")


class MasterWeights:
    """Mixin: the trainer starts from exactly the weights it was given, in fp32."""

    state: Any  # these are the trainer's
    accelerator: Any
    processing_class: Any
    model: Any
    _metrics: Any

    def __init__(
        self, *args: Any, model: PeftModel, score_labels_only: bool = True, fast_adapter: bool = True, **kwargs: Any
    ) -> None:
        masters = {name: p.detach().to(MASTER_DTYPE, copy=True) for name, p in model.named_parameters() if p.requires_grad}
        assert masters, "the model has no trainable parameter: load the adapter with trainable=True (trl#6700)"
        super().__init__(*args, model=model, **kwargs)  # type: ignore[call-arg]  # a mixin: this is TRL's trainer
        shard_as_stored(self.accelerator.state, model)
        for name, parameter in model.named_parameters():
            if name in masters:
                parameter.data = masters[name].to(parameter.device)
        if fast_adapter:
            lora_linear.install(model)
        self.label_head: LabelHead | None = None
        if score_labels_only and (not next(model.parameters()).is_cuda or trains_tokens(model)):
            logged = ("entropy",) if isinstance(self, GRPOTrainer) else ("is_top1",)
            self.label_head = LabelHead(model.get_base_model(), getattr(self, "temperature", 1.0), logged)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with phase("data"):
            return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with phase("backward"):  # the rest of the step is taken out of it
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nobody reads the sum, and counting the model's parameters at every micro-batch takes milliseconds

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = gathered(self.model)
        if state is None:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        else:
            self._save(output_dir or self.args.output_dir, state_dict=state)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not scatter(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with phase("save"):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def log_useful_slots(self, mask: torch.Tensor) -> None:
        """The share of a micro-batch's positions that hold a token and no padding."""
        self._metrics["train" if self.model.training else "eval"]["update/useful_slots"].append(mask.float().mean().item())

    def check_loss(self, loss: torch.Tensor, ids: torch.Tensor) -> None:
        """Stop before a loss that is not a number is propagated, and name the batch it comes from."""
        if not loss.isfinite():
            text = self.processing_class.decode(ids[0], skip_special_tokens=True)
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.state.global_step + 1}, in the batch that begins with {text[:200]!r}; "
                "nothing was applied. --resume goes on from the last checkpoint"
            )


def shard_as_stored(state: Any, model: PeftModel) -> None:
    """FSDP2 sends weights as they are stored and adds gradients up in fp32; autocast rounds, as on one GPU.

    accelerate has FSDP2 round instead (utils/dataclasses.py, `set_mixed_precision`). A layer is then sent as bf16, and what CUDA
    copies so (`torch._foreach_copy_`) comes out with all NaNs alike. One in 1,200 of the words of packed NF4 is a NaN, read as
    bf16: https://github.com/pytorch/pytorch/issues/159333, https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945.
    Beside an adapter in fp32 a layer is sent as bytes. Log-probabilities and gradients, too, were rounded to 8 bits.
    """
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    if trains_tokens(model):
        raise UserError(
            "FSDP2 cannot shard an embedding of which rows are trained: launch with configs/accelerate/ddp.yaml, "
            "or set lora.train_special_tokens=never where the base knows its template's tokens"
        )
    for number, layer in enumerate(model.get_base_model().base_model.layers):
        if packed_linears(layer) and not any(p.requires_grad for p in layer.parameters()):
            raise UserError(
                f"layer {number} has no adapter, and under FSDP2 NF4 weights beside none lose bits on the way: "
                "name modules of every layer in lora.target_modules, or use quantization=nf4_unpacked"
            )
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


class SFT(MasterWeights, SFTTrainer):
    """SFTTrainer with fp32 master weights; entropy is logged only where it is computed."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with phase("forward"), self.accelerator.autocast():  # under FSDP2 nothing else asks for it
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.check_loss(result[0] if return_outputs else result, inputs["input_ids"])
        if "attention_mask" in inputs:  # packed rows have none, and no padding
            self.log_useful_slots(inputs["attention_mask"])
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for mode in ("train", "eval"):
            if any(math.isnan(value) for value in self._metrics[mode].get("entropy", [])):
                del self._metrics[mode]["entropy"]
        super().log(logs, start_time)


class GRPO(MasterWeights, GRPOTrainer):
    """GRPOTrainer that continues an adapter against an exact copy of it, on batches trimmed to their content.

    `skip_zero_signal` leaves out rows whose advantage is 0. With beta 0 they add nothing to the gradient, so the update
    is the same and only the logged entropy and clip ratios are taken over fewer rows.
    `correct_mismatch` uses the sampler's log-probabilities as the old policy's, so that the clipped ratio corrects for
    an engine that does not compute exactly what the trainer does.
    """

    _buffered_inputs: Any  # TRL's, the micro-batches of a window

    def __init__(self, *args: Any, skip_zero_signal: bool = False, correct_mismatch: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_zero_signal, self.correct_mismatch = skip_zero_signal, correct_mismatch
        self._step_prompts: SharedPrompts | None = None  # of all micro-batches of this optimizer step
        self._shared: tuple[SharedPrompts, torch.Tensor] | None = None  # the same while one is scored, and its rows there
        if self.use_transformers_continuous_batching:
            raise UserError(
                "trainer.use_transformers_continuous_batching casts the trained weights to bf16: "
                "use rollouts.engine=continuous_batching, which runs on a copy"
            )
        if skip_zero_signal and (self.beta or self._entropy_bonus_enabled or self.top_entropy_quantile < 1):
            raise UserError("rollouts.skip_zero_signal needs trainer.beta 0 and no entropy terms: those reach every completion")
        copy_to_reference(self.model)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or self.loss_type not in ANY_SPLIT or self.top_entropy_quantile < 1:
            return inputs
        self._buffered_inputs = by_length(self._buffered_inputs, self.args.gradient_accumulation_steps, self.skip_zero_signal)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        whole = inputs
        with phase("forward"):
            self._shared = self._share_across_step(model, whole)
        inputs = trim(self._kept(whole), self._shared[0].width + 1 if self._shared else None)
        if self.correct_mismatch:
            inputs["old_per_token_logps"] = sampled_logps(inputs)
        with phase("forward"):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._shared = None
        self.check_loss(loss, inputs["prompt_ids"])
        self._log_mismatch(inputs)
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
        """The prompts of all micro-batches of a step, run at the first, and the rows of this one; None where it runs its own.

        Only as many prompts as one micro-batch could have anyway: they stay in memory until the step ends. Several processes
        exchange gradients in the backward pass of the last micro-batch, and the prompts' would come after it.
        """
        args = self.args
        alone = args.gradient_accumulation_steps == 1 or args.gradient_checkpointing or self.accelerator.num_processes > 1
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

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with phase("logprobs"):  # of the old policy and the reference, where they are needed; the rest has names of its own
            return super()._generate_and_score_completions(*args, **kwargs)

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
        score = super()._get_per_token_logps_and_entropies
        width = input_ids.shape[1] - logits_to_keep
        if self.label_head:  # nobody reads the reference's, which costs passes over all of its logits
            self.label_head.outputs = ("entropy",) if kwargs.get("compute_entropy") else ()
        if self.args.gradient_checkpointing or width < 2:  # checkpointed layers keep no keys and values to share
            result = score(model, input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs)
        elif self._shared:
            shared, rows = self._shared
            result = score(shared.scorer(rows), input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs)
        else:
            size = batch_size or len(input_ids)
            if not torch.is_grad_enabled():
                size *= SCORED_AT_ONCE[input_ids.device.type]
            shared = SharedPrompts(model, input_ids[:, : width - 1], attention_mask[:, : width - 1])
            with self.accelerator.autocast():  # which TRL begins within `score`
                shared.run(size)
            scores, parts = [], rows_by_length(attention_mask[:, width:], size)
            for rows in parts:
                keep = max(1, int(attention_mask[rows, width:].sum(1).max()))
                ids, mask = (whole[rows, : width + keep] for whole in (input_ids, attention_mask))
                scores.append(score(shared.scorer(rows), ids, mask, keep, None, *args, **kwargs))
            result = tuple(in_place(column, parts, logits_to_keep) for column in zip(*scores, strict=True))
        self._last_logps = result[0].detach()
        return result

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with phase("rewards"):
            scores = super()._calculate_rewards(inputs, *args, **kwargs)
        for name, column in zip(self.reward_func_names, scores.T, strict=True):
            if not column.isfinite().all():
                raise FloatingPointError(
                    f"reward {name} is not finite at step {self.state.global_step + 1}, "
                    f"completion {int((~column.isfinite()).nonzero()[0])} "
                    "of the batch: a grader that returns NaN is broken; nothing was applied"
                )
        self._metrics["train" if self.model.training else "eval"]["frac_groups_without_signal"].append(
            groups_without_signal(scores, self.reward_weights, self.num_generations)
        )
        return scores

    def _log_mismatch(self, inputs: dict[str, Any]) -> None:
        """Mean absolute difference between the sampler's and the trainer's log-probability of a sampled token."""
        if "sampling_per_token_logps" in inputs:
            difference = (self._last_logps - inputs["sampling_per_token_logps"]).abs()
            mask = inputs["completion_mask"].bool()
            self._metrics["train"]["rollout/logp_difference"].append(difference[mask].mean().item())


def groups_without_signal(scores: torch.Tensor, weights: torch.Tensor, size: int) -> float:
    """Share of groups whose weighted rewards are all equal. scores (completions, functions), weights (functions,)."""
    rewards = (scores * weights.to(scores.device)).sum(1).view(-1, size)
    return ((rewards.amax(1) - rewards.amin(1)) < ROUNDING).float().mean().item()


def sampled_logps(inputs: dict[str, Any]) -> torch.Tensor:
    if "sampling_per_token_logps" not in inputs:
        raise UserError(
            "rollouts.correct_mismatch needs an engine that keeps log-probabilities: set rollouts.engine=transformers"
        )
    return inputs["sampling_per_token_logps"]


def rows_with_signal(advantages: torch.Tensor) -> torch.Tensor:
    """Indices of rows with an advantage; one row at least, so that the loss stays connected to the model."""
    rows = (advantages.abs() > ROUNDING).nonzero().squeeze(1)
    return rows if len(rows) else torch.zeros(1, dtype=torch.long, device=advantages.device)


def keep_rows(inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    size = len(inputs["advantages"])
    return {k: v[rows] if isinstance(v, torch.Tensor) and v.dim() > 0 and len(v) == size else v for k, v in inputs.items()}


def share_kept(loss_type: str, kept: dict[str, Any], whole: dict[str, Any]) -> float:
    """The factor that makes a loss over some rows the same as over all: some types average over what they are given."""
    if loss_type in ("grpo", "dr_grpo", "sapo", "luspo"):
        return len(kept["advantages"]) / len(whole["advantages"])
    if loss_type == "bnpo":
        return float(kept["completion_mask"].sum() / whole["completion_mask"].sum().clamp(min=1))
    return 1.0


def by_length(batches: list[dict[str, Any]], per_step: int, signal_first: bool) -> list[dict[str, Any]]:
    """The micro-batches of each optimizer step with its rows by falling length: little padding, the largest first.

    With `signal_first` the rows without an advantage, which are left out, gather at the end.
    """
    result = []
    for start in range(0, len(batches), per_step):
        parts = batches[start : start + per_step]
        size = len(parts[0]["advantages"])
        whole = {key: _joined([part[key] for part in parts], size) for key in parts[0]}
        rank = whole["completion_mask"].sum(1)
        if signal_first:
            rank = rank + (whole["advantages"].abs() > ROUNDING) * (1 + rank.max())
        order = rank.argsort(descending=True, stable=True)
        result += [keep_rows(whole, order[i * size : (i + 1) * size]) for i in range(len(parts))]
    return result


def _joined(values: list[Any], size: int) -> Any:
    assert not isinstance(values[0], list), "rows in a list would not be moved"
    by_row = isinstance(values[0], torch.Tensor) and values[0].dim() > 0 and len(values[0]) == size
    return torch.cat(values) if by_row else values[0]


def trim(inputs: dict[str, Any], prompt: int | None = None) -> dict[str, Any]:
    """Cut columns that are padding in every row: on the left of prompts, or all but `prompt`, and on the right of completions."""
    prompt = prompt or int(inputs["prompt_mask"].sum(1).max())
    completion = max(1, int(inputs["completion_mask"].sum(1).max()))
    cut = {
        "prompt_ids": slice(-prompt, None),
        "prompt_mask": slice(-prompt, None),
        "completion_ids": slice(completion),
        "completion_mask": slice(completion),
        "old_per_token_logps": slice(completion),
        "ref_per_token_logps": slice(completion),
        "sampling_per_token_logps": slice(completion),
    }
    return {key: value[:, cut[key]] if key in cut else value for key, value in inputs.items()}


def rows_by_length(mask: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Rows in parts of at most `size`, by falling length where there is more than one. mask (rows, tokens)."""
    lengths = mask.sum(1)
    order = lengths.argsort(descending=True, stable=True) if len(mask) > size else torch.arange(len(mask), device=mask.device)
    return list(order.split(size))


def in_place(values: tuple[Any, ...], parts: list[torch.Tensor], width: int) -> Any:
    """Scores of parts of the rows, (rows, tokens) each, put together in the order of the rows, 0 where a part is shorter."""
    if values[0] is None:
        return None
    padded = [nn.functional.pad(part, (0, width - part.shape[1])) for part in values]
    return torch.cat(padded)[torch.cat(parts).argsort()]


class SharedPrompts:
    """Stands in for `model(**inputs)` on rows of prompt and completion, and runs each distinct prompt once.

    The completions of a group then attend to the same keys and values, and the gradient of each of them flows back into
    its prompt. The last prompt token stays with its completion, whose first token it predicts. ids and mask (rows, tokens) are
    the prompts without it.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> None:
        # A token and its mask in one number, so that a pad token inside a prompt is not taken for padding.
        self.prompts, self.of_row = (2 * ids + mask).unique(dim=0, return_inverse=True)
        self.model, self.width = model, ids.shape[1]
        self.worthwhile = len(self.prompts) < len(ids)

    def run(self, size: int) -> None:
        """Compute keys and values of the prompts, `size` of them at once."""
        if self.worthwhile:
            caches = [DynamicCache() for _ in self.prompts.split(size)]
            for part, cache in zip(self.prompts.split(size), caches, strict=True):
                backbone(self.model)(input_ids=part // 2, attention_mask=part % 2, past_key_values=cache, use_cache=True)
            layers = zip(*(cache.layers for cache in caches), strict=True)
            self.layers = [(torch.cat([c.keys for c in one]), torch.cat([c.values for c in one])) for one in layers]

    def detach(self) -> None:
        """From here on the scorers' gradients end at the keys and values and gather there, until `backward` takes them on."""
        if self.worthwhile:
            self.made = [tensor for layer in self.layers for tensor in layer]
            self.layers = [(keys.detach().requires_grad_(), values.detach().requires_grad_()) for keys, values in self.layers]

    def backward(self) -> None:
        if self.worthwhile:
            ends = [tensor for layer in self.layers for tensor in layer]
            reached = [(made, end.grad) for made, end in zip(self.made, ends, strict=True) if end.grad is not None]
            torch.autograd.backward(*zip(*reached, strict=True))

    def scorer(self, rows: torch.Tensor) -> Callable[..., Any]:
        """The model on these rows. Outputs are those from the last prompt token on; scores before a completion are not wanted."""

        def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
            if not self.worthwhile:
                return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            prompt = self.of_row[rows]
            cache = DynamicCache([(keys[prompt], values[prompt]) for keys, values in self.layers])
            rest = slice(self.width, None)
            ids, labels = input_ids[:, rest], labels[:, rest]
            return self.model(input_ids=ids, attention_mask=attention_mask, labels=labels, past_key_values=cache, **kwargs)

        return forward


def backbone(model: nn.Module) -> nn.Module:
    """The decoder below PEFT's and the data-parallel wrapper; it holds the same adapted layers."""
    inner = getattr(model, "module", model)
    return inner.get_base_model().base_model


def trains_tokens(model: PeftModel) -> bool:
    return any("trainable_tokens_delta" in name for name, _ in model.named_parameters())


def copy_to_reference(model: PeftModel) -> None:
    """Make adapter "ref", where TRL made one, equal to "default" in every tensor, trained token rows included."""
    if "ref" not in model.peft_config:
        return
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if "default" in parts:
            reference = parameters[".".join("ref" if part == "default" else part for part in parts)]
            reference.data = parameter.detach().to(MASTER_DTYPE, copy=True)
            reference.requires_grad_(False)  # PEFT leaves token rows trainable, and the optimizer would count them


# --- the output head on CPU -------------------------------------------------------------------------------------------


class LabelHead:
    """Takes the place of TRL's fused head on a model and scores only labelled positions. Same call, same outputs.

    Of FusedCausalLMOutput's fields it fills log_probs and those of `outputs`, "entropy" or "is_top1"; the other is NaN.
    """

    def __init__(self, model: nn.Module, temperature: float, outputs: tuple[str, ...]) -> None:
        self.model, self.temperature, self.outputs = model, temperature, outputs
        self.fused_forward = model.forward
        model.forward = functools.wraps(model.forward)(functools.partial(self.forward))  # `generate` reads its signature

    def forward(self, *args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or kwargs.get("shift_labels") is not None:
            return self.fused_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        hidden = self.model.base_model(*args, **(kwargs | {"use_cache": False})).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100
        weight = self.model.get_output_embeddings().weight
        scores = _LabelScores.apply(hidden[mask], weight, labels[mask], self.temperature, self.outputs)
        log_probs, entropy, is_top1 = (score.new_zeros(mask.shape).masked_scatter(mask, score) for score in scores)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=mask,
        )


class _LabelScores(torch.autograd.Function):
    """Log-probability of each label, the only one with a gradient; entropy and top-1 hit if they are among `outputs`, else NaN.

    hidden (labels, width), weight (vocabulary, width), labels (labels,). The gradient of `weight` is computed only when
    some of its rows are trained.
    """

    ROWS = 256  # a tile of 256 x 49,152 fp32 logits is 50 MB

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, outputs):  # type: ignore[no-untyped-def]
        hidden = hidden.to(weight.dtype)
        logits = hidden @ weight.T
        if temperature != 1.0:
            logits /= temperature
        log_z = hidden.new_empty(len(labels), dtype=torch.float32)
        entropy, is_top1 = torch.full_like(log_z, float("nan")), torch.full_like(log_z, float("nan"))
        for rows in _tiles(len(labels)):
            tile = logits[rows].float()  # ATen's argmax of bf16 takes six times as long as of fp32
            if "is_top1" in outputs:
                is_top1[rows] = (tile.argmax(-1) == labels[rows]).float()
            if "entropy" not in outputs:
                log_z[rows] = tile.logsumexp(-1)
            else:
                top = tile.amax(-1, keepdim=True)
                weights = (tile - top).exp_()
                total = weights.sum(-1)
                log_z[rows] = top.squeeze(1) + total.log()
                entropy[rows] = log_z[rows] - weights.mul_(tile).sum(-1) / total
        ctx.save_for_backward(hidden, logits, log_z, labels, weight)
        ctx.temperature = temperature
        log_probs = logits.gather(1, labels[:, None]).squeeze(1).float() - log_z
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        hidden, logits, log_z, labels, weight = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad = grad / ctx.temperature
        for rows in _tiles(len(labels)):
            # d log p(label) / d logits = onehot(label) - p
            p = (logits[rows].float() - log_z[rows, None]).exp_().mul_(-grad[rows, None])
            p.scatter_add_(1, labels[rows, None], grad[rows, None])
            p = p.to(weight.dtype)
            to_hidden[rows] = p @ weight
            if to_weight is not None:
                to_weight += p.T @ hidden[rows]
        return to_hidden, to_weight, None, None, None


def _tiles(num_rows: int) -> list[slice]:
    return [slice(start, start + _LabelScores.ROWS) for start in range(0, num_rows, _LabelScores.ROWS)]

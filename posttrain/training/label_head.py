"""An output head that scores labelled positions alone. It replaces TRL's head where that is slower or fails."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput


class LabelHead:
    """Replaces TRL's fused head on a model and scores only labelled positions. Same call, same outputs.

    It fills FusedCausalLMOutput's log_probs and the fields in `outputs`, "entropy" or "is_top1". The other field is NaN.
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
        head = self.model.get_output_embeddings()
        bias = getattr(getattr(head, "original_module", head), "bias", None)  # PEFT's wrapper of token rows has none
        change = head_change(self.model.config, self.temperature)
        weight = head.weight
        is_master = isinstance(weight, nn.Parameter) and weight.requires_grad
        if is_master and torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        scores = _LabelScores.apply(hidden[mask], weight, bias, labels[mask], change, self.outputs)
        log_probs, entropy, is_top1 = (score.new_zeros(mask.shape).masked_scatter(mask, score) for score in scores)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=mask,
        )


class HeadChange(NamedTuple):
    """What becomes of the products of hidden states and head: x -> cap(x * scale) / temperature."""

    scale: float = 1.0
    cap: float | None = None  # x -> cap * tanh(x / cap)
    temperature: float = 1.0

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """In place, as they are in training the largest tensor of all."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        if self.temperature != 1.0:
            logits /= self.temperature
        return logits


def head_change(config: Any, temperature: float) -> HeadChange:
    """By the names that families give it; TRL knows the same (trl/trainer/utils.py, `add_fused_lm_head`).

    A family that calls it by another name is stopped by MasterWeights.check_head.
    """
    text = config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse Glimmer, Falcon-H1
    scale = next((value for name in names if (value := getattr(text, name, None)) is not None), 1.0)
    if divisor := getattr(text, "logits_scaling", None):  # Granite; HyperCLOVA X multiplies by it
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return HeadChange(scale, getattr(text, "final_logit_softcapping", None), temperature)


class _LabelScores(torch.autograd.Function):
    """Log-probability of each label, which alone has a gradient; entropy and top-1 hit if they are in `outputs`, else NaN.

    hidden (labels, width), weight (vocabulary, width), bias (vocabulary,) or None, labels (labels,). `weight` gets a gradient
    only if some of its rows are trained.
    """

    TILE_ROWS = 256  # a tile of 256 x 49,152 fp32 logits is 50 MB

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        change: HeadChange,
        outputs: tuple[str, ...],
    ) -> Any:
        hidden = hidden.to(weight.dtype)
        logits = hidden @ weight.T
        if bias is not None:
            logits += bias
        change.apply(logits)
        log_z = hidden.new_empty(len(labels), dtype=torch.float32)
        entropy, is_top1 = torch.full_like(log_z, float("nan")), torch.full_like(log_z, float("nan"))
        for rows in _tiles(len(labels)):
            tile = logits[rows].float()  # ATen's argmax takes six times as long for bf16 as for fp32
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
        ctx.change = change
        log_probs = logits.gather(1, labels[:, None]).squeeze(1).float() - log_z
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        hidden, logits, log_z, labels, weight = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        change = ctx.change
        grad = grad * change.scale / change.temperature
        for rows in _tiles(len(labels)):
            # d log p(label) / d logits = onehot(label) - p
            p = (logits[rows].float() - log_z[rows, None]).exp_().mul_(-grad[rows, None])
            p.scatter_add_(1, labels[rows, None], grad[rows, None])
            if change.cap:  # d cap * tanh(x / cap) / dx = 1 - tanh(x / cap)^2
                p *= 1 - (logits[rows].float() * change.temperature / change.cap) ** 2
            p = p.to(weight.dtype)
            to_hidden[rows] = p @ weight
            if to_weight is not None:
                to_weight += p.T @ hidden[rows]
        return to_hidden, to_weight, None, None, None, None


def _tiles(num_rows: int) -> list[slice]:
    size = _LabelScores.TILE_ROWS
    return [slice(start, start + size) for start in range(0, num_rows, size)]

"""Decoder layers that keep little for the backward pass: what is cheap is computed again, layers with one input run as one.

For every token a layer keeps, in widths of the model and of its MLP: the inputs of its two norms, queries, keys, values and what
attention makes of them, gate and up. The outputs of the norms and the product of gate and up, which the linear layers read, are
computed again from those: three passes over activations, where one product of matrices takes twenty times as long.

Query, key and value read one input, and so do gate and up. Each group is one operation with one gradient of its input, and the
adapters' first halves are one product. Gradients differ from those of posttrain/kernels/lora_linear.py by rounding alone: that
rounds the sum of a group's gradients at every term in bf16, this once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from posttrain.errors import UserError
from posttrain.kernels.lora_linear import can_be_fused, only_adapter
from posttrain.kernels.nf4 import base_weight

# Those whose gradients tests/test_lean_layers.py compares with the plain layers'.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "olmo2", "smollm3")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
Function = Callable[..., torch.Tensor]


def use_lean_layers(model: PeftModel) -> None:
    """Make a model's decoder layers keep little.

    Raises:
        UserError: nobody has compared the gradients for this kind of model.
    """
    base = model.get_base_model()
    kind = base.config.model_type
    if kind not in MODEL_TYPES:
        raise UserError(f"lean_layers: not tried on {kind}: set lean_layers=false. It knows {', '.join(MODEL_TYPES)}")
    fused = getattr(base, "kernels", "torch") == "liger"
    for layer in base.base_model.layers:
        for name in NORMS:
            norm = getattr(layer, name, None)
            if norm and not any(p.requires_grad for p in norm.parameters()):
                norm.forward = functools.partial(_noted, norm.forward if fused else from_inputs(norm.forward))
        layer.mlp.forward = functools.partial(_mlp, layer.mlp, gated_product(layer.mlp, fused))
        for part in (layer.self_attn, layer.mlp):
            children = {name: child for name, child in part.named_children() if can_be_fused(child)}
            grouped = [tuple(name for name in names if name in children) for names in GROUPS]
            alone = [(name,) for name in children if not any(name in names for names in grouped)]
            for names in [*grouped, *alone]:
                together = tuple(children[name] for name in names)
                for child in together:
                    child.forward = functools.partial(_forward, child, together, child.forward)


# --- what a tensor is made of -----------------------------------------------------------------------------------------


class Made(NamedTuple):
    """How a tensor was made, so that it need not be kept: the function, and inputs that are kept for its gradient anyway."""

    by: Function
    of: tuple[torch.Tensor, ...]


def _noted(function: Function, *inputs: torch.Tensor) -> torch.Tensor:
    """The function's output, which remembers how it was made. Whoever takes a view of it or casts it keeps it as it is."""
    output = function(*inputs)
    if torch.is_grad_enabled():
        output.made = Made(function, tuple(x.detach() for x in inputs))
    return output


def _mlp(mlp: Any, product: Function, x: torch.Tensor) -> torch.Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    result: torch.Tensor = mlp.down_proj(_noted(product, gate, up))
    return result


def gated_product(mlp: Any, fused: bool) -> Function:
    """act(gate) * up, which keeps gate and up alone for its backward pass. Liger's does so by itself."""
    if fused:
        from liger_kernel.ops import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply
    # Liger changes the classes of the whole process, and its own MLP, SwiGLU only, has no module for the activation.
    activation = getattr(mlp, "act_fn", nn.functional.silu)
    return from_inputs(lambda gate, up: activation(gate) * up)


def from_inputs(function: Function) -> Function:
    """The same function of activations. Its backward pass keeps the inputs alone, and what lies between is computed again."""
    return lambda *inputs: _FromInputs.apply(function, *inputs)


class _FromInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        ctx.function, ctx.autocast = function, _autocast(inputs[0].device)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad(), torch.autocast(grad.device.type, *ctx.autocast):
            output = ctx.function(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grad))
        return None, *(next(found) if x.requires_grad else None for x in inputs)


def _autocast(device: torch.device) -> tuple[torch.dtype, bool]:
    return torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)


# --- linear layers with their adapters --------------------------------------------------------------------------------


def _forward(layer: Any, together: tuple[Any, ...], plain: Function, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The output of one layer. The first of a group that is called leaves those of the others at the input."""
    waiting = getattr(x, "waiting", None)
    if waiting and layer in waiting:
        return waiting.pop(layer)
    names = [only_adapter(each) for each in together]
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    adapters = [
        (each.lora_A[name].weight, each.lora_B[name].weight)
        for each, name in zip(together, names, strict=True)
        if name is not None
    ]
    if args or kwargs or None in names or not (autocast or all(a.dtype == b.dtype == dtype for a, b in adapters)):
        return plain(x, *args, **kwargs)
    made = getattr(x, "made", None) if torch.is_grad_enabled() else None
    plan = _Plan(
        tuple(each.get_base_layer() for each in together),
        tuple(each.scaling[name] for each, name in zip(together, names, strict=True)),
        made,
        dtype,
        autocast,
        torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1,
    )
    outputs = _LoraLinears.apply(x, plan, *(a for a, _ in adapters), *(b for _, b in adapters))
    found = dict(zip(together, outputs, strict=True))
    output: torch.Tensor = found.pop(layer)
    if found:
        x.waiting = found
    return output


class _Plan(NamedTuple):
    """What several layers on one input are made of, but for the tensors that get a gradient."""

    bases: tuple[Any, ...]
    scalings: tuple[float, ...]
    made: Made | None  # of the input
    dtype: torch.dtype  # of the products
    autocast: bool
    runs_again: bool  # within a backward pass, as a checkpointed layer does


class _LoraLinears(torch.autograd.Function):
    """x W' + bias + s (x A') B' for each of several layers: x (..., in), W (out, in), A (rank, in), B (out, rank)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: _Plan, *halves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(plan.bases)
        flat = x.reshape(-1, x.shape[-1]).to(plan.dtype)
        ctx.precisions, ctx.ranks = [half.dtype for half in halves], [len(a) for a in halves[:count]]
        a, bs = _as_products_need_them(halves, ctx.ranks, plan.dtype)
        down = flat @ a.T
        outputs = []
        for base, b, part, scaling in zip(plan.bases, bs, down.split(ctx.ranks, 1), plan.scalings, strict=True):
            weight = base_weight(base).to(plan.dtype)
            if plan.runs_again and weight.data_ptr() != base.weight.data_ptr():
                base.unpacked = weight  # for the gradient, which follows at once
            # The small product first: it is a pass over memory, and the large one reads what it adds to while it computes.
            if base.bias is None:
                y = flat.new_empty(len(flat), len(b)).addmm_(part, b.T, beta=0, alpha=scaling)
            else:
                y = torch.addmm(base.bias.to(plan.dtype), part, b.T, alpha=scaling)
            outputs.append(y.addmm_(flat, weight.T).view(*x.shape[:-1], -1))
        kept = plan.made.of if plan.made else (x if x.dtype == plan.dtype else flat,)
        ctx.save_for_backward(down, a, *bs, *kept)
        ctx.plan, ctx.shape, ctx.x_dtype = plan._replace(made=plan.made and Made(plan.made.by, ())), x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        plan, count = ctx.plan, len(ctx.plan.bases)
        down, a, *rest = ctx.saved_tensors
        bs, kept = rest[:count], rest[count:]
        flat_grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        up = down.new_empty(down.shape)  # s (g B), of all layers side by side; beta 0 reads nothing of what is there
        for part, g, b, scaling in zip(up.split(ctx.ranks, 1), flat_grads, bs, plan.scalings, strict=True):
            part.addmm_(g, b, beta=0, alpha=scaling)
        found: dict[int, torch.Tensor] = {}  # by place among the halves
        if any(ctx.needs_input_grad[2 : 2 + count]):
            to_a = up.T @ _again(plan, kept).reshape(-1, ctx.shape[-1]).to(plan.dtype)
            found.update(enumerate(to_a.split(ctx.ranks)))
        if any(ctx.needs_input_grad[2 + count :]):
            parts = zip(flat_grads, bs, down.split(ctx.ranks, 1), plan.scalings, strict=True)
            to_bs = (torch.empty_like(b).addmm_(g.T, part, beta=0, alpha=scaling) for g, b, part, scaling in parts)
            found.update(enumerate(to_bs, count))
        cast = dict(zip(found, _cast(found.values(), [ctx.precisions[place] for place in found]), strict=True))
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = up @ a
            for g, base in zip(flat_grads, plan.bases, strict=True):
                weight = vars(base).pop("unpacked", None)
                to_x.addmm_(g, base_weight(base).to(plan.dtype) if weight is None else weight)
            to_x = to_x.view(ctx.shape).to(ctx.x_dtype)
        return to_x, None, *(cast.get(place) for place in range(2 * count))


def _as_products_need_them(
    halves: tuple[torch.Tensor, ...], ranks: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The adapters' A below one another, (sum of ranks, in), and each B, (out, rank), by one kernel."""
    firsts, seconds = halves[: len(ranks)], halves[len(ranks) :]
    a = firsts[0].new_empty((sum(ranks), firsts[0].shape[1]), dtype=dtype)
    bs = [torch.empty_like(b, dtype=dtype) for b in seconds]
    torch._foreach_copy_([*a.split(ranks), *bs], halves)
    return a, bs


def _cast(tensors: Iterable[torch.Tensor], dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    """Copies in other precisions, by one kernel for all, as torch's optimizers do it: a launch takes longer than a copy."""
    given = list(tensors)
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(given, dtypes, strict=True)]
    torch._foreach_copy_(copies, given)
    return copies


def _again(plan: _Plan, kept: list[torch.Tensor]) -> torch.Tensor:
    """The input of the layers."""
    if plan.made is None:
        return kept[0]
    with torch.no_grad(), torch.autocast(kept[0].device.type, dtype=plan.dtype, enabled=plan.autocast):
        return plan.made.by(*kept)

"""Decoder layers whose training step is replayed: a CUDA graph for each layer's forward pass and one for its backward pass.

A layer of a training step is a hundred kernels in each direction, and Python takes longer to launch them than a GPU takes to run
them (EXPERIMENTS.md, 2026-11-27: a packed step of a 3B model kept an H100 busy for 44 % of its time). A graph is one launch.

A graph reads and writes the same memory each time, so all of it is laid out once, for rows packed into one of at most `tokens`:

- what lies between the layers, one tensor for each, and one gradient that goes down through all of them;
- the adapter's gradients: a graph adds to them, and they are the parameters' `.grad`;
- everything that a layer keeps for its backward pass, in one pool for all layers and all sizes. The graphs are recorded in the
  order in which they run, so memory that a layer's backward pass gives up is free for those after it, as without graphs.

Graphs are made for SHARES of those, each the first time that it is needed. What is left of a row is filled up with sequences
of zeros, which no token sees and from which no gradient comes. The largest size is recorded first: then all others find room in
its memory.

Checkpointed layers keep their input alone, and the graph of a backward pass begins with the forward pass.

Scores of packed rows with shared prompts, as those of a reference, are replayed without a gradient, by graphs of their own. There
are some for each state of the adapters: a graph that was recorded with an adapter on runs it whatever is said later.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from posttrain.errors import UserError
from posttrain.kernels.attention import Packed, Shared

# Those whose gradients tests/test_layer_graphs.py compares with the plain layers'. Their layers share one mask and one rotation.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "granite", "olmo2")
TOKENS = 256  # a multiple of the tiles of matrix products
# Of the largest size: those that there are graphs for. Packed rows are nearly full, and what is left over may have any size.
SHARES = (1, 31 / 32, 15 / 16, 7 / 8, 3 / 4, 1 / 2, 1 / 4, 1 / 8)
SEQUENCES = 64
Work = Callable[[], None]  # on memory that stays where it is


def use_layer_graphs(model: PeftModel, tokens: int, longest: int, recorder: Recorder | None = None) -> None:
    """Replay a model's decoder layers while it trains on packed rows of at most `tokens`, of sequences of at most `longest`.

    Raises:
        UserError: the model's layers cannot be replayed; the text says why.
    """
    base = model.get_base_model()
    check_family(base.config)
    if reason := _why_not(base):
        raise UserError(f"layer_graphs: {reason}: set layer_graphs=false")
    graphs = LayerGraphs(list(base.base_model.layers), tokens, longest, recorder or CudaGraphs())
    base.base_model.register_forward_pre_hook(_without_mask, with_kwargs=True)
    for number, layer in enumerate(graphs.layers):
        layer.forward = functools.partial(graphs.forward, number, layer.forward)


def check_family(config: Any) -> None:
    """Refuse a family whose layers cannot be replayed, by its config alone."""
    reason = ""
    if config.model_type not in MODEL_TYPES:
        reason = f"not tried on {config.model_type}, it knows {', '.join(MODEL_TYPES)}"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()) or getattr(config, "sliding_window", None):
        reason = "layers with sliding windows need a mask of their own"
    elif getattr(config, "attention_dropout", None):
        reason = "the model's attention_dropout would have to draw anew at each replay"
    if reason:
        raise UserError(f"layer_graphs: {reason}: set layer_graphs=false")


def _why_not(base: Any) -> str | None:
    """What else keeps a model's layers from being replayed; None if nothing does."""
    if base.config._attn_implementation != "varlen":
        return f"it needs model.attn_implementation=varlen, not {base.config._attn_implementation}"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in base.base_model.layers.modules()):
        return "dropout would have to draw anew at each replay, and the adapter's is above 0"
    if not all(any(p.requires_grad for p in layer.parameters()) for layer in base.base_model.layers):
        return "each layer needs an adapter"
    return None


def _without_mask(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers takes a mask of four dimensions as it is. To make one it would wait for the GPU; the graphs have theirs."""
    if _is_replayed(kwargs):
        kwargs["attention_mask"] = torch.empty(1, 1, 1, 1)
    return args, kwargs


def _is_replayed(rows: dict[str, Any]) -> bool:
    """Whether rows go through the graphs: those of training, and what is scored of GRPO's parts, which are no larger."""
    return torch.is_grad_enabled() or rows.get("key_places") is not None


class Kind(NamedTuple):
    """What a graph has been recorded for, beside its size."""

    learns: bool  # there is a backward pass
    adapters: tuple[str, ...]  # those that are on


class Replay(NamedTuple):
    """The graphs of one size, and what they read beside the layers' inputs."""

    kind: Kind
    tokens: int
    mask: Packed
    rotation: tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (1, tokens, head_dim)
    forward: list[Work]  # by layer
    backward: list[Work]


class Recorder(Protocol):
    """What makes work repeatable."""

    def warm_up(self, works: list[Work]) -> None:
        """Do work once that will be recorded next."""

    def record(self, work: Work) -> Work:
        """The same work, to be done at any time. It may be done now, too."""


class LayerGraphs:
    """All layers of a model."""

    def __init__(self, layers: list[Any], tokens: int, longest: int, recorder: Recorder) -> None:
        self.layers, self.longest, self.recorder = layers, longest, recorder
        self.tokens = math.ceil(tokens / TOKENS) * TOKENS
        self.sizes = {math.ceil(share * self.tokens / TOKENS) * TOKENS for share in SHARES}
        self.parameters = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        self.gradients = [[torch.zeros_like(p) for p in parameters] for parameters in self.parameters]
        self.between: list[torch.Tensor] = []  # inputs of the layers, then the output of the last, (1, tokens, width) each
        self.gradient = torch.empty(0)  # of the output of whichever layer is next, (1, tokens, width)
        # No parameter: autograd would know it by a node of this stream, and a graph is recorded on another.
        self.anchor = torch.empty(0)
        self.made: dict[int, tuple[torch.Tensor, GradientEdge]] = {}  # by layer: its input and output in a forward pass
        self.replays: dict[Kind, dict[tuple[int, int, int], Replay]] = {}
        self.now: Replay | None = None
        self.count = 0  # forward passes: the memory holds what the last one kept

    # --- a step -------------------------------------------------------------------------------------------------------

    def forward(self, number: int, plain: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of a layer's forward: hidden (1, tokens, width)."""
        if not _is_replayed(kwargs):
            return plain(hidden, *args, **kwargs)
        if number == 0:
            self._begin(hidden.detach(), kwargs, kwargs["position_embeddings"])
        return _Replayed.apply(hidden, self.anchor, self, number)

    def _begin(self, hidden: torch.Tensor, rows: dict[str, Any], rotation: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Fill in what the graphs read, and make those that are missing. `rows` says where sequences end, and what they see."""
        tokens, ends, take = hidden.shape[1], rows["cu_seq_lens_q"], rows.get("key_places")
        assert hidden.shape[0] == 1 and tokens <= self.tokens, f"{tuple(hidden.shape)} is no packed row of {self.tokens} tokens"
        if not self.between:
            self.between = [hidden.new_zeros(1, self.tokens, hidden.shape[2]) for _ in range(len(self.layers) + 1)]
            self.gradient = torch.zeros_like(self.between[0])
            self.anchor = hidden.new_zeros((), requires_grad=True)
        kind = Kind(torch.is_grad_enabled(), self._adapters())
        replays = self.replays.setdefault(kind, {})
        size = min(size for size in self.sizes if size >= tokens) if replays else self.tokens
        sequences = len(ends) - 1 + math.ceil((size - tokens) / self.longest)
        keys = 0 if take is None else 2 * self.tokens
        key = size, SEQUENCES * math.ceil(sequences / SEQUENCES), keys
        if key not in replays:
            replays[key] = self._recorded(kind, *key, rotation)
        self.now, self.count = replays[key], self.count + 1
        if kind.learns:
            self._own_gradients()
        self.between[0][:, :tokens] = hidden
        self.between[0][:, tokens:size] = 0
        for place, given in zip(self.now.rotation, rotation, strict=True):
            place[:, :tokens] = given
        mask, steps = self.now.mask, torch.arange(1, key[1] + 2 - len(ends), dtype=torch.int32, device=ends.device)
        filling = (steps * self.longest).clamp_(max=size - tokens)  # where its sequences end
        torch.cat([ends, tokens + filling], out=mask.ends)
        mask.sequence[0] = torch.bucketize(torch.arange(size, device=ends.device), mask.ends, right=True) - 1
        if isinstance(mask, Shared) and take is not None:
            own = torch.arange(tokens, size, device=ends.device)
            torch.cat([take, own, own.new_full((keys - len(take) - len(own),), size)], out=mask.take)
            torch.cat([rows["cu_seq_lens_k"], len(take) + filling], out=mask.key_ends)

    def _adapters(self) -> tuple[str, ...]:
        """Those that are on. PEFT switches all layers together."""
        adapted = next((part for part in self.layers[0].modules() if isinstance(part, BaseTunerLayer)), None)
        return () if adapted is None or adapted.disable_adapters else tuple(adapted.active_adapters)

    def _own_gradients(self) -> None:
        """Make the graphs' gradients those of the parameters, whoever has set those to None or to another tensor."""
        none = []
        for parameters, gradients in zip(self.parameters, self.gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter.grad is None:
                    none.append(gradient)
                elif parameter.grad is not gradient:
                    gradient.copy_(parameter.grad)
                parameter.grad = gradient
        if none:
            torch._foreach_zero_(none)

    # --- the graphs ---------------------------------------------------------------------------------------------------

    def _recorded(self, kind: Kind, size: int, sequences: int, keys: int, rotation: tuple[torch.Tensor, torch.Tensor]) -> Replay:
        device, longest = rotation[0].device, self.longest
        ends = torch.arange(sequences + 1, dtype=torch.int32, device=device).mul_(longest).clamp_(max=size)
        mask = Packed(torch.zeros(1, size, dtype=torch.long, device=device), ends, longest)
        if keys:
            take = torch.arange(keys, device=device).clamp_(max=size)
            mask = Shared(mask.sequence, ends, longest, take, ends.clone())
        cos, sin = (x.new_zeros(1, size, x.shape[2]) for x in rotation)
        replay = Replay(kind, size, mask, (cos, sin), [], [])
        numbers, record = range(len(self.layers)), self.recorder.record
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, dtype, enabled, cache_enabled=False):  # a cached copy would not be the graph's
            self.recorder.warm_up([functools.partial(self._try, replay, number) for number in numbers])
            for number in numbers:
                replay.forward.append(record(functools.partial(self._run, replay, number)))
            for number in reversed(numbers) if kind.learns else ():
                replay.backward.insert(0, record(functools.partial(self._add_gradients, replay, number)))
        return replay

    def _layer(self, replay: Replay, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's input and its output, with the graph of autograd if that is asked for."""
        layer = self.layers[number]
        x = self.between[number][:, : replay.tokens].detach().requires_grad_()
        checkpointed, layer.gradient_checkpointing = layer.gradient_checkpointing, False
        y = type(layer).forward(
            layer, x, attention_mask=replay.mask, position_embeddings=replay.rotation, past_key_values=None, use_cache=False
        )
        layer.gradient_checkpointing = checkpointed
        return x, y

    def _run(self, replay: Replay, number: int) -> None:
        """A layer's forward pass."""
        keeps = replay.kind.learns and not self.layers[number].gradient_checkpointing
        with torch.set_grad_enabled(keeps):
            x, y = self._layer(replay, number)
        self.between[number + 1][:, : replay.tokens] = y.detach()
        if keeps:
            self._keep(number, x, y)

    def _keep(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Of the output its place in autograd's graph alone: its values are those between the layers."""
        self.made[number] = x, get_gradient_edge(y)

    def _gradients(self, replay: Replay, number: int) -> tuple[torch.Tensor, ...]:
        """Of a layer's input, then of its parameters."""
        if self.layers[number].gradient_checkpointing:
            with torch.enable_grad():
                self._keep(number, *self._layer(replay, number))
        x, y = self.made.pop(number)
        return torch.autograd.grad([y], [x, *self.parameters[number]], [self.gradient[:, : replay.tokens]])

    def _add_gradients(self, replay: Replay, number: int) -> None:
        """A layer's backward pass."""
        to_x, *to_parameters = self._gradients(replay, number)
        self.gradient[:, : replay.tokens] = to_x
        torch._foreach_add_(self.gradients[number], to_parameters)

    def _try(self, replay: Replay, number: int) -> None:
        """Both passes of a layer, which change no gradient."""
        self._run(replay, number)
        if replay.kind.learns:
            self._gradients(replay, number)


class _Replayed(torch.autograd.Function):
    """A layer. `anchor` wants a gradient, so that there is a backward pass, whatever the first layer's input comes from."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, anchor: torch.Tensor, graphs: LayerGraphs, number: int) -> torch.Tensor:
        assert graphs.now is not None
        ctx.graphs, ctx.number, ctx.count, ctx.tokens = graphs, number, graphs.count, hidden.shape[1]
        assert number == 0 or hidden.data_ptr() == graphs.between[number].data_ptr(), "something stands between the layers"
        graphs.now.forward[number]()
        return graphs.between[number + 1][:, : ctx.tokens].detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        graphs, number, tokens = ctx.graphs, ctx.number, ctx.tokens
        assert ctx.count == graphs.count, "a later forward pass has overwritten what this backward pass needs"
        if grad.data_ptr() != graphs.gradient.data_ptr():
            graphs.gradient[:, :tokens] = grad
            graphs.gradient[:, tokens : graphs.now.tokens] = 0
        graphs.now.backward[number]()
        to_hidden = graphs.gradient[:, :tokens].detach()
        if number == 0:
            to_hidden = to_hidden.clone() if ctx.needs_input_grad[0] else None
        return to_hidden, None, None, None


class CudaGraphs:
    """Records work as CUDA graphs, all with their memory in one pool."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None

    def warm_up(self, works: list[Work]) -> None:
        """Kernels are compiled and chosen as they are launched first. What memory that took is given back."""
        if self.stream is None:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for work in works:
                work()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            work()
            graph.capture_end()
        return graph.replay

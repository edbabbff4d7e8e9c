"""fp32 master weights: what both trainers share, on one device and sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import GRPOTrainer

from posttrain.errors import UserError, stop
from posttrain.kernels import lora_linear
from posttrain.kernels.layer_graphs import use_layer_graphs
from posttrain.kernels.lean_layers import use_lean_layers
from posttrain.kernels.nf4 import packed_linears
from posttrain.models.adapters import gather_sharded_adapter, load_sharded_adapter
from posttrain.models.base import base_of, compute_dtype
from posttrain.phases import phase
from posttrain.runs.directory import Run
from posttrain.runs.process import process_index
from posttrain.training.checkpoints import clear_for, commit_checkpoint, rotate
from posttrain.training.head_guard import check_head
from posttrain.training.label_head import LabelHead

MASTER_DTYPE = torch.float32


class MasterWeights(Trainer):
    """A base that comes before one of TRL's trainers: training then starts from exactly the weights given, in fp32.

    With a `run` (`keep_in`) it ends after exactly the planned steps, and a resumed run is the uninterrupted one: transformers
    trains a step too many where the checkpoint was the last, and a checkpoint of TRL lacks what is carried between steps.
    """

    run: Run | None = None
    save_total_limit: int | None = None
    _saved_step = -1
    _carried: dict[str, Any] | None = None  # of the checkpoint that this run is resumed from

    def __init__(
        self,
        *args: Any,
        model: nn.Module,
        score_labels_only: bool = True,
        fast_adapter: bool = True,
        lean_layers: bool = False,
        layer_graphs: bool = False,
        **kwargs: Any,
    ) -> None:
        # A copy of all weights would be another model, and TRL casts adapters alone.
        copied = isinstance(model, PeftModel)
        masters = {name: p.detach().to(MASTER_DTYPE, copy=copied) for name, p in model.named_parameters() if p.requires_grad}
        assert masters, "the model has no trainable parameter: load the adapter with trainable=True (trl#6700)"
        leave_experts_alone(model, kwargs["args"])
        super().__init__(*args, model=model, **kwargs)
        model.train = functools.partial(train_once, model)
        shard_as_stored(self.accelerator.state, model)
        for name, parameter in model.named_parameters():
            if name in masters:
                parameter.data = masters[name].to(parameter.device)
        if fast_adapter:
            lora_linear.fuse_adapters(model)
        self.steps = Steps(self._carry_on_once)
        self.add_callback(self.steps)
        if lean_layers:
            use_lean_layers(model)
        if layer_graphs:
            use_layer_graphs(model, *self.packed_sizes())
        self._head_checked = False
        self.label_head: LabelHead | None = None
        if score_labels_only and (not next(model.parameters()).is_cuda or trains_tokens(model)):
            logged = ("entropy",) if isinstance(self, GRPOTrainer) else ("is_top1",)
            self.label_head = LabelHead(base_of(model), getattr(self, "temperature", 1.0), logged)

    def packed_sizes(self) -> tuple[int, int]:
        """Tokens of the largest packed row that the model is given in training, and of the longest sequence in one."""
        raise NotImplementedError

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with phase("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with phase("backward"):  # the step's other phases take their time away from it
            return super().training_step(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nobody reads the sum, and transformers takes milliseconds at every micro-batch to count parameters

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = gather_sharded_adapter(self.model)
        if state is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir or self.args.output_dir, state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not load_sharded_adapter(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    # --- checkpoints, and where a run ends ---

    def keep_in(self, run: Run) -> None:
        """Commit checkpoints to this run. Their rotation is taken from transformers, which deletes before that."""
        self.run, self.save_total_limit, self.args.save_total_limit = run, self.args.save_total_limit, None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with phase("save"):
            if self.run is None:
                return super()._save_checkpoint(*args, **kwargs)
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            if self.run.is_main:
                clear_for(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(*args, **kwargs)
            torch.save(self.carried(), folder / _carried_file())
            self.accelerator.wait_for_everyone()
            if self.run.is_main:
                commit_checkpoint(self.run, folder, resumable=not self.args.save_only_model)
                rotate(folder.parent, folder, self.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
            self._saved_step = self.state.global_step

    def carried(self) -> dict[str, Any]:
        """What this process carries from one step into the next, beside what transformers saves."""
        return {
            "metrics": {mode: {key: list(values) for key, values in kept.items()} for mode, kept in self._metrics.items()},
            "num_tokens": self._total_train_tokens,
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
        }

    def carry_on(self, carried: dict[str, Any]) -> None:
        for mode, kept in carried["metrics"].items():
            self._metrics[mode].update(kept)
        self._total_train_tokens = carried["num_tokens"]
        self._tr_loss = carried["loss"]
        self._total_loss_scalar, self._globalstep_last_logged = carried["total_loss"], carried["logged_step"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and self.run:
            to = "cpu" if self.args.device.type == "cpu" else self.args.device  # torch knows no cpu:0, which accelerate has here
            self._carried = torch.load(Path(checkpoint, _carried_file()), map_location=to, weights_only=True)

    def _carry_on_once(self) -> None:
        """As training begins: before that, transformers sets to 0 what it counts."""
        if self._carried is not None:
            self.carry_on(self._carried)
            self._carried = None
            self._cut_curves()

    def _cut_curves(self) -> None:
        """TensorBoard hides what was logged after the checkpoint, for those steps come again."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                folder, after = callback.tb_writer.log_dir, self.state.global_step + 1
                callback.tb_writer.close()
                callback.tb_writer = type(callback.tb_writer)(folder, purge_step=after)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self.run:  # transformers' is that of the steps since the run was resumed
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # it was resumed from its last checkpoint
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After every step: save if the run is to end here, and end it there, before transformers calls it finished."""
        asked = self.run is not None and self._is_asked_to_stop()
        early = asked and self.steps.done < self.steps.planned
        # Between two steps the gradients of a step that was begun are in no checkpoint.
        between = self.accelerator.gradient_state.sync_gradients
        if (early or (asked and stop.received)) and between and self._saved_step != self.state.global_step:
            self.control.should_save, self.args.save_only_model = True, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if early:
            kept = ", checkpoint on disk" if self._saved_step == self.state.global_step else ""
            at = f"at step {self.steps.done} of {self.steps.planned}"
            stop.leave(f"stopped {at}{kept}: the same command with --resume goes on", f"interrupted {at}")

    def _is_asked_to_stop(self) -> bool:
        """Whether any process got a signal, or any callback stops the training: then all of them stop, after the same step."""
        asked = stop.received is not None or self.control.should_training_stop
        if self.accelerator.num_processes == 1:
            return asked
        return bool(self.accelerator.gather(torch.tensor([int(asked)], device=self.accelerator.device)).any())

    def report(self, key: str, value: float) -> None:
        """Add a value to the mean of `key` in the next logged row."""
        self._metrics["train" if self.model.training else "eval"][key].append(value)

    def log_useful_slots(self, mask: torch.Tensor) -> None:
        """Report the share of a micro-batch's positions that hold a token and no padding."""
        self.report("update/useful_slots", mask.float().mean().item())

    def check_head_once(self, inputs: dict[str, Any]) -> None:
        """Compare the head that trains with the model's own, on the first row of the first batch that has labels."""
        if self._head_checked:
            return
        self._head_checked = True
        row = int((inputs["labels"] != -100).sum(1).argmax())
        tensors = {name: value[row : row + 1] for name, value in inputs.items() if torch.is_tensor(value) and value.ndim == 2}
        with torch.compiler.set_stance("force_eager"), self.accelerator.autocast():
            check_head(self.model, tensors, getattr(self, "temperature", 1.0), compute_dtype(base_of(self.model)))

    def check_loss(self, loss: torch.Tensor, ids: torch.Tensor) -> None:
        """Stop before the backward pass of a loss that is not a number, and name its batch."""
        if not loss.isfinite():
            text = self.processing_class.decode(ids[0], skip_special_tokens=True)
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.state.global_step + 1}, in the batch that begins with {text[:200]!r}; "
                "nothing was applied. --resume goes on from the last checkpoint"
            )


class Steps(TrainerCallback):
    """How many optimizer steps there are to do, and how many were done: counted here, whatever the trainer says it did."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin
        self.done = self.planned = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done, self.planned = state.global_step, state.max_steps
        self.begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done += 1


def train_once(model: nn.Module, mode: bool = True) -> nn.Module:
    """`model.train(mode)`, but for a model whose layers are in that mode: transformers calls it before each micro-batch, and the
    parts of 28 adapted layers are thousands. In those 8 ms a GPU has nothing to do."""
    layers = getattr(base_of(model).base_model, "layers", None)  # GPT-2, OPT and Falcon call theirs otherwise
    there = layers is not None and all(part.training == mode for part in (model, *layers))
    return model if there else type(model).train(model, mode)


def _carried_file() -> str:
    return f"carried_{process_index()}.pt"


def leave_experts_alone(model: nn.Module, args: Any) -> None:
    """No loss for the balance of a mixture's experts, which TRL adds unasked: beside an adapter their routers are frozen."""
    if not isinstance(model, PeftModel) or not hasattr(base_of(model).config, "output_router_logits"):
        return
    if args.router_aux_loss_coef:
        raise UserError("trainer.router_aux_loss_coef: routers are frozen here, and no loss can balance them: leave it out")
    args.router_aux_loss_coef = 0.0


def shard_as_stored(state: Any, model: nn.Module) -> None:
    """Make FSDP2 send weights as they are stored and add gradients up in fp32. Autocast rounds, as on one GPU.

    accelerate makes FSDP2 round instead (utils/dataclasses.py, `set_mixed_precision`). FSDP2 then sends a layer as bf16 with
    `torch._foreach_copy_`, which on CUDA rewrites every bf16 NaN to one bit pattern. Packed NF4 bytes read as bf16 contain NaNs,
    one in 1,200 words: https://github.com/pytorch/pytorch/issues/159333,
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945. Beside an fp32 adapter, FSDP2 sends a layer as bytes.
    accelerate's way rounded log-probabilities and gradients to 8 bits, too.
    """
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    if trains_tokens(model):
        raise UserError(
            "FSDP2 cannot shard an embedding of which rows are trained: launch with configs/accelerate/ddp.yaml, "
            "or set lora.train_special_tokens=never where the base knows its template's tokens"
        )
    base = base_of(model)
    adapted = {sent_with(base, name) for name, p in base.named_parameters() if p.requires_grad}
    for part in (sent_with(base, name) for name in packed_linears(base)):
        if part not in adapted:
            raise UserError(
                f"{part} has no adapter, and under FSDP2 NF4 weights beside none lose bits on the way: "
                "name modules of every layer in lora.target_modules, or use quantization=nf4_unpacked"
            )
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def sent_with(base: PreTrainedModel, name: str) -> str:
    """The decoder layer that FSDP2 sends a module or parameter with, whatever the family calls it, or the rest of the model."""
    parents = [name[:end] for end, letter in enumerate(name) if letter == "."]
    layers = (parent for parent in parents if type(base.get_submodule(parent)).__name__ in base._no_split_modules)
    return next(layers, "the part outside of the layers")


def trains_tokens(model: nn.Module) -> bool:
    return any("trainable_tokens_delta" in name for name, _ in model.named_parameters())


def copy_to_reference(model: nn.Module, is_base: bool = False) -> None:
    """If TRL made an adapter "ref", make it equal to "default" in every tensor, trained token rows included.

    `is_base`: the reference is the model below a new adapter. Without "ref", TRL asks the model with its adapter off. A trained
    token row stays on then (`TrainableTokensWrapper.weight`), so a model that has some keeps "ref".
    """
    if "ref" not in getattr(model, "peft_config", ()):
        return
    if is_base and not trains_tokens(model):
        model.delete_adapter("ref")
        return
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if "default" in parts:
            reference = parameters[".".join("ref" if part == "default" else part for part in parts)]
            reference.data = parameter.detach().to(MASTER_DTYPE, copy=True)
            reference.requires_grad_(False)  # PEFT leaves token rows trainable, and the optimizer would count them

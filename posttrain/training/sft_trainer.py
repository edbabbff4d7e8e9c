"""TRL's SFTTrainer with what this project changes in it: the head of posttrain/training/__init__.py lists it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from trl import SFTTrainer

from posttrain.phases import phase
from posttrain.training.masters import MasterWeights
from posttrain.training.packing import check_packing, num_rows


class SFT(MasterWeights, SFTTrainer):
    """SFTTrainer with fp32 master weights. It logs entropy only if entropy is computed, and what an optimizer step is made of."""

    _packing_checked = False
    _rows = 0  # that this process has trained on since the last logged row
    _logged = (0, 0)  # optimizer steps and tokens at the last logged row

    def carried(self) -> dict[str, Any]:
        return super().carried() | {"rows": self._rows, "logged": self._logged}

    def carry_on(self, carried: dict[str, Any]) -> None:
        super().carry_on(carried)
        self._rows, self._logged = carried["rows"], carried["logged"]

    def packed_sizes(self) -> tuple[int, int]:
        return self.args.per_device_train_batch_size * self.args.max_length, self.args.max_length

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._rows += sum(num_rows(batch) for batch in batches)
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with phase("forward"), self.accelerator.autocast():  # under FSDP2 nothing else starts autocast
            self.check_head_once(inputs)
            self._check_packing_once(inputs)
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.check_loss(result[0] if return_outputs else result, inputs["input_ids"])
        if "attention_mask" in inputs:  # packed rows have none, and no padding
            self.log_useful_slots(inputs["attention_mask"])
        return result

    def _check_packing_once(self, inputs: dict[str, Any]) -> None:
        if not self._packing_checked and "cu_seq_lens_q" in inputs and num_rows(inputs) > 1:
            self._packing_checked = True
            with torch.compiler.set_stance("force_eager"):
                check_packing(self.model, inputs, self.model.get_base_model().dtype)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for mode in ("train", "eval"):
            if any(math.isnan(value) for value in self._metrics[mode].get("entropy", [])):
                del self._metrics[mode]["entropy"]
        steps = self.state.global_step - self._logged[0]
        if self.model.training and steps > 0:
            rows = self.accelerator.reduce(torch.tensor(self._rows, device=self.accelerator.device))
            self.report("update/rows", int(rows) / steps)
            self.report("update/tokens", (self._total_train_tokens - self._logged[1]) / steps)
            self._rows, self._logged = 0, (self.state.global_step, self._total_train_tokens)
        super().log(logs, start_time)

"""How much of a LoRA adapter an optimizer step changes at all: fp32 master weights beside TRL's default, bf16.

    python bench/moved_share.py                                          # a new adapter on models/smollm2-135m-instruct
    python bench/moved_share.py --adapter runs/sft_demo                  # one to go on with, as GRPO does
    python bench/moved_share.py --model models/tiny --data data/tiny     # seconds

Our trainer and TRL's own run the same SFT, from the same adapter, on the same rows, over the same NF4 base. The share is that
of the last step: entries of A (or of B) that it changed, among all entries of A (or of B). docs/precision.md holds the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from posttrain.config.schema import Lora, Model
from posttrain.models.adapters import load_adapter, new_adapter, resolve_adapter
from posttrain.models.base import load_base
from posttrain.models.chat import load_tokenizer
from posttrain.records import Example, as_dataset, read_jsonl
from posttrain.training.sft_trainer import SFT

RATES = (1e-4, 3e-5, 1e-5)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--data", default="data/demo", help="a folder written by data_prep.py")
    parser.add_argument("--adapter", help="a run directory or an adapter folder; left out: a new adapter of rank 32")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    start = args.adapter or "a new adapter of rank 32"
    print(f"{args.model} in NF4 with {start}, {args.data}, batch 2, step {args.steps} of AdamW at a constant rate\n")
    print("| learning rate | fp32, A | fp32, B | bf16, A | bf16, B |\n|---|---|---|---|---|")
    for rate in RATES:
        shares = [*moved(SFT, args, rate).values(), *moved(SFTTrainer, args, rate).values()]
        print(f"| {rate:.0e} | " + " | ".join(f"{share:.1%}" for share in shares) + " |", flush=True)


def moved(trainer_class: Any, args: argparse.Namespace, rate: float) -> dict[str, float]:
    """Share of entries that the last step changed, by part of the adapter."""
    tokenizer = load_tokenizer(Model(name_or_path=args.model))
    model = policy(args, tokenizer)
    examples = read_jsonl(Path(args.data, "train.jsonl"), Example)[: 2 * args.steps]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=rate,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = as_dataset(examples, ("prompt", "completion"))
        trainer = trainer_class(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        watch = LastStep()
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.shares


def policy(args: argparse.Namespace, tokenizer: Any) -> Any:
    base = load_base(Model(name_or_path=args.model), "nf4", tokenizer)
    if args.adapter:
        return load_adapter(base, resolve_adapter(args.adapter), trainable=True)
    lora = Lora(r=32, alpha=64, target_modules=TARGETS, train_special_tokens="never")
    return new_adapter(base, lora, tokenizer, seed=0)


class LastStep(TrainerCallback):
    """Measures the last optimizer step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        if state.global_step + 1 == state.max_steps:
            self.before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        if state.global_step + 1 == state.max_steps:
            self.shares = {part: self._share(model, part) for part in ("lora_A", "lora_B")}

    def _share(self, model: torch.nn.Module, part: str) -> float:
        tensors = {name: old for name, old in self.before.items() if part in name}
        changed = sum(int((model.get_parameter(name) != old).sum()) for name, old in tensors.items())
        return changed / sum(old.numel() for old in tensors.values())


if __name__ == "__main__":
    main()

"""What a user would run instead: the minimal QLoRA scripts that TRL's documentation leads to, with a stop watch.

    python bench/peers.py sft  --model DIR --data data/gsm8k --out DIR --steps 8
    python bench/peers.py grpo --model DIR --data data/gsm8k --out DIR --steps 2 --adapter DIR
    python bench/peers.py eval --model DIR --data data/gsm8k --out DIR --questions 32 --adapter DIR

Settings follow https://huggingface.co/docs/trl/sft_trainer and /grpo_trainer with `peft_config` and 4-bit loading; the
hyperparameters are those of configs/sft_llama3.2-3b.yaml and configs/grpo_llama3.2-3b.yaml. `eval` is a loop of greedy
`generate` over padded batches of 32. bench/speed.py calls this.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from posttrain.records import Example, read_jsonl, write_jsonl
from rewards import correctness_reward, format_reward, grade

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


class StopWatch(TrainerCallback):
    """One row for each logged step: seconds since the start, tokens seen, loss or reward."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "learning_rate" in logs:
            row = {"step": state.global_step, "time": time.time(), **logs, "peak_gib": peak_gib()}
            with open(self.file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("sft", "grpo", "eval"))
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--num-completions", type=int, default=16)
    parser.add_argument("--max-completion-length", type=int, default=256)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage == "eval":
        return evaluate(args)
    examples = read_jsonl(args.data / "train.jsonl", Example)[:2000]
    trainer = (sft if args.stage == "sft" else grpo)(args, examples)
    trainer.add_callback(StopWatch(args.out / "metrics.jsonl"))
    trainer.train()


def common(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(args.out / "checkpoints"),
        "max_steps": args.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "optim": "paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch",
    }


def sft(args: argparse.Namespace, examples: list[Example]) -> SFTTrainer:
    rows = Dataset.from_list([{"prompt": e.prompt, "completion": e.completion} for e in examples])
    return SFTTrainer(
        model=str(args.model),
        args=SFTConfig(
            **common(args),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            learning_rate=1e-4,
            max_length=512,
            model_init_kwargs={"dtype": "bfloat16", "quantization_config": NF4},
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=32, lora_alpha=64, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )


def grpo(args: argparse.Namespace, examples: list[Example]) -> GRPOTrainer:
    rows = Dataset.from_list([{"prompt": e.prompt, "answer": e.answer} for e in examples])
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, quantization_config=NF4, device_map="auto")
    return GRPOTrainer(
        model=PeftModel.from_pretrained(base, args.adapter, is_trainable=True),
        args=GRPOConfig(
            **common(args),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=args.num_completions // 8,
            num_generations=8,
            temperature=0.8,
            beta=0.04,
            learning_rate=3e-5,
            max_completion_length=args.max_completion_length,
        ),
        reward_funcs=[correctness_reward, format_reward],
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )


def evaluate(args: argparse.Namespace) -> None:
    """questions.jsonl says when the model was loaded, predictions.jsonl when all was answered."""
    examples = read_jsonl(args.data / "test.jsonl", Example)[: args.questions]
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, quantization_config=NF4, device_map="auto")
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    write_jsonl(args.out / "questions.jsonl", examples)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(examples), 32):
        batch = examples[start : start + 32]
        prompts = tokenizer.apply_chat_template(
            [e.prompt for e in batch], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        outputs = model.generate(**prompts, max_new_tokens=args.max_completion_length, do_sample=False)
        for example, ids in zip(batch, outputs[:, prompts["input_ids"].shape[1] :].tolist(), strict=True):
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
            rows.append({"id": example.id, "num_tokens": end, "correct": grade(text, example.answer).correct})
    write_jsonl(args.out / "predictions.jsonl", rows)
    (args.out / "manifest.json").write_text(json.dumps({"peak_gib": peak_gib(), "batch_size": 32}) + "\n")


if __name__ == "__main__":
    main()

"""Who is measured by bench/speed.py: this project's scripts, with what settings, and the scripts of bench/peers.py."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

from bench.cross_check import ROOT, lm_eval_command
from bench.random_llama import TARGETS

Command = Callable[[Path], list[str]]  # the folder that a party writes into -> what to run

# fast is what configs/recommended does. small fits into the memory of TRL's script. tiny has its settings, without paging.
FAST = ["quantization=nf4_unpacked", "trainer.gradient_checkpointing=false", "trainer.optim=adamw_torch_fused"]
TINY = ["quantization=nf4", "trainer.gradient_checkpointing=true", "trainer.optim=adamw_torch_fused"]
SIXTEEN = ["trainer.per_device_train_batch_size=16", "trainer.gradient_accumulation_steps=1"]
THIRTY_TWO = ["trainer.per_device_train_batch_size=32", "trainer.gradient_accumulation_steps=1"]
EIGHT_TWOS = ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=8"]
FOUR_FOURS = ["trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=4"]
TWO_EIGHTS = ["trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=2"]
BY_LENGTH = "trainer.train_sampling_strategy=group_by_length"
# Packed NF4 in lean layers: what trains where memory counts, with the small mode's checkpoints or without.
LEAN = ["quantization=nf4", "trainer.optim=adamw_torch_fused", "lean_layers=true"]
UNPACKED = "quantization=nf4_unpacked"
KEPT, CHECKPOINTED = "trainer.gradient_checkpointing=false", "trainer.gradient_checkpointing=true"
PACKED = ["trainer.packing=true", "trainer.max_length=512"]
SEATS = "model.decoding=seats"
GRAPHS = "layer_graphs=true"
FP8, FP8_CACHE = ["rollouts.weights=fp8"], "rollouts.cache=fp8"

# What each lever sets. The first entry is the start: TRL's defaults and TRL's own generation, through our scripts.
SFT_LEVERS = {
    "plain": "quantization=nf4 model.attn_implementation=sdpa model.kernels=torch fast_loss=false fast_adapter=false "
    "trainer.gradient_checkpointing=true trainer.optim=paged_adamw_32bit "  # a CPU pages nothing
    "trainer.per_device_train_batch_size=4 trainer.gradient_accumulation_steps=4",
    "fused-optimizer": "trainer.optim=adamw_torch_fused",
    "label-head": "fast_loss=true",
    "fused-adapter": "fast_adapter=true",
    "no-checkpointing": "trainer.gradient_checkpointing=false",
    "one-micro-batch": "trainer.per_device_train_batch_size=16 trainer.gradient_accumulation_steps=1",
    "by-length": "trainer.train_sampling_strategy=group_by_length",
    "unpacked": "quantization=nf4_unpacked",
    "own-attention": "model.attn_implementation=auto",
    "fused-kernels": "model.kernels=auto",  # none on a CPU
}
GRPO_LEVERS = {
    "plain": "quantization=nf4 model.attn_implementation=sdpa model.kernels=torch rollouts.engine=trl fast_adapter=false "
    "trainer.gradient_checkpointing=true trainer.optim=adamw_torch_fused "
    "trainer.per_device_train_batch_size=8 trainer.gradient_accumulation_steps=2",
    "own-engine": "rollouts.engine=transformers",
    "fused-adapter": "fast_adapter=true",
    "no-checkpointing": "trainer.gradient_checkpointing=false",  # and with it shared prompts
    "one-micro-batch": "trainer.per_device_train_batch_size=16 trainer.gradient_accumulation_steps=1",
    "unpacked": "quantization=nf4_unpacked",
    "own-attention": "model.attn_implementation=auto",
    "fused-kernels": "model.kernels=auto",  # none on a CPU
    "no-reference": "trainer.beta=0",
    "signal-only": "rollouts.skip_zero_signal=true",
}


def ladder(levers: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Each lever with its own settings and those of all levers before it."""
    pulled = itertools.accumulate(levers.values(), lambda below, more: f"{below} {more}")
    return [(lever, settings.split()) for lever, settings in zip(levers, pulled, strict=True)]


def parties(args: argparse.Namespace) -> dict[str, Command]:
    """The parties of the stages that were asked for, by name."""
    found = {
        "ours-sft-fast": sft(args, 0.0, *FAST, BY_LENGTH, *SIXTEEN),
        "ours-sft-small": sft(args, 0.0, *FAST, BY_LENGTH, *EIGHT_TWOS),
        "ours-sft-tiny": sft(args, 0.1, *TINY, *FOUR_FOURS),
        "ours-compiled-sft": sft(args, 0.0, *FAST, BY_LENGTH, *SIXTEEN, "compile=true", "fast_adapter=false"),
        "ours-compiled-32-sft": sft(args, 0.0, *FAST, BY_LENGTH, *THIRTY_TWO, "compile=true", "fast_adapter=false"),
        "ours-large-sft": sft(args, 0.0, *FAST, BY_LENGTH, *THIRTY_TWO),
        "ours-packed-sft": sft(args, 0.0, *LEAN, KEPT, *PACKED, *SIXTEEN),
        "ours-packed-small-sft": sft(args, 0.0, *LEAN, CHECKPOINTED, *PACKED, *SIXTEEN),
        "ours-graphs-sft": sft(args, 0.0, *LEAN, KEPT, *PACKED, *SIXTEEN, GRAPHS),
        "ours-graphs-unpacked-sft": sft(args, 0.0, *LEAN, UNPACKED, KEPT, *PACKED, *TWO_EIGHTS, GRAPHS),
        "ours-graphs-small-sft": sft(args, 0.0, *LEAN, "trainer.optim=adamw_8bit", CHECKPOINTED, *PACKED, *FOUR_FOURS, GRAPHS),
        "ours-graphs-small-fp32-sft": sft(args, 0.0, *LEAN, CHECKPOINTED, *PACKED, *FOUR_FOURS, GRAPHS),
        "trl-sft": peer(args, "sft", args.steps),
        "ours-grpo": grpo(args, *FAST),
        "ours-seats-grpo": grpo(args, *FAST, SEATS),
        "ours-seats-lean-grpo": grpo(args, *LEAN, KEPT, SEATS, "update_tokens=8192"),
        "ours-seats-small-grpo": grpo(args, *LEAN, CHECKPOINTED, SEATS, "update_tokens=8192"),
        "ours-graphs-grpo": grpo(args, *LEAN, KEPT, SEATS, GRAPHS, "update_tokens=4096"),
        "ours-graphs-fp8-grpo": grpo(args, *LEAN, KEPT, SEATS, GRAPHS, *FP8, "update_tokens=6144"),
        "ours-graphs-fp8-cache-grpo": grpo(args, *LEAN, KEPT, SEATS, GRAPHS, *FP8, FP8_CACHE, "update_tokens=6144"),
        "trl-grpo": peer(args, "grpo", max(2, args.grpo_steps // 2)),
        "ours-eval": answer(args, "quantization=nf4", f"adapter={adapter(args)}"),
        "ours-seats-eval": answer(args, "quantization=nf4", f"adapter={adapter(args)}", SEATS),
        "hf-eval": peer(args, "eval", 0),
        # The bare bf16 model, as lm-eval loads it: whole processes, for it does not time its parts.
        "ours-lm-eval": answer(args, "quantization=none", "adapter=null"),
        **({f"batch{size}-lm-eval": lm_eval(args, size) for size in args.lm_eval_batches} if args.lm_eval else {}),
        **({"vllm-lm-eval": vllm(args)} if args.vllm else {}),
    }
    found |= {f"{n}-ladder-sft-{lever}": sft(args, 0.0, *pulled) for n, (lever, pulled) in enumerate(ladder(SFT_LEVERS))}
    found |= {f"{n}-ladder-grpo-{lever}": grpo(args, *pulled) for n, (lever, pulled) in enumerate(ladder(GRPO_LEVERS))}
    asked = {name: command for name, command in found.items() if name.split("-", 1)[1].startswith(tuple(args.stages))}
    return {name: command for name, command in asked.items() if not args.only or name in args.only}


def sft(args: argparse.Namespace, dropout: float, *more: str) -> Command:
    config = ["sft_train.py", "--config", "configs/sft_llama3.2-3b.yaml", f"trainer.max_steps={args.steps}"]
    lora = f"lora={{r: 32, alpha: 64, dropout: {dropout}, target_modules: [{','.join(TARGETS)}]}}"
    return lambda out: [*config, *training(args), lora, *more, f"run_dir={out}"]


def grpo(args: argparse.Namespace, *more: str) -> Command:
    config = ["grpo_train.py", "--config", "configs/grpo_llama3.2-3b.yaml", "adapter_mode=continue", "lora=null"]
    micro = args.micro_batch
    steps = args.num_completions // micro
    window = [f"trainer.per_device_train_batch_size={micro}", f"trainer.gradient_accumulation_steps={steps}"]
    length = [f"trainer.max_completion_length={args.max_completion_length}", f"trainer.max_steps={args.grpo_steps}"]
    return lambda out: [*config, *training(args), f"adapter={adapter(args)}", *window, *length, *more, f"run_dir={out}"]


def answer(args: argparse.Namespace, *more: str) -> Command:
    config = ["evaluate.py", "--config", "configs/eval_gsm8k.yaml"]
    asked = [f"data.limit={args.eval_questions}", f"generation.max_new_tokens={args.max_completion_length}"]
    return lambda out: [*config, *on_model(args), *asked, *more, f"run_dir={out}"]


def on_model(args: argparse.Namespace) -> list[str]:
    model = [f"model.name_or_path={args.model}", f"model.attn_implementation={args.attention}", f"data.path={args.data}"]
    return [*model, "model.revision=null", "model.chat_template=null"]  # the configs pin those of Llama


def training(args: argparse.Namespace) -> list[str]:
    rows = ["tracking=none", "data.num_dev=0", "data.num_train=2000"]
    often = ["trainer.logging_steps=1", "trainer.save_strategy=no", "trainer.eval_strategy=no"]
    # Random weights get no reward. Only decay moves a weight then, and a run that moves none fails.
    moving = ["trainer.weight_decay=0.1"] if args.random_3b else []
    return [*on_model(args), *rows, *often, *moving]


def adapter(args: argparse.Namespace) -> Path:
    return args.adapter or args.work / "ours-sft-fast-0" / "adapter"


def peer(args: argparse.Namespace, stage: str, steps: int) -> Command:
    questions = max(1, args.eval_questions // 320) * 32  # at a fixed batch size the rate does not depend on how many
    options = {
        "--model": args.model,
        "--data": args.data,
        "--steps": steps,
        "--num-completions": args.num_completions,
        "--max-completion-length": args.max_completion_length,
        "--questions": questions,
        "--adapter": adapter(args),
    }
    words = [str(word) for option in options.items() for word in option]
    return lambda out: ["bench/peers.py", stage, *words, "--out", str(out)]


def lm_eval(args: argparse.Namespace, batch_size: str) -> Command:
    questions = args.work / "ours-lm-eval-0"
    return lambda out: lm_eval_command(args.lm_eval, questions, out, batch_size)


def vllm(args: argparse.Namespace) -> Command:
    questions = args.work.absolute() / "ours-lm-eval-0" / "questions.jsonl"
    options = ["--model", str(args.model.absolute()), "--questions", str(questions)]
    limit = ["--max-new-tokens", str(args.max_completion_length)]
    python = str(Path(args.vllm).absolute())  # not resolved: an environment's Python is a link to another

    def command(out: Path) -> list[str]:
        out.mkdir(parents=True)
        return [python, str(ROOT / "bench" / "vllm_peer.py"), *options, *limit, "--out", str(out.absolute())]

    return command

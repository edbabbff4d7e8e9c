"""This project beside the minimal TRL scripts, in one run: same model, rows and completions, each a whole process, interleaved.

    python bench/speed.py --model models/smollm2-135m-instruct --data data/gsm8k --stages sft grpo --repeats 3 --json FILE
    python bench/speed.py --model models/random-3b --random-3b --data data/gsm8k --stages sft grpo   # on a GPU

Real tokens (padding not counted) and completions a second in steady state: the median over steps after the first two.
Load and warm-up are the time to the end of the first step. Refuses to report from a busy machine. `--random-3b` writes a
model with random weights in the shape of Llama-3.2-3B first: speed does not depend on what the weights are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from posttrain.run import git_state, hardware  # noqa: E402

TARGETS = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


def main() -> None:
    args = arguments()
    if args.random_3b:
        make_random_3b(args.model, args.tokenizer)
    require_idle(args.busy_limit)
    rows: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for name, command in parties(args).items():
            out = args.work / f"{name}-{repeat}"
            print(f"[{repeat + 1}/{args.repeats}] {name} ...", flush=True)
            rows.setdefault(name, []).append(measure(name, command(out), out, args.timeout))
    report(rows, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=("sft", "grpo"), default=["sft", "grpo"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--grpo-steps", type=int, default=4)
    parser.add_argument("--num-completions", type=int, default=16)
    parser.add_argument("--max-completion-length", type=int, default=256)
    parser.add_argument("--attention", default="sdpa", help="eager is faster on CPU")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one process; what it logged until then counts")
    parser.add_argument("--busy-limit", type=float, default=0.15, help="share of the machine that may be busy before the start")
    parser.add_argument("--random-3b", action="store_true")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--only", nargs="*", help="names of parties")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def parties(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> the command that runs it into a folder."""
    adapter = args.work / "ours-sft-fast-0"
    ours = [f"model.name_or_path={args.model}", f"model.attn_implementation={args.attention}", f"data.path={args.data}"]
    ours += [
        "data.num_dev=0",
        "data.num_train=2000",
        "trainer.logging_steps=1",
        "trainer.save_strategy=no",
        "trainer.eval_strategy=no",
    ]
    shape = [f"lora={{r: 32, alpha: 64, target_modules: {TARGETS}}}", f"trainer.max_steps={args.steps}"]
    fast = [
        "quantization=nf4_unpacked",
        "trainer.gradient_checkpointing=false",
        "trainer.train_sampling_strategy=group_by_length",
    ]
    small = ["quantization=nf4", "trainer.gradient_checkpointing=true", "trainer.optim=adamw_torch_fused"]
    fast += ["trainer.optim=adamw_torch_fused", "model.chat_template=null"]
    small += ["model.chat_template=null"]

    def sft(*more: str) -> Any:
        config = ["sft_train.py", "--config", "configs/sft_llama3.2-3b.yaml", "model.revision=null"]
        return lambda out: [*config, *ours, *shape, *more, f"run_dir={out}"]

    def grpo(*more: str) -> Any:
        config = ["grpo_train.py", "--config", "configs/grpo_llama3.2-3b.yaml", "adapter_mode=continue", "lora=null"]
        window = ["trainer.per_device_train_batch_size=16", f"trainer.gradient_accumulation_steps={args.num_completions // 16}"]
        length = [f"trainer.max_completion_length={args.max_completion_length}", f"trainer.max_steps={args.grpo_steps}"]
        more = ("model.revision=null", f"adapter={adapter}", *window, *length, *more)
        return lambda out: [*config, *ours, *more, f"run_dir={out}"]

    def peer(stage: str, steps: int) -> Any:
        sizes = ["--num-completions", str(args.num_completions), "--max-completion-length", str(args.max_completion_length)]
        base = ["bench/peers.py", stage, "--model", str(args.model), "--data", str(args.data), "--steps", str(steps), *sizes]
        return lambda out: [*base, "--adapter", str(adapter / "adapter"), "--out", str(out)]

    batches = {
        "fast": ["trainer.per_device_train_batch_size=16", "trainer.gradient_accumulation_steps=1"],
        "small": ["trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=4"],
    }
    found = {
        "ours-sft-fast": sft(*fast, *batches["fast"]),
        "ours-sft-small": sft(*small, *batches["small"]),
        "trl-sft": peer("sft", args.steps),
        "ours-grpo": grpo(*fast[:2], *fast[3:]),
        "trl-grpo": peer("grpo", max(2, args.grpo_steps // 2)),
    }
    asked = {name: command for name, command in found.items() if any(f"-{stage}" in name for stage in args.stages)}
    return {name: command for name, command in asked.items() if not args.only or name in args.only}


def measure(name: str, command: list[str], out: Path, timeout: int) -> dict[str, Any]:
    """Run one party; what it logged says the rest. The tokens of a step are those since the step before."""
    started = time.time()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "w", encoding="utf-8") as log:
        try:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, timeout=timeout, check=False)
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = 124
    file = out / "metrics.jsonl"
    steps = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    steps = [row for row in steps if "learning_rate" in row]
    if len(steps) < 2:
        return {"party": name, "error": f"exit {code}", "tail": Path(f"{out}.log").read_text()[-600:]}
    pairs = list(itertools.pairwise(steps))
    seconds = [after["time"] - before["time"] for before, after in pairs]
    tokens = [after["num_tokens"] - before["num_tokens"] for before, after in pairs]
    steady = list(zip(seconds, tokens, strict=True))[1 if len(pairs) > 2 else 0 :]
    return {
        "party": name,
        "to_first_step_seconds": steps[0]["time"] - started,
        "step_seconds": statistics.median(s for s, _ in steady),
        "tokens_per_second": sum(t for _, t in steady) / sum(s for s, _ in steady),
        "peak_gib": max((row.get("peak_gib", 0) for row in steps), default=0) or manifest(out).get("peak_gib"),
        "loss": [row.get("loss") for row in steps],
        "last": {key: value for key, value in steps[-1].items() if key.startswith(("time/", "rollout/", "completions/mean"))},
    }


def manifest(out: Path) -> dict[str, Any]:
    file = out / "manifest.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def report(rows: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    summary = {}
    print(
        "\n| party | to first step, s | step, s | real tokens/s | completions/s | peak GiB |\n|---|--:|--:|--:|--:|--:|\n",
        end="",
    )
    for name, runs in rows.items():
        good = [run for run in runs if "error" not in run]
        if not good:
            print(f"| {name} | {runs[0]['error']}: {runs[0]['tail'][-200:]!r} |")
            continue
        middle = {key: statistics.median(run[key] or 0 for run in good) for key in NUMBERS}
        spread = [min(run["step_seconds"] for run in good), max(run["step_seconds"] for run in good)]
        rate = args.num_completions / middle["step_seconds"] if "grpo" in name else None
        summary[name] = middle | {"step_seconds_spread": spread, "completions_per_second": rate, "last": good[-1]["last"]}
        step = f"{middle['step_seconds']:.2f} [{spread[0]:.2f}, {spread[1]:.2f}]"
        shown = [f"{middle['to_first_step_seconds']:.1f}", step, f"{middle['tokens_per_second']:.0f}"]
        print("| " + " | ".join([name, *shown, f"{rate:.2f}" if rate else "", f"{middle['peak_gib']:.2f}"]) + " |")
    for ours, peer in (("ours-sft-fast", "trl-sft"), ("ours-sft-small", "trl-sft"), ("ours-grpo", "trl-grpo")):
        if ours in summary and peer in summary:
            ratio = summary[ours]["tokens_per_second"] / summary[peer]["tokens_per_second"]
            steps = summary[peer]["step_seconds"] / summary[ours]["step_seconds"]
            print(f"{ours} / {peer}: {ratio:.1f}x the real tokens a second, {steps:.1f}x the steps")
    if args.json:
        text = {"summary": summary, "runs": rows, "hardware": hardware(), **git_state(), "argv": sys.argv}
        args.json.write_text(json.dumps(text, indent=2, default=str) + "\n")


NUMBERS = ("to_first_step_seconds", "step_seconds", "tokens_per_second", "peak_gib")


def require_idle(limit: float, seconds: float = 3.0) -> None:
    """Timings from a machine that does something else are not timings."""

    def busy_and_all() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    before = busy_and_all()
    time.sleep(seconds)
    after = busy_and_all()
    share = (after[0] - before[0]) / max(1, after[1] - before[1])
    if share > limit:
        sys.exit(f"the machine is {share:.0%} busy: stop what else runs, or raise --busy-limit and do not quote the result")


def make_random_3b(folder: Path, tokenizer: Path) -> None:
    """28 layers, hidden 3072, 24 heads, 8 key heads, intermediate 8192, vocabulary 128,256, tied: Llama-3.2-3B's shape."""
    if (folder / "model.safetensors.index.json").is_file() or (folder / "model.safetensors").is_file():
        return
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=4096, eos_token_id=2,
        bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()

"""This project beside the minimal TRL scripts, in one run: same model, rows and completions, each a whole process, interleaved.

    python bench/speed.py --model models/smollm2-135m-instruct --data data/gsm8k --stages sft grpo --repeats 3 --json FILE
    python bench/speed.py --model models/random-3b --random-3b --data data/gsm8k --stages sft grpo eval   # on a GPU
    python bench/speed.py --model models/smollm2-135m-instruct --data data/gsm8k --stages lm-eval --lm-eval LM_EVAL --vllm PYTHON
    python bench/speed.py --model models/smollm2-135m-instruct --data data/gsm8k --stages ladder-sft ladder-grpo --adapter DIR

A ladder's rungs differ by one lever each, in the order of their numbers, and every rung keeps those below it.

It reports real tokens (padding not counted) and completions a second in steady state: the median over steps after the first
two. Load and warm-up are the time to the end of the first step, for eval to the first prompt. On a busy machine it reports
nothing. `--random-3b` first writes a model with random weights in the shape of Llama-3.2-3B: speed depends on the length of
completions and not on the weights, and all completions of a random model run to the limit.

MFU is 4 N tokens/s over the GPU's dense bf16 peak, with N the weights of linear layers and output head: 2 N forward and 2 N
back to the activations. Frozen weights get no gradient, which is the other 2 N of the usual 6 N (`mfu_6n`). Work that
checkpointing repeats does not count. Attention scores and the adapter itself, 6 x 1.5 % of N, are left out. The head counts at
every position, though only completions are scored.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.parties import parties  # noqa: E402
from bench.random_llama import LLAMA_3B, make  # noqa: E402
from posttrain.config.schema import Model  # noqa: E402
from posttrain.runs.manifest import git_state, hardware  # noqa: E402
from posttrain.training.plans import model_shape  # noqa: E402

STAGES = ("sft", "large", "compiled", "packed", "graphs", "grpo", "eval", "seats", "lm-eval", "ladder-sft", "ladder-grpo")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bf16, of the SXM boards


def main() -> None:
    args = arguments()
    if args.random_3b:
        # Another process makes it: this one must hold no GPU memory while it measures others.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(args.model, args.tokenizer, LLAMA_3B))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit(f"{args.model} could not be made")
    facts = {"busy": require_idle(args.busy_limit), "hardware": hardware(), **git_state(), "argv": sys.argv}
    facts["bound"] = bound(args)
    rows: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for name, command in parties(args).items():
            out = args.work / f"{name}-{repeat}"
            if out.exists():  # a finished run is not run again, and its old numbers would pass for new ones
                sys.exit(f"{out} holds an earlier measurement: choose another --work")
            print(f"[{repeat + 1}/{args.repeats}] {name} ...", flush=True)
            row = measure(name, command(out), out, args)
            if repeat == 0 and ("ours" in name or "ladder" in name) and "eval" not in name:
                row["predicted_gib"] = predicted_gib(command(out))
            if gpu := next((gpu for gpu in PEAK_FLOPS if gpu in str(facts["hardware"]["gpu"])), None):
                row |= mfu(row, args.model, PEAK_FLOPS[gpu]) if "-sft" in name else {}
            row["share_of_bound"] = share_of_bound(name, row, facts["bound"])
            print(
                json.dumps({key: value for key, value in row.items() if key not in ("loss", "tail", "seconds", "tokens")}),
                flush=True,
            )
            rows.setdefault(name, []).append(row)
            if args.json:  # after every party, so that an interrupted bench keeps what it has measured
                args.json.parent.mkdir(parents=True, exist_ok=True)
                text = {"summary": summary(rows), "runs": rows, **facts}
                args.json.write_text(json.dumps(text, indent=2, default=str) + "\n")
    report(summary(rows), rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["sft", "grpo"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--grpo-steps", type=int, default=4)
    parser.add_argument("--num-completions", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=16, help="completions in one of ours; a GPU wants more")
    parser.add_argument("--max-completion-length", type=int, default=256)
    parser.add_argument("--eval-questions", type=int, default=64, help="the peer answers a tenth, in whole batches of 32")
    parser.add_argument("--lm-eval", help="the lm_eval command of an environment of its own")
    parser.add_argument("--lm-eval-batches", nargs="+", default=["1", "16", "64"], help="1 is its default")
    parser.add_argument("--vllm", help="the Python of an environment that has vLLM: make vllm-cpu")
    parser.add_argument("--adapter", type=Path, help="what GRPO and evaluation start from; else what ours-sft-fast trains")
    parser.add_argument("--attention", default="auto", help="model.attn_implementation of ours; the ladders set their own")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one process; what it logged until then counts")
    parser.add_argument("--busy-limit", type=float, default=0.15, help="share of the machine that may be busy before the start")
    parser.add_argument("--random-3b", action="store_true")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--only", nargs="*", help="names of parties")
    parser.add_argument("--profile", action="store_true", help="run ours under bench/step_profile.py, whose table is in NAME.log")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.random_3b:
        args.adapter = args.adapter or args.model / "adapter"
    elif {"graphs", "grpo", "eval", "seats", "ladder-grpo"} & {*args.stages} and "sft" not in args.stages and not args.adapter:
        parser.error("grpo and eval start from an adapter: add sft to --stages, or give --adapter")
    if args.num_completions % args.micro_batch:
        parser.error(f"--num-completions {args.num_completions}: give a multiple of --micro-batch {args.micro_batch}")
    if "ladder-grpo" in args.stages and args.num_completions != 16:
        parser.error("the rungs of ladder-grpo are of 16 completions: leave --num-completions out")
    if "lm-eval" in args.stages and not (args.lm_eval or args.vllm):
        parser.error("the stage lm-eval needs --lm-eval or --vllm: the commands of environments that have them")
    return args


def measure(name: str, command: list[str], out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one party, and read the rest from the files that it left."""
    started, log = time.time(), Path(f"{out}.log")
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as lines:
        try:
            ours = command[0].endswith(".py")
            done = subprocess.run(
                [sys.executable, *(["bench/step_profile.py"] if args.profile else []), *command] if ours else command,
                cwd=ROOT if ours else out,
                stdout=lines,
                stderr=lines,
                timeout=args.timeout,
                check=False,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = 124
    row = {"party": name, "exit": code, "process_seconds": time.time() - started}
    if name.endswith("lm-eval"):
        found: dict[str, Any] | None = answered_whole(out, row["process_seconds"])
    else:
        found = answered(out, started) if "-eval" in name else trained(out, started)
    tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-25:])
    if code or not found:
        print(f"--- {name} ended with {code}; {log}:\n{tail}\n---", flush=True)
    if not found:
        return row | {"error": f"exit {code}", "tail": tail}
    if "-grpo" in name:
        found["completions_per_second"] = args.num_completions / found["step_seconds"]
    return row | found


def trained(out: Path, started: float) -> dict[str, Any] | None:
    """Rates from the logged steps. A step's tokens are those since the step before."""
    file = out / "metrics.jsonl"
    whole = file.read_text().split("\n")[:-1] if file.is_file() else []  # a timeout may have torn the last line
    steps = [row for row in map(json.loads, whole) if "learning_rate" in row]
    if len(steps) < 2:
        return None
    pairs = list(itertools.pairwise(steps))
    seconds = [after["time"] - before["time"] for before, after in pairs]
    tokens = [after["num_tokens"] - before["num_tokens"] for before, after in pairs]
    steady = list(zip(seconds, tokens, strict=True))[1 if len(pairs) > 2 else 0 :]
    return {
        "to_first_step_seconds": steps[0]["time"] - started,
        "step_seconds": statistics.median(s for s, _ in steady),
        "tokens_per_second": statistics.median(t / s for s, t in steady),
        "seconds": [round(s, 3) for s in seconds],
        "tokens": tokens,
        "peak_gib": max((row.get("peak_gib", 0) for row in steps), default=0) or manifest(out).get("peak_gib"),
        "loss": [row.get("loss") for row in steps],
        "last": {
            key: value for key, value in steps[-1].items() if key.startswith(("time/", "rollout/", "update/", "completions/mean"))
        },
    }


def answered(out: Path, started: float) -> dict[str, Any] | None:
    """Generation lasts from questions.jsonl, written when the model is loaded, to predictions.jsonl, written at the end."""
    questions, predictions = out / "questions.jsonl", out / "predictions.jsonl"
    if not predictions.is_file():
        return None
    tokens = [json.loads(line)["num_tokens"] for line in predictions.read_text(encoding="utf-8").splitlines()]
    seconds = predictions.stat().st_mtime - questions.stat().st_mtime
    return {
        "to_first_step_seconds": questions.stat().st_mtime - started,
        "step_seconds": seconds,
        "tokens_per_second": sum(tokens) / seconds,
        "completions_per_second": len(tokens) / seconds,
        "peak_gib": manifest(out).get("peak_gib"),
        "last": {"questions": len(tokens), "tokens": sum(tokens), "batch_size": manifest(out).get("batch_size")},
    }


def answered_whole(out: Path, seconds: float) -> dict[str, Any] | None:
    files = [*out.glob("predictions.jsonl"), *out.glob("**/samples_*.jsonl")]
    if not files:
        return None
    ids = {row.get("id") or row["doc"]["id"] for row in map(json.loads, files[0].read_text(encoding="utf-8").splitlines())}
    rate = len(ids) / seconds
    return {
        "to_first_step_seconds": 0.0,
        "step_seconds": seconds,
        "tokens_per_second": 0.0,
        "completions_per_second": rate,
        "last": {},
    }


def manifest(out: Path) -> dict[str, Any]:
    file = out / "manifest.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def predicted_gib(command: list[str]) -> float | None:
    """What `--dry-run` says the command will need. It assumes max_length in every row; the measured rows are shorter."""
    done = subprocess.run([sys.executable, *command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith(("memory", "rollouts"))]
    print("\n".join(said), flush=True)
    totals = re.findall(r"about ([\d.]+) GiB", done.stdout)
    rollouts = [size for line in said if line.startswith("rollouts") for size in re.findall(r"([\d.]+) GiB", line)]
    return round(sum(map(float, [*totals, *rollouts])), 2) if totals else None


def mfu(row: dict[str, Any], model: Path, peak: float) -> dict[str, float]:
    shape = model_shape(Model(name_or_path=str(model)))
    if shape is None or "error" in row:
        return {}
    weights = shape["linear"] + shape["embedding"]  # a tied embedding is the output head
    return {f"mfu{name}": factor * weights * row["tokens_per_second"] / peak for name, factor in (("", 4), ("_6n", 6))}


def bound(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the bare matrix products, learning and decoding. They run in a process of their own, like each party."""
    command = ["bench/bound.py", "--model", str(args.model), "--rows", str(args.num_completions)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"bare matrix products, tokens/s: {done.stdout.strip()}", flush=True)
    return {"sft": found["learn"], "grpo": found["decode"][str(args.num_completions)], "tflops": found["tflops"]}


def share_of_bound(name: str, row: dict[str, Any], bounds: dict[str, Any]) -> float | None:
    """Of SFT's tokens a second, and of the sampler's in GRPO."""
    rates = {"sft": row.get("tokens_per_second"), "grpo": row.get("last", {}).get("rollout/tokens_per_second")}
    stage = next((stage for stage in rates if stage in name.split("-")), "")
    return rates[stage] / bounds[stage] if rates.get(stage) else None


NUMBERS = (
    "to_first_step_seconds",
    "step_seconds",
    "tokens_per_second",
    "completions_per_second",
    "peak_gib",
    "share_of_bound",
    "mfu",
    "mfu_6n",
)


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The middle of each party's repeats."""
    result = {}
    for name, runs in rows.items():
        if good := [run for run in runs if "error" not in run]:
            middle = {key: statistics.median(run.get(key) or 0 for run in good) for key in NUMBERS}
            spread = [min(run["step_seconds"] for run in good), max(run["step_seconds"] for run in good)]
            more = {"predicted_gib": runs[0].get("predicted_gib"), "last": good[-1]["last"]}
            result[name] = middle | {"step_seconds_spread": spread} | more
    return result


def report(found: dict[str, dict[str, Any]], rows: dict[str, list[dict[str, Any]]]) -> None:
    print(
        "\n| party | to first step, s | step, s | real tokens/s | completions/s | peak GiB | planned GiB | of the bound | MFU |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, row in found.items():
        step = f"{row['step_seconds']:.2f} [{row['step_seconds_spread'][0]:.2f}, {row['step_seconds_spread'][1]:.2f}]"
        shown = [f"{row['to_first_step_seconds']:.1f}", step, f"{row['tokens_per_second']:.0f}"]
        shown += [f"{row[key]:.2f}" if row[key] else "" for key in ("completions_per_second", "peak_gib", "predicted_gib")]
        shown += [f"{row[key]:.1%}" if row[key] else "" for key in ("share_of_bound", "mfu")]
        print("| " + " | ".join([name, *shown]) + " |")
    for name in rows.keys() - found.keys():
        print(f"| {name} | {rows[name][0]['error']} |")
    for ours, peer in PAIRS:
        if ours in found and peer in found:
            ratio = found[ours]["tokens_per_second"] / found[peer]["tokens_per_second"]
            print(f"{ours} / {peer}: {ratio:.1f}x the real tokens a second")
    for peer in found:
        if peer.endswith("lm-eval") and peer != "ours-lm-eval":
            ratio = found["ours-lm-eval"]["completions_per_second"] / found[peer]["completions_per_second"]
            print(f"ours-lm-eval / {peer}: {ratio:.1f}x the questions a second, start and load included")


PAIRS = (
    ("ours-sft-fast", "trl-sft"),
    ("ours-sft-small", "trl-sft"),
    ("ours-sft-tiny", "trl-sft"),
    ("ours-large-sft", "trl-sft"),
    ("ours-compiled-32-sft", "trl-sft"),
    ("ours-grpo", "trl-grpo"),
    ("ours-eval", "hf-eval"),
)


def require_idle(limit: float, seconds: float = 3.0) -> float:
    """Refuse a machine that is busy with something else. Returns the share of it that was busy."""

    def busy_and_all() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    before = busy_and_all()
    time.sleep(seconds)
    after = busy_and_all()
    share = (after[0] - before[0]) / max(1, after[1] - before[1])
    if share > limit:
        sys.exit(f"the machine is {share:.0%} busy: stop what else runs, or raise --busy-limit and do not quote the result")
    return share


if __name__ == "__main__":
    main()

"""How time and memory of a GRPO step grow with the model, the length of completions and the size of a group.

    python bench/growth.py --data data/gsm8k --out docs/growth.png      # wants an idle machine; minutes on two CPU cores

Models with random weights in Llama's shape, whose completions all run to the limit. One of the three is varied at a time,
the others stay at the middle: 12 layers of 576, 128 tokens, 8 completions for each of two questions. Prints the numbers as
JSON and draws them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.random_llama import make  # noqa: E402
from posttrain.runs.manifest import git_state, hardware  # noqa: E402

# SmolLM2-135M's.
WIDTH = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
MIDDLE = {"layers": 12, "length": 128, "group": 8}
VARIED = {"layers": (6, 12, 24), "length": (64, 128, 256), "group": (4, 8, 16)}
TITLES = {"layers": "layers of the model", "length": "tokens of a completion", "group": "completions of a question"}
LEARNING = ("time/forward", "time/backward", "time/logprobs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    points: dict[str, list[dict[str, Any]]] = {}
    measured: dict[tuple[int, ...], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for axis, values in VARIED.items():
            for value in values:
                shape = MIDDLE | {axis: value}
                key = tuple(shape.values())
                if key not in measured:
                    measured[key] = shape | measure(shape, args, Path(folder))
                    print(json.dumps(measured[key]), flush=True)
                points.setdefault(axis, []).append(measured[key])
    draw(points, args.out)
    print(json.dumps({"points": points, "hardware": hardware(), **git_state()}))


def measure(shape: dict[str, int], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of each phase of a step, the median without the first step, and the process's peak memory."""
    model, run = folder / f"model{shape['layers']}", folder / "-".join(map(str, shape.values()))
    make(model, args.tokenizer, WIDTH | {"num_hidden_layers": shape["layers"]})
    command = ["grpo_train.py", "--config", "configs/grpo_tiny.yaml", f"model.name_or_path={model}", f"adapter={model}/adapter"]
    command += [f"data={{path: {args.data}, num_train: 64, num_dev: 0}}", f"run_dir={run}"]
    command += [f"trainer.{key}={value}" for key, value in trainer_settings(shape, args.steps).items()]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/decode" in row][1:]
    return {
        "decode": statistics.median(row["time/decode"] for row in steps),
        "learn": statistics.median(sum(row[key] for key in LEARNING) for row in steps),
        "peak_gib": json.loads((run / "manifest.json").read_text())["peak_gib"],
    }


def trainer_settings(shape: dict[str, int], steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "num_generations": shape["group"],
        "per_device_train_batch_size": 2 * shape["group"],
        "gradient_accumulation_steps": 1,
        "max_completion_length": shape["length"],
        "beta": 0.04,  # all rewards are 0, and only the reference makes the update do its work
        "weight_decay": 0.1,  # only decay moves a weight, and a run that moves none fails
        "gradient_checkpointing": "false",
    }


def draw(points: dict[str, list[dict[str, Any]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5), sharex="col", sharey="row")
    for column, (axis, rows) in enumerate(points.items()):
        x = [row[axis] for row in rows]
        for name, label in (("decode", "sampling"), ("learn", "learning")):
            axes[0, column].plot(x, [row[name] for row in rows], marker="o", label=label)
        axes[1, column].plot(x, [row["peak_gib"] for row in rows], marker="o", color="grey")
        axes[1, column].set_xlabel(TITLES[axis])
        axes[1, column].set_xticks(x)
    axes[0, 0].set_ylabel("seconds of a step")
    axes[1, 0].set_ylabel("peak memory, GiB")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()

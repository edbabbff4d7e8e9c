"""The least time that a model's matrix products take on this machine: what no script can beat in the same precision.

    python bench/bound.py --model models/smollm2-135m-instruct --rows 16 128

It times bf16 products of the model's own shapes and nothing else: no attention, no norms, no 4-bit weights, no adapter. Learning
is the forward pass and the backward pass to the activations, as for frozen weights, without the output head. Decoding is the
forward pass with the head. It prints one line of JSON, tokens a second each, and bench/speed.py sets its figures beside them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

LEARNER_TOKENS = 2_048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="completions that are decoded together")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    layer, num_layers = layer_shapes(config), config["num_hidden_layers"]
    head = (config["vocab_size"], config["hidden_size"])
    learn = num_layers * sum(seconds_of(shape, LEARNER_TOKENS) + seconds_of(shape[::-1], LEARNER_TOKENS) for shape in layer)
    decode = {rows: num_layers * sum(seconds_of(shape, rows) for shape in layer) + seconds_of(head, rows) for rows in args.rows}
    flops = 4 * LEARNER_TOKENS * num_layers * sum(rows * columns for rows, columns in layer)
    bound = {
        "learn": LEARNER_TOKENS / learn,
        "decode": {rows: rows / seconds for rows, seconds in decode.items()},
        "tflops": flops / learn / 1e12,
    }
    print(json.dumps(bound))


def layer_shapes(config: dict[str, int]) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of one decoder layer."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    return [(queries, width), (keys, width), (keys, width), (width, queries), (inner, width), (inner, width), (width, inner)]


@torch.no_grad()
def seconds_of(shape: tuple[int, int], rows: int, least: float = 0.2) -> float:
    """Seconds of one product (rows, in) x (in, out), over so many weights that no cache holds them all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = max(1, 256 * 2**20 // (2 * shape[0] * shape[1]))
    weights = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(min(count, 64))]
    x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device=device)

    def once() -> float:
        started = time.perf_counter()
        for weight in weights:
            x @ weight.T
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / len(weights)

    once()
    times, stop = [once()], time.perf_counter() + least
    while time.perf_counter() < stop:
        times.append(once())
    return min(times)


if __name__ == "__main__":
    main()

"""The loop and the seats on the same prompts: seconds, tokens a second, and the kernels of a step.

    python bench/decoding.py --model DIR --data data/gsm8k --rows 512 --new-tokens 400 --temperature 1
    python bench/decoding.py --model DIR --data data/gsm8k --rows 16 --samples 8 --endless --profile
    python bench/decoding.py --model DIR --data data/gsm8k --rows 1319 --new-tokens 256 --endless --ways seats fp8

Prompts are those of the test split, longest first. `fp8` is seats with weights in 8 bits, `fp8-cache` with keys and values in 8
bits as well. No way decodes more rows at once than the engine would: the loop takes them in batches, and seats take the next as
one falls free. The first run of each way makes its graphs and does not count. `--endless` lets no token end a row; real answers
end early, and what is decoded after their end counts as time alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.profiler import DeviceType, ProfilerActivity, profile

from posttrain.config.schema import Model
from posttrain.generation import decoder, loop, seats
from posttrain.generation.engines import rows_at_once
from posttrain.generation.loop import Completion, Sampling
from posttrain.generation.steps import release_graphs
from posttrain.models.base import load_base
from posttrain.models.chat import chat_ids, load_tokenizer
from posttrain.models.policy_copy import PolicyCopy
from posttrain.records import Example, read_jsonl

REPEATS = 3
KERNELS = 25  # lines of the table
WAYS = ("loop", "seats", "fp8", "fp8-cache")


def main() -> None:
    args = parse()
    settings = Model(name_or_path=str(args.model), dtype=args.dtype)
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, "none", tokenizer)
    policy = loop.prepare_to_decode(PolicyCopy(base).model)
    if reason := decoder.why_not(policy):
        raise SystemExit(f"this model decodes by the loop alone: {reason}")
    examples = read_jsonl(args.data / "test.jsonl", Example)[: args.rows]
    prompts = sorted((chat_ids(tokenizer, e.prompt, add_generation_prompt=True) for e in examples), key=len, reverse=True)
    sampling = Sampling(args.new_tokens, args.temperature, num_samples=args.samples)
    stop = -1 if args.endless else tokenizer.eos_token_id
    in_8_bits = {"fp8": False, "fp8-cache": True}  # its keys and values as well?
    models = {
        way: loop.prepare_to_decode(PolicyCopy(base, fp8=True, fp8_cache=in_8_bits[way]).model) if way in in_8_bits else policy
        for way in args.ways
    }
    found = {way: timed(way, models[way], prompts, sampling, stop) for way in args.ways}
    first, *others = args.ways
    for way in others:
        same = sum(one.ids == other.ids for one, other in zip(found[first], found[way], strict=True))
        print(f"{same} of {len(found[first])} rows of {way} are those of {first}: rounding decides between near ties")
    if args.profile:
        for way in args.ways:
            kernels_of(way, models[way], prompts, sampling, stop)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in (("rows", 512), ("samples", 1), ("new-tokens", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["loop", "seats"])
    for name in ("endless", "profile"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


def decode(way: str, policy: Any, prompts: list[list[int]], sampling: Sampling, stop: int) -> tuple[list[list[Completion]], int]:
    """All prompts, as many rows at once as the engine "transformers" takes."""
    rows = rows_at_once(policy, max(map(len, prompts)) + sampling.max_new_tokens)
    if way != "loop":
        return seats.decode_batch(policy, prompts, sampling, stop, max_seats=rows)
    size, groups, slots = max(1, rows // sampling.num_samples), list[list[Completion]](), 0
    for number, start in enumerate(range(0, len(prompts), size)):
        done, took = loop.decode_batch(policy, prompts[start : start + size], sampling, stop, number)
        groups, slots = groups + done, slots + took
    return groups, slots


def timed(way: str, policy: Any, prompts: list[list[int]], sampling: Sampling, stop: int) -> list[Completion]:
    seconds = []
    for _ in range(1 + REPEATS):
        begun = time.perf_counter()
        groups, slots = decode(way, policy, prompts, sampling, stop)
        seconds.append(time.perf_counter() - begun)
    flat = [completion for group in groups for completion in group]
    tokens = sum(len(completion.ids) for completion in flat)
    useful = (tokens - len(flat)) / max(1, slots)
    runs = ", ".join(f"{one:.2f}" for one in seconds[1:])
    speed = tokens / statistics.median(seconds[1:])
    print(f"{way}: {tokens} tokens in {runs} s (first {seconds[0]:.2f}), {speed:.0f} tokens/s, {useful:.0%} of slots useful")
    release_graphs(policy)  # the other way keeps its own
    return flat


def kernels_of(way: str, policy: Any, prompts: list[list[int]], sampling: Sampling, stop: int) -> None:
    """The time of each kernel in one run, prompts included."""
    on_gpu = policy.device.type == "cuda"
    decode(way, policy, prompts, sampling, stop)  # makes the graphs
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        decode(way, policy, prompts, sampling, stop)
    release_graphs(policy)
    rows = [row for row in seen.key_averages() if not on_gpu or row.device_type == DeviceType.CUDA]
    table = [(row.self_device_time_total if on_gpu else row.self_cpu_time_total, row.count, row.key) for row in rows]
    print(f"\n{way}: {sum(count for _, count, _ in table)} kernels, {sum(time for time, *_ in table) / 1e6:.3f} s")
    for took, count, name in sorted(table, reverse=True)[:KERNELS]:
        print(f"{took / 1e3:10.1f} ms {count:7d}  {name[:100]}")


if __name__ == "__main__":
    main()

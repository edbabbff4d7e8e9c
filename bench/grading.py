"""Published GSM8K graders beside this project's: who errs on which side, and how fast each is.

Three sets of (completion, gold, right?): the 5,265 model outputs OpenAI recorded with verdicts, which end in
`A: N`; the same outputs with that line as `#### N`; and the tests' adversarial table, which this project's
grader was written to pass. The other rules are restated in a few lines each, from the source linked above
them; Math-Verify is the package itself. A false positive pays for a wrong answer, a false negative refuses a
right one.

    python bench/grading.py [--data ../shared/data] [--json FILE]      # pip install math-verify for its row
"""
# ruff: noqa: E402 (the repository root has to be importable first)

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from grading_cases import VERDICTS

import rewards

Case = tuple[str, str, bool]  # completion, gold, right?
Grader = Callable[[str, str], bool]

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
HASHES = r"#### (\-?[0-9\.\,]+)"


def ours(text: str, gold: str) -> bool:
    return rewards.grade(text, gold).correct


def ours_strict(text: str, gold: str) -> bool:
    return rewards.grade(text, gold).strict


# https://github.com/openai/grade-school-math/blob/3101c7d/grade_school_math/dataset.py
def openai(text: str, gold: str) -> bool:
    found = re.search(HASHES, text)
    return found is not None and found[1].replace(",", "") == gold


# https://github.com/EleutherAI/lm-evaluation-harness/blob/4e7e0d4/lm_eval/tasks/gsm8k/gsm8k.yaml
def lm_eval_clean(text: str) -> str:
    for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()


def lm_eval_stop(text: str) -> str:
    return re.split(r"Question:|</s>|<\|im_end\|>", text, maxsplit=1)[0]


def lm_eval_strict(text: str, gold: str) -> bool:
    found = re.findall(HASHES, lm_eval_stop(text))
    return bool(found) and lm_eval_clean(found[0]) == lm_eval_clean(gold)


def lm_eval_flexible(text: str, gold: str) -> bool:
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", lm_eval_stop(text))
    return bool(found) and lm_eval_clean("".join(found[-1])) == lm_eval_clean(gold)


def lm_eval_strict_else_flexible(text: str, gold: str) -> bool:
    return (lm_eval_strict if re.search(HASHES, lm_eval_stop(text)) else lm_eval_flexible)(text, gold)


# https://github.com/volcengine/verl/blob/b178a3c/verl/utils/reward_score/gsm8k.py
def verl_strict(text: str, gold: str) -> bool:
    found = re.findall(HASHES, text[-300:])
    return bool(found) and found[-1].replace(",", "").replace("$", "") == gold


def verl_flexible(text: str, gold: str) -> bool:
    found = [number for number in re.findall(r"(\-?[0-9\.\,]+)", text[-300:]) if number not in ("", ".")]
    return bool(found) and found[-1] == gold


def math_verify(text: str, gold: str) -> bool:
    """https://github.com/huggingface/Math-Verify, with its defaults."""
    package = importlib.import_module("math_verify")
    return bool(package.verify(package.parse(f"${gold}$"), package.parse(text)))


GRADERS: dict[str, Grader] = {
    f"this project (version {rewards.GRADER_VERSION})": ours,
    "this project, strict": ours_strict,
    "OpenAI": openai,
    "lm-eval strict-match": lm_eval_strict,
    "lm-eval flexible-extract": lm_eval_flexible,
    "lm-eval strict, else flexible": lm_eval_strict_else_flexible,
    "verl strict": verl_strict,
    "verl flexible": verl_flexible,
}


def recorded_outputs(path: Path) -> list[Case]:
    """The outputs that reached their last line `A: N`. The other 11 of 5,276 ran out of tokens."""
    cases = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        gold = rewards.canonical_number(row["ground_truth"].rpartition("A: ")[2])
        assert gold
        cases += [(row[model]["solution"].rstrip(), gold, row[model]["is_correct"]) for model in MODELS]
    return [case for case in cases if case[0].rpartition("\n")[2].startswith("A: ")]


def with_marker(case: Case) -> Case:
    working, _, answer = case[0].rpartition("A: ")
    return f"{working}#### {answer}", *case[1:]


def measure(grader: Grader, cases: list[Case]) -> dict[str, float]:
    """Error counts and cases a second. A grader that raises has called nothing right, and its exceptions are counted."""
    counts = {"false_positives": 0, "false_negatives": 0, "raised": 0}
    start = time.perf_counter()
    for text, gold, right in cases:
        try:
            verdict = grader(text, gold)
        except Exception:  # other people's code on hostile text
            verdict = False
            counts["raised"] += 1
        counts["false_positives"] += verdict and not right
        counts["false_negatives"] += right and not verdict
    return {**counts, "cases": len(cases), "cases_per_second": len(cases) / (time.perf_counter() - start)}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One row a grader: false positives + false negatives on each set, exceptions, speed on the first set."""
    sets = list(next(iter(results.values())))
    lines = [
        "| grader | " + " | ".join(f"{name}: false pos. + neg." for name in sets) + " | raised | cases/s |",
        "|---|" + "--:|" * (len(sets) + 2),
    ]
    for grader, by_set in results.items():
        errors = [f"{r['false_positives']} + {r['false_negatives']}" for r in by_set.values()]
        raised = sum(r["raised"] for r in by_set.values())
        speed = by_set[sets[0]]["cases_per_second"]
        lines.append(f"| {grader} | {' | '.join(errors)} | {raised} | {speed:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("POSTTRAIN_DATA", str(ROOT / "../shared/data"))
    parser.add_argument("--data", type=Path, default=Path(default), help="the folder above gsm8k/")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()

    sets: dict[str, list[Case]] = {}
    path = args.data / "gsm8k" / "example_model_solutions.jsonl"
    if path.is_file():
        real = recorded_outputs(path)
        sets = {"recorded": real, "recorded, ####": [with_marker(case) for case in real]}
    else:
        print(f"no recorded outputs: {path} is not there", file=sys.stderr)
    sets["adversarial"] = [(text, str(rewards.canonical_number(gold)), right) for text, gold, right, _ in VERDICTS]

    graders = dict(GRADERS)
    try:
        graders[f"Math-Verify {importlib.metadata.version('math-verify')}"] = math_verify
    except importlib.metadata.PackageNotFoundError:
        print("no Math-Verify row: pip install math-verify", file=sys.stderr)

    warnings.simplefilter("ignore")
    results = {name: {set_name: measure(grader, cases) for set_name, cases in sets.items()} for name, grader in graders.items()}
    print(", ".join(f"{name}: {len(cases):,} cases" for name, cases in sets.items()), end="; ")
    print(f"Python {platform.python_version()}, {platform.machine()}, one core\n")
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Run directories as the scripts write them, with made-up completions: base, two SFT runs, GRPO.

The completions are graded by the real grader, so the report shows what evaluate.py would have written.
"""

import json
import random

import rewards
from posttrain.evaluation.summary import summarize
from posttrain.records import Prediction, sha256_text, write_jsonl

BASE = "models/Llama-3.2-3B"
HOSTILE = (
    '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">'
    "<!-- <script> {{data}} \u2028 \U0001f986 It pays $1,234 each.\n#### 1,234\n#### 1234"
)
# (name, stage, share right at 2 steps, share cut off, share after ####)
LADDER = (
    ("base", None, 0.12, 0.32, 0.15),
    ("sft", "sft", 0.48, 0.04, 0.95),
    ("sft-long", "sft", 0.58, 0.03, 0.97),
    ("grpo", "grpo", 0.64, 0.02, 0.99),
)
PEOPLE = ("Maya", "Tom", "Ines", "Jamal", "Olga", "Wei", "Priya", "Luca", "Amara", "Noah")
THINGS = ("apples", "stickers", "marbles", "books", "tickets", "cookies", "pencils", "shells")


def make_question(index, rng, split="test"):
    """A GSM8K-like word problem of 2 to 9 steps, its worked lines and its answer."""
    person, thing, steps = rng.choice(PEOPLE), rng.choice(THINGS), min(9, 2 + int(rng.expovariate(0.55)))
    total = rng.randint(4, 60)
    text, lines = [f"{person} has {total} {thing}."], []
    for _ in range(steps):
        other = rng.randint(2, 40)
        kind = rng.choice(("buys", "gives away", "doubles"))
        if kind == "gives away" and total <= other:
            kind = "buys"
        before = total
        if kind == "buys":
            total += other
            text.append(f"Then {person} buys {other} more.")
            lines.append(f"After buying there are {before}+{other}=<<{before}+{other}={total}>>{total} {thing}.")
        elif kind == "gives away":
            total -= other
            text.append(f"Then {person} gives {other} {thing} to a friend.")
            lines.append(f"That leaves {before}-{other}=<<{before}-{other}={total}>>{total} {thing}.")
        else:
            total *= 2
            text.append(f"A neighbour brings as many {thing} as there are.")
            lines.append(f"Twice as many are 2*{before}=<<2*{before}={total}>>{total} {thing}.")
    text.append(f"How many {thing} does {person} have in the end?")
    question = " ".join(text)
    return {
        "id": f"gsm8k/{split}/{index:05d}",
        "split": split,
        "question": question,
        "answer": str(total),
        "num_steps": steps,
        "lines": lines,
    }


def complete(row, rng, right, cut, marked):
    """One completion: worked lines, sometimes a wrong turn, sometimes cut off, with or without the marker."""
    answer = int(row["answer"]) if right else max(1, int(row["answer"]) + rng.choice((-12, -3, -1, 1, 2, 9, 20)))
    lines = list(row["lines"])
    if cut:
        loop = f"So there are {answer + 1} of them. " * rng.randint(6, 14)
        return "\n".join(lines[: max(1, len(lines) // 2)]) + "\n" + loop.rstrip(), "length"
    if not right:
        lines[-1] = f"Then it must be {answer}."
    end = f"#### {answer}" if marked else rng.choice((f"The answer is {answer}.", f"So we get {answer:,} in all."))
    if marked and rng.random() < 0.02:
        end += f"\n#### {answer}"
    return "\n".join([*lines, end]), "stop"


def predict(row, sample, completion, finish):
    grade = rewards.grade(completion, row["answer"])
    return Prediction(
        id=row["id"],
        sample=sample,
        completion=completion,
        finish=finish,
        num_tokens=max(1, len(completion) // 4),
        value=grade.value,
        method=grade.method,
        num_markers=grade.num_markers,
        correct=grade.correct,
        strict=grade.strict,
        format_ok=grade.format_ok,
        grader=rewards.GRADER_VERSION,
    )


def manifest(stage, name, chain, **changes):
    adapter = chain[-1]["adapter_sha256"] if chain else None
    fields = {
        "stage": stage,
        "name": name,
        "command": f"python {stage}.py --config configs/{name}.yaml",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "python": "3.11.7"},
        "hardware": {
            "cpu": "AMD EPYC",
            "num_cpus": 16,
            "ram_gib": 128.0,
            "gpu": "NVIDIA H100",
            "num_gpus": 1,
        },
        "seed": 42,
        "started": "2026-11-24T08:00:00Z",
        "finished": "2026-11-24T08:21:40Z",
        "seconds": 1300.4,
        "exit": "ok",
        "config_sha256": "c" * 64,
        "notes": [],
        "chain": chain,
        "parent": None,
        "adapter_sha256": adapter,
        "engine": "transformers",
        "generation": {"max_new_tokens": 512, "samples": 1, "temperature": 0.0, "top_p": 1.0},
        "batch_size": 64,
        "data": {"name": "gsm8k", "path": "data/gsm8k", "split": "test", "sha256": "d" * 64},
        "model": {
            "name_or_path": BASE,
            "revision": "13afe5124825b4f3751f836b40dafda64c1ed062",
            "quantization": "nf4",
            "dtype": "bfloat16",
        },
    }
    return fields | changes


def write_eval(folder, questions, predictions, stage_manifest, **summary):
    folder.mkdir(parents=True)
    rows = [{key: value for key, value in row.items() if key != "lines"} for row in questions]
    results = summarize(rows, predictions, **({"dataset": "gsm8k", "dataset_size": len(rows)} | summary))
    write_jsonl(folder / "questions.jsonl", rows)
    write_jsonl(folder / "predictions.jsonl", predictions)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    (folder / "manifest.json").write_text(json.dumps(stage_manifest))
    (folder / "config.yaml").write_text("run_dir: runs/x\nmodel:\n  name_or_path: models/Llama-3.2-3B\n")
    return folder


def write_training(root, stage, chain, rng):
    folder = root / chain[-1]["name"]
    folder.mkdir(parents=True)
    seconds = 2711.0 if stage == "sft" else 9042.0
    run = manifest(stage, folder.name, chain[:-1], parent=parent(root, chain[:-1]), seconds=seconds)
    run["adapter_sha256"] = chain[-1]["adapter_sha256"]
    (folder / "manifest.json").write_text(json.dumps(run))
    rows = sft_metrics(120, rng) if stage == "sft" else grpo_metrics(300, rng)
    write_jsonl(folder / "metrics.jsonl", [row | {"time": 1.7e9 + row["step"]} for row in rows])


def sft_metrics(num_steps, rng):
    for step in range(1, num_steps + 1):
        fall = 0.42 + 0.9 * 0.97**step
        yield {
            "step": step,
            "loss": fall + rng.gauss(0, 0.03),
            "grad_norm": abs(rng.gauss(0.8, 0.15)),
            "learning_rate": 1e-4 * (1 - step / num_steps),
            "entropy": fall + rng.gauss(0, 0.02),
            "lora_moved_share": 0.985 + rng.gauss(0, 0.004),
        }
        if step % 20 == 0:
            yield {"step": step, "eval_loss": fall + 0.03}
        if step in (1, num_steps // 2, num_steps):
            yield {"step": step, **dev_accuracy(0.2 + 0.25 * step / num_steps)}


def grpo_metrics(num_steps, rng):
    for step in range(1, num_steps + 1):
        right = 0.45 + 0.2 * (1 - 0.99**step) + rng.gauss(0, 0.06)
        yield {
            "step": step,
            "loss": rng.gauss(0, 0.01),
            "reward": right + 0.19,
            "reward_std": abs(rng.gauss(0.3, 0.05)),
            "rewards/correctness_reward/mean": right,
            "rewards/format_reward/mean": 0.2 * min(1, 0.93 + 0.0003 * step),
            "kl": 0.0006 * step + abs(rng.gauss(0, 0.004)),
            "completions/mean_length": 128 - 0.02 * step + rng.gauss(0, 5),
            "completions/clipped_ratio": abs(rng.gauss(0.02, 0.01)),
            "entropy": 0.31 - 0.0003 * step + rng.gauss(0, 0.01),
            "frac_groups_without_signal": abs(rng.gauss(0.3, 0.1)),
            "grad_norm": abs(rng.gauss(0.2, 0.05)),
            "learning_rate": 3e-5,
            "lora_moved_share": 0.999,
        }
        if step in (1, num_steps):
            share = 0.44 if step == 1 else 0.47
            yield {"step": step, **dev_accuracy(share)}


def dev_accuracy(share):
    return {"dev/accuracy": share, "dev/accuracy_low": share - 0.06, "dev/accuracy_high": share + 0.06}


def link(stage, name):
    return {"stage": stage, "name": name, "adapter_sha256": sha256_text(name)}


def chains():
    """The chain that leads to each run: both SFTs start from the base, GRPO goes on from the longer one."""
    sft, longer, grpo = link("sft", "sft"), link("sft", "sft-long"), link("grpo", "grpo")
    return {"base": [], "sft": [sft], "sft-long": [longer], "grpo": [longer, grpo]}


def make_runs(root, num_questions=1319, num_samples=1, limit=None, seed=7, training=True, hostile=None, opening=""):
    """All runs of the ladder under `root`; returns the evaluation folders, base first.

    `hostile` is the index of a question whose text, and whose last completions, try to break out of the page;
    `opening` is how every question begins.
    """
    rng = random.Random(seed)
    questions = [make_question(i, rng) for i in range(num_questions)]
    for row in questions:
        row["question"] = opening + row["question"]
    if hostile is not None:
        questions[hostile]["question"] += " <b>bold</b> </script>"
    for row in questions:
        row["prompt"] = f"<|start_header_id|>user<|end_header_id|>\n\n{row['question']}<|eot_id|>"
        row["prompt_sha256"] = sha256_text(row["prompt"])
    folders = []
    for name, stage, *habits in LADDER:
        chain = chains()[name]
        if stage and training:
            write_training(root, stage, chain, rng)
        predictions = answer(questions, num_samples, habits, rng)
        if name == "grpo" and hostile is not None:
            target = questions[hostile]
            predictions = [predict(target, p.sample, HOSTILE, "stop") if p.id == target["id"] else p for p in predictions]
        notes = ["paged_adamw_32bit needs CUDA: adamw_torch is used"] if name == "sft" else []
        run = manifest("eval", name, chain, parent=parent(root, chain), notes=notes)
        size = {"limit": limit, "dataset_size": 1319} if limit else {}
        folders.append(write_eval(root / f"eval_{name}", questions, predictions, run, **size))
    return folders


def parent(root, chain):
    return {"run_dir": str(root / chain[-1]["name"]), "adapter_sha256": chain[-1]["adapter_sha256"]} if chain else None


def answer(questions, num_samples, habits, rng):
    skill, cut, marked = habits
    predictions = []
    for row in questions:
        luck = random.Random(row["id"]).random()  # the same questions are hard for every run
        for sample in range(num_samples):
            right = 0.7 * luck + 0.3 * rng.random() < skill * 0.88 ** (row["num_steps"] - 2)
            text, finish = complete(row, rng, right, rng.random() < cut, rng.random() < marked)
            predictions.append(predict(row, sample, text, finish))
    return predictions

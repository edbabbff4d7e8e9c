"""Questions and worked solutions from a source -> one data set folder that every later stage reads.

    python data_prep.py --config configs/data_gsm8k.yaml                 # GSM8K from the Hub, at a pinned revision
    python data_prep.py --config configs/data_gsm8k_local.yaml source.path=my_folder
    python data_prep.py --config configs/data_demo.yaml                  # offline word problems

Writes <output_dir>/{train,dev,test}.jsonl, rejected.jsonl and manifest.json. The prompt is built here, once, and stored:
SFT, GRPO and evaluation read the same messages. Every gold solution is graded before it is written and must be right.
A second run with the same settings and the same source changes nothing and says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from posttrain import config as settings
from posttrain.config import DataConfig
from posttrain.records import (
    Example,
    Message,
    Prediction,
    read_jsonl,
    read_rows,
    sha256_file,
    sha256_text,
    write_atomic,
    write_jsonl,
)
from posttrain.run import exit_on_user_error, git_state, read_manifest
from posttrain.stats import train_test_overlap
from rewards import GRADER_VERSION, gold_answer, grade

SPLITS = ("train", "dev", "test")
# Generator seeds of the splits. reasoning-gym draws item i from Random(seed + i), so ranges must not come near each other.
SEED_RANGES = {"train": 0, "dev": 100_000_000, "test": 200_000_000}


def main() -> None:
    config, args = settings.from_command_line(DataConfig, __doc__)
    source = read_source(config)
    folder = Path(config.output_dir)
    refuse_foreign(folder)
    if is_current(config, source, folder):
        print(f"{folder} is up to date: same settings, same source, nothing to do")
        return

    from posttrain.chat import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    specials = special_tokens(tokenizer)
    rows, rejected = check_rows(source.rows, config, specials)
    refuse_too_many(rejected, config)
    rows, repeats = without_repeats(rows, distinct_by_answer=config.source.kind == "rejection_sampled")
    shots = few_shot_rows(rows, source.shots, config, specials)
    examples = [to_example(row, config, shots) for row in rows]
    manifest = describe(examples, config, source, repeats, len(rejected), tokenizer)
    print(summary(manifest))
    if not args.dry_run:
        write(folder, examples, rejected, manifest)
        print(f"wrote {folder}")


# --- sources ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A raw row: where it stands in its source, its split there, and its two texts (or why it has none)."""

    file: str
    line: int
    split: str
    question: str = ""
    answer: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    rows: list[Row]
    sha256: str
    describe: dict[str, Any]
    shots: list[Row]


def read_source(config: DataConfig) -> Source:
    source = config.source
    match source.kind:
        case "hub":
            rows = list(hub_rows(source))
        case "jsonl":
            rows = list(jsonl_rows(Path(source.path)))
        case "svamp":
            rows = list(svamp_rows(Path(source.path)))
        case "rejection_sampled":
            rows = list(sampled_rows(source))
        case _:
            rows = list(generated_rows(source, config.seed))
    shots = written_shots(config.prompt.shots)
    digest = sha256_text("".join(f"{row.split}\0{row.question}\0{row.answer}\0{row.problem}\n" for row in [*rows, *shots]))
    origin = {"sampled_from": sampled_source(source)} if source.kind == "rejection_sampled" else {}
    return Source(rows, digest, source.model_dump(mode="json") | origin, shots)


def written_shots(file: str | None) -> list[Row]:
    """Solved examples of a file of their own, for the prompt alone."""
    if file is None:
        return []
    if not Path(file).is_file():
        raise ValueError(f"no solved examples at {file}: check prompt.shots, or leave it out for training rows")
    return list(file_rows(Path(file), "train"))


def hub_rows(source: settings.HubSource) -> Iterator[Row]:
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        splits = load_dataset(source.repo_id, source.config_name, revision=source.revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, OSError) as error:
        raise ValueError(
            f"{source.repo_id} could not be read from the Hub ({type(error).__name__}): connect to the network, or download "
            "its JSONL files and use `source: {kind: jsonl, path: FOLDER}`"
        ) from error
    for split in ("train", "test"):
        for line, row in enumerate(splits[split], 1):
            yield Row(f"{source.repo_id}/{split}", line, split, row["question"], row["answer"])


def jsonl_rows(folder: Path) -> Iterator[Row]:
    """train.jsonl and test.jsonl in GSM8K's schema, one of them at least; read as bytes, so a bad line is only that line."""
    files = [folder / f"{split}.jsonl" for split in ("train", "test") if (folder / f"{split}.jsonl").is_file()]
    if not files:
        raise ValueError(f"{folder} holds neither train.jsonl nor test.jsonl: check source.path")
    for file in files:
        yield from file_rows(file, file.stem)


def file_rows(file: Path, split: str) -> Iterator[Row]:
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if line.strip():
            yield parse_line(line, file.name, number, split)


def parse_line(line: bytes, file: str, number: int, split: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Row(file, number, split, problem=f"invalid UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Row(file, number, split, problem=f"not JSON: {error.msg}")
    if not isinstance(row, dict):
        return Row(file, number, split, problem="not a JSON object")
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            return Row(file, number, split, problem=f"{key!r} is missing, empty or not text")
        if re.search("[\ud800-\udfff]", row[key]):
            return Row(file, number, split, problem=f"{key!r} holds half a character, as \\ud83d alone is")
    return Row(file, number, split, row["question"], row["answer"])


def svamp_rows(file: Path) -> Iterator[Row]:
    """SVAMP (arXiv:2103.07191): body and question joined, the equation as its working. Every row is a test row."""
    if not file.is_file():
        raise ValueError(f"no SVAMP file at {file}: check source.path")
    for number, row in enumerate(json.loads(file.read_text(encoding="utf-8")), 1):
        body = row["Body"].strip()
        question = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}"
        yield Row(file.name, number, "test", question, f"{row['Equation']}\n#### {row['Answer']}")


def sampled_rows(source: settings.RejectionSampledSource) -> Iterator[Row]:
    """Rejection sampling (arXiv:2308.01825): a policy's own distinct, right solutions of training questions.

    Read from an evaluation of the train split with several samples; test questions are refused.
    """
    run_dir = Path(source.run_dir)
    if not (run_dir / "predictions.jsonl").is_file():
        raise ValueError(f"no samples in {run_dir}: evaluate the train split first (data.split=train generation.samples=8)")
    questions = {row["id"]: row for row in read_rows(run_dir / "questions.jsonl")}
    if leaked := [name for name, row in questions.items() if row["split"] != "train"]:
        raise ValueError(f"{run_dir} sampled {len(leaked)} rows that are not of the train split (first: {leaked[0]})")
    kept: dict[str, dict[str, str]] = {name: {} for name in questions}
    samples = read_jsonl(run_dir / "predictions.jsonl", Prediction)
    if source.prefer == "shortest":
        samples.sort(key=lambda sample: sample.num_tokens)  # the questions keep their order: it is that of `kept`
    for sample in samples:
        solution = accepted(sample, source.accept)
        if solution is not None and len(kept[sample.id]) < source.max_per_question:
            kept[sample.id].setdefault(re.sub(r"\W+", " ", sample.completion), solution)
    solutions = [(questions[name]["question"], text) for name, texts in kept.items() for text in texts.values()]
    if source.with_gold:
        solutions += gold_solutions(Path(read_manifest(run_dir)["data"]["path"]))
    for number, (question, text) in enumerate(solutions, 1):
        yield Row(str(run_dir), number, "train", question, text)


def accepted(sample: Prediction, accept: str) -> str | None:
    """The solution that a sample is worth, None for none.

    An untouched model may hardly ever end in the answer form. `rewritten` takes what it says as it stands and adds the form; not
    where it was cut off, which would teach to stop in the middle, nor where it holds `####`, which the form has once.
    """
    text = sample.completion.strip()
    if sample.strict and sample.format_ok:
        return text
    if accept == "strict" or not sample.correct or sample.finish != "stop" or "####" in text:
        return None
    rewritten = f"{text}\n#### {sample.value}"
    return None if gold_problem(rewritten) else rewritten


def gold_solutions(folder: Path) -> list[tuple[str, str]]:
    """Questions and worked solutions of a prepared data set's training rows."""
    if not (folder / "train.jsonl").is_file():
        raise ValueError(f"no {folder}/train.jsonl, which was sampled from: prepare it again, or set source.with_gold=false")
    return [(row.question, row.completion[-1]["content"].strip()) for row in read_jsonl(folder / "train.jsonl", Example)]


def sampled_source(source: settings.RejectionSampledSource) -> dict[str, Any]:
    """The source of the questions: what a model trained on the samples has seen."""
    found: dict[str, Any] = read_manifest(source.run_dir)["data"]["source"]
    return found


def generated_rows(source: settings.GeneratorSource, seed: int) -> Iterator[Row]:
    """Offline word problems from reasoning-gym, each split from seeds of its own, no question twice."""
    import reasoning_gym

    solution = leg_counting_solution if source.kind == "leg_counting" else lambda item: item["metadata"]["answer_cot"]
    seen: set[str] = set()
    for split in reversed(SPLITS):  # test first: a repeat is dropped from the split that is trained on
        wanted = getattr(source, f"num_{split}")
        first = seed * 1_000_000_000 + SEED_RANGES[split]
        items = reasoning_gym.create_dataset(source.kind, size=20 * wanted, seed=first, **source.options)
        fresh = (item for item in items if item["question"] not in seen and not seen.add(item["question"]))  # type: ignore[func-returns-value]
        rows = [
            Row(f"{source.kind}/{split}", number, split, item["question"].strip(), solution(item))
            for number, item in enumerate(itertools.islice(fresh, wanted), 1)
        ]
        if len(rows) < wanted:
            raise ValueError(f"{source.kind} with options {source.options} has only {len(rows)} different questions for {split}")
        yield from rows


def leg_counting_solution(item: dict[str, Any]) -> str:
    """A worked solution in GSM8K's style: one line an animal, a line for the sum, the answer after `####`."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines, legs = [], []
    for animal, count in item["metadata"]["animals"].items():
        product, times = count * ANIMALS[animal], f"{count}*{ANIMALS[animal]}"
        lines.append(f"{count} {animal}{'s' * (count > 1)}: {times}=<<{times}={product}>>{product} legs.")
        legs.append(product)
    total = sum(legs)
    if len(legs) > 1:
        terms = "+".join(map(str, legs))
        lines.append(f"Total: {terms}=<<{terms}={total}>>{total} legs.")
    return "\n".join([*lines, f"#### {total}"])


# --- rows -> examples -------------------------------------------------------------------------------------------------


def check_rows(rows: Iterable[Row], config: DataConfig, specials: set[str]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows whose gold answer is a number and grades itself as right; the others with file, line and reason."""
    good, rejected = [], []
    for row in rows:
        problem = (
            row.problem or special_problem(row, specials) or gold_problem(solution_text(row.answer, config.calculator_marks))
        )
        if problem:
            rejected.append(
                {"file": row.file, "line": row.line, "reason": problem, "question": row.question, "answer": row.answer}
            )
        else:
            good.append(row)
    return good, rejected


def special_tokens(tokenizer: Any) -> set[str]:
    from posttrain.chat import special_ids

    return {str(tokenizer.convert_ids_to_tokens(token)) for token in special_ids(tokenizer)}


def special_problem(row: Row, specials: set[str]) -> str:
    """`<|im_end|>` in a text becomes the token itself: a question could end its own turn and begin the answer."""
    found = sorted(token for token in specials if token in row.question or token in row.answer)
    return f"holds {found[0]}, which the tokenizer reads as a special token" if found else ""


def gold_problem(solution: str) -> str:
    try:
        gold = gold_answer(solution)
    except ValueError as error:
        return str(error)
    verdict = grade(solution, gold)
    return (
        ""
        if verdict.correct and verdict.strict
        else f"the gold {gold} does not grade itself: read {verdict.value} by {verdict.method}"
    )


def refuse_too_many(rejected: list[dict[str, Any]], config: DataConfig) -> None:
    if len(rejected) <= config.max_rejected:
        return
    lines = [f"{row['file']}:{row['line']}: {row['reason']}" for row in rejected[:20]]
    more = [f"... and {len(rejected) - 20} more"] if len(rejected) > 20 else []
    raise ValueError(
        "\n".join(
            [
                f"{len(rejected)} bad rows, nothing written:",
                *lines,
                *more,
                f"mend them, or set max_rejected={len(rejected)} to leave them out (they are then listed in rejected.jsonl)",
            ]
        )
    )


def normalised(question: str) -> str:
    return re.sub(r"\W+", " ", question).strip().lower()


def without_repeats(rows: list[Row], distinct_by_answer: bool = False) -> tuple[list[Row], dict[str, int]]:
    """Drop repeated questions (or repeated pairs), and training rows whose question is in the test split."""
    test = {normalised(row.question) for row in rows if row.split == "test"}
    kept, seen, repeats = [], set[str](), {"duplicates": 0, "train_test_overlap": 0}
    for row in rows:
        key = normalised(row.question + (row.answer if distinct_by_answer else ""))
        if row.split != "test" and normalised(row.question) in test:
            repeats["train_test_overlap"] += 1
        elif key in seen:
            repeats["duplicates"] += 1
        else:
            seen.add(key)
            kept.append(row)
    return kept, repeats


def split_of(row: Row, config: DataConfig) -> str:
    """dev comes out of train by a hash of the question, so it stays the same when rows are added or reordered."""
    if row.split != "train" or config.source.kind in SEED_RANGES_KINDS:
        return row.split
    return "dev" if _unit_hash(row.question) < config.dev_fraction else "train"


SEED_RANGES_KINDS = ("leg_counting", "gsm_symbolic")


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(normalised(text).encode()).digest()[:8]) / 2**64


def few_shot_rows(rows: list[Row], written: list[Row], config: DataConfig, specials: set[str]) -> list[Row]:
    """The solved examples before each question: the file's first k, or k training rows of 2 to 5 steps, first by hash.

    Fixed either way, and never a dev or test question.
    """
    if config.prompt.style != "few_shot":
        return []
    if config.prompt.shots is not None:
        return checked_shots(rows, written, config, specials)[: config.prompt.num_shots]
    train = [row for row in rows if split_of(row, config) == "train" and 2 <= count_steps(row.answer) <= 5]
    if len(train) < config.prompt.num_shots:
        raise ValueError(f"{config.prompt.num_shots} shots need as many training rows of 2 to 5 steps; there are {len(train)}")
    return sorted(train, key=lambda row: _unit_hash("shot " + row.question))[: config.prompt.num_shots]


def checked_shots(rows: list[Row], written: list[Row], config: DataConfig, specials: set[str]) -> list[Row]:
    good, bad = check_rows(written, config, specials)
    if bad:
        raise ValueError(f"{config.prompt.shots}:{bad[0]['line']}: {bad[0]['reason']}; nothing written")
    if len(good) < config.prompt.num_shots:
        raise ValueError(f"prompt.num_shots is {config.prompt.num_shots}, but {config.prompt.shots} holds {len(good)}")
    held_out = {normalised(row.question): split_of(row, config) for row in rows if split_of(row, config) != "train"}
    for shot in good:
        if split := held_out.get(normalised(shot.question)):
            raise ValueError(
                f"{config.prompt.shots}:{shot.line}: this is a {split} question: an example would give its answer away"
            )
    return good


def to_example(row: Row, config: DataConfig, shots: list[Row]) -> Example:
    solution = solution_text(row.answer, config.calculator_marks)
    lead = " " if config.prompt.style == "few_shot" else ""
    return Example(
        id=f"{config.name}-{row.split}-{row.line}",
        split=cast(Any, split_of(row, config)),
        question=row.question,
        prompt=to_prompt(row.question, config, shots),
        completion=[{"role": "assistant", "content": lead + solution}],
        answer=gold_answer(row.answer),
        num_steps=count_steps(row.answer),
    )


def to_prompt(question: str, config: DataConfig, shots: list[Row]) -> list[Message]:
    asked = config.prompt.instruction.replace("{question}", question.strip())
    solved = [
        config.prompt.instruction.replace("{question}", shot.question.strip())
        + " "
        + solution_text(shot.answer, config.calculator_marks)
        for shot in shots
    ]
    messages = [{"role": "user", "content": "\n\n".join([*solved, asked])}]
    return [{"role": "system", "content": config.prompt.system}, *messages] if config.prompt.system is not None else messages


def solution_text(answer: str, calculator_marks: str) -> str:
    answer = answer.strip()
    return answer if calculator_marks == "keep" else re.sub(r"<<[^<>]*>>", "", answer)


def count_steps(answer: str) -> int:
    """Lines of working before the answer: GSM8K's own measure of difficulty (arXiv:2110.14168)."""
    return sum(bool(line.strip()) for line in answer.split("####")[0].splitlines())


# --- the folder -------------------------------------------------------------------------------------------------------


def describe(
    examples: list[Example], config: DataConfig, source: Source, repeats: dict[str, int], num_rejected: int, tokenizer: Any
) -> dict[str, Any]:
    return {
        "stage": "data",
        "name": config.name,
        "source": source.describe,
        "source_sha256": source.sha256,
        "config_sha256": settings.config_sha256(config),
        "grader": GRADER_VERSION,
        "prompt": config.prompt.model_dump(),
        **git_state(),
        "counts": {split: sum(example.split == split for example in examples) for split in SPLITS},
        "rejected": num_rejected,
        **repeats,
        "ngram_overlap": ngram_overlap(examples),
        "warning": "made from GSM8K test questions (arXiv:2410.05229): never report GSM8K for a model trained on this"
        if source.describe["kind"] == "gsm_symbolic"
        else None,
        **token_lengths(examples, config, tokenizer),
    }


def ngram_overlap(examples: list[Example]) -> dict[str, int]:
    """How many test questions share 13 words in a row with one of train or dev; equal questions are gone by now."""
    seen = [example.question for example in examples if example.split != "test"]
    overlap = train_test_overlap(seen, [example.question for example in examples if example.split == "test"])
    return {"ngram": overlap["ngram"], "test_questions": overlap["k"]}


def token_lengths(examples: list[Example], config: DataConfig, tokenizer: Any) -> dict[str, Any]:
    """Percentiles of prompt and whole lengths in the real tokenizer's tokens, and the share over `max_length`."""
    from tqdm import tqdm

    from posttrain.chat import chat_ids

    prompts, wholes = [], []
    for example in tqdm(examples, desc="tokenizing", unit="row", disable=None):
        prompts.append(len(chat_ids(tokenizer, example.prompt, add_generation_prompt=True)))
        wholes.append(len(chat_ids(tokenizer, example.prompt + example.completion)))
    over = sum(length > config.max_length for length in wholes)
    return {
        "tokenizer": config.tokenizer.name_or_path,
        "prompt_tokens": percentiles(prompts),
        "total_tokens": percentiles(wholes),
        "completion_tokens": percentiles([whole - prompt for whole, prompt in zip(wholes, prompts, strict=True)]),
        "max_length": config.max_length,
        "share_over_max_length": round(over / max(1, len(wholes)), 5),
    }


def percentiles(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99, 100)} if ordered else {}


def is_current(config: DataConfig, source: Source, folder: Path) -> bool:
    """The folder holds what these settings and this source give, undamaged."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = read_manifest(folder)
    same = (manifest["config_sha256"], manifest["source_sha256"], manifest["grader"]) == (
        settings.config_sha256(config),
        source.sha256,
        GRADER_VERSION,
    )
    return (
        same
        and bool(manifest["files"])
        and all((folder / name).is_file() and sha256_file(folder / name) == digest for name, digest in manifest["files"].items())
    )


def refuse_foreign(folder: Path) -> None:
    """A folder that data_prep.py did not write may hold the only copy of something, say of the source itself."""
    ours = (folder / "manifest.json").is_file() and read_manifest(folder).get("stage") == "data"
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise ValueError(f"{folder} is not empty and holds no data set of data_prep.py: choose another output_dir")


def write(folder: Path, examples: list[Example], rejected: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """The files' hashes come last: until then, and after a kill, no stage takes the folder for a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "manifest.json", json.dumps(manifest | {"files": {}}, indent=2) + "\n")
    for split in SPLITS:
        write_jsonl(folder / f"{split}.jsonl", [example for example in examples if example.split == split])
    write_jsonl(folder / "rejected.jsonl", rejected)
    files = {name: sha256_file(folder / name) for name in (*(f"{split}.jsonl" for split in SPLITS), "rejected.jsonl")}
    write_atomic(folder / "manifest.json", json.dumps(manifest | {"files": files}, indent=2) + "\n")


def summary(manifest: dict[str, Any]) -> str:
    counts = " ".join(f"{split} {manifest['counts'][split]}" for split in SPLITS)
    lines = [
        f"{manifest['name']}: {counts}; {manifest['rejected']} rejected, {manifest['duplicates']} duplicates, "
        f"{manifest['train_test_overlap']} train rows that are in the test split (dropped), "
        "{test_questions} test questions that share {ngram} words in a row with train".format(**manifest["ngram_overlap"]),
        f"tokens ({manifest['tokenizer']}): prompt {manifest['prompt_tokens']}, completion {manifest['completion_tokens']}; "
        f"{manifest['share_over_max_length']:.2%} of rows over {manifest['max_length']}",
    ]
    return "\n".join([*lines, f"WARNING: {manifest['warning']}"] if manifest["warning"] else lines)


if __name__ == "__main__":
    exit_on_user_error(main)
    sys.exit(0)

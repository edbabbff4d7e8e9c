"""Rows become examples: checked, freed of repeats, split, and given the prompt that every later stage reads."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

from posttrain.config.schema import FORM_CUES, DataConfig
from posttrain.errors import UserError
from posttrain.records import Example, Message
from posttrain.tasks.answers import grader_of
from posttrain.tasks.forms import BOX, Form
from posttrain.tasks.generated import GENERATED_KINDS
from posttrain.tasks.graders import NUMBERS, Grader
from posttrain.tasks.gsm8k import count_steps, solution_text
from posttrain.tasks.made import MADE_KINDS
from posttrain.tasks.rows import Row, asked, unit_hash


def check_rows(rows: Iterable[Row], config: DataConfig, specials: set[str]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows whose gold solution is right by every rule, in the one form; and the others, with file, line and reason."""
    good, rejected = [], []
    grader = grader_of(config.answer.model_dump())
    for row in (in_form(row, grader) for row in rows):
        problem = (
            row.problem
            or special_problem(row, specials)
            or gold_problem(solution_text(row.answer, config.calculator_marks), grader)
        )
        if problem:
            rejected.append(
                {"file": row.file, "line": row.line, "reason": problem, "question": row.question, "answer": row.answer}
            )
        else:
            good.append(row)
    return good, rejected


def in_form(row: Row, grader: Grader = NUMBERS) -> Row:
    """The row with its answer as the last line `#### 5`, if it is written as `####5`, `#### $5` or on the line of the working.

    The same for the other forms. A solution that states no answer, or several, stays as it is: `gold_problem` says why.
    """
    if row.problem:
        return row
    stated = row.answer
    if row.gold is not None:
        row = dataclasses.replace(row, answer=worked(row.answer, row.gold, grader))
    solution = solution_text(row.answer, "strip")
    if contrary := contrary_gold(solution, row.gold, grader) or contrary_words(stated, row.gold, grader):
        return dataclasses.replace(row, problem=contrary)
    if (gold := gold_or_none(solution, grader)) is None or grader.has_format(solution):
        return row
    working, _ = grader.split(row.answer)
    return dataclasses.replace(row, answer=f"{working.rstrip()}\n{grader.form.write(gold)}".lstrip())


def worked(solution: str, gold: str, grader: Grader = NUMBERS) -> str:
    """A solution and an answer from two keys of a row as one text, which states the answer once.

    A solution that states an answer of its own keeps that, behind `####`: `contrary_gold` compares the two. A number from a key
    of its own gets its one spelling, for formats differ in it: 42.0 of Parquet is 42 here, and a CSV has the text 42.0.
    """
    if "####" in solution or grader.form.count(solution):
        return solution
    working, stated = without_last_line(solution, grader)
    if grader.kind == "number" and _DECIMAL.fullmatch(gold.strip()):
        gold = grader.canonical(gold) or gold
    return f"{working.rstrip()}\n#### {(stated or gold).strip()}".lstrip()


_DECIMAL = re.compile(r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?")  # 1,234 and 1/2 are texts in every format, and stay


def without_last_line(solution: str, grader: Grader) -> tuple[str, str | None]:
    """A solution's working and the answer of its last line, where that is written in another of the known forms."""
    for form in map(Form, FORM_CUES.values()):
        stated = form.of_last_line(solution)
        if stated is not None and grader.canonical(stated) is not None:
            return solution.rstrip().rpartition("\n")[0], stated
    boxes = list(BOX.places(solution))
    if len(boxes) == 1:
        start, end, stated = boxes[0]
        if grader.canonical(stated) is not None:
            return solution[:start] + stated + solution[end:], stated
    return solution, None


def contrary_gold(solution: str, gold: str | None, grader: Grader = NUMBERS) -> str:
    """A solution that states an answer of its own must state the one that the row gives beside it."""
    stated = gold_or_none(solution, grader)
    given = None if gold is None else grader.canonical(gold)
    if gold is None or stated is None or (given is not None and grader.equal(stated, given)):
        return ""
    return f"the solution ends in {grader.form.write(stated)}, and the row's answer is {gold.strip()[:60]!r}"


def contrary_words(solution: str, gold: str | None, grader: Grader) -> str:
    """A solution whose last line says in words or in a box what the answer is, "The answer is 18.", must say the row's own.

    Texts and expressions are left out: there "The answer is the red house." says "red house" in other words.
    """
    if gold is None or grader.canonical(gold) is None or not (grader.kind == "number" or hasattr(grader, "options")):
        return ""
    last = solution.rstrip().rpartition("\n")[2]
    said = grader.grade(last, gold)
    if said.value is None or said.correct or said.method not in ("phrase", "boxed"):
        return ""
    return f"the solution's last line says {said.value}, and the row's answer is {gold.strip()[:60]!r}: {last[-60:]!r}"


def gold_or_none(solution: str, grader: Grader) -> str | None:
    try:
        return grader.gold(solution)
    except ValueError:
        return None


def special_tokens(tokenizer: Any) -> set[str]:
    from posttrain.models.chat import special_ids

    return {str(tokenizer.convert_ids_to_tokens(token)) for token in special_ids(tokenizer)}


def special_problem(row: Row, specials: set[str]) -> str:
    """The tokenizer makes the token of `<|im_end|>` in a text: a question could end its own turn and begin the answer."""
    found = sorted(token for token in specials if token in row.question or token in row.answer)
    return f"holds {found[0]}, which the tokenizer reads as a special token" if found else ""


def gold_problem(solution: str, grader: Grader = NUMBERS) -> str:
    try:
        gold = grader.gold(solution)
    except ValueError as error:
        return str(error)
    verdict = grader.grade(solution, gold)
    if verdict.correct and verdict.strict and verdict.format_ok:
        return ""
    last = solution.splitlines()[-1][-40:]
    return f"the gold {gold} does not grade itself: read {verdict.value} by {verdict.method}, and the last line is {last!r}"


def refuse_too_many(rejected: list[dict[str, Any]], config: DataConfig) -> None:
    if len(rejected) <= config.max_rejected:
        return
    lines = once_each(rejected)
    more = [f"... and {len(lines) - 20} other faults"] if len(lines) > 20 else []
    raise UserError(
        "\n".join(
            [
                f"{len(rejected)} bad rows, nothing written:",
                *lines[:20],
                *more,
                f"mend them, or set max_rejected={len(rejected)} to leave them out (they are then listed in rejected.jsonl)",
            ]
        )
    )


def once_each(rejected: list[dict[str, Any]]) -> list[str]:
    """A line for each fault, at the first row that has it, with the number of those that have it, too."""
    counts = Counter((row["file"], row["reason"]) for row in rejected)
    first = {(row["file"], row["reason"]): row for row in reversed(rejected)}
    return [
        f"{file}:{first[file, reason]['line']}: {reason}" + (f" ({count} rows)" if count > 1 else "")
        for (file, reason), count in counts.items()
    ]


def without_repeats(rows: list[Row], distinct_by_answer: bool = False) -> tuple[list[Row], dict[str, int]]:
    """Drop repeated questions, or repeated pairs, and training rows whose question is in the test split."""
    test = {asked(row.question) for row in rows if row.split == "test"}
    kept, seen, repeats = [], set[str](), {"duplicates": 0, "train_test_overlap": 0}
    for row in rows:
        key = asked(row.question) + (f"\0{asked(row.answer)}" if distinct_by_answer else "")
        if row.split != "test" and asked(row.question) in test:
            repeats["train_test_overlap"] += 1
        elif key in seen:
            repeats["duplicates"] += 1
        else:
            seen.add(key)
            kept.append(row)
    return kept, repeats


def contradictions(rows: list[Row], grader: Grader = NUMBERS) -> list[str]:
    """A line for each row whose question has another answer in an earlier row."""
    first: dict[str, Row] = {}
    pairs = [(first.setdefault(asked(row.question), row), row) for row in rows]
    return [
        f"{one.file}:{one.line} says {stated_gold(one, grader)} and {two.file}:{two.line} says {stated_gold(two, grader)} "
        f"to the same question: {two.question.strip()[:60]!r}"
        for one, two in pairs
        if stated_gold(one, grader) != stated_gold(two, grader)
    ]


def stated_gold(row: Row, grader: Grader) -> str:
    return grader.gold(solution_text(row.answer, "strip"))


def split_of(row: Row, config: DataConfig) -> str:
    """A hash of the question takes dev out of train, so dev stays the same when rows are added or reordered."""
    if row.split != "train" or row.has_dev or config.source.kind in GENERATED_KINDS + MADE_KINDS:
        return row.split
    return "dev" if unit_hash(row.question) < config.dev_fraction else "train"


def few_shot_rows(rows: list[Row], written: list[Row], config: DataConfig, specials: set[str]) -> list[Row]:
    """The solved examples before each question: the file's first k, or the k training rows of 2 to 5 steps with the lowest hash.

    Both choices are fixed, and neither holds a dev or test question.
    """
    if config.prompt.style != "few_shot":
        return []
    if config.prompt.shots is not None:
        return checked_shots(rows, written, config, specials)[: config.prompt.num_shots]
    grader = grader_of(config.answer.model_dump())
    train = [row for row in rows if split_of(row, config) == "train" and 2 <= count_steps(row.answer, grader) <= 5]
    if len(train) < config.prompt.num_shots:
        raise UserError(f"{config.prompt.num_shots} shots need as many training rows of 2 to 5 steps; there are {len(train)}")
    return sorted(train, key=lambda row: unit_hash("shot " + row.question))[: config.prompt.num_shots]


def checked_shots(rows: list[Row], written: list[Row], config: DataConfig, specials: set[str]) -> list[Row]:
    good, bad = check_rows(written, config, specials)
    if bad:
        raise UserError(f"{config.prompt.shots}:{bad[0]['line']}: {bad[0]['reason']}; nothing written")
    if len(good) < config.prompt.num_shots:
        raise UserError(f"prompt.num_shots is {config.prompt.num_shots}, but {config.prompt.shots} holds {len(good)}")
    held_out = {asked(row.question): split_of(row, config) for row in rows if split_of(row, config) != "train"}
    for shot in good:
        if split := held_out.get(asked(shot.question)):
            raise UserError(
                f"{config.prompt.shots}:{shot.line}: this is a {split} question: an example would give its answer away"
            )
    return good


def to_example(row: Row, config: DataConfig, shots: list[Row]) -> Example:
    solution, grader = solution_text(row.answer, config.calculator_marks), grader_of(config.answer.model_dump())
    lead = " " if config.prompt.style == "few_shot" else ""
    return Example(
        id=f"{config.name}-{row.split}-{row.number or row.line}",
        split=cast(Any, split_of(row, config)),
        question=row.question,
        prompt=to_prompt(row.question, config, shots),
        completion=[{"role": "assistant", "content": lead + solution}] if row.solved else [],
        answer=stated_gold(row, grader),
        num_steps=count_steps(row.answer, grader),
        columns=dict(row.columns),
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

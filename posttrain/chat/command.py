"""Ask finished runs a question: each answers as evaluate.py lets it answer, token by token.

    python -m posttrain.chat runs/grpo "Tom has 3 pens and buys 4. How many has he?"
    python -m posttrain.chat runs/sft runs/grpo --with-base --gold 7 "Tom has ..."  # base, SFT and GRPO in turn, with verdicts
    python -m posttrain.chat runs/grpo --samples 8 "Tom has ..."                    # eight samples, and what most of them say
    python -m posttrain.chat runs/grpo < question.txt                               # for scripts
    python -m posttrain.chat runs/grpo                                              # at a terminal: question after question

RUN is a training or evaluation run, one of its checkpoints, a merged folder of posttrain.export, or a folder that `hf download`
made of a pushed run. The question gets the prompt of the run's data set and the verdict of its grader. The token ids are those of
evaluation, and a greedy answer is what evaluate.py writes with generation.batch_size=1 and model.decoding=loop: in 16 bits a
larger batch, or a GPU's seats, may round to another word. Each question stands alone, as in training: nothing said before is in
the prompt.
Exit codes: 0 answered, 1 an answer is not the gold one (with --gold), 2 something to mend first.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from posttrain.chat.answering import answer
from posttrain.chat.loading import load
from posttrain.chat.policies import Policy, all_policies
from posttrain.chat.runs import run_at
from posttrain.config.schema import Generation
from posttrain.errors import IN_UTF8, UserError, is_text

SAMPLING_TEMPERATURE = 0.8  # of several samples, where none is given: what docs/evaluation.md samples with


def main() -> None:
    args = from_command_line()
    paths, question = told_apart(args.words)
    generation = generation_of(args)
    policies = list(all_policies(paths, args.base, args.with_base))
    check_gold(policies, args.gold)
    if question is None and not sys.stdin.isatty():
        question = read_question()
    if question is None:
        return converse(policies, generation, args)
    if not question.strip():
        raise UserError("the question is empty: give it as the last argument, or on standard input")

    from posttrain.runs.process import use_one_gpu

    use_one_gpu()
    # One policy is in memory at a time.
    right = [answer(load(policy, question, generation), question, generation, args) for policy in policies]
    sys.exit(0 if all(right) else 1)


def from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="RUN ... [QUESTION]", help="runs, and a question of more than one word")
    parser.add_argument("--with-base", action="store_true", help="the base of the first run answers, too, before all others")
    parser.add_argument("--gold", metavar="ANSWER", help="the right answer: the run's own grader judges")
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="as many samples, and their vote (maj@k)")
    parser.add_argument("--temperature", type=float, help=f"default: 0, greedy; {SAMPLING_TEMPERATURE} for several samples")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", metavar="FOLDER|ID", help="where the base is, for a downloaded adapter that does not say")
    return parser.parse_intermixed_args()


def told_apart(words: list[str]) -> tuple[list[Path], str | None]:
    """The runs, and the question: the last argument, where it is no path and has more than one word.

    Raises:
        UserError: there is no run; or the last argument is one word and no path, so that it may be either.
    """
    *runs, last = words
    if last and Path(last).exists():
        return [*map(Path, words)], None
    if not runs and len(last.split()) != 1:
        raise UserError("no run to ask: python -m posttrain.chat RUN QUESTION")
    if runs and len(last.split()) == 1:
        for run in runs:
            run_at(Path(run))
        asked = shlex.join(["python", "-m", "posttrain.chat", *runs])
        raise UserError(f"{last} holds no run; a question of one word goes to standard input: echo {shlex.quote(last)} | {asked}")
    return [*map(Path, runs or words)], last if runs else None


def read_question() -> str:
    """What stands on standard input. UserError: it is no text, as a file in another encoding."""
    try:
        question = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the question on standard input is no text in {error.encoding}: {IN_UTF8}") from error
    if not is_text(question):
        raise UserError(f"the question on standard input is no text in {sys.stdin.encoding}: {IN_UTF8}")
    return question


def generation_of(args: argparse.Namespace) -> Generation:
    """The sampling settings, checked as those of evaluate.py are."""
    chosen = SAMPLING_TEMPERATURE if args.samples > 1 else 0.0
    temperature = chosen if args.temperature is None else args.temperature
    try:
        return Generation(
            max_new_tokens=args.max_new_tokens, samples=args.samples, temperature=temperature, top_p=args.top_p, batch_size=1
        )
    except ValidationError as error:
        faults = [f"--{'-'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg']}" for e in error.errors()]
        raise UserError("\n".join(faults)) from error


def check_gold(policies: Iterable[Policy], gold: str | None) -> None:
    for policy in policies:
        if gold is not None and policy.grader.canonical(gold) is None:
            raise UserError(f"--gold {gold!r} is no {policy.grader.noun}, which {policy.label} answers with")


# --- at a terminal ----------------------------------------------------------------------------------------------------


def converse(policies: list[Policy], generation: Generation, args: argparse.Namespace) -> None:
    """Question after question, each on its own. All policies stay in memory."""
    if args.gold is not None:
        raise UserError("--gold is the answer of one question: give that as the last argument")
    from posttrain.runs.process import use_one_gpu

    use_one_gpu()
    loaded = [load(policy, "1+1?", generation) for policy in policies]
    print("Each question stands alone, as in training. An empty line ends.", file=sys.stderr)
    for question in lines():
        for one in loaded:
            answer(one, question, generation, args)


def lines() -> Iterator[str]:
    import readline  # noqa: F401  # arrow keys and history

    with contextlib.suppress(EOFError):
        while question := input("question> ").strip():
            yield question

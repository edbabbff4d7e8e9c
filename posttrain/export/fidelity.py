"""Is the artefact the model that training measured? Both answer the same questions, each in its own runtime.

Top-1 agreement and KL divergence are over the tokens of the policy's own greedy answers: both are given the same tokens, and what
they expect next is compared. Accuracy is of each one's own answers, graded by the run's grader, paired by question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.console import answering, say
from posttrain.evaluation.comparison import compare
from posttrain.evaluation.predictions import grade_completion
from posttrain.export.runtimes import Answers, Runtime
from posttrain.generation.guard import BOUNDS, difference
from posttrain.models.chat import chat_ids, chat_text
from posttrain.records import Example, Prediction, sha256_text
from posttrain.tasks.graders import Grader

NUM_COMPARED = 32  # questions whose answers are compared token by token
NUM_TOKENS = 2048  # of those answers, at most: the logits of each are kept, 1.2 GB of them at a vocabulary of 150,000


@dataclass(frozen=True, slots=True)
class Measured:
    """What the policy said: it is asked once, before the artefact is."""

    examples: list[Example]
    prompts: list[list[int]]
    answers: Answers
    logits: list[torch.Tensor]  # of the first answers, or their beginnings, each (tokens, vocabulary)
    max_new_tokens: int


def measure(policy: Runtime, examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Measured:
    prompts = [chat_ids(tokenizer, example.prompt, add_generation_prompt=True) for example in examples]
    answers = _answers(policy, "policy", prompts, max_new_tokens)
    room, logits = NUM_TOKENS, list[torch.Tensor]()
    for prompt, answer in zip(prompts[:NUM_COMPARED], answers.tokens, strict=False):
        if room:
            logits.append(policy.logits(prompt, answer[:room]))
            room -= len(logits[-1])
    return Measured(examples, prompts, answers, logits, max_new_tokens)


def _answers(runtime: Runtime, name: str, prompts: list[list[int]], max_new_tokens: int) -> Answers:
    say(f"the {name} answers {len(prompts):,} questions in {runtime.name}, at most {max_new_tokens} tokens each")
    with answering(len(prompts)):
        return runtime.answer(prompts, max_new_tokens)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """fidelity.json: an artefact beside the policy. Shares are of 1, divergences in nats, speeds in tokens a second."""

    artefact: str
    runtime: str
    split: str
    num_questions: int
    max_new_tokens: int
    num_tokens: int  # compared one by one
    kl_mean: float
    kl_max: float
    top1_agreement: float
    logit_difference: float  # root mean square, in standard deviations of the policy's logits (generation/guard.py)
    greedy_equal: float  # share of questions with the same tokens to the end
    same_prompts: bool  # whether the runtime makes the same token ids of every prompt's text
    same_weights: bool | None  # whether every tensor is the policy's to the bit; None where the form cannot hold them
    accuracy: dict[str, Any]  # of evaluation/comparison.py: policy first, artefact second
    size_bytes: int
    tokens_per_second: float
    policy_tokens_per_second: float
    faults: list[str]  # why it is not the model that training measured, beyond chance and rounding

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """The measurement in a line."""
        return (
            f"{self.runtime}: top-1 {self.top1_agreement:.2%} of {self.num_tokens:,} tokens, KL {self.kl_mean:.2g} "
            f"(at most {self.kl_max:.2g}), same greedy answer to {self.greedy_equal:.1%} of {self.num_questions} questions, "
            f"{self.size_bytes / 1e6:,.1f} MB, {self.tokens_per_second:.1f} tokens/s"
        )


@dataclass(frozen=True, slots=True)
class Said:
    """What an artefact made of the same questions, whatever it is called."""

    runtime: str
    same_prompts: bool
    answers: Answers
    numbers: dict[str, Any]  # of the tokens that are compared one by one


def ask(artefact: Runtime, measured: Measured, tokenizer: PreTrainedTokenizerBase) -> Said:
    """Ask an artefact what the policy was asked."""
    texts = [chat_text(tokenizer, example.prompt, add_generation_prompt=True) for example in measured.examples]
    same_prompts = all(artefact.tokenize(text) == ids for text, ids in zip(texts, measured.prompts, strict=True))
    answers = _answers(artefact, "artefact", measured.prompts, measured.max_new_tokens)
    return Said(artefact.name, same_prompts, answers, _token_by_token(measured, artefact))


def compare_with(
    name: str,
    measured: Measured,
    said: Said,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    *,
    size_bytes: int,
    same_weights: bool | None,
    rounds_to: torch.dtype | None,
) -> Fidelity:
    """The artefact of this name beside the policy.

    `rounds_to` is set where it may differ from the policy by that rounding alone.
    """
    accuracy = _accuracy(name, measured, said.answers, tokenizer, grader)
    faults = _faults(said.same_prompts, same_weights, said.numbers["logit_difference"], rounds_to, accuracy)
    equal = [one == other for one, other in zip(measured.answers.tokens, said.answers.tokens, strict=True)]
    return Fidelity(
        artefact=name,
        runtime=said.runtime,
        split=measured.examples[0].split,
        num_questions=len(measured.examples),
        max_new_tokens=measured.max_new_tokens,
        **said.numbers,
        greedy_equal=sum(equal) / len(equal),
        same_prompts=said.same_prompts,
        same_weights=same_weights,
        accuracy=accuracy,
        size_bytes=size_bytes,
        tokens_per_second=said.answers.tokens_per_second,
        policy_tokens_per_second=measured.answers.tokens_per_second,
        faults=faults,
    )


def _token_by_token(measured: Measured, artefact: Runtime) -> dict[str, Any]:
    divergences, agreed, differences = [], [], []
    for prompt, answer, wanted in zip(measured.prompts, measured.answers.tokens, measured.logits, strict=False):
        found = artefact.logits(prompt, answer[: len(wanted)])[:, : wanted.shape[1]]
        divergences.append(divergence(wanted, found))
        agreed.append(wanted.argmax(-1) == found.argmax(-1))
        differences.append(difference(found[None], wanted[None]).relative)
    kl = torch.cat(divergences)
    return {
        "num_tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float(torch.cat(agreed).float().mean()),
        "logit_difference": max(differences),
    }


def divergence(policy: torch.Tensor, artefact: torch.Tensor) -> torch.Tensor:
    """KL(policy || artefact) of each row of logits, in nats."""
    wanted, found = policy.double().log_softmax(-1), artefact.double().log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).clamp(min=0)


def _accuracy(
    name: str, measured: Measured, answers: Answers, tokenizer: PreTrainedTokenizerBase, grader: Grader
) -> dict[str, Any]:
    questions = [_question(example, ids) for example, ids in zip(measured.examples, measured.prompts, strict=True)]
    before, after = (
        _graded(measured.examples, tokens, tokenizer, grader) for tokens in (measured.answers.tokens, answers.tokens)
    )
    return compare(questions, before, questions, after, names=("the policy", name))


def _question(example: Example, ids: Sequence[int]) -> dict[str, Any]:
    kept = {name: getattr(example, name) for name in ("id", "split", "question", "answer", "num_steps")}
    return kept | {"prompt_sha256": sha256_text(str(list(ids)))}


def _graded(
    examples: list[Example], tokens: list[list[int]], tokenizer: PreTrainedTokenizerBase, grader: Grader
) -> list[Prediction]:
    stop = tokenizer.eos_token_id
    return [
        grade_completion(
            example,
            0,
            tokenizer.decode(ids, skip_special_tokens=True),
            "stop" if ids and ids[-1] == stop else "length",
            len(ids),
            grader,
        )
        for example, ids in zip(examples, tokens, strict=True)
    ]


def _faults(
    same_prompts: bool, same_weights: bool | None, apart: float, rounds_to: torch.dtype | None, accuracy: dict[str, Any]
) -> list[str]:
    found = []
    if not same_prompts:
        found.append("its runtime makes other tokens of the prompts")
    if same_weights is False:
        found.append("its weights are not the policy's")
    if rounds_to is not None and not apart <= BOUNDS[rounds_to]:
        found.append(f"its logits differ by {apart:.2g} of their spread, where rounding is below {BOUNDS[rounds_to]:g}")
    if accuracy["real"]:
        found.append(accuracy["sentence"])
    return found


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

"""What a policy answers to a question, what the grader reads in it, and its verdict."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any

from posttrain.chat.loading import Loaded, asked, prompt_ids
from posttrain.chat.policies import Policy
from posttrain.config.schema import Generation
from posttrain.evaluation.predictions import grade_completion
from posttrain.evaluation.stats import majority
from posttrain.records import Prediction
from posttrain.tasks.answers import where_strict

Said = tuple[str, str, int]  # text, finish, number of tokens


def answer(loaded: Loaded, question: str, generation: Generation, args: argparse.Namespace) -> bool:
    """Print what a policy says and what is read from it. Returns whether that is right, or true without a gold."""
    policy, tokenizer, model = loaded
    prompt = prompt_ids(policy, tokenizer, question, generation, model)
    example = asked(policy, question, args.gold)
    print(f"== {policy.label}", flush=True)
    said = samples if generation.samples > 1 else streamed
    predictions = []
    for number, (text, finish, num_tokens) in enumerate(said(loaded, prompt, generation, args.seed)):
        predictions.append(grade_completion(example, number, text, finish, num_tokens, policy.grader))
        print(f"-> {verdict(predictions[-1], args.gold, policy)}", flush=True)
    winner, tied = majority(predictions)
    if len(predictions) > 1:
        print(f"== vote: {vote(predictions, winner, tied, args.gold)}", flush=True)
    return args.gold is None or winner.correct


def streamed(loaded: Loaded, prompt: list[int], generation: Generation, seed: int) -> Iterator[Said]:
    """One completion, printed word by word."""
    import torch
    from transformers import TextStreamer

    from posttrain.generation.engines import generate_watched

    tokenizer, printer = loaded.tokenizer, TextStreamer(loaded.tokenizer, skip_special_tokens=True)
    sampling = sampling_of(generation, seed)
    one = generate_watched(loaded.model, prompt, sampling, tokenizer, lambda token: printer.put(torch.tensor([token])))
    printer.end()
    yield tokenizer.decode(one.ids, skip_special_tokens=True), one.finish, len(one.ids)


def samples(loaded: Loaded, prompt: list[int], generation: Generation, seed: int) -> Iterator[Said]:
    """Several completions, decoded together as evaluation does."""
    from posttrain.generation.engines import generate

    sampling = sampling_of(generation, seed)
    [completions] = generate(loaded.model, [prompt], sampling, loaded.tokenizer, batch_size=1).completions
    for number, one in enumerate(completions, 1):
        text = loaded.tokenizer.decode(one.ids, skip_special_tokens=True)
        print(f"-- sample {number}\n{text}")
        yield text, one.finish, len(one.ids)


def sampling_of(generation: Generation, seed: int) -> Any:
    from posttrain.generation.loop import Sampling

    return Sampling(generation.max_new_tokens, generation.temperature, generation.top_p, generation.samples, seed)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def verdict(prediction: Prediction, gold: str | None, policy: Policy) -> str:
    """`28 (marker): right`, for one completion."""
    cut = f", cut off at {prediction.num_tokens} tokens" if prediction.finish == "length" else ""
    read = "no answer" if prediction.value is None else f"{prediction.value} ({prediction.method})"
    if gold is None:
        return read + cut
    if not prediction.correct:
        return f"{read}: wrong, the gold answer is {gold}{cut}"
    loose = "" if prediction.strict else f", but not {where_strict(policy.data)}"
    return f"{read}: right{loose}{cut}"


def vote(predictions: list[Prediction], winner: Prediction, tied: bool, gold: str | None) -> str:
    """`28 by 5 of 8 (30 by 2, no answer in 1)`: the value that evaluation's maj@k counts."""
    votes = Counter(prediction.value for prediction in predictions)
    silent = votes.pop(None, 0)
    if winner.value is None:
        return f"no answer in any of {len(predictions)} samples"
    others = [f"{value} by {count}" for value, count in votes.most_common() if value != winner.value]
    others += [f"no answer in {silent}"] if silent else []
    judged = "" if gold is None else f": {'right' if winner.correct else f'wrong, the gold answer is {gold}'}"
    tie = ", a tie that the first of them wins" if tied else ""
    rest = f" ({', '.join(others)})" if others else ""
    return f"{winner.value} by {votes[winner.value]} of {len(predictions)}{rest}{tie}{judged}"

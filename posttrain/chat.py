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
import difflib
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from posttrain.config.schema import MODEL_FOLDER, Generation, Model
from posttrain.errors import IN_UTF8, UserError, exit_on_user_error, is_text
from posttrain.evaluation.predictions import grade_completion
from posttrain.evaluation.stats import majority
from posttrain.records import Example, Prediction, read_object
from posttrain.runs.manifest import (
    EXPORT,
    MANIFEST,
    PUBLIC_MANIFEST,
    Manifest,
    read_manifest,
    refuse_unfinished,
    refuse_unfinished_model,
    run_of,
)
from posttrain.tasks.answers import grader_of, where_strict
from posttrain.tasks.graders import Grader
from posttrain.tasks.prompts import PromptForm, prompt_form, read_prompt_form

SAMPLING_TEMPERATURE = 0.8  # of several samples, where none is given: what docs/evaluation.md samples with
OTHER_ENGINE = "evaluate.py with engine=continuous_batching answers through transformers' own code"


@dataclass(frozen=True, slots=True)
class Voice:
    """Who answers: a base in a form, an adapter on it, and the prompt and grader of the data that it belongs to."""

    label: str
    model: Model
    quantization: str
    adapter: str | None
    weights: str | None  # checkpoint.weights_hash of the base, where the folder says which one it was
    prompt: PromptForm
    data: dict[str, Any]

    @property
    def grader(self) -> Grader:
        return grader_of(self.data.get("answer"))

    @property
    def base(self) -> Voice:
        return replace(self, label=f"base ({self.model.name_or_path})", adapter=None)


class Loaded(NamedTuple):
    voice: Voice
    tokenizer: Any
    policy: Any


def main() -> None:
    args = from_command_line()
    paths, question = told_apart(args.words)
    generation = generation_of(args)
    voices = list(all_voices(paths, args))
    check_gold(voices, args.gold)
    if question is None and not sys.stdin.isatty():
        question = read_question()
    if question is None:
        return converse(voices, generation, args)
    if not question.strip():
        raise UserError("the question is empty: give it as the last argument, or on standard input")

    from posttrain.runs.process import use_one_gpu

    use_one_gpu()
    # One policy is in memory at a time.
    right = [answer(load(voice, question, generation), question, generation, args) for voice in voices]
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


def check_gold(voices: Iterable[Voice], gold: str | None) -> None:
    for voice in voices:
        if gold is not None and voice.grader.canonical(gold) is None:
            raise UserError(f"--gold {gold!r} is no {voice.grader.noun}, which {voice.label} answers with")


# --- who answers ------------------------------------------------------------------------------------------------------


def all_voices(paths: list[Path], args: argparse.Namespace) -> Iterator[Voice]:
    voices = [read_voice(path, args.base) for path in paths]
    yield from [voices[0].base] if args.with_base else []
    yield from voices


def read_voice(folder: Path, base: str | None = None) -> Voice:
    """The policy that a folder stands for.

    Raises:
        UserError: it is no run, nothing of a run and no download of one, or its run has not finished.
    """
    if (folder / EXPORT).is_file():
        return exported_voice(folder)
    run_dir = run_at(folder)
    if (folder / PUBLIC_MANIFEST).is_file():
        return downloaded_voice(folder, base)
    if base is not None:
        raise UserError(f"--base {base}: {run_dir} says itself which base it has; leave the option out")
    manifest = read_manifest(run_dir)
    if not manifest.model:
        raise UserError(f"{run_dir} ended before its model was loaded: run it again, and ask it then")
    model, quantization, adapter = policy_of(run_dir, folder, manifest)
    return Voice(str(folder), model, quantization, adapter, None, prompt_form(manifest.data), manifest.data)


def run_at(path: Path) -> Path:
    """The run that a folder is or lies in, or the folder of a pushed one.

    Raises:
        UserError: nobody answers there; the text says what it is, and what to give in its place.
    """
    run_dir = path if is_run(path) or (path / PUBLIC_MANIFEST).is_file() else run_of(path)
    if run_dir is None or not path.is_dir():
        raise UserError(no_run(path))
    return run_dir


def is_run(folder: Path) -> bool:
    """Whether it holds the manifest of a run. That of a data set has another form."""
    remedy = "restore it from a copy, or use another run_dir"
    return (folder / MANIFEST).is_file() and read_object(folder / MANIFEST, remedy).get("stage") != "data"


def no_run(path: Path) -> str:
    """Why nobody answers at this path, and what to give in its place."""
    give = "give the run_dir of sft_train.py, grpo_train.py or evaluate.py, or a checkpoint"
    if not path.exists():
        near = difflib.get_close_matches(path.name, [run.name for run in runs_in(path.parent)], 1)
        return f"{path} is not there{f' (did you mean {path.parent / near[0]}?)' if near else ''}: {give}"
    if path.is_file():
        inside = path.parent if is_run(path.parent) else run_of(path.parent)
        return f"{path} is a file: {f'give its run, {inside}' if inside and is_run(inside) else give}"
    if (path / MANIFEST).is_file():
        return f"{path} is a data set, and no model answers there: {give}"
    if (path / "config.json").is_file():
        measure = shlex.join(["python", "evaluate.py", "--config", "configs/eval_gsm8k.yaml", f"model.name_or_path={path}"])
        return f"{path} is a model, and no run says how it is asked: evaluate it ({measure}), and give that run"
    if runs := runs_in(path):
        return f"{path} is a folder of runs: give one of them, such as {runs[-1]}"
    return f"{path} holds no run: {give}"


def runs_in(folder: Path) -> list[Path]:
    """The runs that lie in a folder, the one that was last written to at the end."""
    return sorted(filter(is_run, folder.glob("*")), key=lambda run: run.stat().st_mtime)


def policy_of(run_dir: Path, folder: Path, manifest: Manifest) -> tuple[Model, str, str | None]:
    """Base, its form and adapter of a run, or of one of its checkpoints."""
    model, quantization = settings_of(manifest), manifest.model["quantization"]
    if manifest.stage == "eval":
        return model, quantization, evaluated_adapter(run_dir)
    note = refuse_unfinished(folder if folder != run_dir else run_dir / ("model" if manifest.all_weights else "adapter"))
    if note:
        print(f"note: {note}", file=sys.stderr)
    made = run_dir / (MODEL_FOLDER if manifest.all_weights else "adapter")
    if folder == run_dir and not made.is_dir():
        raise UserError(f"{run_dir} has finished, and its {made.name} is gone: give one of its checkpoints, or train it again")
    if manifest.all_weights:
        name = str(folder if folder != run_dir else run_dir / MODEL_FOLDER)
        return model.model_copy(update={"name_or_path": name, "revision": None}), "none", None
    return model, quantization, str(folder)


def settings_of(manifest: Manifest) -> Model:
    """The base's settings as the manifest has them; what fits another machine is chosen on it."""
    known = {name: manifest.model[name] for name in Model.model_fields if name in manifest.model}
    return Model(**known | {"attn_implementation": "auto", "kernels": "auto", "decoding": "loop"})


def evaluated_adapter(run_dir: Path) -> str | None:
    from ruamel.yaml import YAML

    adapter: str | None = YAML(typ="safe", pure=True).load((run_dir / "config.yaml").read_text(encoding="utf-8"))["adapter"]
    return adapter


def exported_voice(folder: Path) -> Voice:
    """A merged folder of posttrain.export, which is a model of its own."""
    made = read_object(folder / EXPORT, "export the run again")
    if made["format"] != "merged":
        raise UserError(f"{folder} is for llama.cpp or Ollama: ask the run that it was made of, {made['parent']['run_dir']}")
    model, data = Model(name_or_path=str(folder), dtype=made["base"]["dtype"], decoding="loop"), made["chain"][-1]["data"]
    return Voice(str(folder), model, "none", None, None, prompt_form(data), data)


def downloaded_voice(folder: Path, base: str | None) -> Voice:
    """The policy of a pushed run, as its repository has it."""
    manifest = read_manifest(folder, PUBLIC_MANIFEST)
    prompt, label = read_prompt_form(folder), str(folder)
    settings = settings_of(manifest).model_copy(update={"chat_template": str(folder / "chat_template.jinja")})
    if manifest.all_weights:
        own = settings.model_copy(update={"name_or_path": label, "revision": None, "template_kwargs": {}})
        return Voice(label, own, "none", None, None, prompt, manifest.data)
    adapter = read_object(folder / "adapter_config.json", "download the repository again")
    merged = folder / "merged_base"
    name = base or (str(merged) if merged.is_dir() else adapter["base_model_name_or_path"])
    if name is None:
        raise UserError(f"{folder} does not say where its base is, which was a folder: name it with --base")
    named: dict[str, Any] = {"name_or_path": name, "revision": None if base else adapter.get("revision"), "template_kwargs": {}}
    quantization = manifest.model["quantization"]
    # Its weights are compared with the hash that the run recorded: what the base is called does not matter.
    own = settings.model_copy(update=named | {"same_base": True})
    return Voice(label, own, quantization, label, manifest.model.get("weights"), prompt, manifest.data)


# --- and answers ------------------------------------------------------------------------------------------------------


def load(voice: Voice, question: str, generation: Generation) -> Loaded:
    """The plain model that generates, checked as evaluate.py checks it before its first token."""
    from posttrain.generation.guard import EngineGuard
    from posttrain.models import adapter_checks, adapters
    from posttrain.models.chat import load_tokenizer
    from posttrain.models.checkpoint import check_base, weights_hash
    from posttrain.models.policy import open_policy
    from posttrain.models.policy_copy import PolicyCopy
    from posttrain.models.template_check import check_same_template

    tokenizer = load_tokenizer(voice.model)
    base = check_base(voice.model, voice.quantization, tokenizer)
    if voice.weights and weights_hash(voice.model) != voice.weights:
        raise UserError(f"{voice.model.name_or_path} is not the base that {voice.label} was trained on: name that with --base")
    refuse_unfinished_model(voice.model.name_or_path)
    folder = adapters.resolve_adapter(voice.adapter) if voice.adapter else None
    if folder:
        adapter_checks.check_start(folder, voice.model, voice.quantization, base, tokenizer, train=False, stores=False)
        check_same_template(tokenizer, folder, [asked(voice, question)])
    prompt = prompt_ids(voice, tokenizer, question, generation, base)
    model, _ = open_policy(voice.model, voice.quantization, tokenizer, folder, trainable=False)
    policy = PolicyCopy(model).model
    EngineGuard(OTHER_ENGINE, lambda **found: None)("transformers", policy, model, [prompt], generation.max_new_tokens)
    return Loaded(voice, tokenizer, policy)


def asked(voice: Voice, question: str, gold: str | None = None) -> Example:
    """The question as a row of the voice's data set. The answers of a question without a gold are read by grading any."""
    read = (answer for answer in ("0", *getattr(voice.grader, "options", ())) if voice.grader.canonical(answer) is not None)
    return Example("asked", "test", question, voice.prompt.ask(question), [], gold or next(read), 0)


def prompt_ids(voice: Voice, tokenizer: Any, question: str, generation: Generation, base: Any) -> list[int]:
    """The token ids that evaluation would feed.

    Raises:
        UserError: the question would end its own turn, or leaves no room for an answer.
    """
    from posttrain.models.chat import chat_ids
    from posttrain.models.checkpoint import check_context
    from posttrain.tasks.examples import special_tokens

    if found := sorted(token for token in special_tokens(tokenizer) if token in question):
        raise UserError(f"the question holds {found[0]}, which the tokenizer reads as a special token: leave it out")
    ids = chat_ids(tokenizer, voice.prompt.ask(question), add_generation_prompt=True)
    check_context(base, len(ids), generation.max_new_tokens, "--max-new-tokens")
    return ids


def answer(loaded: Loaded, question: str, generation: Generation, args: argparse.Namespace) -> bool:
    """Print what a voice says and what is read from it. Returns whether that is right, or true without a gold."""
    voice, tokenizer, policy = loaded
    prompt = prompt_ids(voice, tokenizer, question, generation, policy)
    example = asked(voice, question, args.gold)
    print(f"== {voice.label}", flush=True)
    said = samples if generation.samples > 1 else streamed
    predictions = []
    for number, (text, finish, num_tokens) in enumerate(said(loaded, prompt, generation, args.seed)):
        predictions.append(grade_completion(example, number, text, finish, num_tokens, voice.grader))
        print(f"-> {verdict(predictions[-1], args.gold, voice)}", flush=True)
    winner, tied = majority(predictions)
    if len(predictions) > 1:
        print(f"== vote: {vote(predictions, winner, tied, args.gold)}", flush=True)
    return args.gold is None or winner.correct


Said = tuple[str, str, int]  # text, finish, number of tokens


def streamed(loaded: Loaded, prompt: list[int], generation: Generation, seed: int) -> Iterator[Said]:
    """One completion, printed word by word."""
    import torch
    from transformers import TextStreamer

    from posttrain.generation.engines import generate_watched

    tokenizer, printer = loaded.tokenizer, TextStreamer(loaded.tokenizer, skip_special_tokens=True)
    sampling = sampling_of(generation, seed)
    one = generate_watched(loaded.policy, prompt, sampling, tokenizer, lambda token: printer.put(torch.tensor([token])))
    printer.end()
    yield tokenizer.decode(one.ids, skip_special_tokens=True), one.finish, len(one.ids)


def samples(loaded: Loaded, prompt: list[int], generation: Generation, seed: int) -> Iterator[Said]:
    """Several completions, decoded together as evaluation does."""
    from posttrain.generation.engines import generate

    sampling = sampling_of(generation, seed)
    [completions] = generate(loaded.policy, [prompt], sampling, loaded.tokenizer, batch_size=1).completions
    for number, one in enumerate(completions, 1):
        text = loaded.tokenizer.decode(one.ids, skip_special_tokens=True)
        print(f"-- sample {number}\n{text}")
        yield text, one.finish, len(one.ids)


def sampling_of(generation: Generation, seed: int) -> Any:
    from posttrain.generation.loop import Sampling

    return Sampling(generation.max_new_tokens, generation.temperature, generation.top_p, generation.samples, seed)


def verdict(prediction: Prediction, gold: str | None, voice: Voice) -> str:
    """`28 (marker): right`, for one completion."""
    cut = f", cut off at {prediction.num_tokens} tokens" if prediction.finish == "length" else ""
    read = "no answer" if prediction.value is None else f"{prediction.value} ({prediction.method})"
    if gold is None:
        return read + cut
    if not prediction.correct:
        return f"{read}: wrong, the gold answer is {gold}{cut}"
    loose = "" if prediction.strict else f", but not {where_strict(voice.data)}"
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


# --- at a terminal ----------------------------------------------------------------------------------------------------


def converse(voices: list[Voice], generation: Generation, args: argparse.Namespace) -> None:
    """Question after question, each on its own. All policies stay in memory."""
    if args.gold is not None:
        raise UserError("--gold is the answer of one question: give that as the last argument")
    from posttrain.runs.process import use_one_gpu

    use_one_gpu()
    loaded = [load(voice, "1+1?", generation) for voice in voices]
    print("Each question stands alone, as in training. An empty line ends.", file=sys.stderr)
    for question in lines():
        for one in loaded:
            answer(one, question, generation, args)


def lines() -> Iterator[str]:
    import readline  # noqa: F401  # arrow keys and history

    with contextlib.suppress(EOFError):
        while question := input("question> ").strip():
            yield question


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that closes the pipe early ends this, as it ends other programs
    exit_on_user_error(main)

"""python -m posttrain.chat: the prompt of the data set, the text and the verdict of evaluation, and every wrong use."""

import io
import json
import shutil
import subprocess
import sys

import pytest
from scripts import CONFIGS, run

from posttrain.chat.answering import vote
from posttrain.chat.loading import asked
from posttrain.chat.policies import Policy
from posttrain.evaluation.predictions import grade_completion
from posttrain.evaluation.stats import majority
from posttrain.generation.loop import Sampling, decode_batch, prepare_to_decode
from posttrain.records import Example, Prediction, read_jsonl
from posttrain.runs.data_sets import data_entry
from posttrain.tasks.answers import grader_of
from posttrain.tasks.prompts import PromptForm, prompt_form

NEW = ("--max-new-tokens", "80")  # more than the decode loop has room for at first
SFT = "runs/sft_tiny"


@pytest.fixture(scope="module")
def place(pipeline, tmp_path_factory):
    """A copy of the pipeline's folder, with evaluations of its base and its SFT run that ask one question at a time."""
    folder = shutil.copytree(pipeline, tmp_path_factory.mktemp("asked") / "place", symlinks=True)
    one_by_one = ("generation.batch_size=1", f"generation.max_new_tokens={NEW[1]}")
    sampled = ("generation.temperature=0.9", "generation.top_p=0.95", "seed=5")
    for name, *own in (
        ("sft", f"adapter={SFT}", "data.limit=4"),
        ("base", "adapter=null", "data.limit=1"),
        ("sampled", "adapter=null", "data.limit=1", *sampled),
    ):
        own.append(f"run_dir=runs/one_by_one_{name}")
        done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", *one_by_one, *own, cwd=folder)
        assert done.code == 0, done.err
    (folder / "reports").mkdir()
    shutil.copytree(folder / SFT, folder / "runs" / "lost", ignore=shutil.ignore_patterns("adapter"))
    return folder


@pytest.fixture(scope="module")
def questions(place):
    return read_jsonl(place / "data" / "tiny" / "test.jsonl", Example)[:4]


@pytest.fixture
def ask(place):
    return lambda *arguments: run("posttrain.chat.command", *arguments, cwd=place)


# --- the same as evaluation -------------------------------------------------------------------------------------------


SAMPLED = ("--temperature", "0.9", "--top-p", "0.95", "--seed", "5")


@pytest.mark.parametrize(
    ("run_dir", "evaluation", "settings"),
    [
        (SFT, "one_by_one_sft", ()),
        ("runs/one_by_one_base", "one_by_one_base", ()),
        ("runs/one_by_one_base", "one_by_one_sampled", SAMPLED),
    ],
)
def test_an_answer_is_the_prediction_of_evaluation(place, ask, questions, run_dir, evaluation, settings):
    """A base of random weights goes on for 80 tokens, in which the loop's buffers grow twice while it is watched."""
    predictions = read_jsonl(place / "runs" / evaluation / "predictions.jsonl", Prediction)
    for example, predicted in zip(questions, predictions, strict=False):
        done = ask(run_dir, example.question, "--gold", example.answer, *NEW, *settings)
        opening, rest = done.out.split("\n", 1)
        text, verdict = rest.rsplit("-> ", 1)
        assert (opening, text) == (f"== {run_dir}", f"{predicted.completion}\n")
        assert done.code == (0 if predicted.correct else 1)
        assert verdict.startswith("no answer" if predicted.value is None else f"{predicted.value} ({predicted.method}): ")


def test_who_watches_sees_every_token_as_it_is_chosen(load, tokenizer):
    model, prompts, seen = prepare_to_decode(load()), [[5, 6, 7], [8, 9]], []
    sampling = Sampling(60, temperature=1.0, num_samples=2)
    stop = decode_batch(model, prompts, sampling, -1)[0][0][1].ids[20]  # some token ends some rows early
    completions, _ = decode_batch(model, prompts, sampling, stop, watch=lambda tokens: seen.append(tokens.tolist()))
    rows = [[token for token in row if token >= 0] for row in zip(*seen, strict=True)]
    assert rows == [one.ids for of_prompt in completions for one in of_prompt]
    assert len({len(row) for row in rows}) > 1


def test_a_question_of_the_data_set_gets_its_own_prompt(tiny_data_dir):
    form = prompt_form(data_entry(tiny_data_dir, "test"))
    for split in ("train", "dev", "test"):
        for example in read_jsonl(tiny_data_dir / f"{split}.jsonl", Example):
            assert form.ask(example.question) == example.prompt


@pytest.mark.parametrize("system", ["", "Think."])
def test_solved_examples_and_a_system_prompt_are_kept(tmp_path, tiny_jsonl_dir, tiny_model_dir, system):
    values = {
        "name": "shots",
        "output_dir": str(tmp_path / "shots"),
        "source": {"kind": "jsonl", "path": str(tiny_jsonl_dir)},
        "prompt": {"style": "few_shot", "instruction": "Question: {question}\nAnswer:", "num_shots": 2, "system": system},
        "tokenizer": {"name_or_path": str(tiny_model_dir)},
    }
    (tmp_path / "shots.yaml").write_text(json.dumps(values))
    assert run("data_prep", "--config", tmp_path / "shots.yaml").code == 0
    form = prompt_form(data_entry(tmp_path / "shots", "test"))
    assert form.system == system and form.shots.count("Question: ") == 2
    rows = read_jsonl(tmp_path / "shots" / "test.jsonl", Example)
    assert [form.ask(row.question) for row in rows] == [row.prompt for row in rows]


def test_a_question_that_speaks_of_the_form_is_only_text():
    form = PromptForm(None, "{question} 1\n\n", "Q: {question}\nA:")
    assert form.ask(" what is {question}? ") == [{"role": "user", "content": "{question} 1\n\nQ: what is {question}?\nA:"}]


# --- several runs -----------------------------------------------------------------------------------------------------


def test_base_and_runs_answer_in_turn_each_under_its_name(ask, questions):
    done = ask(SFT, "runs/one_by_one_sft", "runs/grpo_tiny", "--with-base", questions[0].question, *NEW)
    assert done.code == 0, done.err
    names = [line for line in done.out.splitlines() if line.startswith("== ")]
    assert names == ["== base (models/tiny)", f"== {SFT}", "== runs/one_by_one_sft", "== runs/grpo_tiny"]
    base, one, other, _ = (part.split("\n", 1)[1] for part in done.out.split("== ")[1:])
    assert one == other != base  # the evaluation stands for the adapter that it evaluated


def test_samples_vote_as_maj_at_k_does(ask, questions):
    done = ask(SFT, questions[0].question, "--samples", "3", "--gold", questions[0].answer, "--seed", "1", *NEW)
    assert [f"-- sample {number}" in done.out for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert done.out.splitlines()[-1].startswith("== vote: ")
    assert ask(SFT, questions[0].question, "--samples", "3", "--gold", questions[0].answer, "--seed", "1", *NEW).out == done.out


@pytest.mark.parametrize(
    ("answers", "gold", "said"),
    [
        ("5 5 7", "5", "5 by 2 of 3 (7 by 1): right"),
        ("5 5 7", "7", "5 by 2 of 3 (7 by 1): wrong, the gold answer is 7"),
        ("7 5", None, "7 by 1 of 2 (5 by 1), a tie that the first of them wins"),
        ("no 5", None, "5 by 1 of 2 (no answer in 1)"),
        ("no no", "5", "no answer in any of 2 samples"),
    ],
)
def test_the_vote_is_told_in_a_line(answers, gold, said):
    example = Example("a", "test", "?", [], [], gold or "0", 0)
    texts = [f"#### {word}" if word.isdigit() else "well" for word in answers.split()]
    rows = [grade_completion(example, number, text, "stop", 3) for number, text in enumerate(texts)]
    assert vote(rows, *majority(rows), gold) == said


@pytest.mark.parametrize(
    ("spec", "text", "value"),
    [
        ({}, "#### 1,234", "1234"),
        ({"kind": "choice", "form": "Answer: {answer}"}, "Answer: B", "B"),
        ({"kind": "text", "form": "Answer: {answer}", "options": ["yes", "no"]}, "Answer: No", "no"),
        ({"kind": "text", "form": "Answer: {answer}"}, "Answer: Paris", "paris"),
    ],
)
def test_without_a_gold_the_answer_is_read_all_the_same(spec, text, value):
    policy = Policy("x", None, "none", None, None, PromptForm(None, "", "{question}"), {"answer": spec or None})
    assert grade_completion(asked(policy, "?"), 0, text, "stop", 3, grader_of(spec)).value == value


def test_a_merged_folder_answers_as_its_run(place, ask, questions):
    done = run("posttrain.export.command", SFT, "--format", "merged", "--questions", "1", cwd=place)
    assert done.code == 0, done.err
    merged = f"{SFT}/export/merged"
    said = {run_dir: ask(run_dir, questions[0].question, *NEW).out.partition("\n")[2] for run_dir in (SFT, merged)}
    assert said[merged] == said[SFT]
    made = json.loads((place / merged / "export.json").read_text()) | {"format": "gguf"}
    (place / merged / "export.json").write_text(json.dumps(made))
    assert f"ask the run that it was made of, {SFT}" in ask(merged, "How many?").err


# --- where the question comes from ------------------------------------------------------------------------------------


def test_a_question_on_standard_input(ask, questions, monkeypatch):
    said = ask(SFT, questions[0].question, *NEW).out
    for text, wanted in ((questions[0].question, said), ("1+1?", f"== {SFT}\n")):
        monkeypatch.setattr("sys.stdin", io.StringIO(text + "\n"))
        assert ask(SFT, *NEW).out.startswith(wanted)


def test_at_a_terminal_each_question_stands_alone(ask, questions, monkeypatch):
    alone = [ask(SFT, example.question, *NEW).out for example in questions[:2]]
    typed = iter([*(example.question for example in questions[:2]), ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    done = ask(SFT, *NEW)
    assert (done.code, done.out) == (0, "".join(alone))


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_fault(place, questions):
    command = [sys.executable, "-m", "posttrain.chat", SFT, questions[0].question]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        complaint = process.stderr.read()
    assert process.returncode == -13 and "Traceback" not in complaint and "BrokenPipe" not in complaint


# --- wrong uses -------------------------------------------------------------------------------------------------------

WRONG = {
    "no run": (["no/such/run", "How many?"], "no/such/run is not there: give the run_dir of"),
    "no run, and a word": (["runs/none", "hi"], "runs/none is not there: give the run_dir of"),
    "almost a run": (["runs/sft_tin", "How many?"], "runs/sft_tin is not there (did you mean runs/sft_tiny?): give"),
    "a file": (["models/tiny/config.json", "How many?"], "models/tiny/config.json is a file: give the run_dir of"),
    "a file of a run": (["{sft}/manifest.json", "How many?"], "is a file: give its run, runs/sft_tiny"),
    "a file of its adapter": (["{sft}/adapter/adapter_config.json", "hi"], "is a file: give its run, runs/sft_tiny"),
    "a model": (["models/tiny", "How many?"], "name_or_path=models/tiny), and give that run"),
    "a folder of runs": (["runs", "How many?"], "runs is a folder of runs: give one of them, such as runs/"),
    "an empty folder": (["reports", "hi"], "reports holds no run: give the run_dir of"),
    "no adapter": (["runs/lost", "How many?"], "runs/lost has finished, and its adapter is gone: give one of its checkpoints"),
    "a question alone": (["How many are there?"], "no run to ask"),
    "a word alone": (["four?"], "four? is not there: give the run_dir"),
    "a question of one word": (["{sft}", "1+1?"], "standard input: echo '1+1?' | python -m posttrain.chat runs/sft_tiny"),
    "a data set": (["{data}", "How many?"], "data/tiny is a data set, and no model answers there: give the run_dir of"),
    "an empty question": (["{sft}", ""], "the question is empty"),
    "no gold of this kind": (["{sft}", "How many?", "--gold", "many"], "--gold 'many' is no number"),
    "no samples": (["{sft}", "How many?", "--samples", "0"], "--samples: Input should be greater than 0"),
    "greedy samples": (["{sft}", "How many?", "--samples", "2", "--temperature", "0"], "would be equal"),
    "cold": (["{sft}", "How many?", "--temperature", "-1"], "--temperature: Input should be greater"),
    "a special token": (["{sft}", "How many <|im_end|> are there?"], "holds <|im_end|>, which the tokenizer reads as a special"),
    "no room": (["{sft}", "How many?", "--max-new-tokens", "4000"], r"context of 1024: set --max-new-tokens to"),
    "a base that is known": (["{sft}", "How many?", "--base", "x"], "leave the option out"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_use_is_one_line_with_its_remedy(ask, monkeypatch, words, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = ask(*(word.format(sft=SFT, data="data/tiny") for word in words))
    assert (done.code, done.out) == (2, "")
    assert message in done.err and len([line for line in done.err.splitlines() if "chat" in line]) == 1


@pytest.mark.parametrize(("content", "errors"), [(b"caf\xe9?", "strict"), (b"caf\xe9?", "surrogateescape")])
def test_a_question_in_another_encoding_is_told(ask, monkeypatch, content, errors):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors=errors))
    done = ask(SFT)
    assert (done.code, "the question on standard input is no text in utf-8" in done.err) == (2, True)


def test_nothing_on_standard_input_is_no_question(ask, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    done = ask(SFT)
    assert (done.code, "the question is empty" in done.err) == (2, True)


def test_data_that_has_changed_since_is_not_asked_from(tmp_path, tiny_data_dir):
    from posttrain.errors import UserError

    with pytest.raises(UserError, match="has changed since the run read it"):
        prompt_form(data_entry(tiny_data_dir, "test") | {"sha256": "0"})

"""The stages agree: on the tokens of a prompt, on who gives verdicts, and on who may see a test question."""

import inspect
import json
import shutil

import pytest
from grading_cases import VERDICTS
from scripts import CONFIGS, run, workplace
from tiny_training import Tiny

import rewards
from posttrain.config.schema import Model, Rewards
from posttrain.evaluation import predictions
from posttrain.evaluation.predictions import grade_completion
from posttrain.models.chat import chat_ids, load_tokenizer
from posttrain.records import Example, read_jsonl, read_rows, sha256_file, write_jsonl
from posttrain.runs.data_sets import read_data_manifest
from posttrain.tasks import examples
from posttrain.tasks.answers import grader_of
from posttrain.tasks.graders import NUMBERS
from posttrain.training import dev
from posttrain.training.rollouts import reward_functions

NUM_ROWS = 6


# --- one prompt -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def llama3_model_dir(tmp_path_factory, llama3_tokenizer_dir):
    """Llama-3's own tokenizer on a model of one narrow layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama3_model") / "tiny"
    shutil.copytree(llama3_tokenizer_dir, folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=128000, **shape)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny", "llama3"])
def model(request):
    """The `model` block of a config."""
    folder = request.getfixturevalue({"tiny": "tiny_model_dir", "llama3": "llama3_model_dir"}[request.param])
    template = str(CONFIGS / "templates" / "llama3.jinja") if request.param == "llama3" else None
    return {"name_or_path": str(folder), "chat_template": template}


def sft_prompts(tiny, model):
    """The tokens before the completion in the rows that TRL's trainer makes, in the order of the questions."""
    with tiny.sft(model=model, data={"path": tiny.data, "num_train": NUM_ROWS, "num_dev": 0}) as trainer:
        for row in trainer.train_dataset:
            mask = row["completion_mask"] if "completion_mask" in row else [label != -100 for label in row["labels"]]
            start = list(mask).index(1)
            assert all(mask[start:]) and not any(mask[:start])
            yield list(row["input_ids"][:start])
        trainer.model.save_pretrained(trainer.run.folder / "adapter", selected_adapters=["default"])


def grpo_prompts(tiny, model, adapter, trained):
    """The prompts that GRPO's rollouts send to the engine and report to TRL. TRL passes each of them twice."""
    settings = {"path": tiny.data, "num_train": NUM_ROWS, "num_dev": 0}
    with tiny.grpo(adapter, {"max_completion_length": 2}, model=model, data=settings) as trainer:
        assert [row["prompt"] for row in trainer.train_dataset] == [row.prompt for row in trained]
        twice = [row.prompt for row in trained for _ in range(2)]
        sent = trainer.rollout_func(twice, trainer)["prompt_ids"]
        assert sent[::2] == sent[1::2]
        return sent[::2]


def test_prompt_tokens_are_the_same_in_sft_grpo_and_evaluation(model, tiny_data_dir, tmp_path, monkeypatch):
    from posttrain.generation import engines

    trained = read_jsonl(tiny_data_dir / "train.jsonl", Example)[:NUM_ROWS]
    tiny = Tiny(model["name_or_path"], tiny_data_dir, tmp_path)
    sft = list(sft_prompts(tiny, model))
    grpo = grpo_prompts(tiny, model, tmp_path / "run1", trained)

    heard, decode = [], engines.decode_batch

    def listen(policy, prompts, *rest):
        heard.extend(list(prompt) for prompt in prompts)
        return decode(policy, prompts, *rest)

    monkeypatch.setattr(engines, "decode_batch", listen)
    asked = [
        f"{key}={value}" for key, value in {"data.path": tiny_data_dir, "data.split": "train", "data.limit": NUM_ROWS}.items()
    ]
    asked += [f"model.{key}={value}" for key, value in model.items() if value]
    done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", *asked, "generation.max_new_tokens=2", cwd=tmp_path)
    assert done.code == 0, done.err

    tokenizer = load_tokenizer(Model(**model))
    expected = [chat_ids(tokenizer, row.prompt, add_generation_prompt=True) for row in trained]
    assert sft == grpo == expected
    assert sorted(heard) == sorted(expected)  # in batches of similar length
    told = [row["prompt"] for row in read_rows(tmp_path / "runs" / "eval_tiny_base" / "questions.jsonl")]
    assert [tokenizer(text, add_special_tokens=False).input_ids for text in told] == expected


# --- one grader -------------------------------------------------------------------------------------------------------


def test_every_stage_has_the_one_grader():
    assert grader_of(None) is grader_of({"kind": "number", "form": "#### {answer}", "options": None}) is NUMBERS
    for call in (examples.gold_problem, predictions.grade_completion, predictions.regraded, dev.dev_accuracy, reward_functions):
        assert inspect.signature(call).parameters["grader"].default is NUMBERS
    functions, weights = reward_functions(Rewards())
    assert functions == [rewards.correctness_reward, rewards.format_reward] and weights == [1.0, 1.0]
    assert reward_functions(Rewards(correctness=2.0, format=0.1, gate_format=True)) == (
        [rewards.correctness_reward, rewards.gated_format_reward],
        [2.0, 0.5],
    )


def test_a_verdict_is_a_reward():
    """The texts are those that graders get wrong, plain and as chat messages."""
    texts, golds = [row[0] for row in VERDICTS], [row[1] for row in VERDICTS]
    judged = [
        grade_completion(Example("q", "test", "?", [], [], gold, 1), 0, text, "stop", 1)
        for text, gold in zip(texts, golds, strict=True)
    ]
    assert [row.correct for row in judged] == [row[2] for row in VERDICTS]
    for completions in (texts, [[{"role": "assistant", "content": text}] for text in texts]):
        assert rewards.correctness_reward(completions, answer=golds) == [float(row.correct) for row in judged]
        assert rewards.format_reward(completions) == [0.2 * row.format_ok for row in judged]
        assert rewards.gated_format_reward(completions, golds) == [0.2 * (row.correct and row.format_ok) for row in judged]


def test_another_grader_would_show_in_every_stage(monkeypatch):
    """A stage with a grader of its own would not change with the one grader."""

    def contrary(text, gold):
        return rewards.Grade("0", "none", 0, correct=text == "wrong", strict=False, format_ok=False)

    asked = Example("q", "test", "?", [], [], "5", 1)
    assert grade_completion(asked, 0, "#### 5", "stop", 1).correct and rewards.correctness_reward(["#### 5"], ["5"]) == [1.0]
    monkeypatch.setattr(rewards, "grade", contrary)
    assert rewards.correctness_reward(["#### 5", "wrong"], ["5", "5"]) == [0.0, 1.0]
    assert [grade_completion(asked, 0, text, "stop", 1).correct for text in ("#### 5", "wrong")] == [False, True]
    assert "does not grade itself" in examples.gold_problem("#### 5")


def test_what_grpo_was_paid_is_what_evaluation_would_have_said(pipeline):
    golds = {row.prompt[-1]["content"]: row for row in read_jsonl(pipeline / "data" / "tiny" / "train.jsonl", Example)}
    samples = list(read_rows(pipeline / "runs" / "grpo_tiny" / "samples.jsonl"))
    assert len(samples) == 32  # two steps of sixteen
    for sample in samples:
        verdict = grade_completion(golds[sample["question"]], 0, sample["completion"], "stop", 1)
        assert sample["rewards"]["correctness_reward"] == float(verdict.correct)
        assert sample["rewards"]["format_reward"] == pytest.approx(0.2 * verdict.format_ok)
        assert (sample["value"], sample["gold"]) == (verdict.value, golds[sample["question"]].answer)
    assert 0 < sum(sample["rewards"]["correctness_reward"] for sample in samples) < 32


# --- test questions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["sft_train", "grpo_train"])
def test_test_rows_in_the_training_file_are_refused(pipeline, tmp_path, script):
    """A data set whose manifest vouches for it: only the rows themselves tell."""
    workplace(tmp_path, pipeline / "models" / "tiny")
    data = shutil.copytree(pipeline / "data" / "tiny", tmp_path / "data" / "tiny")
    rows = [*read_jsonl(data / "train.jsonl", Example), *read_jsonl(data / "test.jsonl", Example)]
    write_jsonl(data / "train.jsonl", rows)
    manifest = read_data_manifest(data)
    manifest["files"]["train.jsonl"] = sha256_file(data / "train.jsonl")
    (data / "manifest.json").write_text(json.dumps(manifest))
    adapter = [f"adapter={pipeline / 'runs' / 'sft_tiny'}"] if script == "grpo_train" else []
    done = run(script, "--config", CONFIGS / f"{script.split('_')[0]}_tiny.yaml", *adapter, cwd=tmp_path)
    assert done.code == 2 and "refusing to train on 8 test rows" in done.err
    assert not list(tmp_path.glob("runs/*/adapter"))

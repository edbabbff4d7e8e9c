"""What vLLM is asked for and given, with a stand-in for it: what the engine promises must hold whatever decodes inside."""

import dataclasses
import importlib.util
import inspect
import random

import fake_vllm
import numpy as np
import pytest
import torch
from scripts import CONFIGS, run, workplace
from tiny_training import LORA, by_content, ending_in, liven, pay

from posttrain.config.schema import Lora
from posttrain.errors import UserError
from posttrain.generation import engines, vllm_engine
from posttrain.generation.loop import Sampling
from posttrain.generation.supported import check_engine
from posttrain.models.adapters import new_adapter
from posttrain.models.base import load_base
from posttrain.models.policy_copy import PolicyCopy
from posttrain.records import read_rows
from posttrain.runs.manifest import read_manifest

PROMPTS = [[300, 301, 302], [7] * 20, [5, 6, 7, 8], [300, 301, 302]]
GREEDY = Sampling(12)
DRAWN = Sampling(8, temperature=0.7, num_samples=3, seed=5)


@pytest.fixture
def model(fp32_settings, plain_tokenizer):
    return liven(load_base(fp32_settings, "none", plain_tokenizer)).eval()


@pytest.fixture
def tokenizer(plain_tokenizer, model):
    """One of four greedy completions comes to its end token."""
    ids = engines.generate(model, PROMPTS, GREEDY, plain_tokenizer).completions[1][0].ids
    return ending_in(plain_tokenizer, ids[4])


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    fake_vllm.install(monkeypatch)
    return fake_vllm.LLM


def answers(model, tokenizer, engine, sampling=GREEDY, prompts=PROMPTS):
    return [
        [(one.ids, one.finish) for one in completions]
        for completions in engines.generate(model, prompts, sampling, tokenizer, 2, engine).completions
    ]


def test_greedy_answers_are_those_of_our_own_engine(model, tokenizer):
    wanted = answers(model, tokenizer, "transformers")
    assert answers(model, tokenizer, "vllm") == wanted
    assert {finish for ((_, finish),) in wanted} == {"stop", "length"}


def test_only_the_tokenizers_end_token_stops(model, tokenizer):
    """generation_config.json may name others, and vLLM stops at those, too, if it is let."""
    wanted = answers(model, tokenizer, "transformers")
    other = next(ids for ((ids, finish),) in wanted if finish == "length")[2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    assert answers(model, tokenizer, "vllm") == wanted


def test_it_starts_once_and_answers_by_the_weights_as_they_are(fp32_settings, plain_tokenizer, tokenizer, fake):
    trained = new_adapter(load_base(fp32_settings, "none", plain_tokenizer), Lora(**LORA), plain_tokenizer, seed=1)
    policy = PolicyCopy(trained)
    seen = []
    for deviation in (0.0, 0.3, 0.6):
        liven_adapter(trained, deviation)
        seen.append(answers(policy.refresh(), tokenizer, "vllm"))
        assert seen[-1] == answers(policy.model, tokenizer, "transformers"), deviation
    assert seen[0] != seen[1] != seen[2]
    assert len(fake.started) == 1


def liven_adapter(model, deviation):
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, deviation) if deviation else parameter.data.zero_()


def test_a_weight_that_is_not_taken_is_noticed(model, tokenizer, fake):
    answers(model, tokenizer, "vllm")
    name = next(iter(dict(model.named_parameters())))
    vllm_engine._started[model].model.keeps = (name,)
    with pytest.raises(AssertionError, match=f"kept its old weights: {name}"):
        answers(model, tokenizer, "vllm")


def test_log_probabilities_are_those_of_what_was_sampled(model, tokenizer):
    """Of the logits over the temperature: TRL compares them with the trainer's, which are."""
    for prompt, completions in zip(
        PROMPTS, engines.generate(model, PROMPTS, DRAWN, tokenizer, 4, "vllm").completions, strict=True
    ):
        for one in completions:
            logits = model(torch.tensor([[*prompt, *one.ids]])).logits[0, len(prompt) - 1 : -1] / DRAWN.temperature
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.logprobs), wanted, atol=1e-4, rtol=1e-4)


def test_draws_hang_on_seed_and_question_alone(model, tokenizer):
    ask = lambda sampling: answers(model, tokenizer, "vllm", sampling)  # noqa: E731
    first, again, other = ask(DRAWN), ask(DRAWN), ask(dataclasses.replace(DRAWN, seed=6))
    assert first == again != other
    assert first[0] != first[3], "the same prompt twice draws twice"
    assert all(len({tuple(ids) for ids, _ in completions}) == 3 for completions in first)
    [*_, part] = engines.engine_batches("vllm", model, PROMPTS, DRAWN, tokenizer, [(1, [3, 1])])
    assert [[(one.ids, one.finish) for one in row] for row in part.completions] == [first[3], first[1]]


def test_no_two_samples_of_a_run_share_a_seed():
    seeds = [
        vllm_engine._settings(dataclasses.replace(DRAWN, seed=seed), i, 0).seed + sample
        for seed in range(3)
        for i in range(2000)
        for sample in range(DRAWN.num_samples)
    ]
    assert len(set(seeds)) == len(seeds)


def test_starting_leaves_the_trainers_random_state_alone(model, tokenizer):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    answers(model, tokenizer, "vllm")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_a_trainers_autocast_does_not_reach_it(model, tokenizer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers(model, tokenizer, "vllm")  # the stand-in looks


@pytest.mark.parametrize("samples", [1, 3])
def test_it_takes_memory_for_the_rows_and_no_more(model, tokenizer, fake, samples):
    answers(model, tokenizer, "vllm", Sampling(12, num_samples=samples))
    [asked] = fake.started
    rows, pages = len(PROMPTS) * samples, -(-(20 + 12) // vllm_engine.PAGE)
    assert asked["max_num_seqs"] == rows
    assert asked["kv_cache_memory_bytes"] == (rows * pages + 1) * vllm_engine.PAGE * engines.bytes_per_token(model)
    total = engines.memory_bytes(model.device)
    assert asked["gpu_memory_utilization"] == asked["kv_cache_memory_bytes"] / total < 0.5
    assert asked["max_model_len"] == min(rows * pages * vllm_engine.PAGE, model.config.max_position_embeddings)


def test_an_evaluation_with_it_has_the_results_of_our_own(tmp_path, tiny_model_dir, tiny_data_dir):
    place = workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)
    asked = ("data.split=train", "data.limit=5", "generation.max_new_tokens=8")
    for engine in ("vllm", "transformers"):
        done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", f"run_dir={engine}", f"engine={engine}", *asked, cwd=place)
        assert done.code == 0, done.err
    one, two = ((place / engine / "predictions.jsonl").read_text() for engine in ("vllm", "transformers"))
    assert one == two and one.count("\n") == 5
    assert read_manifest(place / "vllm").engine == "vllm"


def test_grpo_trains_on_what_it_sampled(tiny, sft, fake):
    """The trainer scores each window as vllm drew it: old weights, another temperature or another order would show here."""
    with tiny.grpo(sft, {"max_steps": 3, "learning_rate": 0.03}, rollouts={"engine": "vllm"}, quantization="none") as trainer:
        pay(trainer, by_content).train()
        rows = read_rows(trainer.run.folder / "metrics.jsonl")
        differences = [row["rollout/logp_difference"] for row in rows if "rollout/logp_difference" in row]
    assert len(differences) == 3 and max(differences) < 0.02, differences
    assert len(fake.started) == 1


def test_several_processes_are_refused(monkeypatch, fp32_settings):
    check_engine(fp32_settings, "vllm", "use engine=transformers")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process, and there are 2: start the script with python; use engine=transformers"):
        check_engine(fp32_settings, "vllm", "use engine=transformers")
    check_engine(fp32_settings, "transformers", "")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_names_are_vllms(monkeypatch):
    monkeypatch.undo()
    import vllm

    assert inspect.signature(vllm.EngineArgs).parameters.keys() >= fake_vllm.LLM_ARGUMENTS
    assert set(vllm.SamplingParams.__struct_fields__) >= {field.name for field in dataclasses.fields(fake_vllm.SamplingParams)}
    for name in ("apply_model", "reset_prefix_cache", "generate"):
        assert callable(getattr(vllm.LLM, name))

"""What TRL gets from our rollouts and pays for them: groups in order, one prefill a group, draws by seed and step."""

import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_training import by_content, pay

import rewards
from posttrain.config.schema import Rewards
from posttrain.config.schema import Rollouts as Settings
from posttrain.generation.engines import generate
from posttrain.models.base import load_base
from posttrain.models.chat import chat_ids
from posttrain.models.policy_copy import GatheredCopy, PolicyCopy
from posttrain.records import Example, read_jsonl
from posttrain.training.rollouts import Rollouts, reward_functions


@pytest.fixture(scope="module")
def policy(settings, tokenizer):
    return PolicyCopy(load_base(settings, "none", tokenizer))


@pytest.fixture(scope="module")
def questions(tiny_data_dir):
    return [example.prompt for example in read_jsonl(tiny_data_dir / "train.jsonl", Example)]


@pytest.fixture
def trainer(tiny, sft):
    """A real trainer, which TRL passes to a rollout."""
    with tiny.grpo(sft) as trainer:
        yield trainer


def repeated(questions, num_groups, size=4):
    return [question for question in questions[:num_groups] for _ in range(size)]


def rollout(policy, tokenizer, trainer, prompts, seed=0, **settings):
    return Rollouts(policy, tokenizer, seed, Settings(**settings))(prompts, trainer)


def test_a_gathered_copy_is_gone_after_the_rollout(settings, tokenizer, trainer, questions, monkeypatch):
    """While a step is trained, no process holds the policy whole: graphs of decoding, which know their model, do not keep it."""
    made = []

    def generate_with_graphs(policy, *args):
        policy.__dict__["_graphs"] = SimpleNamespace(model=policy)
        made.append(weakref.ref(policy.model.layers[0].mlp.up_proj.weight))
        return generate(policy, *args)

    monkeypatch.setattr("posttrain.training.rollouts.generate", generate_with_graphs)
    gathered = GatheredCopy(load_base(settings, "nf4", tokenizer))
    rollout(gathered, tokenizer, trainer, repeated(questions, 2))
    assert [weight() for weight in made] == [None]


# --- what TRL gets ----------------------------------------------------------------------------------------------------


def test_every_row_has_its_own_prompt_in_trls_order(policy, tokenizer, trainer, questions):
    prompts = repeated(questions, 3)
    out = rollout(policy, tokenizer, trainer, prompts)
    assert out["prompt_ids"] == [chat_ids(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
    assert len(out["completion_ids"]) == len(out["logprobs"]) == 12
    assert [len(ids) for ids in out["completion_ids"]] == [len(logprobs) for logprobs in out["logprobs"]]


def test_completions_end_with_the_end_token_or_at_the_limit(settings, tokenizer, trainer, questions):
    """TRL takes a last token that is not the end token for truncation."""
    base = load_base(settings, "none", tokenizer)
    base.model.embed_tokens.weight.data[tokenizer.eos_token_id] *= 4  # so that some end early
    out = rollout(PolicyCopy(base), tokenizer, trainer, repeated(questions, 11))
    lengths = {len(ids) for ids in out["completion_ids"]}
    assert max(lengths) == trainer.max_completion_length > min(lengths)
    for ids in out["completion_ids"]:
        assert (ids[-1] == tokenizer.eos_token_id) or len(ids) == trainer.max_completion_length
        assert tokenizer.eos_token_id not in ids[:-1]


def test_trl_stops_and_masks_on_the_same_token(trainer, tokenizer):
    assert list(trainer.eos_token_ids) == [tokenizer.eos_token_id]
    assert trainer._tokenizer.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_samples_of_a_group_differ(policy, tokenizer, trainer, questions):
    out = rollout(policy, tokenizer, trainer, repeated(questions, 2))
    assert len({tuple(ids) for ids in out["completion_ids"]}) == 8


def test_logprobs_are_the_policys_at_the_trainers_temperature(policy, tokenizer, trainer, questions):
    out = rollout(policy, tokenizer, trainer, repeated(questions, 2))
    for prompt, ids, logprobs in zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        wanted = (logits / trainer.temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        assert torch.allclose(torch.tensor(logprobs), wanted, atol=0.05)  # a forward in bf16


def test_an_engine_without_logprobs_gives_none(policy, tokenizer, trainer, questions):
    out = rollout(policy, tokenizer, trainer, repeated(questions, 2), engine="continuous_batching")
    assert out["logprobs"] is None
    assert len(out["completion_ids"]) == 8


@pytest.mark.parametrize("engine", ["transformers", "continuous_batching"])
def test_grpo_runs_on_every_engine_with_dev_accuracy_beside_it(tiny, sft, engine):
    settings = {"rollouts": {"engine": engine}, "data": {"path": tiny.data, "num_dev": 2}, "dev_every_steps": 1}
    with tiny.grpo(sft, {"max_steps": 2, "beta": 0.1}, **settings) as trainer:
        pay(trainer, by_content)
        trainer.train()
        rows = trainer.state.log_history
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert ("rollout/logp_difference" in rows[1]) == (engine == "transformers")
    assert rows[1]["rollout/tokens_per_second"] > 0


# --- work is not done twice -------------------------------------------------------------------------------------------


class Prefills:
    """Counts prompts that go through the model, by a hook on its embedding."""

    def __init__(self, policy):
        self.rows = []
        self.handle = policy.model.get_input_embeddings().register_forward_pre_hook(self.see)

    def see(self, module, args):
        if args[0].shape[1] > 1:
            self.rows.append(len(args[0]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize(("groups", "size"), [(3, 4), (1, 8), (6, 2)])
def test_a_prompt_is_computed_once_for_its_group(policy, tokenizer, trainer, questions, groups, size):
    with Prefills(policy) as prefills:
        rollout(policy, tokenizer, trainer, repeated(questions, groups, size))
    assert sum(prefills.rows) == groups


def test_groups_cut_by_a_border_between_processes_still_get_a_row_each(policy, tokenizer, trainer, questions):
    prompts = [questions[0]] * 2 + [questions[1]] * 4 + [questions[2]] * 2
    out = rollout(policy, tokenizer, trainer, prompts)
    assert out["prompt_ids"] == [chat_ids(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
    assert len({tuple(ids) for ids in out["completion_ids"]}) == 8


def test_equal_questions_side_by_side_are_not_mixed_up(policy, tokenizer, trainer, questions):
    """Two groups of one question look like one of twice the size."""
    prompts = repeated([questions[0], questions[0], questions[1]], 3)
    out = rollout(policy, tokenizer, trainer, prompts)
    assert out["prompt_ids"] == [chat_ids(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
    assert len({tuple(ids) for ids in out["completion_ids"]}) == 12


def test_the_batch_size_is_in_completions(policy, tokenizer, trainer, questions):
    with Prefills(policy) as prefills:
        rollout(policy, tokenizer, trainer, repeated(questions, 4), batch_size=8)
    assert prefills.rows == [2, 2]
    with Prefills(policy) as prefills:
        rollout(policy, tokenizer, trainer, repeated(questions, 2), batch_size=1)  # a group is never cut
    assert prefills.rows == [1, 1]


# --- draws ------------------------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_step_call_and_process_alone(policy, tokenizer, trainer):
    """No two of 40,000 combinations share a seed, and a new object, as after a resume, gives the same ones."""
    seen = {}
    for seed, step in itertools.product(range(20), (*range(40), 999, 1000, 123_456)):
        rollouts = Rollouts(policy, tokenizer, seed, Settings())
        trainer.state.global_step = step
        for call in range(3):
            value = rollouts._next_seed(trainer)
            for process in range(16):
                seen[value + process] = (seed, step, call, process)
    assert len(seen) == 20 * 43 * 3 * 16


def test_the_process_is_part_of_the_seed(policy, tokenizer, trainer, monkeypatch):
    rollouts = Rollouts(policy, tokenizer, 0, Settings())
    first = rollouts._next_seed(trainer)
    monkeypatch.setattr(trainer.accelerator.state, "process_index", 3)
    assert Rollouts(policy, tokenizer, 0, Settings())._next_seed(trainer) == first + 3


def test_steps_and_seeds_sample_differently_and_repeat(policy, tokenizer, trainer, questions):
    prompts = repeated(questions, 2)

    def sampled(step, seed):
        trainer.state.global_step = step
        return rollout(policy, tokenizer, trainer, prompts, seed)["completion_ids"]

    assert sampled(3, 0) == sampled(3, 0)
    drawn = [sampled(step, seed) for step, seed in ((0, 0), (1, 0), (0, 1))]
    for one, two in itertools.combinations(drawn, 2):
        assert all(a != b for a, b in zip(one, two, strict=True))


def test_a_second_call_within_a_step_samples_anew(policy, tokenizer, trainer, questions):
    rollouts = Rollouts(policy, tokenizer, 0, Settings())
    prompts = repeated(questions, 2)
    first, second = rollouts(prompts, trainer), rollouts(prompts, trainer)
    assert all(a != b for a, b in zip(first["completion_ids"], second["completion_ids"], strict=True))


def test_the_rollouts_follow_the_policy(tiny, sft, questions):
    with tiny.grpo(sft) as trainer:
        prompts = repeated(questions, 2)
        before = trainer.rollout_func(prompts, trainer)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.data += 0.5
        trainer.rollout_func._step = -1  # the same draws again
        assert trainer.rollout_func(prompts, trainer)["completion_ids"] != before["completion_ids"]


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [False, True])
def test_the_reward_is_correctness_and_format_by_their_weights(gate):
    texts = ["6*7=42\n#### 42", "It is 42.", "#### 41", "no idea"]
    functions, weights = reward_functions(Rewards(correctness=2.0, format=0.5, gate_format=gate))
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = [function(completions=completions, answer=["42"] * 4) for function in functions]
    paid = [sum(w * value for w, value in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)]
    assert paid == pytest.approx([2.5, 2.0, 0.0 if gate else 0.5, 0.0])
    assert functions[0] is rewards.correctness_reward


def test_every_weight_of_the_settings_has_its_function():
    weights = {name for name, field in Rewards.model_fields.items() if field.annotation is float}
    assert all(callable(getattr(rewards, f"{name}_reward")) for name in weights)

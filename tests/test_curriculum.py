"""Which questions GRPO asks next: they rest and come back, groups without signal are replaced, a resumed run draws the same."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from scripts import CONFIGS
from test_resume import FOUR_STEPS, interrupted_and_resumed, straight
from tiny_training import adapter_tensors, largest_difference, opened, pay, pay_tiny

from posttrain.config.load import ConfigError, config_sha256, load
from posttrain.config.schema import Curriculum as Settings
from posttrain.config.schema import GrpoConfig
from posttrain.errors import UserError
from posttrain.records import Example, read_jsonl
from posttrain.runs.directory import check_machine
from posttrain.training.curriculum import Curriculum, Group, Window


def made(count=8, rest=0, rounds=0, seed=0):
    return Curriculum(count, seed, Settings.model_construct(rest_steps=rest, extra_rounds=rounds))


def group(question, pass_rate=0.5, has_signal=None):
    signal = 0 < pass_rate < 1 if has_signal is None else has_signal
    rows = [{"id": question}] * 2
    output = {"prompt_ids": [[question]] * 2, "completion_ids": [[1], [2]], "logprobs": None}
    return Group(question, rows, output, torch.full((2, 1), float(question)), {"gold": [question] * 2}, signal, pass_rate)


def asked(curriculum, size, rates, step=0):
    """A window, where the pass rate of each question is known, and what was reported of it."""
    reported = {}
    window = curriculum.window(
        size, step, lambda questions: [group(q, rates.get(q, 0.5)) for q in questions], reported.__setitem__
    )
    return [one.question for one in window.groups], {key.split("/")[1]: value for key, value in reported.items()}


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_every_question_is_asked_once_an_epoch_and_epochs_differ():
    curriculum = made()
    first, second = epoch(curriculum), epoch(curriculum)
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert first == epoch(made())
    assert first != epoch(made(seed=1))


def epoch(curriculum):
    return [question for step in range(4) for question in curriculum.draw(2, step, ())]


def test_a_window_never_asks_a_question_twice():
    curriculum = made(count=5)
    for step in range(20):
        drawn = curriculum.draw(3, step, ())
        more = curriculum.draw(2, step, drawn)
        assert len({*drawn, *more}) == 5


def test_what_was_solved_always_or_never_rests_and_comes_back():
    curriculum, seen = made(count=4, rest=3), []
    for step in range(8):
        seen.append(asked(curriculum, 2, {0: 0.0, 1: 1.0}, step)[0])
    for question in (0, 1):
        steps = [step for step, questions in enumerate(seen) if question in questions]
        assert len(steps) > 1 and all(later - earlier >= 3 for earlier, later in itertools.pairwise(steps))
    assert all({2, 3} & {*questions} for questions in seen)


def test_a_question_that_is_solved_sometimes_again_rests_no_more():
    curriculum = made(count=2, rest=100)
    curriculum.learn([group(0, 1.0)], step=0)
    assert curriculum.resting == {0: 100}
    curriculum.learn([group(0, 0.5)], step=1)
    assert curriculum.resting == {}


def test_where_all_rest_those_that_have_rested_longest_are_asked():
    curriculum = made(count=4, rest=100)
    for step, question in enumerate((2, 0, 3, 1)):
        curriculum.learn([group(question, 0.0)], step)
    assert curriculum.draw(2, 5, ()) == [2, 0]
    assert curriculum.draw(3, 5, (2,)) == [0, 3, 1]


def test_groups_without_signal_are_replaced_up_to_the_bound():
    dull = dict.fromkeys(range(6), 0.0)  # two of eight have signal
    for rounds, extra, with_signal in ((0, 0, None), (1, None, None), (8, None, 2)):
        questions, reported = asked(made(rounds=rounds), 2, dull)
        assert len(questions) == len({*questions}) == 2
        if extra is not None:
            assert reported["extra_groups"] == extra
        if with_signal is not None:
            assert {*questions} == {6, 7}
            assert 0 < reported["extra_groups"] <= 6
            assert reported["extra_seconds"] > 0
        assert reported["pass_rate"] == pytest.approx((1 - reported["drawn_without_signal"]) / 2)


def test_without_any_signal_the_first_groups_stay_and_the_questions_run_out():
    curriculum = made(rounds=99)
    first = made(rounds=99).draw(2, 0, ())
    questions, reported = asked(curriculum, 2, dict.fromkeys(range(8), 1.0))
    assert questions == first
    assert reported["extra_groups"] == 6
    assert reported["drawn_without_signal"] == 1.0


def test_a_window_joins_its_groups_row_by_row():
    window = Window([group(3), group(1)])
    assert [row["id"] for row in window.inputs] == [3, 3, 1, 1]
    assert window.output == {"prompt_ids": [[3], [3], [1], [1]], "completion_ids": [[1], [2]] * 2, "logprobs": None}
    assert window.scores[:, 0].tolist() == [3.0, 3.0, 1.0, 1.0]
    assert window.extras == {"gold": [3, 3, 1, 1]}


def test_the_state_goes_through_json():
    one, two = made(rest=3), made(rest=3)
    for step in range(5):
        asked(one, 3, {0: 0.0, 5: 1.0}, step)
    saved = json.loads(json.dumps(one.state()))
    two.on_train_begin(None, SimpleNamespace(stateful_callbacks={"Curriculum": saved}), None)
    assert two.state() == one.state()
    assert [one.draw(3, step, ()) for step in range(5, 9)] == [two.draw(3, step, ()) for step in range(5, 9)]


# --- in a run ---------------------------------------------------------------------------------------------------------

BOTH = {"rest_steps": 2, "extra_rounds": 2}


def sometimes(completion_ids):
    """Equal rewards in about half of the groups of four."""
    return [float(ids[0] % 7 == 0) for ids in completion_ids]


def test_what_trl_gets_belongs_together(tiny, sft):
    """Each logged row has the prompt, the gold and the rewards of one and the same question."""
    gold = {example.prompt[-1]["content"]: example.answer for example in read_jsonl(f"{tiny.data}/train.jsonl", Example)}
    with tiny.grpo(sft, {"max_steps": 2, "temperature": 1.0}, curriculum=BOTH) as trainer:
        trainer.train()
        rows = list(trainer.latest())
        assert len(rows) == 8
        assert all(row["gold"] == gold[row["prompt"][-1]["content"]] for row in rows)
        logged = trainer.state.log_history[0]
    assert {"extra_groups", "extra_seconds", "drawn_without_signal", "pass_rate", "resting"} == {
        key.split("/")[1] for key in logged if key.startswith("curriculum/")
    }


@pytest.mark.slow
def test_more_groups_with_signal_are_learnt_from(tiny, sft):
    shares = []
    for curriculum in ({"rest_steps": 1}, {"extra_rounds": 4}):
        with pay_tiny(tiny, sft, {"max_steps": 4, "temperature": 1.0}, sometimes, curriculum=curriculum) as trainer:
            trainer.train()
            rows = [row for row in trainer.state.log_history if "reward" in row]
            shares.append(sum(row["frac_groups_without_signal"] for row in rows) / len(rows))
    assert shares[1] < shares[0]
    assert any(row["curriculum/extra_groups"] for row in rows)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, sft):
    config = lambda: tiny.grpo_config(sft, FOUR_STEPS | {"temperature": 1.0}, curriculum=BOTH)  # noqa: E731
    (one, _, losses), (two, _, again) = straight(config()), interrupted_and_resumed(config(), 2)
    assert losses == again
    assert largest_difference(one, two) == 0


def test_a_resumed_run_asks_what_an_uninterrupted_one_would_have(tiny, sft):
    def run(resume_from=None):
        config = tiny.grpo_config(sft, FOUR_STEPS | {"temperature": 1.0, "max_steps": 4}, curriculum=BOTH)
        with opened(config) as trainer:
            pay(trainer, sometimes)
            trainer.train(resume_from_checkpoint=resume_from)
            return trainer.curriculum.state(), trainer.run.folder, adapter_tensors(trainer.model)

    straight_state, folder, straight_end = run()
    state, _, end = run(str(folder / "checkpoints/checkpoint-2"))
    assert state == straight_state
    assert largest_difference(end, straight_end) == 0


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["curriculum={}"], "curriculum: does nothing as it is: set rest_steps or extra_rounds above 0, or remove it"),
        (
            ["curriculum={rest_steps: 1}", "rollouts.engine=vllm"],
            "needs rollouts.engine transformers: vllm does not draw",
        ),
        (
            ["curriculum={rest_steps: 1}", "rollouts.engine=trl"],
            "needs rollouts.engine transformers: trl does not draw",
        ),
        (["curriculum={rest_step: 1}"], "curriculum.rest_step: unknown key (did you mean 'curriculum.rest_steps'?)"),
    ],
)
def test_what_cannot_be_is_refused(overrides, text):
    with pytest.raises(ConfigError) as refused:
        load(CONFIGS / "grpo_tiny.yaml", overrides, GrpoConfig)
    assert text in str(refused.value) and "\n" not in str(refused.value)


def test_several_processes_are_refused(monkeypatch):
    config = load(CONFIGS / "grpo_tiny.yaml", ["curriculum={rest_steps: 1}"], GrpoConfig)
    check_machine(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="curriculum draws questions in one process"):
        check_machine(config)


def test_fewer_questions_than_a_step_asks_are_refused():
    with pytest.raises(UserError, match="a step asks 9 questions at once, and there are 8"):
        asked(made(), 9, {})


def test_without_a_curriculum_a_run_is_the_one_that_it_was():
    """Its hash has no trace of the setting, so that earlier runs are found."""
    plain = load(CONFIGS / "grpo_tiny.yaml", [], GrpoConfig)
    with_one = load(CONFIGS / "grpo_tiny.yaml", ["curriculum={rest_steps: 1}"], GrpoConfig)
    assert config_sha256(plain) != config_sha256(with_one)
    assert config_sha256(plain) == config_sha256(plain.model_copy(update={"unmet_after_steps": 3}))

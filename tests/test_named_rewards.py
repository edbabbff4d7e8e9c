"""Rewards by name: what is called with what, what is refused and when, and the page that shows them."""

import asyncio
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from scripts import CONFIGS, run, tree, workplace

from posttrain.config.load import ConfigError, load
from posttrain.config.schema import BUILT_IN_REWARDS, GrpoConfig, Rewards
from posttrain.errors import UserError
from posttrain.records import Example, as_dataset, columns_of, read_jsonl
from posttrain.tasks.answers import grader_of
from posttrain.training.batches import gated, groups_paid
from posttrain.training.built_in_rewards import BUILT_IN, tags
from posttrain.training.callbacks import UnmetRewards
from posttrain.training.named_rewards import gated_columns, named_rewards
from posttrain.training.reward_trial import try_rewards
from posttrain.training.rollouts import reward_functions

PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
TEXTS = ["#### 4", "so it is 12\n#### 12"]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in TEXTS]
VALUES = {
    "prompts": [[]] * 2, "completion_ids": [[1, 2], [3, 4, 5]], "trainer_state": None, "log_extra": None, "log_metric": None,
    "answer": ["4", "12"], "id": ["a", "b"], "question": ["2 + 2?", "3 x 4?"], "solution": TEXTS, "num_steps": [1, 1],
}  # fmt: skip
SOURCE = """
import torch
def nine(completions, **columns): return [9.0] * len(completions)
def of_columns(answer, question, solution, num_steps, id, prompts): return [len(q) for q in question]
def scaled(completions, factor=1.0): return [factor] * len(completions)
async def later(completions, **columns): return [len(c[-1]["content"]) for c in completions]
class Judge:
    async def __call__(self, completions, **columns): return [1.0] * len(completions)
judge = Judge()
def wants(completions, difficulty): return difficulty
def raising(completions, **columns): return [1 / 0]
async def raising_later(completions, **columns): raise ConnectionError("the judge\\ndid not answer")
def short(completions, **columns): return [1.0]
def alone(completions, **columns): return 1.0
def text(completions, **columns): return "11"
def nothing(completions, **columns): return None
def none(completions, **columns): return [1.0, None]
def nan(completions, **columns): return [1.0, float("nan")]
def endless(completions, **columns): return [float("inf"), 1.0]
def words(completions, **columns): return ["1.0", "1.0"]
def truths(completions, **columns): return [1.0, True]
def tensors(completions, **columns): return torch.ones(2)
def exits(completions, **columns): raise UserWarning
number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "lacking.py").write_text("import not_there\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only(key, said=1.0, max_tokens=100):
    [reward] = named_rewards(Rewards(**{key: said}), max_tokens)
    return reward


def paid(reward, **values):
    returned = reward.function(completions=COMPLETIONS, **(VALUES | values))
    return asyncio.run(returned) if asyncio.iscoroutine(returned) else returned


# --- what is called ---------------------------------------------------------------------------------------------------


def test_a_function_gets_the_columns_that_it_asks_for(here):
    assert paid(only("mine.py:nine")) == [9.0, 9.0]
    assert paid(only("mine.py:of_columns")) == [6.0, 6.0]
    assert paid(only("mine.py:scaled", {"weight": 1, "args": {"factor": 3}})) == [3.0, 3.0]
    assert paid(only("mine.py:later")) == [6.0, 19.0]
    assert paid(only("mine.py:judge")) == [1.0, 1.0]


def test_upstream_awaits_what_is_async(here):
    from trl.trainer.utils import is_async_callable

    kinds = {name: is_async_callable(only(f"mine.py:{name}").function) for name in ("nine", "later", "judge", "scaled")}
    assert kinds == {"nine": False, "later": True, "judge": True, "scaled": False}
    assert is_async_callable(only("mine.py:later", {"weight": 1.0, "args": {"extra": 1}}).function)


def test_a_function_of_a_package(here, monkeypatch):
    package = here / "own_rewards_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "short.py").write_text("def brief(completions, **columns): return [0.5] * len(completions)\n")
    monkeypatch.syspath_prepend(here)
    reward = only("own_rewards_of_a_test.short.brief")
    assert paid(reward) == [0.5, 0.5]
    assert (reward.name, reward.file) == ("brief", package / "short.py")


def test_names_in_the_logs_are_the_functions_and_never_equal(here):
    shutil.copy("mine.py", "other.py")
    found = named_rewards(Rewards(**{"mine.py:nine": 1.0, "other.py:nine": 1.0, "overlong": 1.0}), 100)
    assert [reward.name for reward in found] == ["nine", "other.py:nine", "overlong_reward"]
    assert [reward.function.__name__ for reward in found] == [reward.name for reward in found]


def test_built_in_rewards():
    assert tuple(BUILT_IN) == BUILT_IN_REWARDS
    ids = [[1] * 80, [1] * 90, [1] * 100]
    completions = COMPLETIONS + COMPLETIONS[:1]
    assert only("overlong").function(completions=completions, completion_ids=ids) == [0.0, -0.5, -1.0]
    wide = only("overlong", {"weight": 1.0, "args": {"buffer_tokens": 40}})
    assert wide.function(completions=completions, completion_ids=ids) == [-0.5, -0.75, -1.0]
    ids = [[1, 2, 3, 4], [5, 5, 5, 5], [1]]
    assert only("repetition").function(completions=completions, completion_ids=ids) == [0.0, -0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "pays"),
    [
        ("<think>2 + 2</think><answer>4</answer>", 1.0),
        ("\n<think>\n2 + 2\n</think>\n\n<answer>4</answer>\n", 1.0),
        ("<think>2 + 2</think>", 0.0),
        ("so <think>2 + 2</think><answer>4</answer>", 0.0),
        ("<think>2 + 2</think> so <answer>4</answer>", 0.0),
        ("<answer>4</answer><think>2 + 2</think>", 0.0),
        ("<think><think>2 + 2</think></think><answer>4</answer>", 0.0),
        ("<think>2</think><think>2</think><answer>4</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tags_are_all_of_the_text_in_their_order_each_once(text, pays):
    assert tags(100)(completions=[text]) == [pays]


def test_a_gate_is_a_weight_on_another_rewards_success():
    """The gated format reward is the format reward behind the gate of correctness."""
    import rewards

    texts = ["#### 42", "It is 42.", "#### 41", "no idea"]
    columns = [rewards.correctness_reward(texts, ["42"] * 4), rewards.format_reward(texts)]
    scores = torch.tensor(columns).T
    assert gated(scores, {1: 0})[:, 1].tolist() == torch.tensor(rewards.gated_format_reward(texts, ["42"] * 4)).tolist()
    assert gated(scores, {}) is scores
    chain = torch.tensor([[0.0, 1.0, 1.0]])
    assert gated(chain, {1: 0, 2: 1}).tolist() == [[0.0, 0.0, 1.0]]  # a gate looks at what the other reward itself paid
    settings = Rewards(**{"overlong": {"weight": 1.0, "gate": "tags"}, "tags": {"weight": 1.0, "gate": "format"}})
    assert gated_columns(("correctness", "format"), named_rewards(settings, 100)) == {2: 3, 3: 1}


# --- what is refused --------------------------------------------------------------------------------------------------

BEFORE = [
    ("gone.py:f", 1.0, "rewards.gone.py:f: no file gone.py"),
    ("min.py:nine", 1.0, "rewards.min.py:nine: no file min.py (did you mean 'mine.py'?)"),
    ("mine:nine", 1.0, "rewards.mine:nine: no file mine"),
    ("mine.py:nin", 1.0, "rewards.mine.py:nin: mine.py has no function nin (did you mean 'nine'?)"),
    ("mine.py:number", 1.0, "mine.py has no function number"),
    ("broken.py:f", 1.0, "broken.py cannot be loaded: SyntaxError: invalid syntax"),
    ("lacking.py:f", 1.0, "lacking.py cannot be loaded: ModuleNotFoundError: No module named 'not_there' (lacking.py:1)"),
    ("not_a_package.module.f", 1.0, "not_a_package.module cannot be imported: ModuleNotFoundError"),
    ("mine.py:wants", 1.0, "nothing gives the function its 'difficulty': there are prompts, completions, completion_ids, answer"),
    ("mine.py:scaled", {"weight": 1.0, "args": {"facter": 1}}, "takes no argument 'facter' (did you mean 'factor'?)"),
    ("overlong", {"weight": 1.0, "args": {"buffer": 1}}, "no argument 'buffer' (did you mean 'buffer_tokens'?)"),
    (
        "overlong",
        {"weight": 1.0, "args": {"buffer_tokens": 101}},
        "buffer_tokens must lie between 1 and max_completion_length (100)",
    ),
    ("overlong", {"weight": 1.0, "args": {"buffer_tokens": "x"}}, "rewards.overlong: "),
    ("repetition", {"weight": 1.0, "args": {"ngram_size": 0}}, "ngram_size must be at least 1, not 0"),
    ("tags", {"weight": 1.0, "args": {"names": ["<think>"]}}, "names must be a list of tags"),
    ("tags", {"weight": 1.0, "args": {"names": 3}}, "names must be a list of tags"),
]


@pytest.mark.parametrize(("key", "said", "text"), BEFORE)
def test_what_cannot_be_called_is_refused_in_one_line(here, key, said, text):
    with pytest.raises(UserError) as refused:
        only(key, said)
    assert text in str(refused.value) and "\n" not in str(refused.value)


CALLED = [
    (
        "raising",
        "raised, on 2 completions of which the first is '#### 4': ZeroDivisionError: division by zero (mine.py:11)",
    ),
    (
        "raising_later",
        "mine.py:raising_later raised, on 2 completions of which the first is '#### 4': ConnectionError: the judge",
    ),
    ("exits", "UserWarning:  (mine.py:23)"),
    ("short", "reward mine.py:short returned 1 values for 2 completions"),
    ("alone", "reward mine.py:alone returned 1.0, not a list"),
    ("text", "reward mine.py:text returned '11', not a list"),
    ("nothing", "reward mine.py:nothing returned None, not a list"),
    ("none", "reward mine.py:none returned None for completion 1 of 2, 'so it is 12\\n#### 12': return a finite number"),
    ("nan", "reward mine.py:nan returned nan for completion 1 of 2"),
    ("endless", "reward mine.py:endless returned inf for completion 0 of 2, '#### 4'"),
    ("words", "reward mine.py:words returned '1.0' for completion 0 of 2"),
    ("truths", "reward mine.py:truths returned True for completion 1 of 2"),
    ("tensors", "reward mine.py:tensors returned tensor(1.) for completion 0 of 2"),
]


@pytest.mark.parametrize(("name", "text"), CALLED)
def test_what_is_no_list_of_numbers_stops_in_one_line(here, name, text):
    with pytest.raises(UserError) as refused:
        paid(only(f"mine.py:{name}"))
    assert text in str(refused.value) and "\n" not in str(refused.value)


IN_CONFIG = [
    ("rewards.overlog=1", "rewards.overlog: unknown key (did you mean 'rewards.overlong'?)"),
    (
        "rewards.brevity=1",
        "rewards.brevity: unknown key: built in are overlong, repetition, tags; your own is file.py:function",
    ),
    ("rewards={correctness: 0, format: 0}", "rewards: every weight is 0, and nothing would be learnt"),
    ("rewards={correctness: 0, format: 0, overlong: 0}", "rewards: every weight is 0, and nothing would be learnt"),
    ("rewards.a.py:b=much", 'rewards.a.py:b: should be a number, not "much"'),
    ("rewards.a.py:b={gate: correctness}", "rewards.a.py:b.weight: missing"),
    (
        "rewards.a.py:b={weight: 1, gate: correct}",
        "gate 'correct' is no other reward of this config (did you mean 'correctness'?)",
    ),
    ("rewards.a.py:b={weight: 1, gate: 'a.py:b'}", "gate 'a.py:b' is no other reward of this config"),
]


@pytest.mark.parametrize(("override", "text"), IN_CONFIG)
def test_what_the_config_alone_shows_is_refused_with_its_place(override, text):
    with pytest.raises(ConfigError) as refused:
        load(CONFIGS / "grpo_tiny.yaml", [override], GrpoConfig)
    assert text in str(refused.value) and "\n" not in str(refused.value)


def test_a_function_of_a_file_is_a_key_of_the_command_line():
    config = load(
        CONFIGS / "grpo_tiny.yaml",
        ["rewards.a/b.py:c=0.5", "rewards.a/b.py:d={weight: 1}", "rewards.a/b.py:d.weight=2"],
        GrpoConfig,
    )
    assert {name: reward.weight for name, reward in config.rewards.named().items()} == {"a/b.py:c": 0.5, "a/b.py:d": 2.0}


# --- in a run ---------------------------------------------------------------------------------------------------------

STARTS = ("adapter=null", "lora={r: 4, alpha: 8, target_modules: all-linear}", "data.num_dev=0", "unmet_after_steps=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    folder = workplace(tmp_path_factory.mktemp("rewards"), tiny_model_dir)
    assert run("data_prep", "--config", CONFIGS / "data_tiny.yaml", cwd=folder).code == 0
    (folder / "mine.py").write_text(SOURCE, encoding="utf-8")
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", PAGE):
        (folder / "my_rewards.py").write_text(block, encoding="utf-8")
    return folder


def grpo(folder, *more):
    return run("grpo_train", "--config", CONFIGS / "grpo_tiny.yaml", *STARTS, *more, cwd=folder)


def test_a_run_logs_pays_copies_and_hashes_its_rewards(place):
    brevity = "rewards.my_rewards.py:brevity={weight: 0.1, args: {target_tokens: 30}}"
    more = (brevity, "rewards.my_rewards.py:shows_work=0.05", "rewards.mine.py:later=0.01", "trainer.temperature=1.0")
    done = grpo(place, "run_dir=runs/own", *more)
    assert done.code == 0, done.err
    samples = [json.loads(line) for line in (place / "runs/own/samples.jsonl").read_text().splitlines()]
    assert {*samples[0]["rewards"]} == {"correctness_reward", "format_reward", "brevity", "shows_work", "later"}
    assert any(sample["rewards"]["brevity"] > 0 for sample in samples)
    row = json.loads((place / "runs/own/metrics.jsonl").read_text().splitlines()[0])
    assert 0 < row["rewards/brevity/mean"] < 1
    assert row["rewards/brevity/groups_paid"] == 1.0
    made = json.loads((place / "runs/own/manifest.json").read_text())
    assert [entry["reward"] for entry in made["rewards"]] == [
        "my_rewards.py:brevity",
        "my_rewards.py:shows_work",
        "mine.py:later",
    ]
    assert (place / "runs/own/rewards/my_rewards.py").read_bytes() == (place / "my_rewards.py").read_bytes()
    assert "share of groups in which a reward paid anything: correctness_reward 0.0%" in done.out
    assert "format_reward paid nothing in the first 1 steps" in made["notes"][1]
    # Another file is another run.
    source = (place / "my_rewards.py").read_text()
    (place / "my_rewards.py").write_text(source + "\n")
    done = grpo(place, "run_dir=runs/own", *more, "--resume")
    (place / "my_rewards.py").write_text(source)
    assert done.code == 2
    assert "belongs to a run over another" in done.err and "my_rewards.py, which has changed since" in done.err


@pytest.mark.parametrize("name", ["raising", "raising_later", "none", "short"])
def test_a_bad_reward_ends_before_the_run_directory_is_made(place, name):
    before = {path for path in tree(place) if "__pycache__" not in str(path)}
    done = grpo(place, "run_dir=runs/bad", f"rewards.mine.py:{name}=1")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"mine.py:{name}" in done.err
    assert {path for path in tree(place) if "__pycache__" not in str(path)} == before


def test_a_reward_that_fails_later_stops_the_run_in_one_line(place):
    (place / "late.py").write_text(
        "def late(completions, trainer_state): return [float('nan') if trainer_state.global_step else i "
        "for i in range(len(completions))]\n"
    )
    done = grpo(place, "run_dir=runs/late", "rewards.late.py:late=1")
    assert done.code == 2
    assert re.search(r"reward late.py:late returned nan for completion 0 of 16, '.*': return a finite number", done.err)
    assert "failed: UserError" in json.loads((place / "runs/late/manifest.json").read_text())["exit"]


@pytest.mark.parametrize("block", re.findall(r"(?ms)^```yaml\n(.*?)^```", PAGE))
def test_each_block_of_the_page_goes_through_a_dry_run(place, block, tmp_path):
    config = tmp_path / "grpo.yaml"
    config.write_text((CONFIGS / "grpo_tiny.yaml").read_text() + block)
    done = run("grpo_train", "--config", config, *STARTS, "--dry-run", cwd=place)
    assert done.code == 0, done.err
    assert "correctness_reward pays 1 1 1 1 for gold solutions, 0 0 0 0 for those of other questions" in done.out
    for name in load(config, [], GrpoConfig).rewards.named():
        assert f"{name.rpartition(':')[2]}" in done.out


def test_wrong_solutions_are_right_for_another_question(tiny, tokenizer):
    examples = read_jsonl(f"{tiny.data}/train.jsonl", Example)
    import rewards

    [trial] = try_rewards([rewards.correctness_reward], examples, tokenizer)
    assert (trial.gold, trial.wrong) == ([1.0] * 4, [0.0] * 4)


def test_columns_of_the_source_are_given_also_where_there_is_no_solution(here, tiny, tokenizer):
    grader = grader_of({"kind": "choice", "form": "Answer: {answer}"})
    examples = [
        dataclasses.replace(example, answer=letter, completion=[], columns={"difficulty": 0.5})
        for example, letter in zip(read_jsonl(f"{tiny.data}/train.jsonl", Example)[:4], "ABCA", strict=True)
    ]
    assert as_dataset(examples, columns_of(examples))["difficulty"][:] == [0.5] * 4
    named = named_rewards(Rewards(**{"mine.py:wants": 1.0}), 100, columns_of(examples))
    graded, _ = reward_functions(Rewards(), grader)
    right, form, own = try_rewards([*graded, named[0].function], examples, tokenizer, grader)
    assert (right.gold, right.wrong, own.gold) == ([1.0] * 4, [0.0] * 4, [0.5] * 4)
    assert min(form.gold) > 0 and right.name == "correctness_reward"


# --- a reward that is never met ---------------------------------------------------------------------------------------


class Said:
    def __init__(self):
        self.lines, self.notes = [], []

    def say(self, text):
        self.lines.append(text)

    def note(self, text):
        self.notes.append(text)


def rows(*shares, every=1):
    return [
        {"step": (i + 1) * every, "reward": 0.0, "rewards/format_reward/groups_paid": share} for i, share in enumerate(shares)
    ]


@pytest.mark.parametrize(
    ("log", "share"),
    [(rows(0.0, 0.0, 0.0, 0.0), "0.0%"), (rows(0.0, 0.5, 0.0, 0.1), "15.0%"), (rows(0.2, 0.4, every=3), "30.0%")],
)
def test_the_share_over_the_first_steps_is_said_once(log, share):
    run = Said()
    callback = UnmetRewards(run, {"format_reward": 1.0}, after=4)
    for end in range(1, len(log) + 1):
        state = type("State", (), {"log_history": log[:end]})
        callback.on_log(None, state, None, log[end - 1])
        callback.on_log(None, state, None, {"train_loss": 0.1})  # what a run logs at its end has no reward
    later = log + rows(*[0.0] * 9)[6:]
    callback.on_log(None, type("State", (), {"log_history": later}), None, later[-1])
    assert len(run.lines) == 1 and f"format_reward {share}" in run.lines[0]
    assert len(run.notes) == (share == "0.0%")


def test_groups_in_which_a_reward_paid_anything():
    scores = torch.tensor([[0, 0.2], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 1], [0, 1]])
    assert groups_paid(scores, 2) == [0.0, 0.5]

"""The numbers against known answers, against their definitions, and against brute force."""

import itertools
import json
import math
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from posttrain.errors import UserError
from posttrain.evaluation import comparison, stats, summary
from posttrain.records import Prediction
from posttrain.tasks.contamination import train_test_overlap


def predict(id, correct=True, *, sample=0, value="1", method="marker", **changes):
    fields = dict(
        id=id,
        sample=sample,
        completion="#### 1",
        finish="stop",
        num_tokens=10,
        value=value,
        method=method,
        num_markers=1,
        correct=correct,
        strict=correct and method == "marker",
        format_ok=True,
        grader="1",
    )
    return Prediction(**(fields | changes))


def ask(n, num_steps=2, prompt="p"):
    return [
        {
            "id": f"q{i}",
            "question": f"Question {i}?",
            "answer": "1",
            "num_steps": num_steps,
            "prompt_sha256": prompt,
        }
        for i in range(n)
    ]


def read(file):
    if not file.exists():
        pytest.skip(f"{file} is not here: it comes with openai/grade-school-math")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- known answers: the solutions and verdicts that OpenAI published with GSM8K ----

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.fixture(scope="module")
def recorded(gsm8k_dir):
    """(questions, {model: predictions}) from OpenAI's own `is_correct`, not from our grader."""
    rows, golds = read(gsm8k_dir / "example_model_solutions.jsonl"), read(gsm8k_dir / "test.jsonl")
    questions = [
        {
            "id": f"q{i}",
            "question": row["question"],
            "answer": "1",
            "num_steps": sum(bool(line.strip()) for line in gold["answer"].split("####")[0].split("\n")),
            "prompt_sha256": "p",
        }
        for i, (row, gold) in enumerate(zip(rows, golds, strict=True))
    ]
    runs = {model: [predict(f"q{i}", row[model]["is_correct"]) for i, row in enumerate(rows)] for model in MODELS}
    return questions, runs


def test_accuracy_of_the_recorded_solutions(recorded):
    questions, runs = recorded
    accuracy = summary.summarize(questions, runs["175b_verification"])["accuracy"]["lenient"]
    assert (accuracy["k"], accuracy["n"]) == (742, 1319)
    assert accuracy["value"] == pytest.approx(0.56255, abs=5e-6)
    assert accuracy["stderr"] == pytest.approx(0.013664, abs=5e-7)
    assert accuracy["wilson"] == pytest.approx([0.53563, 0.58910], abs=5e-6)
    assert accuracy["bootstrap"] == pytest.approx(accuracy["wilson"], abs=0.002)


def test_accuracy_by_steps_of_the_recorded_solutions(recorded):
    questions, runs = recorded
    by_steps = summary.summarize(questions, runs["175b_verification"])["by_steps"]
    assert [*by_steps] == ["2", "3", "4", "5", "6", "7+"]
    shares = [by_steps[steps]["value"] for steps in "23456"]
    assert shares == pytest.approx([0.791, 0.647, 0.522, 0.331, 0.264], abs=5e-4)
    assert by_steps["7+"]["n"] == 63
    assert by_steps["7+"]["k"] == round(0.125 * 40 + 0.150 * 20)  # 7 and 8 steps; none right of the 9 and 11


def test_paired_test_of_the_recorded_solutions(recorded):
    questions, runs = recorded
    result = comparison.compare(questions, runs["6b_verification"], questions, runs["175b_finetuning"])
    assert (result["only_first"], result["only_second"]) == (209, 152)
    assert result["p_value"] == pytest.approx(0.0031507, abs=5e-8)
    assert result["difference"] == pytest.approx(-0.043215, abs=5e-7)  # second minus first
    assert result["stderr"] == pytest.approx(0.014361, abs=5e-7)
    assert result["interval"] == pytest.approx([-0.043215 - 1.96 * 0.014361, -0.043215 + 1.96 * 0.014361], abs=2e-4)
    assert "4.32 points below" in result["sentence"] and "real" in result["sentence"]


def test_pass_at_k_of_the_recorded_solutions(recorded):
    questions, runs = recorded
    samples = [replace(p, sample=i) for i, model in enumerate(MODELS) for p in runs[model]]
    passed = summary.summarize(questions, samples)["pass_at_k"]
    assert [passed[k]["value"] for k in "124"] == pytest.approx([0.37926, 0.53273, 0.67248], abs=5e-6)
    correct = [sum(runs[model][i].correct for model in MODELS) for i in range(len(questions))]
    assert np.mean([stats.pass_at_k(4, c, 3) for c in correct]) == pytest.approx(0.61751, abs=5e-6)


@pytest.mark.parametrize(("n", "hits"), [(13, 3), (10, 9), (8, 80)])
def test_overlap_of_the_published_splits(gsm8k_dir, n, hits):
    train, test = ([row["question"] for row in read(gsm8k_dir / f"{split}.jsonl")] for split in ("train", "test"))
    overlap = train_test_overlap(train, test, n)
    assert (overlap["k"], overlap["n"]) == (hits, 1319)
    if n == 13:
        assert overlap["indices"] == [581, 602, 632]


# ---- one number against its definition ----


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 1319), (1319, 1319), (742, 1319), (3, 7), (2.5, 7)])
def test_wilson_is_where_the_score_test_just_rejects(k, n):
    for bound in stats.wilson(k, n):
        assert 0 <= bound <= 1
        distance = abs(k / n - bound)
        assert distance == pytest.approx(stats.Z * math.sqrt(bound * (1 - bound) / n), abs=1e-12)
    low, high = stats.wilson(k, n)
    assert low <= k / n <= high and low < high


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(k, n):
    with pytest.raises(AssertionError, match="0 <= k <= n"):
        stats.wilson(k, n)


def test_stderr_is_lm_evals():
    values = [1] * 30 + [0] * 70
    assert stats.stderr(values) == pytest.approx(math.sqrt(0.3 * 0.7 / 99), rel=1e-12)
    assert stats.stderr([1]) is None  # lm-eval writes NaN here, which is no JSON


def test_bootstrap_is_seeded_and_agrees_with_resampling_one_by_one():
    values = np.repeat([0.0, 0.25, 1.0], [120, 40, 90])
    assert stats.bootstrap(values) == stats.bootstrap(values[::-1])
    assert stats.bootstrap(values, seed=1) != stats.bootstrap(values, seed=2)
    draws = np.random.default_rng(3).choice(values, size=(20_000, len(values))).mean(axis=1)
    assert stats.bootstrap(values) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.004)
    with pytest.raises(AssertionError, match="at least one"):
        stats.bootstrap([])


@pytest.mark.parametrize(("n", "c", "k", "expected"), [(10, 3, 5, 0.916667), (16, 4, 4, 0.728022), (4, 1, 4, 1), (4, 0, 4, 0)])
def test_pass_at_k_known(n, c, k, expected):
    assert stats.pass_at_k(n, c, k) == pytest.approx(expected, abs=5e-7)


def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_correct_one():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert stats.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_refuses_more_than_was_sampled(n, c, k):
    with pytest.raises(AssertionError, match="k <= n"):
        stats.pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("values", "winner", "tied"),
    [
        (["5"], "5", False),
        (["5", "7", "7"], "7", False),
        (["5", "7", "7", "5"], "5", True),  # first seen
        (["7", "5", "5", "7", "9"], "7", True),
        ([None, None, None, "7"], "7", False),  # completions without an answer do not vote
        ([None, "7", None, "5"], "7", True),
        ([None, None], None, False),
        (["5", "7", "9", "9"], "9", False),
    ],
)
def test_majority(values, winner, tied):
    samples = [predict("q", sample=i, value=value) for i, value in enumerate(values)]
    chosen, was_tied = stats.majority(samples)
    assert (chosen.value, was_tied) == (winner, tied)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 4), (40, 61), (2000, 2100)])
def test_mcnemar_is_the_binomial_tail_and_symmetric(first, second):
    n = first + second
    tail = sum(math.comb(n, i) for i in range(min(first, second) + 1))
    assert stats.mcnemar(first, second) == float(min(Fraction(1), Fraction(2 * tail, 2**n)))
    assert stats.mcnemar(first, second) == stats.mcnemar(second, first)


def test_mcnemar_at_the_edge_of_significance():
    assert stats.mcnemar(5, 0) > 0.05 > stats.mcnemar(6, 0)


@pytest.mark.parametrize("seed", range(8))
def test_sign_flip_is_the_share_of_all_sign_patterns(seed):
    draw = random.Random(seed)
    differences = [draw.randint(-4, 4) * draw.choice([1, 2]) for _ in range(10)]
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(differences))
    ]
    share = sum(total >= abs(sum(differences)) for total in sums) / len(sums)
    assert stats.sign_flip(differences) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (6, 0), (209, 152), (600, 640)])
def test_sign_flip_of_single_samples_is_mcnemar(first, second):
    differences = [-3] * first + [3] * second + [0] * 50  # whatever the scale
    assert stats.sign_flip(differences) == pytest.approx(stats.mcnemar(first, second), rel=1e-9)


@pytest.mark.parametrize(("discordant", "points"), [(0.10, 2.4), (0.15, 3.0), (0.25, 3.9)])
def test_detectable_difference_known(discordant, points):
    assert round(100 * stats.detectable_difference(1319, discordant), 1) == points


@pytest.mark.parametrize(("n", "discordant"), [(1319, 0.15), (300, 0.4), (1319, 0.02)])
def test_detectable_difference_is_found_four_times_in_five(n, discordant):
    true = stats.detectable_difference(n, discordant)
    shares = [(discordant - true) / 2, (discordant + true) / 2, 1 - discordant]
    draws = np.random.default_rng(0).multinomial(n, shares, size=1500)
    found = np.mean([stats.mcnemar(int(a), int(b)) < 0.05 for a, b, _ in draws])
    assert found == pytest.approx(stats.POWER, abs=0.06)


def test_detectable_difference_needs_as_many_changed_verdicts_as_it_is_large():
    for n in (10, 100, 1319):
        share = stats.detectable_difference(n, discordant=0.0)
        assert stats.mcnemar(math.ceil(share * n), 0) < 0.05
    assert stats.detectable_difference(1) == 1.0


@pytest.mark.parametrize("true", [0.0, 0.02, -0.05])
def test_paired_interval_holds_the_true_difference_19_times_in_20(true):
    n, discordant = 300, 0.12
    shares = [(discordant - true) / 2, (discordant + true) / 2, 1 - discordant]
    draws = np.random.default_rng(1).multinomial(n, shares, size=2000)
    intervals = [stats.paired_interval(int(a), int(b), n) for a, b, _ in draws]
    assert np.mean([low <= true <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)
    low, high = stats.paired_interval(0, 0, 20)
    assert low < 0 < high  # 20 equal verdicts do not prove the runs equal


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


# ---- a whole evaluation ----


def test_summary_counts_what_it_says():
    questions = [q | {"num_steps": steps} for q, steps in zip(ask(6), [1, 2, 2, 6, 7, 11], strict=True)]
    predictions = [
        predict("q0"),
        predict("q1", False, finish="length", num_tokens=100, value=None, method="none", format_ok=False),
        predict("q2", finish="length", num_tokens=100, method="last_number", format_ok=False),
        predict("q3", num_markers=3, format_ok=False),
        predict("q4", False),
        predict("q5", method="boxed"),
    ]
    made = summary.summarize(questions, predictions, dataset="d", limit=6, dataset_size=9)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["subset"] == "first 6 of 9"
    assert [(made["accuracy"][rule]["k"]) for rule in ("lenient", "strict")] == [4, 2]
    assert (made["truncated"]["k"], made["truncated"]["accuracy"]["k"]) == (2, 1)
    assert (made["format_ok"]["k"], made["multi_marker"]["k"]) == (3, 1)
    assert {steps: (r["k"], r["n"]) for steps, r in made["by_steps"].items()} == {
        "1": (1, 1),
        "2": (1, 2),
        "6": (1, 1),
        "7+": (1, 2),
    }
    assert [*made["by_method"]] == ["marker", "phrase", "boxed", "last_number", "none"]
    assert sum(r["k"] for r in made["by_method"].values()) == 4
    assert sum(r["share"] for r in made["by_method"].values()) == pytest.approx(1)
    assert made["by_method"]["phrase"]["value"] is None  # no completion, no accuracy
    assert made["completion_tokens"] == {"mean": 40, "median": 10, "p95": 100, "max": 100, "total": 240}
    assert "pass_at_k" not in made


@pytest.mark.parametrize(
    ("n", "limit", "size", "label"),
    [
        (9, None, 9, None),
        (9, 9, 9, None),
        (9, 20, 9, None),
        (5, 5, 1319, "first 5 of 1,319"),
        (5, 5, None, "first 5"),
    ],
)
def test_subset_label(n, limit, size, label):
    assert summary.subset_label(n, limit, size) == label


def sampled(seed, num_samples, n=60, skill=0.0):
    draw = random.Random(seed)
    ability = [min(1, random.Random(i).random() + skill) for i in range(n)]
    right = [[draw.random() < share for _ in range(num_samples)] for share in ability]
    return [
        predict(f"q{i}", hit, sample=s, value="1" if hit else draw.choice(["2", "3", None]))
        for i, row in enumerate(right)
        for s, hit in enumerate(row)
    ]


def test_copies_of_a_sample_add_no_certainty():
    single = sampled(0, 1)
    copies = [replace(p, sample=s) for p in single for s in range(8)]
    one, eight = (summary.summarize(ask(60), rows) for rows in (single, copies))
    assert eight["accuracy"]["lenient"]["n"] == 480
    for key in ("value", "wilson", "bootstrap", "stderr"):
        assert eight["accuracy"]["lenient"][key] == pytest.approx(one["accuracy"]["lenient"][key])
    for k in "1248":
        assert eight["pass_at_k"][k]["value"] == pytest.approx(one["accuracy"]["lenient"]["value"])
        assert eight["maj_at_k"][k]["k"] == one["accuracy"]["lenient"]["k"]


def test_samples():
    made = summary.summarize(ask(60), sampled(1, 6))
    assert [*made["pass_at_k"]] == [*made["maj_at_k"]] == ["1", "2", "4", "6"]
    assert made["pass_at_k"]["1"]["value"] == pytest.approx(made["accuracy"]["lenient"]["value"])
    rising = [share["value"] for share in made["pass_at_k"].values()]
    assert rising == sorted(rising)
    assert made["maj_at_k"]["1"]["ties"] == 0 < made["maj_at_k"]["2"]["ties"]


def test_order_of_predictions_does_not_matter():
    rows = sampled(2, 4)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert summary.summarize(ask(60), rows) == summary.summarize(ask(60), shuffled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "finish"),
        (lambda rows: [*rows, rows[0]], "finish"),
        (lambda rows: [*rows, predict("stranger")], "stranger"),
        (lambda rows: [*rows[:-1], replace(rows[-1], sample=1)], "expected"),
        (lambda rows: [*rows, replace(rows[0], sample=1)], "expected"),
        (lambda rows: [], "expected"),
        (lambda rows: [*rows[:-1], replace(rows[-1], grader="2")], "regrade"),
    ],
)
def test_incomplete_or_mixed_predictions_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        summary.summarize(ask(3), change([predict(f"q{i}") for i in range(3)]))


def test_no_questions_and_double_questions_are_refused():
    with pytest.raises(UserError, match="no questions"):
        summary.summarize([], [])
    with pytest.raises(UserError, match="unique"):
        summary.summarize([*ask(2), ask(1)[0]], [predict("q0"), predict("q1")])


# ---- is the difference real? ----


def test_compare_says_real_or_chance_and_turns_around():
    better = [predict(f"q{i}", i >= 5) for i in range(40)]
    worse = [predict(f"q{i}", i >= 25) for i in range(40)]
    up = comparison.compare(ask(40), worse, ask(40), better, names=("base", "sft"))
    down = comparison.compare(ask(40), better, ask(40), worse, names=("sft", "base"))
    assert up["real"] and up["difference"] == pytest.approx(0.5) == pytest.approx(-down["difference"])
    assert up["interval"] == pytest.approx([-bound for bound in reversed(down["interval"])])
    assert up["p_value"] == down["p_value"]
    assert up["sentence"].startswith("sft is 50.00 points above base (37.50 % -> 87.50 %, n = 40,")
    almost = [replace(better[0], correct=True), *better[1:]]
    chance = comparison.compare(ask(40), better, ask(40), almost)
    assert not chance["real"] and "within chance" in chance["sentence"]
    same = comparison.compare(ask(40), better, ask(40), better, subset="first 40 of 1,319")
    assert same["p_value"] == 1 and "level with" in same["sentence"] and "first 40 of 1,319" in same["sentence"]


def test_compare_matches_questions_by_id():
    rows, other = sampled(3, 1), sampled(4, 1)
    straight = comparison.compare(ask(60), rows, ask(60), other)
    assert straight == comparison.compare(ask(60), rows, ask(60)[::-1], other[::-1])


def test_compare_strict_reads_strict():
    first = [predict(f"q{i}") for i in range(10)]
    second = [predict(f"q{i}", method="last_number") for i in range(10)]
    assert comparison.compare(ask(10), first, ask(10), second)["difference"] == 0
    assert comparison.compare(ask(10), first, ask(10), second, metric="strict")["difference"] == -1


def test_compare_of_copied_samples_is_mcnemar():
    first, second = sampled(5, 1), sampled(6, 1, skill=0.2)
    single = comparison.compare(ask(60), first, ask(60), second)
    for copies in (2, 3):
        twins = [replace(p, sample=s) for p in second for s in range(copies)]
        several = comparison.compare(ask(60), first, ask(60), twins)
        assert several["test"] == "exact sign-flip"
        for key in ("p_value", "difference", "stderr", "only_first", "discordant"):
            assert several[key] == pytest.approx(single[key])
        assert several["interval"] == pytest.approx(single["interval"], abs=0.03)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ask(3)[:2], "different questions"),
        ([*ask(2), ask(4)[3]], "different questions"),
        ([*ask(2), ask(3)[2] | {"answer": "2"}], "gold answers .* differ in 1 of 3 rows, first 'q2'"),
        ([*ask(2), ask(3)[2] | {"question": "?"}], "questions .* differ in 1 of 3"),
        (ask(3, prompt="other"), "prompts .* differ in 3 of 3"),
    ],
)
def test_compare_refuses_runs_that_were_asked_different_things(rows, message):
    first = [predict(f"q{i}") for i in range(3)]
    second = [predict(row["id"]) for row in rows]
    with pytest.raises(UserError, match=message):
        comparison.compare(ask(3), first, rows, second)


def test_compare_across_prompts_is_labelled_and_across_graders_refused():
    rows = [predict(f"q{i}") for i in range(3)]
    result = comparison.compare(ask(3), rows, ask(3, prompt="other"), rows, require_same_prompt=False)
    assert result["same_prompt"] is False and "prompts differ" in result["sentence"]
    with pytest.raises(UserError, match="gold"):  # the questions must be equal even then
        comparison.compare(ask(3), rows, [q | {"answer": "9"} for q in ask(3)], rows, require_same_prompt=False)
    with pytest.raises(UserError, match="regrade"):
        comparison.compare(ask(3), rows, ask(3), [replace(p, grader="2") for p in rows])


def test_p_is_never_printed_as_zero():
    assert [comparison.format_p(p) for p in (0.0, 1e-9, 0.0031507, 0.0499, 0.4, 1.0)] == [
        "< 0.0001",
        "< 0.0001",
        "= 0.0032",
        "= 0.0499",
        "= 0.40",
        "= 1.00",
    ]


@pytest.mark.parametrize("hits", [0, 1, 601, 1318, 1319])
def test_a_rate_is_printed_alike_everywhere(hits):
    rate = summary.rate((str(i), i < hits) for i in range(1319))
    low, high = stats.wilson(hits, 1319)
    assert summary.with_interval(rate) == f"{hits / 1319:.2%} [{low:.2%}, {high:.2%}]"
    assert summary.percents(rate) == tuple(f"{share:.2%}".removesuffix("%") for share in (hits / 1319, low, high))
    assert summary.interval({"value": 0.5, "bootstrap": [0.4, 0.6]}) == (0.4, 0.6)


# ---- contamination ----


def test_overlap_ignores_case_and_punctuation_and_needs_n_words_in_a_row():
    train = ["One two, three FOUR five."]
    assert train_test_overlap(train, ["zero one two three four", "one two x three four"], n=4)["k"] == 1
    assert train_test_overlap(train, ["three four five", "one two three"], n=4)["k"] == 0
    assert train_test_overlap(["short text"], ["Short text!", "text"], n=4)["indices"] == [0]

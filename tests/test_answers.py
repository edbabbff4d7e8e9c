"""What each kind of answer pays for and what not: tables of texts, each with a reason. Numbers behind ####: test_rewards.py."""

import importlib.util
import time

import pytest
from grading_cases import VERDICTS

import rewards
from posttrain.config.schema import Answer, Rewards
from posttrain.errors import UserError
from posttrain.evaluation.predictions import grade_completion
from posttrain.evaluation.stats import majority
from posttrain.records import Example
from posttrain.tasks import expressions
from posttrain.tasks.answers import grader_of, other_answers
from posttrain.tasks.examples import gold_problem, in_form
from posttrain.tasks.forms import Form
from posttrain.tasks.graders import NUMBERS
from posttrain.tasks.rows import Row
from posttrain.training.rollouts import reward_functions

HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
needs_math_verify = pytest.mark.skipif(not HAS_MATH_VERIFY, reason="the extra expression is not installed")
FORMS = (
    "Answer: {answer}",
    r"\boxed{{answer}}",
    "<answer>{answer}</answer>",
    "Final result -> {answer}",
    "The answer is {answer}.",
)


def grader(kind="number", form="#### {answer}", options=None):
    return grader_of({"kind": kind, "form": form, "options": options})


# --- numbers in another form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("said", "correct", "strict"),
    [
        ("6*7=42\n{42}", True, True),
        ("{42}", True, True),
        ("{41}", False, False),
        ("{41}\n{42}", True, True),  # the last statement counts, as one guess: see `once`
        ("{42}\n{41}", False, False),
        ("{42 or 43}", False, False),
        ("{41 or 42}", False, False),
        ("{42, 43}", False, False),
        ("{41, 42}", False, False),
        ("{3:42}", False, False),
        ("{42}\n\nQuestion: How many pens?\n{3}", True, True),  # a run-on is not read
        ("#### 42", True, False),  # right, and not in the form that was asked for
        ("So it is 42.", True, False),
        ("", False, False),
    ],
)
def test_a_number_in_another_form(form, said, correct, strict):
    text = said.replace("{", "\0").replace("}", "\1")
    before, after = form.split("{answer}")
    verdict = grader(form=form).grade(text.replace("\0", before).replace("\1", after), "42")
    assert (verdict.correct, verdict.strict) == (correct, strict)


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_the_last_line_once_and_plain(form):
    judge = grader(form=form)
    write = judge.form.write
    assert judge.has_format(f"6*7=42\n{write('42')}") and judge.has_format(f"so\n{write('-1,234.5')}\n")
    for text in (
        f"so {write('42')}",
        f"{write('42')}\nDone.",
        f"{write('41')}\n{write('42')}",
        write("42 apples"),
        write("forty"),
        write(""),
        write(" 42"),
        write("6*7"),
        "#### 42",
        "42",
    ):
        assert not judge.has_format(text), text


@pytest.mark.parametrize("form", FORMS)
def test_what_the_number_grader_refuses_is_refused_in_every_form(form):
    """Completions that end in `#### x`, with that line in another form: wherever today's verdict is strict, so is this one."""
    judge, seen = grader(form=form), 0
    for text, gold, correct, _ in VERDICTS:
        working, *answers = text.split("####")
        if len(answers) == 1 and rewards.canonical_number(answers[0]) and "\n" not in answers[0].strip():
            seen += 1
            assert judge.grade(f"{working}{judge.form.write(answers[0].strip())}", gold).correct == correct, text
    assert seen > 60


def test_the_default_grader_is_the_one_of_rewards():
    assert grader_of(None) is grader_of({}) is grader_of(Answer().model_dump()) is NUMBERS
    assert NUMBERS.name == rewards.GRADER_VERSION
    for text, gold, *_ in VERDICTS:
        assert NUMBERS.grade(text, gold) == rewards.grade(text, gold)
        assert NUMBERS.has_format(text) == rewards.grade(text, gold).format_ok


# --- choice -----------------------------------------------------------------------------------------------------------

CHOICES = [  # text, gold, right, strict, why
    ("2 + 2\nAnswer: B", "B", True, True, "the form"),
    ("Answer: A", "B", False, False, "another letter"),
    ("Answer: (B)", "B", True, True, "in brackets"),
    ("Answer: **B**", "B", True, True, "bold"),
    ("**Answer:** B", "B", True, True, "a bold label"),
    ("Answer: B) 42", "B", True, True, "with what stands beside it"),
    ("Answer: B. Paris", "B", True, True, "the same with a point"),
    ("The answer is B.", "B", True, False, "a sentence"),
    ("The correct answer is (B).", "B", True, False, "a sentence with brackets"),
    ("The answer is option B", "B", True, False, "named as an option"),
    (r"The answer is $\boxed{B}$.", "B", True, False, "a box in a sentence"),
    (r"So \boxed{B}", "B", True, False, "a box"),
    (r"\boxed{\text{B}}", "B", True, False, "a box with text"),
    ("The answer is B because A is wrong", "B", True, False, "a reason that begins as with an article"),
    ("The answer is B because not A", "B", False, False, "two options are named: none is stated"),
    ("The answer is B, as it is even.", "B", True, False, "a reason"),
    ("B", "B", True, False, "nothing but the letter"),
    ("(B)", "B", True, False, "the same in brackets"),
    ("It is even.\nB.", "B", True, False, "a last line that is the letter"),
    ("Answer: B\n\nQuestion: Which one?\nAnswer: C", "B", True, True, "a run-on"),
    ("Answer: A, B, C, D", "A", False, False, "all letters, the first is right"),
    ("Answer: A, B, C, D", "D", False, False, "all letters, the last is right"),
    ("Answer: A B C D", "A", False, False, "all letters with spaces"),
    ("Answer: ABCD", "A", False, False, "all letters as a word"),
    ("Answer: A/B/C/D", "A", False, False, "all letters with slashes"),
    ("Answer: (A) (B) (C) (D)", "A", False, False, "all letters in brackets"),
    ("Answer: A\nAnswer: B\nAnswer: C\nAnswer: D", "D", False, False, "all letters in the form"),
    ("Answer: A\nAnswer: B\nAnswer: C\nAnswer: D", "A", False, False, "the first of them is no better"),
    ("The answer is A. The answer is B. The answer is C.", "C", False, False, "all letters in sentences"),
    ("A\nB\nC\nD", "D", False, False, "all letters on lines"),
    ("A) 1\nB) 2\nC) 3\nD) 4", "D", False, False, "the options repeated"),
    ("Answer: A or B", "A", False, False, "a hedge"),
    ("Answer: A or B", "B", False, False, "a hedge the other way"),
    ("Answer: either A or B", "A", False, False, "a hedge with a word before"),
    ("Answer: A and B", "B", False, False, "two answers"),
    ("Answer: not B", "B", False, False, "a negation"),
    ("Answer: anything but B", "B", False, False, "an exclusion"),
    ("Answer: a", "A", False, False, "a small letter is a word"),
    ("The answer is a dog.", "A", False, False, "the article"),
    ("The answer is A dog.", "A", False, False, "the article at the head of a phrase"),
    ("A dog barks.", "A", False, False, "the article at the head of a text"),
    ("Answer: B\nA dog barks.", "B", True, True, "the article beside an answer"),
    ("Answer: Because", "B", False, False, "a word that begins with the letter"),
    ("because cab", "C", False, False, "small letters inside of words"),
    ("Answer: E", "A", False, False, "a letter that is no option"),
    ("Answer: B'", "B", True, True, "a stray quote"),
    ("Answer:", "A", False, False, "nothing"),
    ("", "A", False, False, "an empty text"),
]


@pytest.mark.parametrize(("text", "gold", "correct", "strict", "why"), CHOICES, ids=[row[4] for row in CHOICES])
def test_a_choice(text, gold, correct, strict, why):
    judge = grader("choice", "Answer: {answer}", ["A", "B", "C", "D"])
    verdict = judge.grade(text, gold)
    assert (verdict.correct, verdict.strict) == (correct, strict)


def test_a_gold_that_is_no_option_is_an_error():
    with pytest.raises(ValueError, match="gold answer 'E' is no one of A, B; run data_prep.py"):
        grader("choice", "Answer: {answer}", ["A", "B"]).grade("Answer: E", "E")


def test_no_text_is_right_for_two_letters():
    judge = grader("choice", "Answer: {answer}", ["A", "B", "C", "D"])
    for text, *_ in CHOICES:
        assert sum(judge.grade(text, letter).correct for letter in "ABCD") <= 1


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("so\nAnswer: B", True),
        ("Answer: B\n", True),
        ("Answer: (B)", False),
        ("Answer: B.", False),
        ("Answer: b", False),
        ("Answer: E", False),
        ("Answer: A\nAnswer: B", False),
        ("Answer: A B", False),
        ("so Answer: B", False),
        ("Answer: B\nDone.", False),
        ("B", False),
    ],
)
def test_the_format_of_a_choice(text, well_formed):
    assert grader("choice", "Answer: {answer}", ["A", "B", "C", "D"]).has_format(text) == well_formed


# --- text -------------------------------------------------------------------------------------------------------------

YES_NO = [
    ("4 > 3\nAnswer: yes", "yes", True, True, "the form"),
    ("Answer: Yes.", "yes", True, True, "a capital and a point"),
    ("Answer: **yes**", "yes", True, True, "bold"),
    ("Answer: no", "yes", False, False, "the other one"),
    ("The answer is yes.", "yes", True, False, "a sentence"),
    ("Answer: yes, because 4 > 3", "yes", True, True, "a reason"),
    ("Yes.", "yes", True, False, "the word alone"),
    ("Answer: yes and no", "yes", False, False, "both"),
    ("Answer: yes and no", "no", False, False, "both, the other way"),
    ("Answer: yes, no", "yes", False, False, "a list"),
    ("Answer: yes/no", "yes", False, False, "a list with a slash"),
    ("Answer: yes or no", "no", False, False, "a hedge"),
    ("Answer: yes\nAnswer: no", "no", False, False, "both in the form"),
    ("yes\nno", "no", False, False, "both on lines"),
    ("Answer: not yes", "yes", False, False, "a negation"),
    ("Answer: no one knows", "no", False, False, "another meaning of the word"),
    ("Answer: yesterday", "yes", False, False, "a longer word"),
    ("Yes, it may be.\nI do not know.", "yes", False, False, "not stated as the answer"),
    ("", "no", False, False, "an empty text"),
]


@pytest.mark.parametrize(("text", "gold", "correct", "strict", "why"), YES_NO, ids=[row[4] for row in YES_NO])
def test_yes_or_no(text, gold, correct, strict, why):
    verdict = grader("text", "Answer: {answer}", ["yes", "no"]).grade(text, gold)
    assert (verdict.correct, verdict.strict) == (correct, strict)


def test_an_option_may_hold_another():
    judge = grader("text", "Answer: {answer}", ["no", "no one", "all of them"])
    assert judge.grade("Answer: no one", "no one").correct and not judge.grade("Answer: no one", "no").correct
    assert judge.grade("The answer is no.", "no").correct and not judge.grade("Answer: no or no one", "no one").correct


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("Answer: Paris", True),
        ("Answer: paris.", True),
        ('Answer: "Paris"', True),
        ("Answer:  PARIS ", True),
        ("The answer is Paris.", True),
        ("Answer: Paris and London", False),
        ("Answer: Paris, London", False),
        ("Answer: London\nParis", False),
        ("Answer: not Paris", False),
        ("Answer: Parisian", False),
        ("Paris", False),
        ("", False),
    ],
)
def test_any_text_is_compared_whole(text, correct):
    assert grader("text", "Answer: {answer}").grade(text, "Paris").correct == correct


# --- expressions ------------------------------------------------------------------------------------------------------

EXPRESSIONS = [
    (r"\boxed{6x+5}", "6x+5", True, "the form"),
    (r"\boxed{5+6x}", "6x+5", True, "another order"),
    (r"\boxed{ 6 x + 5 }", "6x+5", True, "spaces"),
    (r"\boxed{6\cdot x+5}", "6x+5", False, "an operation more than the gold has"),
    (r"\boxed{y = 6x+5}", "6x+5", True, "with what is looked for"),
    (r"\boxed{6x+4}", "6x+5", False, "another expression"),
    (r"\boxed{\frac{x}{2}}", "0.5x", True, "a fraction for a decimal"),
    (r"\boxed{0.5x}", r"\frac{x}{2}", True, "a decimal for a fraction"),
    (r"\boxed{\sqrt{18}}", r"3\sqrt{2}", True, "a root"),
    (r"\boxed{4.2426}", r"3\sqrt{2}", False, "a root rounded"),
    (r"\boxed{3.14159265358979}", r"\pi", False, "pi rounded"),
    (r"\boxed{\frac{10}{4}}", r"\frac{5}{2}", True, "a number: as a fraction"),
    (r"\boxed{2.5}", r"\frac{5}{2}", True, "a number: as a decimal"),
    (r"\boxed{2+\frac{1}{2}}", r"\frac{5}{2}", False, "a number: a sum is not computed"),
    (r"\boxed{x = \frac{5}{2}}", r"\frac{5}{2}", True, "a number: with its unknown"),
    (r"\boxed{5, 6}", "5", False, "a list where a scalar is asked for"),
    (r"\boxed{(5, 6)}", "5", False, "a tuple where a scalar is asked for"),
    (r"\boxed{(x, 2x)}", "x", False, "a tuple of expressions"),
    (r"\boxed{\{5\}}", "5", False, "a set"),
    (r"\boxed{(1, 2)}", "(1,2)", True, "a tuple where one is asked for"),
    (r"\boxed{(2, 1)}", "(1,2)", False, "in another order"),
    (r"\boxed{(1, 2, 3)}", "(1,2)", False, "one more"),
    (r"\boxed{6x+5=6x+5}", "6x+5", False, "an equation"),
    (r"\boxed{3x^2+5x=x(3x+5)=6x+5}", "6x+5", False, "a chain"),
    (r"\boxed{y=6x+5=5+6x}", "6x+5", False, "a chain that is true"),
    (r"\boxed{\frac{d}{dx}(3x^2+5x)}", "6x+5", False, "what was to be computed"),
    (r"\boxed{(8x+7)-(2x+2)}", "6x+5", False, "the question repeated"),
    (r"\boxed{6x+5\text{ or }7}", "6x+5", False, "a hedge"),
    (r"\boxed{6x+5 or 7}", "6x+5", False, "a hedge in plain words"),
    (r"\boxed{\pm x}", "x", False, "two signs"),
    (r"\boxed{foo}", "6x+5", False, "a word"),
    (r"\boxed{6x+}", "6x+5", False, "half an expression"),
    (r"\boxed{}", "6x+5", False, "nothing"),
    (r"\boxed{6x 5}", "6x+5", False, "two side by side"),
    (r"\boxed{\input{x}}", "x", False, "a command"),
    (r"\boxed{6x+5", "6x+5", True, "a box that does not close"),
    (r"\boxed{9^{9^{9^9}}x}", "x", False, "a tower of powers"),
    (r"\boxed{1}" + "\n" + r"\boxed{6x+5}", "6x+5", True, "the last of two boxes"),
    (r"\boxed{6x+5}" + "\n" + r"\boxed{1}", "6x+5", False, "not the first of two"),
    ("The answer is $6x+5$.", "6x+5", True, "a sentence"),
    ("It is 6x+5.", "6x+5", False, "not stated as the answer"),
]


@needs_math_verify
@pytest.mark.parametrize(("text", "gold", "correct", "why"), EXPRESSIONS, ids=[row[3] for row in EXPRESSIONS])
def test_an_expression(text, gold, correct, why):
    verdict = grader("expression", r"\boxed{{answer}}").grade(text, gold)
    assert verdict.correct == correct
    assert verdict.strict == (correct and "box" in text)


@needs_math_verify
@pytest.mark.parametrize(
    ("answer", "well_formed"),
    [("6x+5", True), ("x", True), ("0.5", True), ("6x+", False), ("foo", False), ("x or y", False), ("", False), (" x", False)],
)
def test_the_format_of_an_expression_is_for_what_can_be_read(answer, well_formed):
    judge, text = grader("expression", r"\boxed{{answer}}"), rf"so{chr(10)}\boxed{{{answer}}}"
    assert judge.has_format(text) == judge.grade(text, "7x").format_ok == well_formed


@needs_math_verify
def test_equal_expressions_vote_together():
    judge, example = grader("expression", r"\boxed{{answer}}"), Example("q", "test", "?", [], [], "6x+5", 1)
    texts = (r"\boxed{x-1}", r"\boxed{5+6x}", r"\boxed{-1+x}", r"\boxed{6x+5}", r"\boxed{3x-2x - 1}")
    samples = [grade_completion(example, n, text, "stop", 1, judge) for n, text in enumerate(texts)]
    assert [sample.value for sample in samples] == ["x - 1", "6x+5", "x - 1", "6x+5", "x - 1"]
    assert majority(samples)[0].value == "x - 1"


@pytest.mark.slow
@needs_math_verify
def test_what_takes_too_long_is_killed_and_the_next_pair_is_answered():
    worker = expressions.Worker(seconds=0.5)
    powers = "+".join(f"(x+{n})^{{99}}" for n in range(20))
    worker.ask({"value": "x", "gold": "x"})
    first = worker.process.pid
    started = time.monotonic()
    assert worker.ask({"value": f"({powers})^{{50}}", "gold": "(x+2)^{500}+(y+x)^{900}"}) == {}
    assert time.monotonic() - started < 5 and worker.process is None
    worker.seconds = 60.0
    assert worker.ask({"value": "x+1", "gold": "1+x"})["equal"] and worker.process.pid != first
    worker.kill()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(expressions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[expression\]'"):
        grader("expression", "a form of this test alone: {answer}")


# --- every kind and form ----------------------------------------------------------------------------------------------

KINDS = [("number", None, "42"), ("choice", ["A", "B"], "B"), ("text", ["yes", "no"], "no"), ("text", None, "Paris in May")]
KINDS += [("expression", None, r"\frac{1}{2}x")] if HAS_MATH_VERIFY else []


@pytest.mark.parametrize("form", ["#### {answer}", *FORMS])
@pytest.mark.parametrize(("kind", "options", "gold"), KINDS)
def test_a_source_is_written_in_the_form_and_grades_itself(form, kind, options, gold):
    judge = grader(kind, form, options)
    for written in (f"6 * 7 is it.\n#### {gold}", f"6 * 7 is it. #### {gold}", f"6 * 7 is it.\n{judge.form.write(gold)}"):
        row = in_form(Row("f", 1, "train", "How many?", written), judge)
        assert not gold_problem(row.answer, judge)
        assert row.answer.startswith("6 * 7 is it.\n") and row.answer.count("\n") == 1
        assert judge.gold(row.answer) == judge.canonical(gold)
    assert judge.form.of_last_line(row.answer) == gold


@pytest.mark.parametrize(
    ("kind", "options", "solution", "reason"),
    [
        ("choice", ["A", "B"], "so\n#### C", "gold answer is no one of A, B: 'C'"),
        ("choice", ["A", "B"], "so\n#### A or B", "no one of A, B"),
        ("choice", ["A", "B"], "so A", "has 0 '####', 0 boxes and no one last line 'Answer: {answer}'"),
        ("choice", ["A", "B"], "#### A\n#### B", "has 2 '####'"),
        ("choice", ["A", "B"], "Answer: A\nno\n#### B", "the working states an answer as well, 'Answer:'"),
        ("text", ["yes", "no"], "so\n#### maybe", "no one of yes, no: 'maybe'"),
        ("number", None, "so\n#### many", "no number: 'many'"),
    ],
)
def test_a_solution_without_one_answer_is_rejected_with_the_reason(kind, options, solution, reason):
    judge = grader(kind, "Answer: {answer}", options)
    assert reason in gold_problem(in_form(Row("f", 1, "train", "?", solution), judge).answer, judge)


def test_a_solution_that_ends_in_a_box_is_written_in_another_form():
    row = in_form(Row("f", 1, "train", "?", r"It is $\boxed{42}$, as asked."), grader(form="Answer: {answer}"))
    assert row.answer == "It is $42$, as asked.\nAnswer: 42"


@pytest.mark.parametrize(("kind", "options", "gold"), KINDS)
def test_the_rewards_pay_what_evaluation_says(kind, options, gold):
    judge = grader(kind, "Answer: {answer}", options)
    functions, weights = reward_functions(Rewards(), judge)
    assert [function.__name__ for function in functions] == ["correctness_reward", "format_reward"] and weights == [1.0, 1.0]
    texts = [f"so\nAnswer: {gold}", f"The answer is {gold}.", "no idea", f"Answer: {gold}\nAnswer: {gold}"]
    rows = [grade_completion(Example("q", "test", "?", [], [], gold, 1), 0, text, "stop", 1, judge) for text in texts]
    assert functions[0](texts, answer=[gold] * 4) == [float(row.correct) for row in rows]
    assert functions[1](texts, answer=[gold] * 4) == [0.2 * row.format_ok for row in rows]
    assert [row.correct for row in rows][:3] == [True, True, False] and [row.format_ok for row in rows] == [True] + [False] * 3
    assert {row.grader for row in rows} == {judge.name} != {rewards.GRADER_VERSION}
    gated, _ = reward_functions(Rewards(gate_format=True), judge)
    assert gated[1].__name__ == "gated_format_reward" and gated[1](texts, answer=[gold] * 4) == [0.2, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_found_where_it_was_written(form):
    written = Form(form)
    text = f"so\n{written.write('x')}\n{written.write('y')}"
    assert [content for _, _, content in written.places(text)] == ["x", "y"] and written.of_last_line(text) == "y"
    assert [text[start:end] for start, end, _ in written.places(text)] == [written.write("x"), written.write("y")]


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 20_000, "Answer: " * 20_000, "<answer>" * 20_000, "A B " * 50_000, "####" * 50_000]
)
@pytest.mark.parametrize(("kind", "options", "gold"), KINDS)
def test_a_long_text_gets_its_verdict_in_time(text, kind, options, gold):
    started = time.monotonic()
    for form in ("Answer: {answer}", r"\boxed{{answer}}"):
        assert not grader(kind, form, options).grade(text, gold).strict
    assert time.monotonic() - started < 10


def test_answers_of_another_grader_are_told():
    chain = [{"name": "sft", "data": {"answer": {"kind": "number", "form": "Answer: {answer}"}}}, {"name": "old", "data": {}}]
    [said] = other_answers(chain, {"name": "gsm8k"})
    version = rewards.GRADER_VERSION
    assert said == f"sft was trained on answers of grader number-{version}.1 'Answer: {{answer}}', this data has {version}"
    assert other_answers(chain[:1], chain[0]["data"]) == []

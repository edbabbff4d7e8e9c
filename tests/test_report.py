"""The report says what its run directories say, refuses what must not be compared, changes nothing else."""

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import unescape
from pathlib import Path

import made_runs
import pytest

from posttrain import report
from posttrain.errors import UserError
from posttrain.evaluation.comparison import compare
from posttrain.evaluation.recorded import check_results
from posttrain.evaluation.summary import summarize
from posttrain.records import Prediction, read_jsonl, read_rows, write_jsonl
from posttrain.report import charts, figures, page, tables, together, words
from posttrain.report.charts import Chart, Point, Series
from posttrain.report.groups import load
from posttrain.runs.manifest import read_manifest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    made_runs.make_runs(root, num_questions=90, hostile=3)
    return root


@pytest.fixture
def runs(original, tmp_path):
    """A copy that a test may break; its parents' paths still name the original, which is then not there."""
    shutil.copytree(original, tmp_path / "runs")
    for file in (tmp_path / "runs").glob("*/manifest.json"):
        file.write_text(file.read_text().replace(str(original), "gone"))
    return tmp_path / "runs"


def evals(root, *names):
    return [root / f"eval_{name}" for name in names or ("base", "sft", "sft-long", "grpo")]


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def texts(table):
    return [[cell[0] for cell in row] for row in table]


# ---- tables ----


def test_table_holds_the_numbers_of_the_predictions(original):
    group = load(evals(original))[0][0]
    table = texts(tables.result_table(group))
    for row, folder in zip(table[1:], evals(original), strict=True):
        questions, rows = (
            [*read_rows(folder / "questions.jsonl")],
            read_jsonl(folder / "predictions.jsonl", Prediction),
        )
        lenient = sum(p.correct for p in rows) / len(rows)
        strict = sum(p.strict for p in rows) / len(rows)
        cut = sum(p.finish == "length" for p in rows) / len(rows)
        assert row[:5] == [
            folder.name[5:],
            "90",
            f"{100 * lenient:.2f} %",
            f"{100 * strict:.2f} %",
            f"{100 * cut:.1f} %",
        ]
        low, high = summarize(questions, rows)["accuracy"]["lenient"]["wilson"]
        assert f"({100 * low:.2f} to {100 * high:.2f})" in tables.markdown(tables.result_table(group))


def test_rows_follow_the_chain_and_are_held_against_their_parent(original):
    for order in (("grpo", "sft-long", "base", "sft"), ("sft", "grpo", "sft-long", "base")):
        group = load(evals(original, *order))[0][0]
        names = [run.label for run in group.runs]
        assert names[0] == "base" and names[-1] == "grpo"
        before = {run.label: group.before(i) for i, run in enumerate(group.runs)}
        assert before["base"] is None
        assert names[before["grpo"]] == "sft-long"  # its parent, wherever that row stands
    assert [tables.result_table(group)[i][7][1] for i in range(1, 5)][-1] == "to sft-long"


def test_another_base_model_is_not_held_against_this_one(runs):
    edit(
        runs / "eval_base" / "manifest.json",
        model={"name_or_path": "Instruct", "quantization": "nf4", "dtype": "x"},
    )
    group = load(evals(runs))[0][0]
    assert [group.before(i) for i in range(4)] == [None, None, 1, 2]


def test_a_first_adapter_is_held_against_the_bare_model_of_its_quantization(runs):
    shutil.copytree(runs / "eval_base", runs / "eval_unpacked")
    model = read_manifest(runs / "eval_base").model | {"quantization": "none"}
    edit(runs / "eval_unpacked" / "manifest.json", name="unpacked", model=model)
    group = load(evals(runs, "base", "unpacked", "sft", "sft-long"))[0][0]
    assert [run.label for run in group.runs] == ["base", "unpacked", "sft", "sft-long"]
    assert [group.before(i) for i in range(4)] == [None, 0, 0, 0]


def test_differences_are_the_paired_tests(original):
    group = load(evals(original))[0][0]
    first, second = ([*read_rows(f / "questions.jsonl")] for f in evals(original, "sft-long", "grpo"))
    a, b = (read_jsonl(f / "predictions.jsonl", Prediction) for f in evals(original, "sft-long", "grpo"))
    result = compare(first, a, second, b, names=("sft-long", "grpo"))
    assert group.steps[0]["sentence"] == result["sentence"]
    assert result["sentence"] in report.console_report(evals(original))
    row = next(row for row in tables.pair_table(group) if row[0][0].startswith("sft-long"))
    assert [cell[0] for cell in row[1:4]] == [
        str(result["only_first"]),
        str(result["only_second"]),
        f"{100 * result['difference']:+.2f}",
    ]
    assert len(group.comparisons) == 6
    assert all(pair["p_holm"] >= pair["p_value"] for pair in group.comparisons.values())


def test_a_subset_is_labelled_everywhere(tmp_path):
    folders = made_runs.make_runs(tmp_path, num_questions=20, limit=20, training=False)
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(report.MARKERS))
    report.update_readme(readme, folders)
    html = report.write_report(folders, tmp_path / "out").read_text()
    label = "first 20 of 1,319"
    said = [
        readme.read_text(),
        report.console_report(folders),
        (tmp_path / "out" / "report.md").read_text(),
        html,
    ]
    assert all(text.count(label) >= 5 for text in said)  # the title and every row
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    assert data["groups"][0]["subset"] == label
    assert all(label in step["sentence"] for step in load(folders)[0][0].steps)


def test_runs_over_other_questions_get_a_table_of_their_own(original, tmp_path):
    small = made_runs.make_runs(tmp_path, num_questions=20, limit=20, training=False)
    groups, _ = load([*evals(original), *small])
    assert [(len(group.runs), group.runs[0].results["n"]) for group in groups] == [(4, 90), (4, 20)]


def test_other_prompts_are_compared_but_marked(runs):
    file = runs / "eval_base" / "questions.jsonl"
    rows = [row | {"prompt": "Q: " + row["question"], "prompt_sha256": "other"} for row in read_rows(file)]
    write_jsonl(file, rows)
    text = report.console_report(evals(runs))
    row = next(line for line in text.splitlines() if line.startswith("| sft (SFT)"))
    assert "\N{DAGGER}" in row
    assert "\N{DAGGER}" not in next(line for line in text.splitlines() if line.startswith("| grpo"))
    group, trainings = load(evals(runs))[0][0], []
    assert any("prompted differently" in note for note in tables.notes(group, trainings))


def test_notes_name_what_differs_and_what_was_not_honoured(runs):
    model = {"name_or_path": made_runs.BASE, "quantization": "none", "dtype": "bfloat16"}
    edit(runs / "eval_base" / "manifest.json", model=model)
    groups, trainings = load(evals(runs))
    notes = " ".join(tables.notes(groups[0], trainings))
    assert "quantization of the base weights differs" in notes and "base none, sft nf4" in notes
    assert "sft: paged_adamw_32bit needs CUDA" in notes
    assert "dtype of" not in notes


def test_samples_add_pass_and_majority(tmp_path):
    folders = made_runs.make_runs(tmp_path, num_questions=25, num_samples=4, training=False)
    group = load(folders)[0][0]
    header, *rows = texts(tables.result_table(group))
    assert header[8:11] == ["Sign-flip p", "pass@4", "maj@4"]
    here, there = (group.runs[i].results["pass_at_k"]["4"]["value"] for i in (-1, group.before(len(group.runs) - 1)))
    assert rows[-1][9] == f"{100 * here:.2f} %, {100 * (here - there):+.2f}"
    assert "," not in rows[0][9] and rows[-1][7].startswith(("+", "-"))
    assert [chart.name for chart in figures.result_charts(group)][2:] == ["pass_at_k", "maj_at_k"]


def test_published_numbers_without_predictions_make_a_table_without_tests(runs):
    for folder in evals(runs):
        (folder / "predictions.jsonl").unlink()
    groups, trainings = load(evals(runs))
    assert groups[0].comparisons == {} and groups[0].steps == []
    assert any("Differences are not tested" in note for note in tables.notes(groups[0], trainings))
    _, *rows = texts(tables.result_table(groups[0]))
    here, there = (groups[0].runs[i].results["accuracy"]["lenient"]["value"] for i in (-1, groups[0].before(3)))
    assert [row[8] for row in rows] == ["", *["not tested"] * 3] and rows[-1][7] == f"{100 * (here - there):+.2f}"
    assert page.page_data(groups, [])["groups"] == []
    assert "90" in report.console_report(evals(runs))


def test_a_repeated_run_that_was_published_under_another_name_shows_its_seconds(runs):
    before = texts(tables.result_table(load(evals(runs))[0][0], load(evals(runs))[1]))
    (runs / "grpo").rename(runs / "grpo_second")
    neighbour = runs / "broken"
    neighbour.mkdir()
    (neighbour / "manifest.json").write_text("{")  # a damaged neighbour
    groups, trainings = load(evals(runs))
    assert "grpo_second" in {run.path.name for run in trainings}
    assert texts(tables.result_table(groups[0], trainings)) == before and before[-1][-2] != ""


# ---- what is read ----


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is no run directory"),
        (lambda f: edit(f / "manifest.json", exit="running"), "not finished .running."),
        (lambda f: edit(f / "manifest.json", exit="failed: OutOfMemoryError: x"), "not finished .failed"),
        (lambda f: (f / "results.json").unlink(), "no results.json: evaluate.py --regrade"),
        (lambda f: (f / "predictions.jsonl").write_text(""), "expected"),
    ],
)
def test_a_broken_run_is_refused_with_a_remedy(runs, break_it, message):
    break_it(runs / "eval_sft")
    with pytest.raises(UserError, match=message):
        load(evals(runs))


def test_numbers_that_do_not_belong_to_the_predictions_are_refused(runs):
    file = runs / "eval_grpo" / "predictions.jsonl"
    first, *rest = read_jsonl(file, Prediction)
    write_jsonl(file, [replace(first, correct=not first.correct), *rest])
    with pytest.raises(UserError, match=r"results\.json says .* its predictions give .* --regrade"):
        load(evals(runs))


# The manifests of these runs have no size of a data set.
SHOWN_ELSEWHERE = ("dataset", "dataset_size", "limit", "subset")


def places(value, place=()):
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*place, key))
    elif place[0] not in SHOWN_ELSEWHERE:
        yield place


def test_each_value_of_the_results_is_held_to_the_predictions(runs):
    folder = runs / "eval_grpo"
    results = json.loads((folder / "results.json").read_text())
    rows = (
        read_manifest(folder),
        list(read_rows(folder / "questions.jsonl")),
        read_jsonl(folder / "predictions.jsonl", Prediction),
    )
    check_results(folder, results, *rows)
    changed = 0
    for *above, last in places(results):
        inner = results
        for key in above:
            inner = inner[key]
        value = inner[last]
        inner[last] = value * 1.001 + 1e-5 if isinstance(value, int | float) else f"{value} "
        with pytest.raises(
            UserError, match=rf"results\.json says .*{last}.* its (predictions give|questions give|manifest says) .* --regrade"
        ):
            check_results(folder, results, *rows)
        inner[last] = value
        changed += 1
    assert changed > 40


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*/*/predictions.jsonl.gz")), ids=lambda file: file.parent.name)
def test_published_results_are_what_their_predictions_give(file):
    results = json.loads((file.parent / "results.json").read_text())
    questions, predictions = (
        [
            json.loads(line)
            for line in gzip.decompress(file.with_name(f"{name}.jsonl.gz").read_bytes()).decode().split("\n")
            if line
        ]
        for name in ("questions", "predictions")
    )
    check_results(file.parent, results, read_manifest(file.parent), questions, [Prediction(**row) for row in predictions])


def test_runs_graded_by_other_rules_are_refused(runs):
    file = runs / "eval_grpo" / "predictions.jsonl"
    write_jsonl(file, [replace(p, grader="0") for p in read_jsonl(file, Prediction)])
    edit(runs / "eval_grpo" / "results.json", grader="0")
    with pytest.raises(UserError, match="--regrade both"):
        report.console_report(evals(runs))


def test_nothing_to_report_is_refused(runs):
    edit(runs / "eval_base" / "manifest.json", stage="data")
    with pytest.raises(UserError, match="no evaluation and no training run"):
        load([runs / "eval_base"])


def test_training_runs_are_found_behind_the_adapter(original, runs):
    for root in (
        original,
        runs,
    ):  # where the manifest says, and beside the evaluation when the folder has moved
        _, trainings = load([root / "eval_grpo"])
        assert [run.label for run in trainings] == ["sft-long", "grpo"]
        assert all(run.path.parent == root for run in trainings)
    _, twice = load([runs / "eval_grpo", runs / "eval_sft-long", runs / "grpo"])
    assert sorted(run.label for run in twice) == ["grpo", "sft-long"]
    group, found = load(evals(runs))
    assert [row[-2] for row in texts(tables.result_table(group[0], found))[1:]] == [
        "",
        "2,711",
        "2,711",
        "9,042",
    ]


def test_a_training_run_of_another_adapter_is_not_taken_for_the_parent(runs):
    edit(runs / "grpo" / "manifest.json", adapter_sha256="f" * 64)
    assert load([runs / "eval_grpo"])[1] == []


def test_equal_names_are_told_apart(runs):
    edit(runs / "eval_sft-long" / "manifest.json", name="eval_sft")
    labels = [run.label for run in load(evals(runs))[0][0].runs]
    assert labels == ["base", "sft (eval_sft)", "sft (eval_sft-long)", "grpo"]


def test_a_training_run_alone_makes_a_report(runs, tmp_path):
    edit(runs / "sft" / "manifest.json", exit="running", finished=None)
    html = report.write_report([runs / "sft"], tmp_path / "out").read_text()
    assert "Training of sft" in html and "(running)" in html and 'id="results"' not in html


# ---- what is written ----


def test_the_style_sheet_has_a_colour_for_every_class(original):
    page = report.html_page(*load(evals(original)))
    wanted = [f"s{i}" for i in range(charts.NUM_COLORS)]
    assert re.findall(r"--(s\d+): light-dark\(#\w{6}, #\w{6}\)", page) == wanted
    assert re.findall(r"\.(s\d+) \{ --c: var\(--\1\) \}", page) == wanted


def test_same_input_same_bytes_and_the_runs_untouched(original, tmp_path):
    def contents(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before = contents(original)
    for name in ("a", "b"):
        report.write_report(evals(original, "sft-long", "grpo"), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(original) == before
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"report.md", "report.html"}
    assert {*re.findall(r"\]\((.*?)\)", (tmp_path / "a" / "report.md").read_text())} == {"report.html"}


def test_readme_changes_only_between_its_markers(original, tmp_path):
    readme = tmp_path / "README.md"
    start, end = report.MARKERS
    readme.write_text(f"# Title\n\n{start}\nold\n{end}\n\nafter\n")
    report.update_readme(readme, evals(original))
    once = readme.read_text()
    report.update_readme(readme, evals(original))
    assert readme.read_text() == once
    assert once.startswith(f"# Title\n\n{start}\n") and once.endswith(f"\n{end}\n\nafter\n") and "old" not in once
    assert "| grpo (GRPO) | 90 |" in once and "exact McNemar p" in once


@pytest.mark.parametrize("text", ["", "<!-- results:start -->", "<!-- results:end --><!-- results:start -->"])
def test_readme_without_markers_is_refused_and_kept(original, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match="lacks the lines <!-- results:start --> and"):
        report.update_readme(readme, evals(original))
    assert readme.read_text() == text


def test_command_line(original, tmp_path):
    def run(*args):
        command = [sys.executable, "-m", "posttrain.report", *map(str, args)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = run(*evals(original, "base", "sft"), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "| sft (SFT) |" in done.stdout and "exact McNemar p" in done.stdout
    assert done.stdout.rstrip().endswith(f"report: {tmp_path / 'out' / 'report.html'}")
    bad = run(tmp_path)
    assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1 and "no run directory" in bad.stderr


# ---- the page ----


@pytest.fixture(scope="module")
def html(original):
    return page.html_page(*load(evals(original)))


def test_page_data_survives_whatever_a_model_writes(original, html):
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.S)
    assert len(scripts) == 2  # the data and the one script: nothing closed them early
    data = json.loads(scripts[0])
    group = data["groups"][0]
    assert group["samples"][3][3][0][0] == made_runs.HOSTILE
    assert group["questions"][3][1].endswith("<b>bold</b> </script>")
    assert made_runs.HOSTILE not in html and "<b>bold</b>" not in html
    for run, folder in enumerate(evals(original)):
        rows = read_jsonl(folder / "predictions.jsonl", Prediction)
        assert [samples[0][0] for samples in group["samples"][run]] == [p.completion for p in rows]
        assert group["correct"][run] == [int(p.correct) for p in rows]


def test_page_escapes_names_notes_and_settings(runs, tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    model = {"name_or_path": evil, "quantization": evil, "dtype": evil}
    edit(runs / "eval_grpo" / "manifest.json", name=evil, notes=[evil], command=evil, model=model)
    (runs / "eval_grpo" / "config.yaml").write_text(f"# {evil} {{{{data}}}}\n")
    text = page.html_page(*load(evals(runs)))
    assert "<img" not in text and unescape(text).count(evil) >= 12
    assert "{{data}}" in text


def test_page_runs_only_its_own_script_and_names_no_other_place(html):
    policy = unescape(re.search(r'Content-Security-Policy" content="(.*?)"', html)[1])
    script = re.findall(r"<script>(.*?)</script>", html, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "unsafe" not in policy
    outside = re.sub(r"http://www.w3.org/2000/svg", "", html)
    assert "http://" not in outside and "https://" not in outside
    assert not re.search(r"\bsrc=|\bstyle=|\bon\w+=", re.sub(r"<script.*?</script>", "", html, flags=re.S))
    assert all(target.startswith("#") for target in re.findall(r'href="(.*?)"', html))


def test_prompts_are_whole_though_stored_in_parts(original):
    run = load(evals(original, "base"))[0][0].runs[0]
    shots = "Question: 1+1?\nAnswer: #### 2\n\n" * 8
    for make in (
        lambda q: q["prompt"],
        lambda q: f"{shots}Question: {q['question']}\nAnswer:",
        lambda q: "same",
    ):
        asked = replace(run, questions=[q | {"prompt": make(q)} for q in run.questions])
        stored = page._prompts(asked)
        middles = stored["middles"] or [q["question"] for q in asked.questions]
        rebuilt = [stored["prefix"] + middle + stored["suffix"] for middle in middles]
        assert rebuilt == [q["prompt"] for q in asked.questions]
        assert len(json.dumps(stored)) < 200 + sum(len(q["question"]) + 30 for q in asked.questions) + len(shots)


def test_many_samples_are_cut_in_the_page_but_counted_in_full(tmp_path):
    folders = made_runs.make_runs(tmp_path, num_questions=4, num_samples=page.MAX_SAMPLES_SHOWN + 2, training=False)
    group = page.page_data(*load(folders))["groups"][0]
    assert {len(samples) for run in group["samples"] for samples in run} == {page.MAX_SAMPLES_SHOWN}
    assert group["runs"][0]["num_samples"] == page.MAX_SAMPLES_SHOWN + 2


# ---- the highlighted answer ----


def predicted(completion, value, method):
    return Prediction("q", 0, completion, "stop", 1, value, method, 0, False, False, False, "1")


@pytest.mark.parametrize(
    ("completion", "value", "method", "before", "shown"),
    [
        ("3 and 3\n#### 3", "3", "marker", "3 and 3\n#### ", "3"),
        ("#### 7\nQuestion: more\n#### 7", "7", "marker", "#### ", "7"),  # the first marker counts
        ("####\n#### 5", "5", "marker", "####\n#### ", "5"),
        ("in all $1,234.50.\n#### $1,234.50", "1234.5", "marker", "in all $1,234.50.\n#### $", "1,234.50"),
        ("5-3 makes 2, so 3", "3", "last_number", "5-3 makes 2, so ", "3"),
        ("#### -3", "-3", "marker", "#### ", "-3"),
        ("#### \u22123", "-3", "marker", "#### ", "\u22123"),
        ("The answer is 4. The answer is 4!", "4", "phrase", "The answer is 4. The answer is ", "4"),
        ("4 then \\boxed{4} then 4", "4", "boxed", "4 then \\boxed{", "4"),
        ("12 or 1/2", "0.5", "last_number", "12 or ", "1/2"),
        ("half is .5", "0.5", "last_number", "half is ", ".5"),
        ("\U0001f986\U0001f986 #### 42", "42", "marker", "\U0001f986\U0001f986 #### ", "42"),
    ],
)
def test_answer_is_found_where_it_stands(completion, value, method, before, shown):
    start, end = page.locate_answer(predicted(completion, value, method))
    assert (completion[:start], completion[start:end]) == (before, shown)
    utf16 = completion.encode("utf-16-le")
    _, *_, left, right = page._sample(predicted(completion, value, method))
    assert utf16[2 * left : 2 * right].decode("utf-16-le") == shown  # as a browser counts


@pytest.mark.parametrize(("completion", "value"), [("no number", None), ("only 5", "7"), ("", "1"), ("1/0", "3")])
def test_no_answer_no_highlight(completion, value):
    assert page.locate_answer(predicted(completion, value, "last_number")) is None
    assert page._sample(predicted(completion, value, "last_number"))[-2:] == [-1, -1]


def test_every_extracted_answer_is_found_and_right(original):
    for folder in evals(original):
        for p in read_jsonl(folder / "predictions.jsonl", Prediction):
            if p.value is not None:
                start, end = page.locate_answer(p)
                assert p.completion[start:end].replace(",", "") == p.value
                assert p.method != "marker" or p.completion[:start].endswith("#### ")


def test_a_flood_of_digits_is_searched_fast():
    page.locate_answer(predicted("1" * 200_000 + " answer is 2" * 2_000, "3", "phrase"))


# ---- charts ----


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 0), (3e-5, 3e-5), (-0.04, 0.03), (128, 141), (0, 1e6), (1e-9, 2e-9), (-5, -1)],
)
def test_ticks_cover_the_values(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 7 and found == sorted(set(found))


@pytest.mark.parametrize("high", [0.0, 0.001, 0.05, 0.11, 0.33, 0.61, 0.99, 1.0])
def test_share_ticks_cover_the_values(high):
    found = charts.share_ticks(high)
    assert found[0] == 0 and high <= found[-1] <= 1


def all_charts(root):
    groups, trainings = load(evals(root))
    return [
        *figures.result_charts(groups[0]),
        *(c for run in trainings for c in figures.training_charts(run)),
    ]


def test_every_chart_is_wellformed_and_without_colours_of_its_own(original):
    for chart in all_charts(original):
        element = ET.fromstring(charts.svg(chart))
        assert not any("style" in part.attrib or "fill" in part.attrib for part in element.iter())
        numbers = [float(v) for v in re.findall(r"-?\d+\.\d+", " ".join(p.attrib.get("d", "") for p in element.iter()))]
        assert all(-20 <= number <= 460 for number in numbers)  # nothing is drawn far outside


def test_bars_are_as_long_as_their_shares():
    points = tuple(Point(i, share, share - 0.05, share + 0.05) for i, share in enumerate((0.1, 0.4)))
    chart = Chart("x", "x", "bars", (Series("lenient", points),), ("a", "b"), percent=True)
    widths = [float(w) for w in re.findall(r'class="bar" .*? width="([\d.]+)"', charts.svg(chart))]
    assert widths[1] == pytest.approx(4 * widths[0], rel=0.01)


def test_curves_leave_out_what_is_not_a_number_and_keep_the_last_of_a_resumed_step(original):
    run = load(evals(original))[1][0]
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": float("nan"), "note": "text", "flag": None},
        {"step": 3, "loss": 9.0},
        {"step": 3, "loss": 1.0},
        {"step": 3, "train_runtime": 5.0},
    ]
    (chart,) = figures.training_charts(replace(run, metrics=rows))
    assert [(p.x, p.y) for p in chart.series[0].points] == [(1, 2.0), (3, 1.0)]
    assert figures.training_charts(replace(run, metrics=[])) == []
    ET.fromstring(charts.svg(figures.training_charts(replace(run, metrics=rows[:1]))[0]))  # a single point


def test_a_run_reads_the_same_compressed(runs):
    plain = load(evals(runs))
    assert all(run.metrics for run in plain[1])
    for file in [*runs.glob("*/*.jsonl")]:
        file.with_suffix(".jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert load(evals(runs)) == plain


def test_rewards_are_drawn_apart(original):
    grpo = load(evals(original))[1][-1]
    drawn = {chart.title: [s.label for s in chart.series] for chart in figures.training_charts(grpo)}
    assert drawn["Rewards"] == ["total", "correctness", "format"]
    wanted = {"Loss", "KL to the reference policy", "Completion length, tokens", "Cut-off completions"}
    assert wanted | {"Entropy, nats per token", "Adapter weights moved by a step", "Dev accuracy"} <= drawn.keys()


def test_runs_of_one_stage_stand_together(original):
    groups, trainings = load([*evals(original, "sft", "sft-long", "grpo")])
    ((stage, runs),) = together.stages(trainings).items()
    assert (stage, [run.label for run in runs]) == ("sft", ["sft", "sft-long"])
    drawn = {chart.title: chart for chart in together.together_charts(stage, runs)}
    alone = {chart.title: chart for chart in figures.training_charts(runs[1])}
    assert [series.label for series in drawn["Loss"].series] == ["sft", "sft-long"]
    assert drawn["Loss"].series[1].points == alone["Loss"].series[0].points
    header, *rows = texts(together.final_table(runs))
    assert header[:2] == ["Run", "Steps"] and "Train loss" in header and "Reward" not in header
    last = runs[0].metrics[max(i for i, row in enumerate(runs[0].metrics) if "loss" in row)]["loss"]
    assert float(rows[0][header.index("Train loss")]) == pytest.approx(last, rel=0.01)
    html = report.html_page(groups, trainings)
    assert html.count('data-curve="all_sft_loss"') == 1 and "What each run ended with" in html
    assert together.stages(trainings[1:]) == {}


def test_dev_accuracy_is_drawn_against_the_minutes_of_steps(original):
    """One row for each five steps and one for each step, of 12 seconds; the seconds between rows do not count."""
    run = load(evals(original))[1][-1]
    dev = [{"step": step, "dev/accuracy": share, "time": 9.0 * step} for step, share in ((0, 0.3), (10, 0.4), (12, 0.5))]
    rows = [{"step": step, "step_time": 12.0} for step in (5, 10)], [{"step": step, "step_time": 12.0} for step in range(1, 11)]
    runs = [replace(run, metrics=[*dev, *part]) for part in rows]
    drawn = {chart.title: chart for chart in together.together_charts("grpo", runs)}["Dev accuracy over time"]
    assert [[(p.x, p.y) for p in series.points] for series in drawn.series] == [[(0.0, 0.3), (2.0, 0.4)]] * 2
    assert drawn.title in words.CHARTS
    timeless = [replace(run, metrics=dev) for run in runs]
    assert "Dev accuracy over time" not in {chart.title for chart in together.together_charts("grpo", timeless)}


def test_settings_that_differ_are_named_and_no_other(original, tmp_path):
    _, trainings = load([*evals(original, "sft", "sft-long")])
    runs = []
    for run, rate in zip(trainings, (1e-4, 2e-4), strict=True):
        folder = tmp_path / run.label
        folder.mkdir()
        (folder / "config.yaml").write_text(
            f"run_dir: runs/{run.label}\nseed: 42\ntrainer:\n  learning_rate: {rate}\n  bf16: true\n"
        )
        runs.append(replace(run, path=folder))
    assert texts(together.settings_table(runs)) == [["Setting", "sft", "sft-long"], ["trainer.learning_rate", "0.0001", "0.0002"]]
    (tmp_path / "sft" / "config.yaml").unlink()
    assert together.settings_table(runs) == []


def test_tooltips_are_sentences_of_the_pages():
    pages = " ".join((ROOT / "docs" / name).read_text() for name in ("metrics.md", "evaluation.md"))
    said = " ".join(re.sub(r"[`*]", "", pages).split())
    for text in (*words.CHARTS.values(), *words.COLUMNS.values()):
        assert text in said, text
    titles = {title for title, _, _ in figures.CURVES}
    assert titles <= words.CHARTS.keys() and set(together.FINAL) <= words.COLUMNS.keys()
    assert words.of_column("pass@8") == words.CHARTS["pass@k"] and words.of_column("n") == ""


def test_columns_and_charts_explain_themselves(original):
    page = report.html_page(*load(evals(original)))
    assert '<th scope="col" title="right by any extraction method: correct / completions">Lenient</th>' in page
    assert f'<span class="title" title="{words.CHARTS["Learning rate"]}">Learning rate</span>' in page


def test_running_mean_keeps_the_mean_and_calms_the_curve():
    points = [Point(i, float(i % 2)) for i in range(200)]
    smooth = charts.running_mean(points)
    assert len(smooth) == 200 and all(abs(p.y - 0.5) < 0.1 for p in smooth)
    assert charts.running_mean([Point(i, 3.0) for i in range(50)]) == [Point(i, 3.0) for i in range(50)]


@pytest.mark.parametrize(
    ("completion", "value", "marker", "shown"),
    [
        ("B is not A.\nAnswer: B", "B", "Answer:", "B is not A.\nAnswer: <B>"),
        ("4 > 3\n<answer>Yes</answer>", "yes", "<answer>", "4 > 3\n<answer><Yes></answer>"),
        (r"so \boxed{\frac{1}{2}x}", r"\frac{1}{2}x", r"\boxed{", r"so \boxed{<\frac{1}{2}x>}"),
        (r"so \boxed{x + 1}", "x+1", r"\boxed{", None),  # spelled otherwise
        ("Answer: 1,234", "1234", "Answer:", "Answer: <1,234>"),
    ],
)
def test_an_answer_of_another_kind_is_found_where_it_stands(completion, value, marker, shown):
    place = page.locate_answer(predicted(completion, value, "marker"), marker)
    assert (place and f"{completion[: place[0]]}<{completion[slice(*place)]}>{completion[place[1] :]}") == shown

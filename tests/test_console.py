"""What a person sees: lines that stand alone, bars on a terminal alone, and nothing that libraries say to nobody."""

import contextlib
import io
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from scripts import CONFIGS, ROOT, run, tiny_pipeline, workplace

from bench import console_picture
from posttrain import console
from posttrain.config.load import load
from posttrain.config.schema import SftConfig
from posttrain.console import answering, close_bars, dimmed, duration, open_bar, say
from posttrain.generation.engines import generate
from posttrain.generation.loop import Sampling
from posttrain.models.base import load_base
from posttrain.models.chat import load_tokenizer
from posttrain.training.progress import evaluation_command


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def rows(self):
        """What stands on the screen in the end, line by line."""
        return [line.rsplit("\r", 1)[-1].rstrip() for line in self.getvalue().split("\n")]


@contextlib.contextmanager
def terminal():
    """pytest takes stdout back between a fixture and its test."""
    screen = Terminal()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        yield screen
        close_bars()


@pytest.fixture
def said(pipeline, tiny_model_dir):
    return tiny_pipeline(pipeline, tiny_model_dir)


# --- lines and bars ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.449, "0.45 s"), (4.26, "4.3 s"), (11.6, "12 s"), (99, "99 s"), (100, "2 min"), (3540, "59 min"), (3600, "1 h 0 min"),
     (7800, "2 h 10 min"), (86400 * 2, "48 h 0 min")],
)  # fmt: skip
def test_durations_have_two_figures(seconds, told):
    assert duration(seconds) == told


def test_no_line_is_glued_to_a_bar_and_no_bar_is_left():
    with terminal() as screen:
        bar = open_bar(10, "step")
        bar.update(3)
        say("one line")
        say("another", file=sys.stderr)
        bar.n = 7
        bar.refresh()
        close_bars()
    assert [row for row in screen.rows() if row] == ["one line", "another"]
    assert "7/10" in screen.getvalue()


def test_closing_a_bar_closes_those_that_were_opened_after_it_and_no_other():
    with terminal():
        first, second, third = (open_bar(1, name) for name in "abc")
        close_bars(second)
        assert console._bars == [first]
        close_bars(third)
        assert console._bars == [first]


@pytest.mark.parametrize(("no_color", "told"), [(None, "\033[2mx\033[0m"), ("", "\033[2mx\033[0m"), ("1", "x")])
def test_colour_is_for_terminals_without_no_color(monkeypatch, no_color, told):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    with terminal():
        assert dimmed("x") == told
    with contextlib.redirect_stdout(io.StringIO()):
        assert dimmed("x") == "x"


def test_in_a_file_questions_are_told_once_a_minute(capsys, monkeypatch):
    clock = iter((0.0, 10.0, 61.0, 70.0, 100.0, 130.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with answering(100):
        for done in (10, 20, 30, 40, 60):
            answering.within_batch(done)
    assert capsys.readouterr().out.splitlines() == [
        "20 of 100 questions, about 4 min left",
        "60 of 100 questions, about 87 s left",
    ]


def test_decoders_tell_nobody_where_nobody_waits():
    answering.within_batch(3, 5)
    answering.finished(3)
    assert answering._bar is None


def test_a_bar_moves_within_a_batch(tiny_model_dir, monkeypatch):
    """Of two batches of 4, each question ends at some token of 64."""
    config = load(CONFIGS / "sft_tiny.yaml", [f"model.name_or_path={tiny_model_dir}"], SftConfig)
    tokenizer = load_tokenizer(config.model)
    model = load_base(config.model, "none", tokenizer)
    seen = []
    monkeypatch.setattr(answering, "_show", seen.append)
    prompts = [tokenizer.encode(f"{number} and {number}?") for number in range(8)]
    with answering(len(prompts)):
        generate(model, prompts, Sampling(64, temperature=1.5, seed=1), tokenizer, batch_size=4)
    assert seen == sorted(seen) and seen[-1] == 8 and len(seen) > 2
    assert answering._bar is None and not console._bars


# --- a run --------------------------------------------------------------------------------------------------------------


def test_a_training_has_a_line_for_each_logged_row_and_ends_with_what_came_of_it(said):
    lines = said["sft"].out.splitlines()
    told = [line for line in lines if re.match(r"step +\d+ of 30  loss [\d.]+  tokens right .*  \d+ tokens a row  .*/step", line)]
    assert [line.split()[1] for line in told] == ["5", "10", "15", "20", "25", "30"] and all("left" in line for line in told[:-1])
    assert lines.count("measuring dev accuracy (4 questions)") == 2
    assert any(
        re.match(r"expected: about .* of steps \(computed for two cores of an AMD EPYC; docs/planning.md\)", line)
        for line in lines
    )
    assert any(re.match("expected: up to .* if every completion reaches", line) for line in said["grpo"].out.splitlines())
    assert re.match(r"dev accuracy of 4 questions: [\d.]+% -> [\d.]+% \(95 % interval", lines[-3])
    assert lines[-1] == "next: python evaluate.py --config configs/eval_tiny.yaml adapter=runs/sft_tiny"
    assert not [line for line in lines if line.startswith("{")] and len(lines) < 25
    right = [
        line for line in said["grpo"].out.splitlines() if re.match(r"step \d of 2  reward [\d.]+  right .*%  \d+ tokens", line)
    ]
    assert len(right) == 2


@pytest.mark.slow
def test_on_a_terminal_nothing_of_libraries_is_seen(tmp_path, tiny_model_dir, tiny_data_dir):
    workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONWARNINGS", "TRL_EXPERIMENTAL_SILENCE")}
    for script, stage in (("sft_train", "sft"), ("grpo_train", "grpo")):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 120))
        command = [sys.executable, ROOT / f"{script}.py", "--config", CONFIGS / f"{stage}_tiny.yaml"]
        with subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            screen = Terminal(_all_of(ours))
        assert process.returncode == 0, screen.getvalue()
        for row in screen.rows():
            assert "Warning" not in row and "it/s" not in row and "examples" not in row and not row.startswith("{"), row
            assert len(re.findall(r"step +\d+ of", row)) <= 1, "two lines in one"
        assert f"/{30 if stage == 'sft' else 2} [" in screen.getvalue(), "no bar"
        assert "\033[A" not in screen.getvalue(), "two bars at a time"
        assert "Loading weights" not in screen.getvalue() and "\033[2m" not in screen.getvalue()


def _all_of(end):
    parts = []
    while True:
        try:
            part = os.read(end, 65536)
        except OSError:  # the other end is closed
            return b"".join(parts).decode().replace("\r\n", "\n")
        parts.append(part)


# --- what comes next --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "overrides", "all_weights", "told"),
    [
        ("sft_demo", [], False, "configs/eval_demo.yaml adapter=runs/sft_demo"),
        ("grpo_llama3.2-3b", [], False, "configs/eval_gsm8k.yaml adapter=runs/grpo_llama3.2-3b"),
        ("sft_demo", ["data.path=data/quick", "run_dir=runs/quick/sft"], False,
         "configs/eval_demo.yaml data.path=data/quick run_dir=runs/eval_sft adapter=runs/quick/sft"),
        ("sft_demo", ["lora=null", "quantization=none", "run_dir=runs/all"], True,
         "configs/eval_demo.yaml model.name_or_path=runs/all/model quantization=none run_dir=runs/eval_all"),
        ("sft_demo", ["model.name_or_path=me/mine"], False,
         "configs/eval_gsm8k.yaml model.name_or_path=me/mine model.revision=null model.chat_template=null data.path=data/demo "
         "run_dir=runs/eval_sft_demo adapter=runs/sft_demo"),
    ],
)  # fmt: skip
def test_what_comes_next_is_a_command_with_settings_that_hold(config, overrides, all_weights, told):
    from posttrain.config.schema import GrpoConfig

    cls = GrpoConfig if config.startswith("grpo") else SftConfig
    command = evaluation_command(load(CONFIGS / f"{config}.yaml", overrides, cls), SimpleNamespace(all_weights=all_weights))
    assert command == f"python evaluate.py --config {told}"
    _, script, *arguments = shlex.split(command)
    assert run(script.removesuffix(".py"), *arguments, "--print-config", cwd=ROOT).code == 0


# --- the page -----------------------------------------------------------------------------------------------------------


def test_the_picture_is_of_the_text_and_small():
    page = (ROOT / "docs" / "console.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"(?ms)^```text\n(.*?)^```", page)
    drawn = (ROOT / "docs" / "console.svg").read_text(encoding="utf-8")
    assert drawn == console_picture.picture(text.splitlines(), "make demo") and len(drawn) < 150_000
    commands = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    recipe = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(commands) == 8 and all(command in recipe for command in commands)


def test_the_text_has_the_lines_that_are_said_today(said):
    """Each of its lines has the form of one that a run of the tiny pipeline says: numbers and names apart."""
    page = (ROOT / "docs" / "console.md").read_text(encoding="utf-8")
    shown = {form(line) for line in page.splitlines() if re.match(r"step +\d+ of|next: |expected: |\d+ steps of ", line)}
    here = {form(line) for name in ("sft", "grpo") for line in said[name].out.splitlines()}
    assert {line for line in shown if line.startswith(("step", "expected"))} <= here


def form(line):
    line = re.sub(r"[\d.]+ (s|min)\b|[\d.]+ h [\d.]+ min", "T", line)
    return re.sub(r" +", " ", re.sub(r"[\d.]+", "N", line))

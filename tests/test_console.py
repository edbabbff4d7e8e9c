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
from posttrain.console import Bar, answering, close_bars, dimmed, duration, say
from posttrain.generation.engines import generate
from posttrain.generation.loop import Sampling
from posttrain.models.base import load_base
from posttrain.models.chat import load_tokenizer
from posttrain.training.progress import evaluation_command


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def rows(self):
        """What stands on the screen in the end, line by line, as a terminal without colours has it."""
        rows, at = [""], [0, 0]
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", self.getvalue(), re.DOTALL):
            if part == "\n":
                at = [at[0] + 1, 0]
                rows += [""] * (at[0] + 1 - len(rows))
            elif part == "\r":
                at[1] = 0
            elif part.endswith("A"):
                at[0] -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                rows[at[0]] = ""
            elif not part.startswith("\x1b"):
                rows[at[0]] = rows[at[0]][: at[1]].ljust(at[1]) + part + rows[at[0]][at[1] + 1 :]
                at[1] += 1
        return [row.rstrip() for row in rows]

    def plain(self):
        return re.sub(r"\x1b\[[\d;]*m", "", self.getvalue())

    def is_left_as_it_was(self):
        """Whether the cursor can be seen."""
        return self.getvalue().count("\x1b[?25l") == self.getvalue().count("\x1b[?25h")


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


@pytest.mark.parametrize("num_bars", [1, 2])
def test_no_line_is_glued_to_a_bar_and_no_bar_is_left(num_bars):
    long = "next: python evaluate.py " + "key=[value] " * 30
    with terminal() as screen:
        bars = [Bar(10, f"of {number}") for number in range(num_bars)]
        say("one line")
        say("another", file=sys.stderr)
        print(long)
        for bar in bars:
            bar.show(7.5, "at work")
            bar.refresh()
        assert "7/10 of 0 at work" in screen.plain() and not screen.is_left_as_it_was()
        bars[-1].close()
        say("below another bar")
    assert [row for row in screen.rows() if row] == ["one line", "another", long.rstrip(), "below another bar"]
    assert screen.is_left_as_it_was()


def test_a_bar_within_another_is_seen_however_short_its_work_is():
    with terminal() as screen:
        outer, inner = Bar(10, "steps"), Bar(4, "questions")
        inner.close()
        outer.close()
    assert "0/10 steps" in screen.plain() and "0/4 questions" in screen.plain()


def test_a_command_that_fails_leaves_no_bar():
    with terminal() as screen, pytest.raises(ValueError), answering(3):
        raise ValueError
    assert not console._bars and not any(screen.rows()) and screen.is_left_as_it_was()


@pytest.fixture(autouse=True)
def fresh_screen(monkeypatch):
    """What the environment says is read when the first bar is made."""
    monkeypatch.setenv("TERM", "xterm-256color")
    console._screen.cache_clear()
    yield
    console._screen.cache_clear()


@pytest.mark.parametrize("setting", ["FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"])
def test_no_bar_and_no_colour_reach_a_file(monkeypatch, capsys, setting):
    """Whatever a pipeline sets that draws into files."""
    monkeypatch.setenv(setting, "1")
    with contextlib.closing(Bar(10, "steps")) as bar, answering(3):
        bar.show(5)
        say("a line")
        say("a complaint", file=sys.stderr)
    assert capsys.readouterr() == ("a line\n", "a complaint\n")


@pytest.mark.parametrize(("value", "colours"), [("1", False), ("", True)])
def test_a_bar_has_no_colour_under_no_color(monkeypatch, value, colours):
    monkeypatch.setenv("NO_COLOR", value)
    with terminal() as screen, contextlib.closing(Bar(10, "steps")) as bar:
        bar.show(5)
    assert "/10 steps" in screen.plain() and (screen.plain() != screen.getvalue()) == colours


def test_a_terminal_that_cannot_move_its_cursor_has_lines_alone(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as screen, contextlib.closing(Bar(10, "steps")) as bar:
        bar.show(5)
        say("a line")
    assert screen.getvalue() == "a line\n"


def test_lines_that_go_to_a_file_stay_there_while_a_bar_is_on_the_terminal():
    """As under `python sft_train.py ... > log`."""
    with terminal() as screen, contextlib.redirect_stdout(io.StringIO()) as file, contextlib.closing(Bar(10, "steps")):
        say("a line")
    assert file.getvalue() == "a line\n" and "a line" not in screen.getvalue()


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
    monkeypatch.setattr(answering, "_show", lambda bar, done, doing="": seen.append(done))
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
        assert f"/{30 if stage == 'sft' else 2} steps" in screen.plain() and "/4 questions" in screen.plain(), "no bar"
        assert not [row for row in screen.rows() if "━" in row] and screen.is_left_as_it_was(), "a bar is left"
        assert "Loading weights" not in screen.plain() and "\033[2m" not in screen.getvalue()


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

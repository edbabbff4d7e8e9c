"""Every Python block of docs/use.md, as it stands there, on a tiny run: it answers as the project's own policy does."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from scripts import ROOT, run

from posttrain.chat.answering import verdict
from posttrain.chat.policies import Policy
from posttrain.evaluation.predictions import grade_completion
from posttrain.records import Example
from posttrain.tasks.prompts import PromptForm

QUESTION = 'Tom has 3 pens and buys 4. How many has he?\nEnd with "#### " and the number.'


@pytest.fixture(scope="module")
def place(pipeline, tmp_path_factory):
    """runs/grpo as the page calls it, with a merged folder beside it."""
    from posttrain.config.schema import Model
    from posttrain.models import adapters
    from posttrain.models.base import load_base
    from posttrain.models.chat import load_tokenizer

    folder = tmp_path_factory.mktemp("use")
    for name in ("models", "data"):
        shutil.copytree(pipeline / name, folder / name, symlinks=True)
    shutil.copytree(pipeline / "runs/grpo_tiny", folder / "runs/grpo")
    settings = Model(name_or_path=str(folder / "models/tiny"))
    tokenizer = load_tokenizer(settings)
    model = adapters.load_adapter(load_base(settings, "none", tokenizer), folder / "runs/grpo/adapter", False)
    adapters.merge(model).save_pretrained(folder / "runs/grpo/export/merged")
    tokenizer.save_pretrained(folder / "runs/grpo/export/merged")
    return folder


def blocks():
    return re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "docs/use.md").read_text(encoding="utf-8"))


def test_a_base_in_a_folder_is_found_from_any_working_directory(place):
    config = json.loads((place / "runs/grpo/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith("/")


def test_every_way_to_load_it_is_run():
    ways = ("from peft", "from transformers", "from llama_cpp")
    assert [next(way for way in ways if way in block) for block in blocks()] == list(ways)


def test_the_recording_is_read_as_it_says():
    """What stands after `->` is what the grader makes of the answer above it, and the line is the command's own."""
    [recording] = re.findall(r"(?ms)^```text\n(\$ QUESTION=.*?)^```", (ROOT / "docs/use.md").read_text(encoding="utf-8"))
    policy = Policy("", None, "none", None, None, PromptForm(None, "", "{question}"), {})
    read = []
    for command, said in re.findall(r"(?ms)^\$ (.*?posttrain\.chat[^\n]*)\n(.*?)(?=^\$ |\Z)", recording):
        gold = match[1] if (match := re.search(r"--gold (\S+)", command)) else None
        for answer, shown in re.findall(r"(?ms)^== (?!vote)[^\n]*\n(.*?)^-> ([^\n]*)$", said):
            example = Example("asked", "test", "", [], [], gold or "0", 0)
            prediction = grade_completion(example, 0, answer.removesuffix("\n"), "stop", 9, policy.grader)
            assert verdict(prediction, gold, policy) == shown
            read.append(shown)
    assert len(read) == 4 and read[2].endswith(": right")


def said_by(block, place):
    done = subprocess.run([sys.executable, "-c", block], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_adapter_and_merged_folder_answer_the_same(place):
    adapter, merged, _ = blocks()
    assert said_by(adapter, place) == said_by(merged, place) != "\n"


@pytest.mark.slow
def test_llama_cpp_answers_the_same(place):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e .[gguf]")
    pytest.importorskip("gguf", reason="gguf is not installed: make setup")
    few = ("--split", "test", "--questions", 2, "--max-new-tokens", 8)
    done = run("posttrain.export.command", "runs/grpo", "--format", "gguf", "--quant", "q8_0", *few, cwd=place)
    assert done.code in (0, 3), done
    _, merged, file = blocks()
    assert said_by(file, place) == said_by(merged, place) != "\n"

"""The families of docs/models.md: each goes through the pipeline, or is refused before anything is written."""

import families
import pytest
from scripts import CONFIGS
from transformers import AutoTokenizer

from posttrain.generation import seats, steps

PAGE = families.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_does_what_the_page_says(name, tmp_path):
    assert families.row(name, families.run_family(name, tmp_path)) in PAGE.splitlines()


@pytest.mark.slow
def test_a_family_with_the_tokenizer_that_llama_3_ships(tmp_path, llama3_tokenizer_dir):
    """Its special tokens lie above all others, it begins every text with one, and it has no template of its own."""
    tokenizer = AutoTokenizer.from_pretrained(llama3_tokenizer_dir)
    tokenizer.chat_template = (CONFIGS / "templates" / "llama3.jinja").read_text(encoding="utf-8")
    assert families.run_family("Llama", tmp_path, tokenizer) == "supported"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in families.REFUSED])
def test_a_family_on_a_gpu(name, tmp_path, monkeypatch):
    """As on a CPU, with the fused kernels and the graphs that a GPU gets by default."""
    captured = []
    for module in (steps, seats):
        capture = module.capture
        monkeypatch.setattr(module, "capture", lambda *args, capture=capture: captured.append(args) or capture(*args))
    assert families.run_family(name, tmp_path) == "supported"
    assert captured or name in ("gpt-oss", "Mixtral", "Qwen3-MoE")  # no graph holds a choice of experts


def test_the_page_has_every_family_and_no_other():
    named = [line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("|")]
    assert named == ["family", "---", *families.FAMILIES]

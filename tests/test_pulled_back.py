"""What a stranger gets of a pushed run by its id alone, in each of its three forms, with other libraries than this one."""

import pytest
from conftest import make_tiny_model
from pulled_back import pulled_back, same
from test_export import with_data
from tiny_training import Tiny, finished_sft, liven

NUM, LONGEST = 50, 24


def lively_model(folder):
    """The tiny Llama saying something else at every token: one that repeats itself answers alike whatever it lost."""
    import torch
    from transformers import AutoModelForCausalLM

    make_tiny_model(folder)
    liven(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pulled(tmp_path_factory, tiny_data_dir):
    """Answers to 50 questions by adapter and merged folder, and by the GGUF file where llama.cpp is."""
    from importlib.util import find_spec

    from scripts import run

    from posttrain.records import Example, read_jsonl

    folder = tmp_path_factory.mktemp("pulled")
    tiny = Tiny(lively_model(folder / "tiny"), tiny_data_dir, folder / "runs")
    sft = with_data(finished_sft(tiny, quantization="none", model={"name_or_path": tiny.model, "dtype": "float32"}))
    formats = ["merged", *(["gguf"] if find_spec("llama_cpp") and find_spec("gguf") else [])]
    quant = ["--quant", "f16"] if "gguf" in formats else []
    done = run("posttrain.export.command", sft, "--format", *formats, *quant, "--questions", 2, "--max-new-tokens", LONGEST)
    assert done.code == 0, done
    rows = [row for split in ("test", "dev", "train") for row in read_jsonl(tiny_data_dir / f"{split}.jsonl", Example)][:NUM]
    gguf = sft / "export/gguf-f16" if "gguf" in formats else None
    return pulled_back(sft, [row.prompt for row in rows], LONGEST, sft / "export/merged", gguf, dtype="float32")


@pytest.mark.slow
def test_adapter_and_merged_folder_answer_the_same_by_id_alone(pulled):
    assert len(pulled["merged"]) == NUM and len(set(pulled["merged"])) > NUM // 2
    assert same(pulled["adapter"], pulled["merged"]) == NUM


@pytest.mark.slow
def test_a_gguf_file_answers_in_llama_cpp_as_it_did_before_the_push(pulled):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e .[gguf]")
    pytest.importorskip("gguf", reason="gguf is not installed: make setup")
    assert same(pulled["gguf"], pulled["before"]) == NUM
    # The file holds fp32 weights in 16 bits, and llama.cpp keeps keys and values in as many: of random words, some are near ties.
    assert same(pulled["gguf"], pulled["merged"]) > 0.7 * NUM

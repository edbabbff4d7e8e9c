"""Artefacts are the policy that training measured, or the report says that they are not."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from ruamel.yaml import YAML
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from posttrain.errors import UserError
from posttrain.export import command, fidelity, source
from posttrain.export.command import export, main
from posttrain.export.fidelity import divergence
from posttrain.export.merged import in_parts, write_merged
from posttrain.export.source import Request, Target
from posttrain.hub.reading import read_release
from posttrain.hub.release import Request as PushRequest
from posttrain.models.adapters import load_adapter
from posttrain.models.base import load_base
from posttrain.models.chat import stop_token
from posttrain.models.folded import FoldedWeights, Tensor
from posttrain.models.policy_copy import PolicyCopy
from posttrain.records import Prediction, read_jsonl, sha256_file
from posttrain.runs.alone import alone
from posttrain.runs.data_sets import data_entry
from posttrain.runs.manifest import parent_of_model, read_manifest


def request(run_dir, out, kind="merged", quant=None, into="trained", **changes):
    target = Target(kind, quant, into, out)
    asked = Request(run_dir, (target,), "dev", questions=3, max_new_tokens=8, evals=())
    return dataclasses.replace(asked, **changes)


def with_data(run_dir):
    """The run as its script leaves it: the trainers of these tests record no data set."""
    manifest, config = json.loads((run_dir / "manifest.json").read_text()), (run_dir / "config.yaml").read_text()
    path = YAML(typ="safe").load(config)["data"]["path"]
    (run_dir / "manifest.json").write_text(json.dumps(manifest | {"data": data_entry(path, "train")}))
    return run_dir


@pytest.fixture(scope="module")
def sft(sft, tmp_path_factory):
    return with_data(shutil.copytree(sft, tmp_path_factory.mktemp("runs") / "sft"))


@pytest.fixture(scope="module")
def sft_with_tokens(sft_with_tokens, tmp_path_factory):
    return with_data(shutil.copytree(sft_with_tokens, tmp_path_factory.mktemp("runs") / "sft_with_tokens"))


@pytest.fixture(scope="module")
def merged(sft_with_tokens, tmp_path_factory):
    """A merged folder of a run on NF4 with trained token rows, and its report."""
    out = tmp_path_factory.mktemp("export") / "merged"
    (found,) = export(request(sft_with_tokens, out))
    return out, found


def test_a_merged_folder_is_the_policy_to_the_bit(merged, sft_with_tokens, settings, tokenizer, load):
    folder, found = merged
    policy = PolicyCopy(load_adapter(load("nf4"), sft_with_tokens / "adapter", trainable=False)).model
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    wanted = dict(policy.named_parameters())
    assert {name: torch.equal(p, wanted[name]) for name, p in model.named_parameters()} == dict.fromkeys(wanted, True)
    assert (found.same_weights, found.same_prompts, found.top1_agreement, found.greedy_equal) == (True, True, 1.0, 1.0)
    assert found.kl_max < 1e-6 and not found.faults


def test_a_merged_folder_stops_where_its_template_does(merged, sft_with_tokens):
    folder, _ = merged
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids(stop_token(tokenizer))
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id == stop
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(sft_with_tokens / "adapter").chat_template


def test_the_bases_own_sampling_is_nowhere(settings, tokenizer, tiny_model_dir, tmp_path):
    """Many published bases have a temperature without do_sample, which transformers loads and refuses to save."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "base")
    sampling = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.3, "eos_token_id": [0, 2]}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    own = settings.model_copy(update={"name_or_path": str(folder)})
    load_base(own, "none", tokenizer).save_pretrained(tmp_path / "trained")
    write_merged(FoldedWeights(own, "none", None), tokenizer, tmp_path / "merged")
    for saved in (tmp_path / "trained", tmp_path / "merged"):
        found = GenerationConfig.from_pretrained(saved)
        assert (found.temperature, found.repetition_penalty, found.eos_token_id) == (None, None, tokenizer.eos_token_id)


def test_an_export_says_what_it_is(merged, sft_with_tokens):
    folder, found = merged
    said = json.loads((folder / "export.json").read_text())
    run = read_manifest(sft_with_tokens)
    assert said["parent"]["adapter_sha256"] == run.adapter_sha256 and said["base"] == run.model
    assert {name: entry["sha256"] for name, entry in said["files"].items()} == {
        path.name: sha256_file(path) for path in folder.iterdir() if path.name != "export.json"
    }
    assert json.loads((folder / "fidelity.json").read_text()) == json.loads(json.dumps(found.as_json()))
    card = (folder / "README.md").read_text()
    assert found.line() in card and found.accuracy["sentence"] in card and "PeftModel" not in card
    assert f"\n{said['command']}\n```\n\nCommit" in card and "`export.json` has the rest." in card


@pytest.mark.slow
def test_the_cards_python_loads_the_folder_that_it_lies_in(merged):
    folder, _ = merged
    [code] = re.findall(r"(?s)```python\n(.*?)```", (folder / "README.md").read_text())
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_merged_folder_is_a_base_whose_ancestry_is_known(merged, sft_with_tokens, tmp_path):
    folder, _ = merged
    parent, chain, sha256 = parent_of_model(str(folder))
    assert parent["adapter_sha256"] == chain[-1]["adapter_sha256"] == read_manifest(sft_with_tokens).adapter_sha256
    assert sha256 == sha256_file(folder / "model.safetensors")
    other = shutil.copytree(folder, tmp_path / "other")
    with open(other / "model.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=r"other holds other weights than export.json says"):
        parent_of_model(str(other))


@pytest.mark.slow
def test_training_goes_on_from_a_merged_folder(merged, tiny, settings, tokenizer):
    from tiny_training import finished_sft

    folder, _ = merged
    run = with_data(finished_sft(tiny, model={"name_or_path": str(folder)}))
    again = read_manifest(run)
    assert [link["stage"] for link in again.chain] == ["sft"]
    assert not export(request(run, run / "export" / "merged"))[0].faults


def broken(monkeypatch, scale):
    """Merges in which every adapter is scaled otherwise."""
    from posttrain.models import folded

    right = folded._on_placeholders

    def wrong(base, folder):
        model = right(base, folder)
        for module in model.modules():
            if isinstance(module, folded.LoraLayer):
                module.scaling = dict.fromkeys(module.scaling, scale)
        return model

    monkeypatch.setattr(folded, "_on_placeholders", wrong)


def test_a_merge_without_its_scale_is_caught(sft, tmp_path, monkeypatch, capsys):
    broken(monkeypatch, 1.0)  # in place of alpha / r = 2
    monkeypatch.setattr(sys, "argv", ["export", str(sft), "--format", "merged", "--out", str(tmp_path), "--questions", "3"])
    monkeypatch.setattr(source, "LONGEST_ANSWER", 8)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == command.CHANGED
    *lines, last = capsys.readouterr().out.splitlines()
    waits = [f"the {whose} answers 3 questions in transformers, at most 8 tokens each" for whose in ("policy", "artefact")]
    assert [line for line in lines if "answers 3" in line] == waits
    assert last.startswith("export: merged is not the model that training measured: its weights are not the policy's")
    said = json.loads((tmp_path / "merged" / "fidelity.json").read_text())
    assert said["kl_mean"] > 0 and said["same_weights"] is False
    assert "**Not the model that training measured**" in (tmp_path / "merged" / "README.md").read_text()


def test_the_original_base_is_another_model_and_no_fault(sft, tmp_path):
    (found,) = export(request(sft, tmp_path / "merged-original", into="original"))
    assert found.same_weights is None and found.kl_mean > 0 and not found.faults


def test_parts_are_cut_as_they_fill_and_read_back_as_one_model(sft, settings, tokenizer, tmp_path):
    weights = FoldedWeights(settings, "nf4", sft / "adapter")
    write_merged(weights, tokenizer, tmp_path / "whole")
    write_merged(weights, tokenizer, tmp_path / "parts", part_bytes=60_000)
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 2
    for part in parts:
        with safe_open(part, framework="pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 60_000 or len(sizes) == 1
    whole, cut = (dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters()) for name in ("whole", "parts"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("sizes", "wanted"), [([3, 3, 3], [[3, 3], [3]]), ([9, 1, 6], [[9], [1], [6]]), ([6], [[6]]), ([1, 5, 1], [[1, 5], [1]])]
)
def test_in_parts(sizes, wanted):
    tensors = [Tensor(str(i), str(i), None, (size,)) for i, size in enumerate(sizes)]
    assert [[tensor.numel for tensor in part] for part in in_parts(tensors, 6)] == wanted


def test_divergence_is_the_formula():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
    wanted = torch.tensor([0.25 * torch.log(torch.tensor(2.0)), torch.log(torch.tensor(2.0))])
    torch.testing.assert_close(divergence((p + 1e-12).log() + 3, q.log() - 1).float(), wanted)


ACCURACY = {"real": False, "sentence": "the artefact is 20.00 points below the policy"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"accuracy": ACCURACY | {"real": True}}, "20.00 points below the policy"),
        ({"same_prompts": False}, "other tokens of the prompts"),
        ({"same_weights": False}, "its weights are not the policy's"),
        ({"apart": 0.3}, "its logits differ by 0.3 of their spread"),
        ({"apart": float("nan")}, "its logits differ by nan"),
        ({"apart": 0.3, "rounds_to": None}, None),
    ],
)
def test_what_counts_as_another_model(changes, fault):
    same = {"same_prompts": True, "same_weights": None, "apart": 0.05, "rounds_to": torch.bfloat16, "accuracy": ACCURACY}
    found = fidelity._faults(**same | changes)
    assert len(found) == (fault is not None) and (fault is None or fault in found[0])


EXPORTS = ROOT / "results" / "exports"


def published_row(folder):
    lost = json.loads((folder / "fidelity.json").read_text())
    both, low, high = lost["accuracy"], *lost["accuracy"]["interval"]
    cells = [
        f"`{lost['artefact']}`",
        f"{lost['size_bytes'] / 1e6:.1f}",
        f"{lost['num_questions']:,}",
        f"{lost['top1_agreement']:.2%}",
        f"{lost['kl_mean']:.2g} ({lost['kl_max']:.2g})",
        f"{lost['greedy_equal']:.1%}",
        ", ".join(f"{share:.2%}" for share in both["accuracy"]),
        f"{100 * both['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
        f"{both['p_value']:.2g}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_published_rows_are_those_of_their_files():
    page = (EXPORTS / "README.md").read_text(encoding="utf-8").splitlines()
    rows = sorted(published_row(file.parent) for file in EXPORTS.glob("*/*/fidelity.json"))
    assert rows and sorted(line for line in page if line.startswith("| `")) == rows


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_place_that_is_taken_is_refused_and_left_as_it_is(merged):
    folder, _ = merged
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"merged is there already: choose another --out, or remove it"):
        export(request(folder.parent, folder))
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_two_exports_into_one_place_are_one_after_the_other(sft, tmp_path, monkeypatch):
    folder = tmp_path / "merged"
    with alone(folder, "--out", appears=True), pytest.raises(UserError, match="merged is in use by another process: wait for it"):
        export(request(sft, folder))
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(command, "read_source", meanwhile(command.read_source, folder.mkdir))  # the first has ended just now
    with pytest.raises(UserError, match="merged is there already: choose another --out"):
        export(request(sft, folder))


def meanwhile(function, other):
    def called(*arguments):
        found = function(*arguments)
        other()
        return found

    return called


def test_an_answer_longer_than_the_context_is_refused(sft, tmp_path):
    with pytest.raises(UserError, match=r"1025 new ones \(--max-new-tokens\) it leaves the model's context of 1024: set"):
        export(request(sft, tmp_path / "merged", max_new_tokens=1025))
    assert not any(tmp_path.iterdir())


def test_what_fails_leaves_nothing(sft, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "ask_artefact", fail)
    with pytest.raises(OSError, match="No space left"):
        export(request(sft, tmp_path / "merged"))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"exit": "interrupted at step 1 of 3"}, r"is not finished \(interrupted at step 1 of 3\)"),
        ({"stage": "eval"}, "is a run of stage eval, which has no adapter: give one of sft_train.py"),
    ],
)
def test_a_run_without_a_result_is_refused(sft, tmp_path, change, line):
    run = shutil.copytree(sft, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=line):
        export(request(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_refused(sft, tmp_path):
    run = shutil.copytree(sft, tmp_path / "run")
    with open(run / "adapter" / "adapter_model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match=r"adapter_model.safetensors has changed since"):
        export(request(run, tmp_path / "out"))


def test_into_original_needs_another_original(tiny, tmp_path):
    from tiny_training import finished_sft

    run = with_data(finished_sft(tiny, quantization="none"))
    with pytest.raises(UserError, match="was trained on its base as it is: leave --into out"):
        export(request(run, tmp_path / "out", into="original"))


@pytest.mark.parametrize("kind", command.BY_LLM_COMPRESSOR)
def test_a_format_of_another_library_is_refused_with_the_way_to_it(kind, sft, tmp_path):
    from scripts import run

    done = run("posttrain.export.command", sft, "--format", "merged", kind, "--out", tmp_path / "out")
    assert (done.code, done.out, (tmp_path / "out").exists()) == (2, "", False)
    assert f"--format {kind} is written by llm-compressor" in done.err and "export --format merged, and" in done.err


@pytest.mark.parametrize("package", ["gguf", "llama_cpp"])
def test_a_package_that_is_missing_is_told_with_its_remedy(package, sft, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"need.*pip install 'posttrain\[gguf\]'"):
        export(request(sft, tmp_path / "out", "gguf", "q8_0"))
    assert not (tmp_path / "out").exists()


def test_a_merged_folder_of_a_run_that_trained_all_weights_is_its_model(tiny, tmp_path):
    from tiny_training import finished_sft

    run = with_data(finished_sft(tiny, lora=None, quantization="none"))
    (found,) = export(request(run, tmp_path / "merged"))
    assert found.same_weights and not found.faults
    assert "A model. It makes" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.slow
def test_a_merged_folder_answers_as_the_adapter_did(pipeline, tmp_path):
    """By the two commands, on the pipeline's run: the evaluation of the folder has the completions of the adapter's."""
    from scripts import CONFIGS, run

    done = run(
        "posttrain.export.command", "runs/grpo_tiny", "--format", "merged", "--out", tmp_path, "--questions", 4, cwd=pipeline
    )
    assert done.code == 0 and f"\nwrote {tmp_path / 'merged'}\n  transformers: top-1 100.00%" in done.out, done
    as_base = [f"model.name_or_path={tmp_path / 'merged'}", "quantization=none", f"run_dir={tmp_path / 'eval'}"]
    assert run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", *as_base, cwd=pipeline).code == 0
    [adapters] = [folder for folder in (pipeline / "runs").glob("eval_*grpo_tiny") if folder.is_dir()]
    wanted, found = (read_jsonl(folder / "predictions.jsonl", Prediction) for folder in (adapters, tmp_path / "eval"))
    assert [row.completion for row in found] == [row.completion for row in wanted]
    assert [link["stage"] for link in read_manifest(tmp_path / "eval").chain] == ["sft", "grpo"]
    release = read_release(PushRequest(pipeline / "runs/grpo_tiny", "me/x", evals=(adapters, tmp_path / "eval")))
    assert [one.label for one in release.evaluations] == ["this adapter", "this adapter, as the folder merged"]

"""Training without an SFT adapter: a new adapter on the model as it is, and all of a model's weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from scripts import CONFIGS, retell, run, tiny_pipeline, workplace
from test_resume import FOUR_STEPS, interrupted_and_resumed, straight
from tiny_training import LORA, largest_difference, pay_tiny, scored

from posttrain.errors import UserError
from posttrain.hub.reading import read_release
from posttrain.hub.release import Request
from posttrain.hub.repository import all_files
from posttrain.models.base import base_of, compute_dtype
from posttrain.models.policy_copy import PolicyCopy
from posttrain.records import sha256_file
from posttrain.report.groups import load
from posttrain.runs.directory import check_machine

ALL = {"lora": None, "quantization": "none"}


def own_logps(model, inputs, temperature):
    """Log-probabilities of the completions by one plain forward of each row, without padding."""
    found = []
    for prompt, p_mask, ids, mask in zip(
        *(inputs[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")), strict=True
    ):
        prompt, ids = prompt[p_mask.bool()], ids[mask.bool()]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        found.append(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    return found


@pytest.mark.parametrize("lora", [LORA, None], ids=["new adapter", "all weights"])
def test_the_reference_is_the_model_itself_wherever_the_policy_goes(tiny, fp32, load, lora):
    with pay_tiny(tiny, None, {"beta": 0.04}, **fp32, lora=lora) as trainer:
        base = load(dtype="float32")
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                if p.requires_grad and ("lora_B" in name or "proj" in name):
                    p += 0.1 * torch.randn_like(p)
        inputs = scored(trainer)
        wanted = own_logps(base, inputs, trainer.temperature)
        for row, mask, own in zip(inputs["ref_per_token_logps"], inputs["completion_mask"], wanted, strict=True):
            assert torch.allclose(row[mask.bool()], own, atol=1e-4)
        moved = own_logps(base_of(trainer.model) if lora is None else trainer.model, inputs, trainer.temperature)
        assert not torch.allclose(torch.cat(moved), torch.cat(wanted), atol=1e-2)


def test_all_weights_are_fp32_masters_of_the_models_own_dtype(tiny):
    with tiny.sft(**ALL) as trainer:
        model = trainer.model
        assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())
        assert compute_dtype(model) == torch.bfloat16
        copy = PolicyCopy(model)
        assert {p.dtype for p in copy.model.parameters()} == {torch.bfloat16}
        trainer.train()
        copied = dict(copy.refresh().named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(copied[name], parameter.to(torch.bfloat16)), name


def test_the_first_loss_is_that_of_a_run_with_an_adapter(tiny, fp32):
    """A new adapter changes nothing yet, and so all three forms begin at one loss."""
    losses = []
    for lora in (LORA, None):
        with tiny.sft({"max_steps": 1}, **fp32, lora=lora) as trainer:
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_grpo_of_a_new_adapter_begins_without_kl(tiny, form):
    with pay_tiny(tiny, None, {"beta": 0.1, "max_steps": 3, "learning_rate": 1e-2}, quantization=form, lora=LORA) as trainer:
        assert "ref" not in trainer.model.peft_config
        trainer.train()
        kls = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kls[0] == 0.0
    assert min(kls[1:]) > 0


def test_a_new_adapter_with_token_rows_keeps_a_frozen_copy_for_reference(tiny):
    """TrainableTokensWrapper leaves its rows on when adapters are off."""
    lora = LORA | {"train_special_tokens": "always"}
    with pay_tiny(tiny, None, {"beta": 0.1, "max_steps": 2, "learning_rate": 1e-2}, lora=lora) as trainer:
        assert "ref" in trainer.model.peft_config
        trainer.train()
        assert trainer.state.log_history[0]["kl"] == 0.0


def test_grpo_of_all_weights_begins_without_kl(tiny):
    with pay_tiny(tiny, None, {"beta": 0.1, "max_steps": 3, "learning_rate": 1e-2}, **ALL) as trainer:
        trainer.train()
        rows = [row for row in trainer.state.log_history if "kl" in row]
    assert rows[0]["kl"] == 0.0
    assert rows[2]["kl"] > 0
    assert all(row["lora_moved_share"] > 0.5 for row in rows)


# --- by the scripts ---------------------------------------------------------------------------------------------------

GREAT_LOSS = ("trainer.learning_rate=3e-3", "data.num_dev=0")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_model_dir, tiny_data_dir):
    return workplace(tmp_path_factory.mktemp("all"), tiny_model_dir, data=tiny_data_dir)


@pytest.fixture(scope="module")
def trained(prepared):
    """A folder with runs/sft, of all weights, what it said, and an evaluation of it."""
    folder = prepared
    said = {"sft": stage(folder, "sft", "run_dir=runs/sft", "lora=null", "quantization=none", *GREAT_LOSS)}
    said["eval"] = evaluation(folder, "sft")
    return folder, said


def stage(folder, name, *more):
    script = {"sft": "sft_train", "grpo": "grpo_train"}[name]
    return run(script, "--config", CONFIGS / f"{name}_tiny.yaml", *more, cwd=folder)


def evaluation(folder, name, *more):
    model = f"model.name_or_path=runs/{name}/model"
    return run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", model, "quantization=none", *more, cwd=folder)


def manifest(folder, name):
    return json.loads((folder / "runs" / name / "manifest.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_all_weights_are_saved_as_a_model_folder_that_evaluation_traces(trained):
    folder, said = trained
    assert said["sft"].code == said["eval"].code == 0, said
    made = manifest(folder, "sft")
    assert made["all_weights"] and made["exit"] == "ok"
    assert made["adapter_sha256"] == sha256_file(folder / "runs/sft/model/model.safetensors")
    tensors = load_file(folder / "runs/sft/model/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not (folder / "runs/sft/adapter").exists()
    evaluated = manifest(folder, "eval_tiny_sft")
    assert evaluated["adapter_sha256"] == made["adapter_sha256"]
    assert [link["stage"] for link in evaluated["chain"]] == ["sft"]
    assert evaluated["parent"]["run_dir"] == "runs/sft"


@pytest.mark.slow
def test_grpo_goes_on_from_the_model_folder(trained):
    folder, _ = trained
    model = "model.name_or_path=runs/sft/model"
    for name, lora in (("grpo_all", "null"), ("grpo_lora", "{r: 4, alpha: 8, target_modules: all-linear}")):
        done = stage(
            folder, "grpo", f"run_dir=runs/{name}", "adapter=null", f"lora={lora}", "quantization=none", model, "data.num_dev=0",
            "trainer.weight_decay=0.1",  # no answer is right, and a run that moves nothing fails
        )  # fmt: skip
        assert done.code == 0, done.err
        made = manifest(folder, name)
        assert [link["name"] for link in made["chain"]] == ["sft"]
        assert made["parent"]["adapter_sha256"] == manifest(folder, "sft")["adapter_sha256"]
    done = evaluation(folder, "grpo_all")
    assert done.code == 0, done.err
    assert [link["stage"] for link in manifest(folder, "eval_tiny_grpo_all")["chain"]] == ["sft", "grpo"]
    done = evaluation(folder, "sft", "adapter=runs/grpo_lora")
    assert done.code == 0, done.err
    assert [link["stage"] for link in manifest(folder, "eval_tiny_grpo_lora")["chain"]] == ["sft", "grpo"]


@pytest.mark.slow
def test_a_report_and_a_card_follow(trained, tmp_path):
    folder, _ = trained
    groups, trainings = load([folder / "runs/eval_tiny_sft"])
    assert groups[0].runs[0].stage == "SFT"
    assert [training.label for training in trainings] == ["sft"]
    request = Request(folder / "runs/sft", "me/tiny-sft", evals=(folder / "runs/eval_tiny_sft",))
    files = all_files(read_release(request))
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "training_manifest.json"} <= {*files}
    card = files["README.md"].decode()
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "PeftModel" not in card
    assert "All weights" in card
    assert "this model" in card


REFUSED = [
    ("sft", ["lora=null"], "quantization: lora null trains all weights, and nf4 cannot be trained: set none, or lora"),
    ("sft", ["lora=null", "quantization=nf4_unpacked"], "quantization: lora null trains all weights, and nf4_unpacked cannot"),
    ("grpo", ["adapter=null"], "lora: missing: the shape of the new adapter"),
    ("grpo", ["adapter=null", "lora=null"], "quantization: lora null trains all weights, and nf4"),
    (
        "grpo",
        ["adapter=null", "adapter_mode=rescale", "lora={r: 4, alpha: 8, target_modules: all-linear}"],
        "adapter_mode: rescale needs an adapter",
    ),
]


@pytest.mark.parametrize("name, more, text", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(prepared, name, more, text):
    done = stage(prepared, name, "run_dir=runs/refused", *more)
    assert done.code == 2
    assert text in done.err
    assert done.err.count("\n") == 1
    assert not (prepared / "runs/refused").exists()


@pytest.mark.slow
def test_a_run_of_all_weights_is_no_adapter(trained):
    done = stage(trained[0], "sft", "run_dir=runs/refused", "adapter=runs/sft", "lora=null")
    assert done.code == 2 and "runs/sft trained all weights and has no adapter: set model.name_or_path=runs/sft/model" in done.err


@pytest.mark.slow
def test_a_model_folder_with_other_weights_is_refused(trained, tmp_path):
    folder, _ = trained
    other = tmp_path / "work"
    shutil.copytree(folder, other, symlinks=True)
    shutil.copy(folder / "models/tiny/model.safetensors", other / "runs/sft/model/model.safetensors")
    done = evaluation(other, "sft", "run_dir=runs/again")
    assert (done.code, "holds other weights than the run finished with" in done.err) == (2, True)
    retell(folder / "runs/sft", exit="failed: on purpose")
    done = evaluation(folder, "sft", "run_dir=runs/again")
    retell(folder / "runs/sft", exit="ok")
    assert (done.code, "its model is no result" in done.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_resumed_training_of_all_weights_equals_uninterrupted(tiny, name):
    steps = FOUR_STEPS | {"learning_rate": 1e-3}
    config = (
        (lambda: tiny.sft_config(steps, **ALL))
        if name == "sft"
        else (lambda: tiny.grpo_config(None, steps | {"beta": 0.05}, **ALL))
    )
    (one, _, losses), (two, _, again) = straight(config(), all_weights), interrupted_and_resumed(config(), 2, tensors=all_weights)
    assert losses == again
    assert largest_difference(one, two) == 0


def all_weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_all_weights_are_not_trained_in_shards(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="lora null trains all weights, .* or give lora"):
        check_machine(tiny.sft_config(**ALL))


@pytest.mark.slow
def test_grpo_goes_on_from_an_adapter_that_no_run_is_known_of(tmp_path, tiny_model_dir):
    """Its link of the chain has no data, and the card in the new adapter's folder says so by leaving it out."""
    tiny_pipeline(tmp_path, tiny_model_dir)
    shutil.copytree(tmp_path / "runs/sft_tiny/adapter", tmp_path / "elsewhere")
    done = run("grpo_train", "--config", CONFIGS / "grpo_tiny.yaml", "adapter=elsewhere", "run_dir=runs/x", cwd=tmp_path)
    assert done.code == 0, done
    card = (tmp_path / "runs/x/adapter/README.md").read_text(encoding="utf-8")
    assert "- adapter `elsewhere`: adapter `" in card and "- grpo `x`: adapter `" in card

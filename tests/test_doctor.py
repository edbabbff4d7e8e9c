"""The doctor tells what works and what to do about what does not, and never what is secret."""

import shutil

import pytest
import torch
from scripts import CONFIGS, ROOT, run, tree

from posttrain.doctor import machine
from posttrain.doctor.findings import Finding, examined, redacted
from posttrain.errors import UserError
from posttrain.kernels import nf4

MACHINE = ("Python", "packages", "GPU", "bf16", "NF4", "kernels", "Hub token")


@pytest.fixture
def place(tmp_path, pipeline):
    """A user's folder with the configs, a model, a prepared data set and a finished SFT run."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    for name in ("models", "data"):
        shutil.copytree(pipeline / name, tmp_path / name, symlinks=True)
    shutil.copytree(pipeline / "runs" / "sft_tiny", tmp_path / "runs" / "sft_tiny")
    return tmp_path


def doctor(*arguments, cwd="."):
    done = run("posttrain.doctor.__main__", *arguments, cwd=cwd)
    return int(done.code), [line for line in done.out.splitlines() if line[:8].strip() in ("ok", "warning", "broken")], done


@pytest.mark.parametrize(
    ("config", "checks"),
    [
        ("sft_tiny", ("config", "base", "data", "computed by", "room", "tracking")),
        ("grpo_tiny", ("config", "base", "data", "adapter", "computed by", "room", "tracking")),
        ("eval_tiny", ("config", "base", "data", "computed by", "room", "tracking")),
        ("data_tiny", ("config", "source", "tokenizer")),
    ],
)
def test_all_is_well_here(place, config, checks):
    before = tree(place)
    code, lines, _ = doctor("--config", f"configs/{config}.yaml", cwd=place)
    assert code == 0 and tree(place) == before
    assert [line[8:22].strip() for line in lines] == [*MACHINE, *checks]
    assert all(line.startswith("ok") for line in lines), lines
    assert f"for {config.removesuffix('_tiny')}" in lines[len(MACHINE)]


@pytest.mark.parametrize(
    ("config", "overrides", "broken"),
    [
        ("sft_tiny", ["model.name_or_path=models/none"], ["base          models/none holds no model", "run `make model`"]),
        ("sft_tiny", ["data.path=data/demo"], ["prepare them with `python data_prep.py --config configs/data_demo.yaml`"]),
        ("grpo_tiny", ["adapter=runs/none"], ["adapter       ", "runs/none"]),
        ("sft_tiny", ["trainer.learning_rat=1"], ["unknown key (did you mean 'trainer.learning_rate'?)"]),
        ("eval_tiny", ["model.chat_template=none.jinja"], ["no chat template at none.jinja"]),
        ("sft_tiny", ["model.attn_implementation=flash_attention_2"], ["computed by   model.attn_implementation", "needs CUDA"]),
        ("data_tiny", ["tokenizer.name_or_path=models/none"], ["tokenizer     models/none holds no model"]),
    ],
)
def test_what_is_broken_is_told_once_with_its_remedy_and_the_rest_is_looked_at(place, config, overrides, broken):
    code, lines, _ = doctor("--config", f"configs/{config}.yaml", *overrides, cwd=place)
    found = [line for line in lines if line.startswith("broken")]
    assert code == 1 and len(lines) > len(MACHINE)
    assert all(any(text in line for line in found) for text in broken), found
    assert len({line[22:] for line in found}) == len(found)


def test_a_warning_is_no_fault(place, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(place))
    code, lines, _ = doctor("--config", "configs/sft_tiny.yaml", "tracking=wandb", cwd=place)
    assert code == 0 and lines[-1].startswith("warning tracking") and "wandb login" in lines[-1]


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "there", "state", "told"),
    [
        ("trl", "1.17.0", "warning", "trl 1.17.0 is outside <1.17,>=1.16"),
        ("peft", None, "broken", "peft is not installed"),
        ("torch", "2.14.0+cu130", "ok", "torch 2.14.0+cu130 (tested: "),
    ],
)
def test_versions_are_held_against_the_tested_ones(monkeypatch, name, there, state, told):
    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda asked: there if asked == name else real(asked))
    finding = next(finding for finding in machine.packages() if told in finding.told)
    assert finding.state == state and (state == "ok" or "constraints.txt" in finding.remedy)


def test_every_dependency_is_looked_at():
    (finding,) = machine.packages()
    assert finding.told.startswith(f"{len(machine._project()['dependencies'])} looked at")


@pytest.mark.parametrize(("part", "entry"), [("outputs", 1.5), ("gradients", float("nan"))])
def test_a_packed_layer_that_computes_something_else_is_told(monkeypatch, part, entry):
    def damaged(device):
        pairs = real(device)
        pairs[part][0][0, 0] += entry * pairs[part][1].abs().max()
        return pairs

    real = nf4.pass_through_nf4
    monkeypatch.setattr(nf4, "pass_through_nf4", damaged)
    (finding,) = machine.nf4()
    assert (
        finding.state == "broken" and f"a packed layer's {part} differ" in finding.told and "quantization=none" in finding.remedy
    )


def test_the_packed_layer_is_packed():
    """Its outputs are near those of the weights that were packed, and not equal."""
    packed, plain = nf4.pass_through_nf4(torch.device("cpu"))["outputs"]
    draw = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(shape, generator=draw).bfloat16().float() for shape in ((128, 256), (8, 256)))
    exact = inputs @ weight.T
    assert not machine._differs(packed, plain) and 0.01 < (packed - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize(
    ("cards", "cuda", "state", "told"),
    [(0, None, "ok", "none"), (2, None, "broken", "install torch for CUDA"), (2, "13.0", "broken", "update the driver")],
)
def test_a_card_that_torch_cannot_use_is_told(monkeypatch, tmp_path, cards, cuda, state, told):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path)
    for number in range(cards):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    (finding,) = machine.gpu()
    assert finding.state == state and told in finding.line()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("do this\ndo that"), ["do this", "do that"]),
        (RuntimeError("a kernel failed\nand more"), ["RuntimeError: a kernel failed"]),
        (MemoryError(), ["out of memory (MemoryError): close other programs, or take a machine with more memory"]),
    ],
)
def test_a_check_that_fails_is_a_finding(error, told):
    def fails():
        yield Finding("ok", "x", "so far")
        raise error

    so_far, *found = examined("x", fails)
    assert so_far.state == "ok" and [finding.told for finding in found] == told
    assert {finding.state for finding in found} == {"broken"}


@pytest.mark.slow
def test_two_processes_reach_one_another():
    (finding,) = machine.processes(2)
    assert (finding.state, finding.what) == ("ok", "2 processes") and finding.told.endswith("sum over 2 by gloo")


# --- secrets ----------------------------------------------------------------------------------------------------------

CANARIES = {"HF_TOKEN": "hf_canaryCanaryCanary", "WANDB_API_KEY": "canary" * 6, "MY_PASSWORD": "canary-in-the-mine"}


def test_no_report_has_a_secret_a_user_or_his_home(place, monkeypatch):
    home = place / "home" / "ada"
    home.mkdir(parents=True)
    for name, value in (CANARIES | {"HOME": str(home), "LOGNAME": "ada"}).items():
        monkeypatch.setenv(name, value)
    paths = [f"model.name_or_path={home}/{CANARIES['MY_PASSWORD']}", f"data.path={CANARIES['HF_TOKEN']}/of/ada"]
    code, lines, done = doctor("--config", "configs/sft_tiny.yaml", *paths, "--report", cwd=place)
    said = done.out + done.err
    assert code == 1 and said.startswith("```\nposttrain at ") and said.endswith("```\n")
    assert "there is one (it is not shown)" in said and "~/*** holds no model" in said and "***/of/<user>/train.jsonl" in said
    assert "canary" not in said.lower() and str(home) not in said and "ada" not in said.replace("adapter", "")
    assert len(lines) > len(MACHINE)


def test_short_values_and_parts_of_words_stay(monkeypatch):
    monkeypatch.setenv("MY_KEY", "1")
    monkeypatch.setenv("LOGNAME", "art")
    assert redacted("1 start of art") == "1 start of <user>"


def test_overrides_need_a_config():
    done = run("posttrain.doctor.__main__", "run_dir=x", cwd=ROOT)
    assert done.code == 2 and "needs --config FILE" in done.err

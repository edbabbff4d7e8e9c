"""Which kernels a model gets, and on a GPU that they compute what transformers' own layers do, forward and back."""

from __future__ import annotations

import re

import pytest
import torch
from scripts import CONFIGS, run, workplace
from tiny_training import liven
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.config.schema import Lora, Model
from posttrain.errors import UserError
from posttrain.kernels import liger
from posttrain.models import policy
from posttrain.models.base import load_base, model_identity
from posttrain.models.chat import load_tokenizer
from posttrain.models.policy_copy import PolicyCopy


def tiny(model_type: str, device: str = "cpu", **more):
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, vocab_size=97, num_key_value_heads=2, head_dim=16, **shape, **more)
    torch.manual_seed(0)
    return liven(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")).to(device)


def load(folder, **more):
    settings = Model(name_or_path=str(folder), dtype="float32", **more)
    return settings, load_base(settings, "none", load_tokenizer(settings), to=torch.device("cpu"))


def methods(model):
    """Modules whose forward is not their class's."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_on_a_cpu_a_model_stays_as_it_is_and_the_manifest_says_so(tiny_model_dir):
    settings, model = load(tiny_model_dir)
    assert model_identity(settings, "none", model)["kernels"] == "torch" and not methods(model)
    copied = PolicyCopy(model).model
    assert copied.kernels == "torch" and not methods(copied)


def test_what_is_asked_for_and_cannot_be_is_refused(tiny_model_dir):
    with pytest.raises(UserError, match="model.kernels liger: they need CUDA; use model.kernels=torch"):
        load(tiny_model_dir, kernels="liger")


@pytest.mark.parametrize(("compiled", "kernels"), [("true", "torch"), ("false", "auto")])
def test_what_is_compiled_is_loaded_without_them(monkeypatch, tmp_path, tiny_model_dir, tiny_data_dir, compiled, kernels):
    """torch.compile fuses these layers itself."""
    asked = []

    def load_base(settings, *_):
        asked.append(settings.kernels)
        raise RuntimeError("far enough")

    monkeypatch.setattr(policy, "load_base", load_base)
    folder = workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)
    with pytest.raises(RuntimeError, match="far enough"):
        run("sft_train", "--config", CONFIGS / "sft_tiny.yaml", f"compile={compiled}", cwd=folder)
    assert asked == [kernels]


@pytest.mark.parametrize(
    ("installed", "config", "said"),
    [
        (False, {"model_type": "llama", "hidden_act": "silu"}, r"pip install 'posttrain\[liger\]'"),
        (True, {"model_type": "phi3", "hidden_act": "silu"}, "not tried on phi3 with silu"),
        (True, {"model_type": "llama", "hidden_act": "gelu"}, "not tried on llama with gelu"),  # Liger would compute SiLU
    ],
)
def test_auto_on_a_gpu_says_why_it_fuses_nothing(monkeypatch, capsys, installed, config, said):
    """A stand-in for a model on a GPU. use_liger asks it all this before it touches a kernel."""

    class OnGpu:
        device = torch.device("cuda")

    OnGpu.config = type("Config", (), config)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda *_: pytest.fail("fused all the same"))
    model = OnGpu()
    liger.use_liger(model, "torch")
    assert capsys.readouterr().out == "" and model.kernels == "torch"
    liger.use_liger(model, "auto")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and re.search(said, out) and model.kernels == "torch"
    with pytest.raises(UserError, match=said):
        liger.use_liger(model, "liger")


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", liger.MODEL_TYPES)
def test_logits_and_gradients_are_those_of_transformers_layers(model_type):
    ids = torch.randint(0, 97, (3, 21), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # padding on the left: positions that differ by row
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = {}
    for kernels in ("torch", "liger"):
        model = tiny(model_type, "cuda")
        liger.use_liger(model, kernels)
        assert model.kernels == kernels and bool(methods(model)) == (kernels == "liger")
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        (logits * torch.linspace(-1, 1, 97, device="cuda"))[mask.bool()].sum().backward()
        found[kernels] = [logits[mask.bool()].detach(), *(p.grad for p in model.parameters())]
    for ours, wanted in zip(found["liger"], found["torch"], strict=True):
        assert ((ours - wanted).norm() / wanted.norm()).item() < 1e-5


@pytest.mark.gpu
def test_the_copy_that_generates_has_its_models_kernels(tiny_model_dir):
    from posttrain.models.adapters import new_adapter

    settings = Model(name_or_path=str(tiny_model_dir))
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, "nf4", tokenizer)
    assert base.kernels == "liger"
    policy = new_adapter(base, Lora(r=4, alpha=8, target_modules=["q_proj", "up_proj"]), tokenizer, 0)
    copied = PolicyCopy(policy).model
    assert copied.kernels == "liger" and any(name.endswith("norm") for name in methods(copied))
    ids = torch.tensor([[300, 301, 302]], device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.allclose(copied(ids).logits, policy.eval()(ids).logits, rtol=0.05, atol=0.05)

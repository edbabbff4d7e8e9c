"""Weights folded tensor by tensor are those of the copy that generates, and PEFT's own."""

from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_adapter_kinds import LORAS, OTHERS, lora, other
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from posttrain.config.schema import Model
from posttrain.errors import UserError
from posttrain.kernels.nf4 import layers_to_pack, packed_linears
from posttrain.models.adapters import load_adapter
from posttrain.models.base import load_base
from posttrain.models.checkpoint import skeleton
from posttrain.models.folded import DRAWN, FoldedWeights
from posttrain.models.policy_copy import PolicyCopy

REFUSED = {
    "lora_bias": "biases",
    "parameters": "target_parameters",
    "pissa": "init_lora_weights pissa",
    "the embedding": "first or last matrix",
    "the embedding with dora": "first or last matrix",
    "the head": "first or last matrix",
    "BEFT": "biases",
} | {kind: f"peft_type {kind}" for kind in DRAWN}

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def adapter_of(load, folder, config):
    """An adapter of PEFT's own, moved away from where it began."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(load(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def differing(folded, model):
    """Names of tensors that are not the model's, to the bit. A head that is the embedding counts once."""
    wanted = dict(model.named_parameters())
    assert {t.name for t in folded.tensors} == wanted.keys()
    return [t.name for t in folded.tensors if not torch.equal(folded.read(t), wanted[t.name])]


@pytest.mark.parametrize("name", [*LORAS, *OTHERS])
def test_every_kind_is_folded_as_the_copy_folds_it_or_refused(name, load, settings, tmp_path):
    config = LORAS[name]() if name in LORAS else other(name, **OTHERS[name])
    folder = adapter_of(load, tmp_path, config)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            FoldedWeights(settings, "none", folder)
        return
    copy = PolicyCopy(load_adapter(load(), folder, trainable=False)).model
    assert not differing(FoldedWeights(settings, "none", folder), copy)


@pytest.mark.parametrize("config", ["plain", "token rows"])
@pytest.mark.parametrize("form", ["nf4", "nf4_unpacked"])
def test_a_packed_base_is_folded_as_the_copy_folds_it(form, config, load, settings, tmp_path):
    folder = adapter_of(load, tmp_path, LORAS[config]())
    copy = PolicyCopy(load_adapter(load(form), folder, trainable=False)).model
    assert not differing(FoldedWeights(settings, form, folder), copy)
    assert differing(FoldedWeights(settings, "none", folder), copy)  # the original's values are others


@pytest.mark.parametrize("name", ["plain", "rslora", "rank and alpha patterns", "dora", "token rows"])
def test_it_is_what_peft_merges(name, load, settings, tmp_path):
    """PEFT's `merge_and_unload` in fp32."""
    fp32 = settings.model_copy(update={"dtype": "float32"})
    folder = adapter_of(load, tmp_path, LORAS[name]())
    base = AutoModelForCausalLM.from_pretrained(settings.name_or_path, dtype=torch.float32)
    merged = dict(PeftModel.from_pretrained(base, folder).merge_and_unload().named_parameters())
    folded = FoldedWeights(fp32, "none", folder)
    for tensor in folded.tensors:
        torch.testing.assert_close(folded.read(tensor), merged[tensor.name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "dora"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_the_adapter_trained_are_in_the_folder(kind, bias, tmp_path):
    """PEFT keeps them as the base's own parameters, beside A and B."""
    config = LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    settings = Model(name_or_path=str(tmp_path / "base"), dtype="float32")
    base = partial(AutoModelForCausalLM.from_pretrained, settings.name_or_path)
    folder = adapter_of(base, tmp_path / "adapter", lora(bias=bias, use_dora=kind == "dora"))
    merged = dict(PeftModel.from_pretrained(base(), folder).merge_and_unload().named_parameters())
    folded = FoldedWeights(settings, "none", folder)
    assert merged["model.layers.0.self_attn.q_proj.bias"].abs().max() > 0.01
    for tensor in folded.tensors:
        torch.testing.assert_close(folded.read(tensor), merged[tensor.name], rtol=0, atol=1e-6)


def test_layers_to_pack_are_those_that_a_load_packs(load, settings):
    assert layers_to_pack(skeleton(settings)) == [*packed_linears(load("nf4"))]


@pytest.fixture(scope="module")
def gpt2(tiny_model_dir, tmp_path_factory):
    """Layers whose weights are (in, out). Those between attention and the stream are square, and could be taken either way."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**sizes, **ends)).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(name_or_path=str(folder), attn_implementation="eager"), tokenizer


def test_layers_that_are_turned_round_before_they_are_packed(gpt2):
    settings, tokenizer = gpt2
    packed, unpacked = (load_base(settings, form, tokenizer) for form in ("nf4", "nf4_unpacked"))
    assert layers_to_pack(skeleton(settings)) == [*packed_linears(packed)] != []
    wanted = dict(unpacked.named_parameters())
    for tensor in (folded := FoldedWeights(settings, "nf4", None)).tensors:
        is_turned = isinstance(folded.packed.get(tensor.name), bool)
        plain = wanted[tensor.name].T if is_turned else wanted[tensor.name]
        assert torch.equal(folded.read(tensor), plain), tensor.name
    ids = torch.arange(3, 40)[None]
    logits = [PolicyCopy(base).model(ids).logits for base in (packed, unpacked)]
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0], unpacked(ids).logits, rtol=0.02, atol=0.02)
    with pytest.raises(UserError, match="not tried on layers as transformer.h.0.attn.c_attn, Conv1D"):
        PolicyCopy(packed, fp8=True)


def test_a_base_alone_is_its_own_files(settings):
    folded = FoldedWeights(settings, "none", None)
    there = load_file(f"{settings.name_or_path}/model.safetensors")
    assert {t.name: t.shape for t in folded.tensors} == {name: tuple(t.shape) for name, t in there.items()}
    assert all(torch.equal(folded.read(t), there[t.name]) for t in folded.tensors)


def test_a_base_that_names_its_tensors_otherwise_is_refused(settings, tiny_model_dir, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"x.{name}": t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="has no tensor model.embed_tokens.weight in its files"):
        FoldedWeights(settings.model_copy(update={"name_or_path": str(folder)}), "none", None)

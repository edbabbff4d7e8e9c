"""Base models in their three forms, the stop token that their parts must agree on, and the copy that generates."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from tiny_training import LORA

from posttrain.config.schema import Lora, Model
from posttrain.errors import UserError
from posttrain.kernels.nf4 import base_weight, flatten_scales, packed_linears
from posttrain.models.adapters import hold_fp32, new_adapter
from posttrain.models.base import device, fingerprint, load_base
from posttrain.models.chat import load_tokenizer
from posttrain.models.policy import open_policy
from posttrain.models.policy_copy import PolicyCopy
from posttrain.models.special_tokens import align_special_tokens, check_stop_token

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.tensor([[5, 300, 301, 2, 17, 400], [1, 2, 3, 4, 5, 6]])
FORMS = ("nf4", "nf4_unpacked", "none")


@pytest.fixture
def adapted(load, tokenizer):
    """An adapter that changes every layer it is on, and rows of special tokens if asked to."""

    def adapted(form="none", base=None, targets=LORA["target_modules"], tokens="never", use_rslora=False, **changes):
        lora = Lora(r=4, alpha=8, target_modules=targets, train_special_tokens=tokens, use_rslora=use_rslora)
        return stir(new_adapter(load(form, **changes) if base is None else base, lora, tokenizer, 0)).eval()

    return adapted


def stir(policy, seed=0, std=0.2):
    """Random values where an adapter starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return policy


@torch.no_grad()
def logits(model):
    with training_precision(model):
        return model.eval()(input_ids=IDS).logits


def training_precision(model):
    """A bf16 policy computes in bf16 under autocast, as the trainer runs it."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_past_cudnns_attention(tiny_model_dir):
    """cuDNN plans for every new shape of a batch, a second each time."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    settings = Model(name_or_path=str(tiny_model_dir))
    load_base(settings, "none", load_tokenizer(settings))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("module", ["models.adapters", "generation.engines", "training.arguments"])
def test_importing_what_trains_and_generates_says_nothing(module):
    """On some CPUs bitsandbytes warns of a kernel that is not used here."""
    done = subprocess.run(
        [sys.executable, "-c", f"import posttrain.{module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_unpacked_nf4_has_the_values_of_packed_nf4_and_no_trace_of_packing(load):
    packed, unpacked, plain = (load(form) for form in FORMS)
    assert len(packed_linears(packed)) == 14
    assert not packed_linears(unpacked)
    assert torch.equal(logits(packed), logits(unpacked))
    assert not torch.equal(logits(packed), logits(plain))
    for name, module in packed_linears(packed).items():
        assert torch.equal(base_weight(module), unpacked.get_submodule(name).weight)
    assert not getattr(unpacked, "is_loaded_in_4bit", False)
    assert not getattr(unpacked, "is_quantized", False)
    assert "quantization_config" not in unpacked.config.to_dict()


def test_double_quantization_packs_a_weight_in_half_a_byte(load):
    module = next(iter(packed_linears(load("nf4")).values()))
    assert module.weight.dtype == torch.uint8
    assert module.weight.numel() == module.in_features * module.out_features // 2
    assert module.weight.quant_state.nested
    assert module.weight.quant_state.quant_type == "nf4"


def test_flat_scales_unpack_to_the_same_values_and_are_saved_as_bitsandbytes_saves_them(load):
    model, nested = load("nf4"), load("nf4")
    flatten_scales(model)
    for name, module in packed_linears(model).items():
        state = module.weight.quant_state
        assert state is module.quant_state and not state.nested and state.absmax.dtype == torch.float32
        assert torch.equal(base_weight(module), base_weight(nested.get_submodule(name)))
        again = Params4bit.from_prequantized(module.weight.data, state.as_dict(packed=True), device=module.weight.device)
        assert torch.equal(dequantize_4bit(again.data, again.quant_state), base_weight(module))
    assert torch.equal(logits(model), logits(nested))


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_flat_scales_unpack_to_the_same_values_on_a_gpu(storage):
    layer = Linear4bit(512, 384, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=storage)
    model = torch.nn.Sequential(layer).to(torch.bfloat16).cuda()
    nested = base_weight(layer)
    assert layer.weight.quant_state.nested
    flatten_scales(model)
    assert not layer.weight.quant_state.nested and torch.equal(base_weight(layer), nested)


def test_scales_are_flat_where_a_policy_is_trained(tiny_model_dir, tokenizer):
    settings = Model(name_or_path=str(tiny_model_dir))
    for trainable in (True, False):
        policy, _ = open_policy(settings, "nf4", tokenizer, None, trainable=trainable)
        assert {module.weight.quant_state.nested for module in packed_linears(policy).values()} == {not trainable}


@pytest.mark.parametrize("form", FORMS)
def test_a_base_comes_frozen_in_its_dtype_and_stops_as_the_tokenizer_does(load, tokenizer, form):
    base = load(form)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert base.dtype == torch.bfloat16
    for config in (base.config, base.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    check_stop_token(base, tokenizer)


def test_a_packed_base_still_passes_gradients_after_it_was_evaluated(load, adapted):
    """bitsandbytes repacks for a kernel without gradients in an eval forward, where the host's AVX512 allows it."""
    policy = adapted("nf4")
    logits(policy)
    with training_precision(policy):
        policy.train()(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in policy.named_parameters() if "layers.0" in n and p.requires_grad]
    assert len(grads) == 14
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    assert not any(module.support_avx512bf16_for_cpu for module in packed_linears(policy).values())


def test_the_fingerprint_knows_the_model_whatever_its_form_or_adapter(load, adapted):
    base = load()
    prints = {fingerprint(load(form)) for form in FORMS} | {fingerprint(adapted("nf4", tokens="always"))}
    assert prints == {fingerprint(base)}
    base.model.norm.weight.data[3] += 0.5
    assert fingerprint(base) not in prints


def test_a_folder_without_a_model_is_refused(settings, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"holds no model \(no config.json\): check model.name_or_path"):
        load_base(settings.model_copy(update={"name_or_path": str(tmp_path)}), "none", tokenizer)


# --- one stop token ---------------------------------------------------------------------------------------------------


def break_template(base, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")


def break_tokenizer(base, tokenizer):
    tokenizer.eos_token = "<|endoftext|>"


def break_config(base, tokenizer):
    base.config.eos_token_id = 0


def break_generation_config(base, tokenizer):
    base.generation_config.eos_token_id = 0


def break_generation_config_with_more(base, tokenizer):
    base.generation_config.eos_token_id = [2, 0]  # as Llama-3 Instruct ships it: TRL would mask at the first of any


def break_generation_config_with_none(base, tokenizer):
    base.generation_config.eos_token_id = None


BREAKS = {
    break_template: "'chat template': 0",
    break_tokenizer: "'tokenizer.eos_token_id': 0",
    break_config: "'model.config.eos_token_id': 0",
    break_generation_config: "'generation_config.eos_token_id': 0",
    break_generation_config_with_more: r"'generation_config.eos_token_id': \[2, 0\]",
    break_generation_config_with_none: "'generation_config.eos_token_id': None",
}


@pytest.mark.parametrize(("damage", "named"), BREAKS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_part_that_stops_on_another_token_is_named(load, tokenizer, damage, named):
    base, tokenizer = load(), copy.deepcopy(tokenizer)
    damage(base, tokenizer)
    with pytest.raises(UserError, match=f"disagree on the stop token.*{named}"):
        check_stop_token(base, tokenizer)


def test_aligned_parts_agree_again(load, tokenizer):
    base = load()
    base.config.eos_token_id, base.generation_config.eos_token_id = 7, [1, 2]
    align_special_tokens(base, tokenizer)
    check_stop_token(base, tokenizer)


# --- the copy that generates ------------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "tokens": {"tokens": "always"},
    "attention alone": {"targets": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_copys_logits_are_the_policys(adapted, case):
    policy = adapted(dtype="float32", **case)
    with policy.disable_adapter():
        base = logits(policy)
    wanted = logits(policy)
    assert (wanted - base).abs().max() > 0.05
    assert torch.allclose(logits(PolicyCopy(policy).model), wanted, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("form", FORMS)
def test_the_copy_of_a_bf16_policy_differs_by_rounding_alone(adapted, form, case):
    policy = adapted(form, **case)
    with policy.disable_adapter():
        base = logits(policy)
    wanted = logits(policy)
    rounding, effect = (logits(PolicyCopy(policy).model) - wanted).float(), (base - wanted).float()
    assert rounding.norm() < 0.02 * effect.norm()


def pointers(model):
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters(remove_duplicate=False)}  # tied ones twice


def test_the_copy_shares_what_no_adapter_changes_and_nothing_else(adapted):
    policy = adapted(targets=["q_proj", "down_proj"])
    copied, base = pointers(PolicyCopy(policy).model), pointers(policy.get_base_model())
    for name, pointer in copied.items():
        folded = "q_proj" in name or "down_proj" in name
        assert (pointer not in base.values()) == folded, name
    assert len(copied) == 21
    assert copied["lm_head.weight"] == copied["model.embed_tokens.weight"]


def test_the_copy_of_a_packed_base_shares_the_rest(adapted):
    policy = adapted("nf4")
    copied, base = pointers(PolicyCopy(policy).model), pointers(policy.get_base_model())
    shared = {name for name, pointer in copied.items() if pointer in base.values()}
    assert shared == {name for name in copied if "norm" in name or "embed" in name or "lm_head" in name}


def test_trained_rows_are_folded_into_one_matrix_for_both_ends(adapted):
    policy = PolicyCopy(adapted(tokens="always")).model
    assert policy.lm_head.weight is policy.model.embed_tokens.weight


def test_a_model_without_adapter_is_shared_whole(load):
    base = load(dtype="float32")
    policy = PolicyCopy(base)
    assert pointers(policy.model) == pointers(base)
    assert torch.equal(logits(policy.refresh()), logits(base))


@pytest.mark.parametrize("form", FORMS)
def test_the_copy_leaves_the_trained_model_as_it_was(adapted, form):
    policy = adapted(form, tokens="always").train()
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    trainable = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    PolicyCopy(policy).refresh()
    assert policy.training
    assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == trainable
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())


@pytest.mark.parametrize("tokens", ["never", "always"])
def test_refresh_follows_the_adapter(adapted, tokens):
    policy = adapted(dtype="float32", tokens=tokens)
    copied = PolicyCopy(policy)
    first = logits(copied.model)
    stir(policy, seed=1)
    assert torch.equal(logits(copied.model), first)
    assert torch.allclose(logits(copied.refresh()), logits(policy), atol=1e-5)
    assert not torch.allclose(logits(copied.model), first, atol=1e-2)


def test_folding_is_done_in_fp32_and_rounded_once(adapted):
    policy = adapted()
    copied = PolicyCopy(policy).model
    layer = policy.get_base_model().model.layers[1].mlp.up_proj
    exact = (
        layer.base_layer.weight.double() + 2.0 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    folded = copied.model.layers[1].mlp.up_proj.weight
    assert folded.dtype == torch.bfloat16
    assert ((folded.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_the_copy_generates_with_the_runs_stop_token(load, adapted, tokenizer):
    copied = PolicyCopy(adapted("nf4")).model
    assert copied.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not copied.training


# --- precision of the compute -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_activations_reach_the_adapter_in_bf16_and_its_masters_are_fp32(adapted, form):
    """PEFT would cast every activation up to the dtype of the adapter's weights: twice the memory traffic for nothing."""
    policy = adapted(form)
    seen = []
    for module in policy.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with training_precision(policy):
        policy.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert len(seen) == 14
    assert {*seen} == {(torch.bfloat16, torch.bfloat16)}
    masters = [p for p in policy.parameters() if p.requires_grad]
    assert {p.dtype for p in masters} == {p.grad.dtype for p in masters} == {torch.float32}


def test_hold_fp32_touches_what_is_trained_alone(adapted):
    policy = adapted().bfloat16()
    values = {name: p.detach().clone() for name, p in policy.named_parameters()}
    hold_fp32(policy)
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
        assert torch.equal(parameter, values[name].to(parameter.dtype))


def test_the_device_is_the_cpu_where_there_is_no_other():
    assert device() == torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

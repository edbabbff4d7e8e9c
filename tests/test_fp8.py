"""Rollouts in 8 bits: products against those of the rounded weights, what a copy decodes, and how what it drew is weighed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from test_seats import FAMILIES, Sampling, loop, prompts, rows, seats
from test_trainers import completion_logps
from tiny_training import LENGTHS, loss_and_gradient, pay_tiny, ragged, scored, stir
from torch import nn
from transformers import AutoModelForCausalLM

import grpo_train
from posttrain.config.schema import GrpoConfig
from posttrain.errors import UserError
from posttrain.generation import decoder, guard
from posttrain.kernels import decoding, fp8_linear
from posttrain.kernels.fp8_linear import Fp8Linear
from posttrain.models.policy_copy import PolicyCopy
from posttrain.models.reference import reference_of
from posttrain.tasks.answers import grader_of

ROUNDING = 2**-4  # of a number with 3 bits of mantissa, at most
SOME = ["llama, tied, with biases", "qwen2, windows in some layers", "qwen3"]


def apart(one, other):
    return float((one.float() - other.float()).norm() / other.float().norm())


def holding(weight, bias=None):
    linear = nn.Linear(*weight.T.shape, bias=bias is not None, dtype=torch.bfloat16)
    if bias is not None:
        linear.bias.data = bias
    layer = Fp8Linear(linear.requires_grad_(False))
    layer.hold(weight)
    return layer


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_a_product_is_that_of_what_the_layer_holds(monkeypatch, device, biased, few):
    monkeypatch.setattr(fp8_linear, "has_few_tiles", lambda rows, outputs: few)
    weight, bias = randn(96, 64) * torch.logspace(-3, 2, 96)[:, None], randn(96).bfloat16() if biased else None
    layer, x = holding(weight, bias).to(device), (randn(3, 5, 64) * torch.logspace(-2, 3, 5)[:, None]).bfloat16().to(device)
    assert ((layer.held().cpu() - weight).abs() <= weight.abs() * ROUNDING + weight.abs().amax(1, keepdim=True) / 448 / 512).all()
    values, scale = decoding.plain_fp8_rows(x.flatten(0, 1))
    wanted = (values.float() * scale) @ layer.held().T + (0 if bias is None else bias.to(device).float())
    assert apart(layer(x).flatten(0, 1), wanted) < 0.01
    assert apart(layer(x), x.float() @ weight.T.to(device) + (0 if bias is None else bias.to(device).float())) < 0.06


def test_a_row_of_zeros_and_a_weight_of_zeros_give_zeros():
    assert not holding(torch.zeros(32, 64))(randn(4, 64).bfloat16()).any()
    assert not holding(randn(32, 64))(torch.zeros(4, 64, dtype=torch.bfloat16)).any()


def policy(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # a copy: transformers notes the dtype in the config, which other tests share
        base = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name]), dtype=torch.bfloat16)
        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model


@pytest.mark.parametrize("name", SOME)
def test_a_copy_holds_the_rounded_folded_weights_and_follows_the_adapter(name):
    model = policy(name)
    copy, plain = PolicyCopy(model, fp8=True), PolicyCopy(model)
    for _ in range(2):
        held = {key: module for key, module in copy.refresh().named_modules() if isinstance(module, Fp8Linear)}
        assert len(held) == 7 * FAMILIES[name].num_hidden_layers
        for key, module in held.items():
            folded = plain.refresh().get_submodule(key)
            assert apart(module.held(), folded.weight) < 0.04, key
            assert module.bias is None or torch.equal(module.bias, folded.bias)
        stir(model)
    assert copy.model.get_output_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("way", ["seats", "seats, 8-bit cache", "loop"])
def test_what_it_decodes_is_what_the_weights_that_it_holds_give(name, way, device):
    copy = PolicyCopy(policy(name).to(device), fp8=True, fp8_cache="cache" in way).refresh()
    copy.decoding = way.split(",")[0]
    assert decoder.fits(loop.prepare_to_decode(copy)) == (way != "loop")
    tokens, logits = guard.decoded_logits(copy, prompts())
    texts = [[*prompt, *more[:-1]] for prompt, more in zip(prompts(), tokens, strict=True)]
    wanted = guard.own_logits(reference_of(copy), texts, copy.device)
    assert guard.difference(logits, wanted).relative < 0.15


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_seats_draw_the_same_however_many_there_are(fp8_cache):
    """Prompts are shared among seats and rows move to others, with all that is kept of them."""
    copy = loop.prepare_to_decode(PolicyCopy(policy("qwen3"), fp8=True, fp8_cache=fp8_cache).model)
    copy.decoding = "seats"
    sampling = Sampling(8, temperature=1.0, num_samples=2, seed=4)
    found = [seats.decode_batch(copy, prompts(), sampling, -1, 0, max_seats)[0] for max_seats in (4, 64)]
    same = sum(one == other for one, other in zip(rows(found[0]), rows(found[1]), strict=True))
    assert same >= len(rows(found[0])) - 2  # a product of other shape may round otherwise


def test_keys_and_values_in_8_bits_take_half_and_are_off_by_their_rounding():
    found = {}
    for fp8_cache in (False, True):
        copy = loop.prepare_to_decode(PolicyCopy(policy("qwen3"), fp8=True, fp8_cache=fp8_cache).model)
        made = decoder.Decoder(copy, 3, 64)
        logits = made.prefill([[5, 9, 3, 7], [4, 8]], range(2))
        found[fp8_cache] = sum(tensor.nbytes for tensor in made.cached()), logits, made
    assert torch.equal(found[False][1], found[True][1])  # a prompt sees itself as it was computed
    head_dim = found[False][2].keys[0].shape[3]
    assert found[True][0] == found[False][0] * (1 + 4 / head_dim) / 2
    for exact, rounded in zip(
        found[False][2].keys + found[False][2].values, found[True][2].keys + found[True][2].values, strict=True
    ):
        kept = rounded.front(3, 64)
        assert exact[:2, :, :2].any() and not exact[2].any() and not kept[2].any()
        assert ((kept - exact.float()).abs() <= exact.float().abs() * ROUNDING + rounded.scale[..., None] * 2**-10).all()
    ids, place = torch.tensor([2, 6]), torch.tensor([4, 2])
    one, other = (found[fp8_cache][2](ids, place) for fp8_cache in (False, True))
    assert 0 < apart(one, other) < 0.1


# --- training on what it draws ----------------------------------------------------------------------------------------


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr("posttrain.runs.directory._machine_has", lambda what: True)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("off_policy", [False, True])
def test_each_tokens_gain_has_the_cut_weight_of_its_mismatch(tiny, sft, off_policy):
    settings = {"beta": 0.1, "loss_type": "dapo", "vllm_importance_sampling_clip_max": 1.2}
    with pay_tiny(tiny, sft, settings, rollouts={"weights": "fp8"}) as trainer:
        inputs = ragged(scored(trainer), LENGTHS)
        with torch.autocast("cpu", torch.bfloat16):
            now = completion_logps(trainer.model, inputs, 0.8)
        noise = 0.3 * torch.randn(now.shape, generator=torch.Generator().manual_seed(0))
        if off_policy:
            inputs["old_per_token_logps"] = now - 0.1
        inputs["sampling_per_token_logps"] = (now - 0.1 * off_policy) - noise
        loss, _ = loss_and_gradient(trainer, inputs)
        (logged,), (share,) = (trainer._metrics["train"][f"rollout/{name}"] for name in ("mean_weight", "cut_weights"))
    mask = inputs["completion_mask"]
    weight = noise.exp().clamp(max=1.2)
    ratio = torch.full_like(now, 0.1 * off_policy).exp()
    gain = torch.minimum(ratio * inputs["advantages"][:, None], ratio.clamp(max=1.2) * inputs["advantages"][:, None]) * weight
    gap = inputs["ref_per_token_logps"] - now
    kl = (gap.exp() - gap - 1) * (ratio if trainer.args.use_bias_correction_kl else 1)
    wanted = ((0.1 * kl - gain) * mask).sum() / mask.sum()
    assert loss == pytest.approx(wanted.item(), rel=0.05, abs=2e-3)
    assert logged == pytest.approx((weight * mask).sum().item() / mask.sum().item(), rel=0.03)
    assert share == pytest.approx(((noise.exp() > 1.2) * mask).sum().item() / mask.sum().item(), abs=0.15)


@pytest.mark.usefixtures("on_hopper")
def test_a_run_trains_on_rollouts_in_8_bits_and_logs_the_mismatch(tiny, sft):
    with pay_tiny(tiny, sft, {"max_steps": 2, "beta": 0.04}, rollouts={"weights": "fp8"}) as trainer:
        stir(trainer.model)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        held = [module for module in trainer.rollout_func.copy.model.modules() if isinstance(module, Fp8Linear)]
    assert len(rows) == 2 and held
    for row in rows:
        assert 0 < row["rollout/logp_difference"] < 0.2
        assert row["rollout/mean_weight"] == pytest.approx(1, abs=0.05) and row["rollout/cut_weights"] == 0


@pytest.mark.usefixtures("on_hopper")
def test_a_run_keeps_keys_and_values_in_8_bits_in_seats_alone(tiny, sft):
    asked = {"weights": "fp8", "cache": "fp8"}
    with pytest.raises(UserError, match="decodes in the loop"), pay_tiny(tiny, sft, {"max_steps": 1}, rollouts=asked):
        raise AssertionError("the tiny model has no seats by itself")
    model = tiny.grpo_config(sft).model.model_copy(update={"decoding": "seats"})
    with pay_tiny(tiny, sft, {"max_steps": 1}, rollouts=asked, model=model) as trainer:
        trainer.train()
        (row,) = [row for row in trainer.state.log_history if "loss" in row]
        kept = trainer.rollout_func.copy.model
    assert kept.fp8_cache and 0 < row["rollout/logp_difference"] < 0.3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rollouts": {"weights": "fp8", "engine": "trl"}}, "is of posttrain's own rollouts"),
        ({"rollouts": {"weights": "fp8", "correct_mismatch": True}}, "remove one of the two"),
        ({"lora": None, "adapter": None, "quantization": "none"}, "remove it, or give lora"),
        ({"model": {"name_or_path": "x", "dtype": "float32"}}, "set model.dtype to that"),
        ({"rollouts": {"weights": "int4"}}, "fp8"),
        ({"rollouts": {"cache": "fp8"}}, "set rollouts.weights fp8"),
        (
            {"rollouts": {"weights": "fp8", "cache": "fp8"}, "model": {"name_or_path": "x", "decoding": "loop"}},
            "is of seats: remove it, or model.decoding loop",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, told):
    given = {"adapter": "x", "model": {"name_or_path": "x"}, "rollouts": {"weights": "fp8"}} | settings
    with pytest.raises(ValidationError, match=told):
        GrpoConfig(run_dir="x", data={"path": "x"}, **given)


def test_a_machine_without_such_products_is_refused_before_anything_is_loaded(tiny, sft):
    with pytest.raises(UserError, match="needs a GPU with products in 8 bits"):
        grpo_train.get_ready(tiny.grpo_config(sft, rollouts={"weights": "fp8"}), grader_of(None))

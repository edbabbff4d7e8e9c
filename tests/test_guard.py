"""The two checks that a run makes of itself: they pass on what is right, they draw nothing, and they fail on what is wrong."""

import json

import pytest
import torch
from families import make_model
from tiny_training import LORA, Tiny, stir
from transformers import BloomConfig, Gemma2Config, Gemma3Config, LlamaConfig, Qwen3NextConfig

from posttrain.config.schema import Lora, Model
from posttrain.errors import UserError
from posttrain.generation import engines, guard, loop, masks, steps, supported
from posttrain.generation.guard import EngineGuard
from posttrain.generation.loop import Sampling
from posttrain.kernels import lora_linear
from posttrain.models.adapters import new_adapter
from posttrain.models.base import load_base
from posttrain.models.chat import load_tokenizer
from posttrain.models.policy_copy import PolicyCopy
from posttrain.models.reference import reference_of
from posttrain.training import label_head

PROMPTS = [torch.randint(5, 600, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 11, 40)]
FAMILIES = ("Gemma3 (text)", "Mistral", "Gemma2", "Granite")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from conftest import tiny_tokenizer

    return {name: make_model(name, tmp_path_factory.mktemp("family"), tiny_tokenizer()) for name in FAMILIES}


@pytest.fixture
def copy_of(folders):
    """The copy that generates of a family, and the base it was made of."""

    def copy_of(name, dtype="float32"):
        settings = Model(name_or_path=str(folders[name]), dtype=dtype)
        base = load_base(settings, "none", load_tokenizer(settings))
        return PolicyCopy(base).model, base

    return copy_of


def check(policy, trained=None, prompts=PROMPTS):
    """The difference that a run would record."""
    found = {}
    EngineGuard("use another engine", found.update)("transformers", policy, trained, prompts, 24)
    assert found["decoding"] == "loop"  # these run on a CPU
    return found["engine_difference"]


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("step", ["EagerStep", "GraphStep"])
def test_windows_are_those_of_transformers_in_any_batch(copy_of, monkeypatch, name, step):
    """Slices of prompts, dropped rows, rows below and above the window, and all of the graph step but its capture."""
    policy, _ = copy_of(name)
    own = reference_of(policy)
    wanted = [
        own.generate(torch.tensor([p]), do_sample=False, max_new_tokens=24, eos_token_id=9, pad_token_id=0)[0, len(p) :].tolist()
        for p in (*PROMPTS, [5, 6])
    ]
    stop = wanted[0][6]  # one row at least ends early
    wanted = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in wanted]
    monkeypatch.setattr(steps, "EagerStep", getattr(steps, step))
    monkeypatch.setattr(steps, "capture", lambda run: run)
    monkeypatch.setattr(steps, "SPAN", 8)
    monkeypatch.setattr(steps, "STEPS_BETWEEN_DROPS", 3)
    monkeypatch.setitem(loop.PREFILL_TOKENS, "cpu", 50)
    loop.prepare_to_decode(policy)
    found, _ = loop.decode_batch(policy, [*PROMPTS, [5, 6]], Sampling(24), stop_id=stop)
    assert [completion.ids for (completion,) in found] == wanted


def test_a_model_without_windows_has_one_mask_for_all_layers():
    assert masks.layer_windows(LlamaConfig()) == {masks.ALL_LAYERS: None}


# --- before the first token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_what_is_right_differs_by_rounding(copy_of, name, dtype, rounding):
    assert check(*copy_of(name, dtype)) < rounding


@pytest.mark.parametrize("name", ["Gemma3 (text)", "Mistral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_window_that_is_left_out_stops_the_run(copy_of, monkeypatch, name, dtype):
    policy, base = copy_of(name, dtype)
    blind = {kind: None for kind in masks.layer_windows(policy.config)}
    monkeypatch.setattr(steps, "layer_windows", lambda config: blind)
    monkeypatch.setattr(masks, "layer_windows", lambda config: blind)
    with pytest.raises(
        UserError, match=r"does not compute the model's own forward: a logit is \S+, and \S+ there.*another engine"
    ):
        check(policy, base)


def test_a_cap_that_is_left_out_stops_the_run(copy_of, monkeypatch):
    policy, base = copy_of("Gemma2")
    monkeypatch.setattr(steps, "decoding_attention", lambda model: "sdpa")
    monkeypatch.setattr(loop.steps, "decoding_attention", lambda model: "sdpa")
    policy.config.attn_logit_softcapping = base.config.attn_logit_softcapping
    for layer in policy.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    with pytest.raises(UserError, match="rounding by less than 0.001"):
        check(policy, base)


@pytest.fixture
def adapted(folders):
    settings = Model(name_or_path=str(folders["Granite"]), dtype="float32")
    tokenizer = load_tokenizer(settings)
    policy = new_adapter(load_base(settings, "none", tokenizer), Lora(**LORA), tokenizer, 0)
    stir(policy)
    return policy


def test_an_adapter_is_compared_with_the_trained_model(adapted):
    lora_linear.fuse_adapters(adapted)
    assert check(PolicyCopy(adapted).model, adapted) < 1e-5


def test_one_changed_weight_of_a_folded_adapter_stops_the_run(adapted):
    policy = PolicyCopy(adapted).model
    policy.model.layers[0].self_attn.o_proj.weight.data[3, 5] += 1
    with pytest.raises(UserError, match="does not compute the trained model with its adapter"):
        check(policy, adapted)


def test_a_wrong_kernel_stops_the_run(copy_of):
    policy, base = copy_of("Granite")
    norm = policy.model.norm
    norm.forward = lambda hidden: hidden * norm.weight  # without the division
    with pytest.raises(UserError, match="does not compute the model's own forward"):
        check(policy, base)


def test_the_guard_asks_once_draws_nothing_and_leaves_the_model_as_it_was(adapted):
    found, policy = [], PolicyCopy(adapted).model
    ask = EngineGuard("", lambda **told: found.append(told))
    adapted.train()
    before, modes = torch.get_rng_state(), [module.training for module in adapted.modules()]
    for _ in range(2):
        ask("transformers", policy, adapted, PROMPTS, 24)
    assert len(found) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in adapted.modules()] == modes
    assert all("forward" not in vars(module) for module in policy.modules())


def test_logits_that_are_no_numbers_are_the_engines_fault_only_if_the_model_has_numbers(copy_of):
    policy, base = copy_of("Granite")
    policy.model.norm.forward = lambda hidden: hidden * torch.nan
    with pytest.raises(UserError, match="a logit is nan, and"):
        check(policy, base)
    del policy.model.norm.forward
    policy.model.norm.weight.data.fill_(torch.nan)
    EngineGuard("", lambda **told: pytest.fail(str(told)))("transformers", policy, base, PROMPTS, 24)


def test_another_engine_is_not_asked():
    EngineGuard("", pytest.fail)("continuous_batching", None, None, PROMPTS, 24)


def test_the_guards_prompt_passes_a_window_where_the_runs_texts_do(copy_of):
    policy, _ = copy_of("Mistral")
    assert [len(p) for p in guard.guard_prompts(policy, [[5] * 5, [6] * 6], 2)] == [5, 3]
    assert [len(p) for p in guard.guard_prompts(policy, [[5] * 5, [6] * 6], 3)] == [9, 5]
    assert guard.guard_prompts(policy, [[5] * 5, [6] * 40, [7] * 12], 3)[0] == [7] * 12
    assert [len(p) for p in guard.guard_prompts(policy, [list(range(500))], 3)] == [64, 32]


def test_the_reference_has_the_same_weights_and_none_of_our_layers(copy_of):
    policy, _ = copy_of("Granite")
    loop.prepare_to_decode(policy)
    policy.kernels = "liger"  # then its class is read anew
    own = reference_of(policy)
    assert type(own) is not type(policy) and own.config._attn_implementation == "eager"
    assert [p.data_ptr() for p in own.parameters()] == [p.data_ptr() for p in policy.parameters()]
    ids = torch.tensor([PROMPTS[0]])
    assert torch.allclose(own(ids).logits, reference_of(copy_of("Granite")[0])(ids).logits, atol=1e-6)


def test_an_evaluation_records_the_difference(pipeline):
    (file,) = pipeline.glob("runs/*eval*sft_tiny*/manifest.json")
    manifest = json.loads(file.read_text())
    assert 0 < manifest["engine_difference"] < guard.BOUNDS[torch.bfloat16]


# --- what a config asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3NextConfig(), "layers of type linear_attention"),
        (BloomConfig(), "bloom"),
        (Gemma3Config(), "beside its text model"),
    ],
)
def test_what_the_engine_cannot_decode_is_refused_by_its_config(config, reason):
    assert reason in supported.why_not(config, "transformers")


def test_continuous_batching_is_refused_where_it_leaves_the_cap_out():
    assert "attn_logit_softcapping" in supported.why_not(Gemma2Config(), "continuous_batching")
    assert supported.why_not(Gemma2Config(), "transformers") is None


def test_upstreams_continuous_batching_leaves_the_cap_out(copy_of, folders):
    tokenizer = load_tokenizer(Model(name_or_path=str(folders["Gemma2"])))
    ours, theirs = (
        [c.ids for (c,) in engines.generate(copy_of("Gemma2")[0], PROMPTS, Sampling(24), tokenizer, 3, engine).completions]
        for engine in ("transformers", "continuous_batching")
    )
    assert ours != theirs, "it caps now: supported.why_not need not refuse it"


def test_gpt_neox_has_an_automatic_batch_size(tmp_path, tokenizer):
    settings = Model(name_or_path=str(make_model("GPT-NeoX", tmp_path, tokenizer)), dtype="float32")
    assert engines.auto_batch_size(load_base(settings, "none", load_tokenizer(settings)), 100, 1) == 128


# --- before the first step --------------------------------------------------------------------------------------------


@pytest.fixture
def granite(folders, tiny_data_dir, tmp_path):
    fp32 = {"model": {"name_or_path": str(folders["Granite"]), "dtype": "float32"}, "quantization": "none"}
    return Tiny(folders["Granite"], tiny_data_dir, tmp_path), fp32


def test_a_divided_head_has_the_loss_and_gradient_of_trls(granite):
    tiny, fp32 = granite
    rows = []
    for fast_loss in (True, False):
        with tiny.sft({"max_steps": 1}, fast_loss=fast_loss, **fp32) as trainer:
            trainer.train()
            rows.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


@pytest.mark.parametrize("wrong", [{"scale": 1.0}, {"cap": 0.1}])
def test_a_head_that_scores_otherwise_stops_the_run(granite, monkeypatch, wrong):
    tiny, fp32 = granite
    right = label_head.head_change
    monkeypatch.setattr(label_head, "head_change", lambda *args: right(*args)._replace(**wrong))
    with (
        pytest.raises(
            UserError, match=r"fast loss is not the model's: it is [\d.]+ on the first batch, and [\d.]+ by the model's own"
        ),
        tiny.sft({"max_steps": 1}, **fp32) as trainer,
    ):
        trainer.train()

"""Decoding in seats against the loop and transformers: the same tokens, draws and log-probabilities, however seats are taken."""

import collections
import copy
import functools
import types

import pytest
import torch
from pydantic import ValidationError
from tiny_training import LORA
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.gemma2 import Gemma2Config

from posttrain.config.schema import Lora, Model
from posttrain.errors import UserError
from posttrain.generation import decoder, engines, guard, loop, seats, steps
from posttrain.generation.loop import Sampling
from posttrain.models.policy_copy import PolicyCopy

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied, with biases": LlamaConfig(tie_word_embeddings=True, attention_bias=True, **SIZES),
    "llama, yarn": LlamaConfig(rope_parameters=YARN, **SIZES),
    "qwen2, windows in some layers": Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, **SIZES),
    "qwen3": Qwen3Config(head_dim=16, **SIZES),
    "mistral, windows": MistralConfig(sliding_window=8, **SIZES),
}
LENGTH = 16
SAMPLED = Sampling(LENGTH, temperature=1.0, num_samples=3, seed=4)
SAMPLINGS = [Sampling(LENGTH), SAMPLED, Sampling(LENGTH, temperature=0.7, top_p=0.8, seed=4), Sampling(1, temperature=1.0)]


@functools.cache
def model_of(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
    return loop.prepare_to_decode(model)


@functools.cache
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (n,), generator=generator).tolist() for n in (30, 21, 13, 13, 8, 5, 2, 1)]


@functools.cache
def wanted(name, sampling):
    """What the loop decodes, with a stop token that ends some rows and not others."""
    endless, _ = loop.decode_batch(model_of(name), prompts(), sampling, -1, 3)
    seen = collections.Counter(token for group in endless for row in group for token in set(row.ids))
    stop = next(token for token, count in seen.most_common() if count <= max(1, len(prompts()) * sampling.num_samples // 3))
    return loop.decode_batch(model_of(name), prompts(), sampling, stop, 3)[0], stop


def rows(groups):
    return [(row.ids, row.finish) for group in groups for row in group]


@pytest.mark.parametrize("name", FAMILIES)
def test_seats_hold_what_the_loop_decodes(name):
    check(name, SAMPLED, 4)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "nucleus", "one token"])
@pytest.mark.parametrize("max_seats", [1, 6, 512])
def test_however_many_seats_there_are(sampling, max_seats):
    check("qwen3", sampling, max_seats)


def check(name, sampling, max_seats):
    assert decoder.why_not(model_of(name)) is None
    expected, stop = wanted(name, sampling)
    found, _ = seats.decode_batch(model_of(name), prompts(), sampling, stop, 3, max_seats)
    assert rows(found) == rows(expected)
    assert {finish for _, finish in rows(found)} == {"stop", "length"} or sampling.max_new_tokens == 1
    for one, other in zip(found, expected, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(name):
    stop = wanted(name, Sampling(LENGTH))[1]
    found, _ = seats.decode_batch(model_of(name), prompts(), Sampling(LENGTH), stop, max_seats=2)
    model = model_of(name)
    model.config._attn_implementation = "eager"
    for prompt, (row,) in zip(prompts(), found, strict=True):
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LENGTH, eos_token_id=stop, pad_token_id=0)
        assert row.ids == out[0, len(prompt) :].tolist()
    loop.prepare_to_decode(model)


@pytest.mark.parametrize("looks", [1, 3, 50])
def test_how_often_the_host_looks_changes_nothing(monkeypatch, looks):
    monkeypatch.setitem(seats.STEPS_BETWEEN_LOOKS, "cpu", looks)
    expected, stop = wanted("llama", SAMPLED)
    assert rows(seats.decode_batch(model_of("llama"), prompts(), SAMPLED, stop, 3, 6)[0]) == rows(expected)


def test_a_free_seat_takes_the_next_prompt_and_a_batch_at_its_end_takes_smaller_steps(monkeypatch):
    stop = wanted("llama", SAMPLED)[1]
    model, sizes = model_of("llama"), []
    step = seats.Steps.__call__
    monkeypatch.setattr(seats.Steps, "__call__", lambda self, n: sizes.append(n) or step(self, n))
    num_slots = seats.decode_batch(model, prompts(), SAMPLED, stop, 3, 6)[1]
    assert num_slots == sum(sizes) and sizes[0] == 6 and sizes[-1] < 6
    waves = [seats.decode_batch(model, prompts()[i : i + 2], SAMPLED, stop, 3, 6)[1] for i in range(0, 8, 2)]
    assert num_slots < sum(waves)


def test_another_model_and_longer_prompts_get_seats_of_their_own():
    model = model_of("llama")
    seats.decode_batch(model, prompts()[-2:], Sampling(2), -1)
    small = model._graphs
    seats.decode_batch(model, prompts()[-2:], Sampling(1), -1)
    assert model._graphs is small
    seats.decode_batch(model, [prompts()[0] * 3], Sampling(40), -1)
    large = model._graphs
    assert large is not small and all(a >= b for a, b in zip(large.sizes, small.sizes, strict=True))
    assert model_of("qwen3").__dict__.get("_graphs") is not large


# --- one product for several layers -----------------------------------------------------------------------------------


def test_joined_weights_are_views_that_fold_and_save_as_before(tmp_path, tiny_model_dir):
    """The copy's fused weights follow the adapter, the base's stay where they are, and a saved copy is whole."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    settings = Lora(**LORA)
    policy = get_peft_model(base, LoraConfig(r=settings.r, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    place = base.model.layers[0].self_attn.k_proj.weight.data_ptr()
    twin = PolicyCopy(policy)
    decoder.join_projections(twin.model)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    twin.refresh()
    layer, source = twin.model.model.layers[0], base.model.layers[0]
    whole = decoder.joined([layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight])
    folded = source.self_attn.q_proj.weight + source.self_attn.q_proj.get_delta_weight("default")
    assert torch.allclose(whole, torch.cat([folded, source.self_attn.k_proj.weight, source.self_attn.v_proj.weight]))
    assert source.self_attn.k_proj.weight.data_ptr() == place
    twin.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in twin.model.state_dict().items())


def test_what_is_not_llamas_is_left_to_the_loop():
    def reason(config):
        return decoder.why_not(AutoModelForCausalLM.from_config(config))

    small = SIZES | {"num_hidden_layers": 1}
    assert "gemma2" in reason(Gemma2Config(head_dim=16, **small))
    assert "dynamic" in reason(LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, **small))
    assert "plain linear" in reason(LlamaConfig(mlp_bias=True, **small))
    assert "heads of 24" in reason(LlamaConfig(head_dim=24, **small))
    one_bias = AutoModelForCausalLM.from_config(LlamaConfig(**small))
    one_bias.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(64))
    assert "plain linear" in decoder.why_not(one_bias)


def test_the_logits_that_the_guard_sees_are_those_that_tokens_are_chosen_from():
    """The guard compares them with transformers' own: here as it does on a GPU, where models decode in seats."""
    tokens, logits = seats.greedy_logits(model_of("qwen3"), prompts()[:3], 4)
    assert tokens == logits.argmax(-1).tolist()
    for prompt, row, seen in zip(prompts(), tokens, logits, strict=False):
        own = model_of("qwen3")(torch.tensor([prompt + row[:-1]]), use_cache=False, logits_to_keep=4).logits
        assert torch.allclose(seen, own[0], atol=1e-3)


def test_the_guard_looks_at_what_decodes(monkeypatch):
    monkeypatch.setattr(decoder, "fits", lambda model: True)
    seen = []
    monkeypatch.setattr(seats, "greedy_logits", lambda *args, run=seats.greedy_logits: seen.append(args) or run(*args))
    found = guard.compare(model_of("qwen3"), None, prompts()[:2])
    assert len(seen) == 1 and max(difference.relative for difference in found.values()) < 1e-4
    assert "_graphs" not in vars(model_of("qwen3"))


def test_seats_are_asked_for_and_refused_by_what_they_cannot_do():
    model = copy.deepcopy(model_of("qwen3"))
    assert decoder.way(model) == "loop"
    model.decoding = "seats"
    assert decoder.way(model) == "seats"
    model.config.hidden_act = "gelu"
    with pytest.raises(UserError, match="not tried on qwen3 with gelu; use model.decoding=loop"):
        decoder.fits(model)


@pytest.mark.parametrize("change", [{}, {"kernels": "torch"}, {"decoding": "loop"}, {"dtype": torch.float32}, {"act": "gelu"}])
def test_where_nothing_is_said_seats_are_taken_with_their_kernels_alone(change):
    """`kernels` says liger on a GPU alone: here it is said of a model that is not there."""
    model = copy.deepcopy(model_of("qwen3")).to(change.get("dtype", torch.bfloat16))
    model.kernels, model.decoding = change.get("kernels", "liger"), change.get("decoding", "auto")
    model.config.hidden_act = change.get("act", "silu")
    assert decoder.fits(model) == (not change)


@pytest.mark.parametrize(
    ("setting", "said"), [({"kernels": "torch"}, "seats are fused kernels"), ({"dtype": "float32"}, "seats compute in 16 bits")]
)
def test_settings_that_seats_contradict_are_refused(setting, said):
    with pytest.raises(ValidationError, match=said):
        Model(name_or_path="m", decoding="seats", **setting)
    assert {need.what for need in Model(name_or_path="m", decoding="seats").needs()} == {"cuda", "triton"}


def test_the_engine_takes_seats_where_they_fit(monkeypatch):
    """As on a GPU: four times as many prompts make a batch, and no more rows than before are decoded at a time."""
    model, tokenizer = model_of("qwen3"), types.SimpleNamespace(eos_token_id=wanted("qwen3", SAMPLED)[1])
    monkeypatch.setattr(engines, "rows_at_once", lambda *_: 6)
    assert engines.auto_batch_size(model, 100, 3) == 2
    monkeypatch.setattr(decoder, "fits", lambda model: True)
    assert engines.auto_batch_size(model, 100, 3) == 8
    sizes, step = [], seats.Steps.__call__
    monkeypatch.setattr(seats.Steps, "__call__", lambda self, n: sizes.append(n) or step(self, n))
    found = engines.generate(model, prompts(), SAMPLED, tokenizer, 8)
    assert max(sizes) == 6 and found.num_slots == sum(sizes)
    assert rows(found.completions) == rows(loop.decode_batch(model, prompts(), SAMPLED, tokenizer.eos_token_id, 0)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sampling", [Sampling(LENGTH), SAMPLED], ids=["greedy", "sampled"])
def test_a_graph_on_a_gpu_decodes_what_its_kernels_do(monkeypatch, name, sampling):
    """The same kernels one by one give the same tokens, and the model's own forward gives log-probabilities within rounding."""
    model = copy.deepcopy(model_of(name)).to("cuda", torch.bfloat16)
    steps.release_graphs(model)  # those of the CPU
    stop = wanted(name, sampling)[1]
    graphed, _ = seats.decode_batch(model, prompts(), sampling, stop, 3, 6)
    assert model._graphs.captured
    steps.release_graphs(model)
    monkeypatch.setattr(seats, "capture", lambda run, owner: run)
    assert rows(seats.decode_batch(model, prompts(), sampling, stop, 3, 6)[0]) == rows(graphed)
    tokens, logits = seats.greedy_logits(model, prompts()[:3], 4)
    model.config._attn_implementation = (
        "sdpa"  # the loop's attention, which the copy has from the CPU, leaves the windows to its masks
    )
    for prompt, row, seen in zip(prompts(), tokens, logits, strict=False):
        own = model(torch.tensor([prompt + row[:-1]], device="cuda"), use_cache=False, logits_to_keep=4).logits[0].float()
        assert (seen - own).norm() < 0.2 * (own - own.mean(-1, keepdim=True)).norm()

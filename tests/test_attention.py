"""Attention as matrix products against SDPA: outputs and gradients, whatever the heads, the lengths and the mask."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_tokenizer
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from posttrain.attention import BLOCK, matmul_attention
from posttrain.config import Model
from posttrain.models import load_base


def states(rows, heads, kv_heads, queries, keys, dtype=torch.float32, dim=16):
    draw = torch.Generator().manual_seed(0)
    shapes = [(rows, queries, heads, dim), (rows, keys, kv_heads, dim), (rows, keys, kv_heads, dim)]
    # Transposed, as a decoder layer hands them over.
    return [(2 * torch.randn(shape, generator=draw)).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def causal(rows, queries, keys):
    return torch.ones(rows, 1, queries, keys, dtype=torch.bool).tril(keys - queries)


def padded(rows, queries, keys):
    """Padding on the left or the right of a row, never of a query's own position."""
    mask, own = causal(rows, queries, keys), torch.arange(keys) - (keys - queries) == torch.arange(queries)[:, None]
    for row in range(rows):
        hidden = slice(0, keys // 3) if row % 2 else slice(keys - keys // 4, keys)
        mask[row, :, :, hidden] = False
    return mask | own


def additive(mask, dtype):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def by_sdpa(q, k, v, mask, dtype=torch.float32):
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    return scaled_dot_product_attention(q.to(dtype), k, v, attn_mask=mask).transpose(1, 2)


def with_gradients(function, inputs):
    """The output and the gradients of an arbitrary function of it."""
    for x in inputs:
        x.grad = None
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * weight).sum().backward()
    return [out.detach(), *(x.grad.clone() for x in inputs)]


def distance(one, other):
    return ((one.double() - other.double()).norm() / (1 + other.double().norm())).item()  # what is 0 may be 1e-7 in one of them


LENGTHS = [
    (1, 1),
    (7, 7),
    (BLOCK, BLOCK),
    (BLOCK + 1, BLOCK + 1),
    (2 * BLOCK + 5, 2 * BLOCK + 5),
    (1, 9),
    (BLOCK + 3, BLOCK + 40),
]


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_outputs_and_gradients_are_those_of_sdpa(heads, kv_heads, queries, keys, kind):
    rows = 3
    inputs = states(rows, heads, kv_heads, queries, keys)
    mask = causal(rows, queries, keys) if kind == "none" else padded(rows, queries, keys)
    given = {"none": None, "bool": mask, "added": additive(mask, torch.float32)}[kind]
    ours = with_gradients(lambda q, k, v: matmul_attention(None, q, k, v, given)[0], inputs)
    for one, other in zip(ours, with_gradients(lambda q, k, v: by_sdpa(q, k, v, mask), inputs), strict=True):
        assert one.shape == other.shape and distance(one, other) < 1e-5


def test_in_bf16_it_is_as_exact_as_sdpa():
    """Against fp64, within a third of SDPA's own error; eager, which rounds the scores, is not."""
    inputs = states(4, 6, 2, 200, 200, torch.bfloat16, dim=64)
    mask = causal(4, 200, 200)
    exact = with_gradients(lambda q, k, v: by_sdpa(q, k, v, mask, torch.float64), inputs)[0]
    ours = with_gradients(lambda q, k, v: matmul_attention(None, q, k, v, None)[0], inputs)
    sdpa = with_gradients(lambda q, k, v: by_sdpa(q, k, v, mask, torch.bfloat16), inputs)
    reference = with_gradients(
        lambda q, k, v: by_sdpa(q, k, v, mask, torch.float32), [x.detach().float().requires_grad_() for x in inputs]
    )
    assert distance(ours[0], exact) < 1.34 * distance(sdpa[0], exact)
    for one, other, true in zip(ours, sdpa, reference, strict=True):
        assert distance(one, true) < max(1.34 * distance(other, true), 0.006)


def test_the_scale_is_the_modules():
    q, k, v = states(2, 4, 2, 5, 5)
    assert torch.allclose(
        matmul_attention(None, q, k, v, None, scaling=0.5)[0], matmul_attention(None, q * 2, k, v, None)[0], atol=1e-5
    )


def test_a_row_that_may_look_nowhere_is_finite():
    q, k, v = states(2, 4, 2, 5, 5)
    mask = causal(2, 5, 5)
    mask[0, :, :2] = False
    out, *gradients = with_gradients(lambda q, k, v: matmul_attention(None, q, k, v, mask)[0], [q, k, v])
    assert all(x.isfinite().all() for x in (out, *gradients))


class Causal(nn.Module):
    is_causal, num_key_value_groups = True, 2


def test_what_it_does_not_do_is_left_to_sdpa():
    q, k, v = states(2, 4, 2, 60, 60)
    dropped = matmul_attention(Causal(), q, k, v, None, dropout=0.5)[0]
    assert distance(dropped, matmul_attention(None, q, k, v, None)[0]) > 0.1
    biased = matmul_attention(Causal(), q, k, v, None, position_bias=torch.arange(60.0).expand(1, 1, 60, 60))[0]
    assert distance(biased, matmul_attention(None, q, k, v, None)[0]) > 0.1
    with pytest.raises(ValueError, match="softcap"):
        matmul_attention(Causal(), q, k, v, None, softcap=30.0)


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tiny_model_dir):
    made = {}
    for name in ("matmul", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation=name)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # or scores are near 0, and every mask gives about the same
        made[name] = model.eval()
    return made


IDS = torch.randint(3, 60, (3, BLOCK + 20), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["whole", "right", "left", "packed"])
def test_a_model_with_it_is_the_model(models, kind):
    inputs = {"input_ids": IDS}
    mask = torch.ones_like(IDS)
    if kind == "right":
        mask[1, -30:], mask[2, -5:] = 0, 0
    if kind == "left":
        mask[1, :30], mask[2, :5] = 0, 0
    if kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(50), torch.arange(BLOCK - 30)]).expand(3, -1)
    else:
        inputs["attention_mask"] = mask
    logits, gradients = {}, {}
    for name, model in models.items():
        model.zero_grad()
        logits[name] = model(**inputs).logits[mask.bool()]
        logits[name].logsumexp(-1).sum().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert distance(logits["matmul"], logits["sdpa"]) < 1e-5
    assert distance(gradients["matmul"], gradients["sdpa"]) < 1e-4


def test_after_a_cache(models):
    found = {}
    for name, model in models.items():
        cache = DynamicCache()
        model(input_ids=IDS[:, :40], past_key_values=cache, use_cache=True)
        found[name] = model(input_ids=IDS[:, 40:], past_key_values=cache).logits
    assert distance(found["matmul"], found["sdpa"]) < 1e-5


@pytest.mark.parametrize(("asked", "meant"), [("auto", "matmul"), ("matmul", "matmul"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_which_attention_a_model_is_loaded_with_on_a_cpu(tiny_model_dir, asked, meant):
    settings = Model(name_or_path=str(tiny_model_dir), attn_implementation=asked)
    assert load_base(settings, "none", tiny_tokenizer()).config._attn_implementation == meant


def test_an_architecture_without_sdpa_keeps_eager_attention(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    model = load_base(Model(name_or_path=str(tiny_model_dir)), "none", tiny_tokenizer())
    assert model.config._attn_implementation == "eager"

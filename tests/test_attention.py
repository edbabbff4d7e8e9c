"""Both kinds of attention against SDPA: outputs and gradients, whatever the heads, the lengths and the mask."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_tokenizer
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM
from transformers.masking_utils import (
    causal_mask_function,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from posttrain.config.schema import Model
from posttrain.kernels.attention import (
    QUERY_BLOCK,
    LeftPadded,
    left_padded,
    matmul_attention,
    packed,
    varlen_attention,
    varlen_mask,
)
from posttrain.models.base import fastest_attention, load_base


def states(rows, heads, kv_heads, queries, keys, dtype=torch.float32, dim=16):
    draw = torch.Generator().manual_seed(0)
    shapes = [(rows, queries, heads, dim), (rows, keys, kv_heads, dim), (rows, keys, kv_heads, dim)]
    # Transposed, as a decoder layer passes them.
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
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    (out.float() * weight).sum().backward()
    return [out.detach(), *(x.grad.clone() for x in inputs)]


def distance(one, other):
    return ((one.double() - other.double()).norm() / (1 + other.double().norm())).item()  # what is 0 may be 1e-7 in one of them


LENGTHS = [
    (1, 1),
    (7, 7),
    (QUERY_BLOCK, QUERY_BLOCK),
    (QUERY_BLOCK + 1, QUERY_BLOCK + 1),
    (2 * QUERY_BLOCK + 5, 2 * QUERY_BLOCK + 5),
    (1, 9),
    (QUERY_BLOCK + 3, QUERY_BLOCK + 40),
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
    """Its error against fp64 is within a third of SDPA's own. That of eager, which rounds the scores, is not."""
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
    for name in ("matmul", "varlen", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation=name)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # or scores are near 0, and every mask gives about the same
        made[name] = model.eval()
    return made


IDS = torch.randint(3, 60, (3, QUERY_BLOCK + 20), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["matmul", "varlen"])
@pytest.mark.parametrize("kind", ["whole", "right", "left", "both", "torn", "packed"])
def test_a_model_with_it_is_the_model(models, kind, name):
    inputs = {"input_ids": IDS}
    mask = torch.ones_like(IDS)
    if kind in ("right", "both"):
        mask[1, -30:], mask[2, -5:] = 0, 0
    if kind in ("left", "both"):
        mask[1, :30], mask[2, :5] = 0, 0
    if kind == "torn":
        mask[1, 10:20], mask[2, :5] = 0, 0
    if kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(50), torch.arange(QUERY_BLOCK - 30)]).expand(3, -1)
    else:
        inputs["attention_mask"] = mask
    logits, gradients = {}, {}
    for which in (name, "sdpa"):
        model = models[which]
        model.zero_grad()
        logits[which] = model(**inputs).logits[mask.bool()]
        logits[which].logsumexp(-1).sum().backward()
        gradients[which] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert distance(logits[name], logits["sdpa"]) < 1e-5
    assert distance(gradients[name], gradients["sdpa"]) < 1e-4


@pytest.mark.parametrize("name", ["matmul", "varlen"])
@pytest.mark.parametrize("padded", [False, True])
def test_after_a_cache(models, name, padded):
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :12], mask[2, :3], mask[1, -8:] = 0, 0, 0
    found = {}
    for which in (name, "sdpa"):
        model, cache = models[which], DynamicCache()
        model(input_ids=IDS[:, :40], attention_mask=mask[:, :40], past_key_values=cache, use_cache=True)
        out = model(input_ids=IDS[:, 40:], attention_mask=mask, past_key_values=cache).logits
        found[which] = out[mask[:, 40:].bool()]
    assert distance(found[name], found["sdpa"]) < 1e-5


# --- without padding --------------------------------------------------------------------------------------------------


def mask_of(*rows):
    return torch.tensor([[int(c) for c in row] for row in rows])


@pytest.mark.parametrize(
    ("mask", "first"),
    [
        (mask_of("1111", "1111"), None),
        (mask_of("1111", "1100"), None),  # no query sees what follows it
        (mask_of("1111", "0011"), [0, 2]),
        (mask_of("0110", "0011"), [1, 2]),
        (mask_of("0000", "0011"), [0, 2]),  # nothing but padding: whatever it sees, nobody reads it
    ],
)
def test_only_padding_on_the_left_needs_a_mask(mask, first):
    found = varlen_mask(len(mask), 4, 4, attention_mask=mask)
    assert (found is None) if first is None else found.first.tolist() == first
    if first:
        assert found.ends.tolist() == [0, 4 - first[0], 8 - sum(first)]
        assert list(zip(found.row.tolist(), found.place.tolist(), strict=True)) == [
            (row, place) for row in range(2) for place in range(first[row], 4)
        ]


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": mask_of("1011")},  # a hole
        {"attention_mask": mask_of("0111"), "mask_function": lambda b, h, q, k: k <= q},  # packed rows, sliding windows
        {"attention_mask": mask_of("0111"), "kv_length": 6},  # a cache longer than what is in it
        {"attention_mask": None},
    ],
)
def test_every_other_mask_is_sdpas(given):
    kv_length = given.pop("kv_length", 4)
    found = varlen_mask(1, 4, kv_length, allow_is_causal_skip=False, **given)
    assert isinstance(found, torch.Tensor) and found.shape == (1, 1, 4, kv_length)


def test_its_dense_mask_is_transformers():
    mask = mask_of("0011111", "1111111", "0000011")
    both = LeftPadded.mask(left_padded(mask.argmax(1), 7), 3, 7), sdpa_mask(3, 3, 7, q_offset=4, attention_mask=mask.bool())
    assert torch.equal(*both)


SEQUENCES = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 3, 3, 3]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 0, 1, 2, 3]])


def test_upstream_tells_a_mask_its_packed_sequences():
    causal = packed_sequence_compatibility_function(causal_mask_function, POSITIONS, SEQUENCES)
    found = varlen_mask(2, 7, 7, mask_function=causal)
    assert found.ends.tolist() == [0, 3, 5, 7, 8, 9, 10, 14] and found.longest == 4
    assert torch.equal(found.mask(7, 7), sdpa_mask(2, 7, 7, mask_function=causal, allow_is_causal_skip=False))


def test_windows_of_packed_sequences_are_sdpas():
    windows = packed_sequence_compatibility_function(sliding_window_causal_mask_function(2), POSITIONS, SEQUENCES)
    found = varlen_mask(2, 7, 7, mask_function=windows, allow_is_causal_skip=False)
    assert torch.equal(found, sdpa_mask(2, 7, 7, mask_function=windows, allow_is_causal_skip=False))


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys"), [(60, 60), (33, 90), (1, 40)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_on_a_gpu_outputs_and_gradients_are_those_of_sdpa(heads, kv_heads, queries, keys):
    first = torch.tensor([0, 5, 29], device="cuda")
    inputs = [x.detach().cuda().requires_grad_() for x in states(3, heads, kv_heads, queries, keys, torch.bfloat16)]
    cut = left_padded(first, keys)
    sees = cut.mask(queries, keys)
    token = sees.any(-1)[:, 0, :, None, None]  # nobody reads what padding attends to
    ours = with_gradients(lambda q, k, v: varlen_attention(None, q, k, v, cut)[0] * token, inputs)
    wanted = with_gradients(lambda q, k, v: by_sdpa(q, k, v, sees).nan_to_num() * token, inputs)
    assert all(distance(one, other) < 0.02 for one, other in zip(ours, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_on_a_gpu_packed_rows_are_those_of_sdpa(heads, kv_heads):
    rows = torch.tensor([[0] * 33 + [1] * 7 + [2] * 1 + [3] * 19, [0] * 60], device="cuda")
    inputs = [x.detach().cuda().requires_grad_() for x in states(2, heads, kv_heads, 60, 60, torch.bfloat16)]
    mask = packed(rows)
    assert mask.ends.tolist() == [0, 33, 40, 41, 60, 120] and mask.longest == 60
    ours = with_gradients(lambda q, k, v: varlen_attention(None, q, k, v, mask)[0], inputs)
    wanted = with_gradients(lambda q, k, v: by_sdpa(q, k, v, mask.mask(60, 60)), inputs)
    assert all(distance(one, other) < 0.02 for one, other in zip(ours, wanted, strict=True))


# --- which one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["auto", "matmul", "varlen", "sdpa", "eager"])
def test_which_attention_a_model_is_loaded_with_on_a_cpu(tiny_model_dir, asked):
    settings = Model(name_or_path=str(tiny_model_dir), attn_implementation=asked)
    assert load_base(settings, "none", tiny_tokenizer()).config._attn_implementation == ("matmul" if asked == "auto" else asked)


@pytest.mark.parametrize(("capability", "meant"), [((7, 5), "sdpa"), ((8, 0), "varlen"), ((9, 0), "varlen"), ((12, 0), "varlen")])
def test_which_attention_auto_means_on_a_gpu(monkeypatch, capability, meant):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fastest_attention(torch.device("cuda")) == meant


def test_an_architecture_without_sdpa_keeps_eager_attention(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    model = load_base(Model(name_or_path=str(tiny_model_dir)), "none", tiny_tokenizer())
    assert model.config._attn_implementation == "eager"

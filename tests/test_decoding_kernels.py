"""The kernels of a decoding step: Triton against the torch path, which tests/test_seats.py compares with transformers.

On a GPU, or anywhere in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/test_decoding_kernels.py
(Triton 3.6's interpreter needs a numpy that makes an int of an array with one number.)
"""

import pytest
import torch

from posttrain.generation.loop import Sampling, choose
from posttrain.kernels import decoding

INTERPRETED = decoding.interpreted()
pytestmark = [pytest.mark.skipif(decoding.triton_kernels() is None, reason="needs Triton and a GPU or its interpreter")]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's products know no bf16.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
HEADS = [(7, 1, 16), (6, 2, 32), (4, 4, 64)]  # heads, kv_heads, head_dim
ROWS = 5
CAPACITY = 200


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def both(monkeypatch, run):
    """What Triton and what torch gives, each from its own copies."""
    ours = run()
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "use_triton", lambda x: False)
        return ours, run()


def check(monkeypatch, run):
    ours, wanted = both(monkeypatch, run)
    for one, other in zip(ours, wanted, strict=True):
        tolerance = 1e-5 if one.dtype == torch.float32 else 0.02
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
def test_norm_and_residual(monkeypatch, dtype, adds):
    x, residual, weight = (randn(*shape, dtype=dtype) for shape in ((ROWS, 96), (ROWS, 96), (96,)))

    def run():
        rest = residual.clone() if adds else None
        out = decoding.add_norm(x.clone(), rest, weight, 1e-6)
        return (out, rest) if adds else (out,)

    check(monkeypatch, run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_times_up(monkeypatch, dtype):
    gate_up = randn(ROWS, 2 * 1100, dtype=dtype)
    check(monkeypatch, lambda: (decoding.silu_mul(gate_up),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("seated", [False, True])
def test_rotation_and_where_keys_and_values_go(monkeypatch, dtype, heads, kv_heads, head_dim, normed, seated):
    qkv = randn(ROWS, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos, sin = (x.repeat(1, 2).to(dtype) for x in (lambda angle: (angle.cos(), angle.sin()))(randn(CAPACITY, head_dim // 2)))
    place = torch.tensor([0, 3, 64, 199, 130], device=DEVICE)
    seat = torch.tensor([6, 0, 2, 2, 1], device=DEVICE) if seated else None
    norms = (randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype), 1e-6) if normed else None
    buffers = [randn(7, kv_heads, CAPACITY, head_dim, dtype=dtype) for _ in range(2)]

    def run():
        keys, values, given = buffers[0].clone(), buffers[1].clone(), qkv.clone()
        return decoding.rotate_and_store(given, cos, sin, place, keys, values, norms, seat), keys, values, given

    check(monkeypatch, run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize("programs", [1, 512])  # each row's keys by one program, or shared out
def test_attention_of_one_token(monkeypatch, dtype, heads, kv_heads, head_dim, window, programs):
    monkeypatch.setattr(decoding.triton_kernels(), "PROGRAMS", programs)
    query = randn(ROWS, heads, head_dim, dtype=dtype)
    keys, values = (randn(7, kv_heads, CAPACITY, head_dim, dtype=dtype) for _ in range(2))
    place = torch.tensor([0, 3, 64, 199, 130], device=DEVICE)
    for buffer in (keys, values):  # what a row does not have is never looked at
        for row, end in enumerate(place.tolist()):
            buffer[row, :, end + 1 :] = torch.nan
    check(monkeypatch, lambda: (decoding.attend(query, keys, values, place, window, 0.3),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [50, 300, 5000])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_draw_is_that_of_the_loop(dtype, vocabulary, temperature):
    """Equal but where a random number falls within rounding of a border between two tokens."""
    logits, uniform = randn(60, vocabulary, dtype=dtype) * 3, torch.rand(60, device=DEVICE)
    token, logprob = decoding.draw_in_two_passes(logits, uniform, temperature)
    wanted, wanted_logprob = choose(logits, Sampling(1, temperature=temperature), uniform)
    same = token == wanted
    assert same.sum() >= 58
    assert torch.allclose(logprob[same], wanted_logprob[same], atol=2e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
def test_nothing_impossible_is_drawn_at_the_ends(uniform):
    logits = torch.full((3, 700), -1e4, device=DEVICE)
    logits[0, 0] = logits[1, 299] = logits[2, 699] = 5.0
    token, logprob = decoding.draw_in_two_passes(logits, torch.full((3,), uniform, device=DEVICE), 1.0)
    assert token.tolist() == [0, 299, 699]
    assert torch.allclose(logprob, torch.zeros(3, device=DEVICE), atol=1e-6)


def test_rows_advance(monkeypatch):
    """Dead rows stay as they are, a stop token and the limit end a row."""
    ids, place, step = (torch.tensor(x, device=DEVICE) for x in ([9] * 5, [4, 5, 0, 7, 8], [0, 2, 1, 3, 1]))
    live = torch.tensor([True, True, False, True, True], device=DEVICE)
    tokens, logprobs = torch.full((5, 4), -1, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    token, logprob = torch.tensor([1, 2, 3, 4, 5], device=DEVICE), randn(5)
    stop, limit = torch.tensor([5], device=DEVICE), torch.tensor([4], device=DEVICE)

    def run():
        rows = decoding.Rows(*(x.clone() for x in (ids, place, step, live, tokens, logprobs)))
        decoding.advance(rows, token, logprob, stop, limit)
        return rows

    ours, wanted = both(monkeypatch, run)
    assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))
    assert ours.live.tolist() == [True, True, False, False, False]
    assert ours.place.tolist() == [5, 6, 0, 0, 0]
    assert ours.tokens.tolist() == [[1, -1, -1, -1], [-1, -1, 2, -1], [-1] * 4, [-1, -1, -1, 4], [-1, 5, -1, -1]]


# --- rows in 8 bits ---------------------------------------------------------------------------------------------------

in_8_bits = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs a card with 8-bit numbers"
)


def products(columns, dtype):
    """As a product of rows in 8 bits leaves them."""
    return decoding.Scaled(randn(ROWS, columns, dtype=dtype) * 50, randn(ROWS, 1).abs(), randn(columns, 1).abs() / 50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
def test_a_norm_of_products_to_scale_is_that_of_scaled_ones(dtype, adds):
    """To the bit: the same numbers are rounded at the same places."""
    x, residual, weight = products(96, dtype), randn(ROWS, 96, dtype=dtype), randn(96, dtype=dtype)
    rests = [residual.clone() if adds else None for _ in range(2)]
    one, other = (decoding.add_norm(given, rest, weight, 1e-6) for given, rest in zip((x, decoding.whole(x)), rests, strict=True))
    assert torch.equal(one, other)
    assert not adds or (torch.equal(*rests) and not torch.equal(rests[0], residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("normed", [False, True])
def test_a_rotation_of_products_to_scale_is_that_of_scaled_ones(dtype, heads, kv_heads, head_dim, normed):
    qkv = products((heads + 2 * kv_heads) * head_dim, dtype)
    cos, sin = (randn(CAPACITY, head_dim, dtype=dtype) for _ in range(2))
    place = torch.tensor([0, 3, 64, 199, 130], device=DEVICE)
    norms = (randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype), 1e-6) if normed else None
    found = []
    for given in (qkv, decoding.whole(qkv)):
        keys, values = (torch.zeros(7, kv_heads, CAPACITY, head_dim, device=DEVICE, dtype=dtype) for _ in range(2))
        found.append((decoding.rotate_and_store(given, cos, sin, place, keys, values, norms), keys, values))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert found[0][1].any() and found[0][2].any()


def cache(kv_heads, head_dim):
    """Whose numbers are of very different sizes from place to place, as 8 bits alone would not hold them."""
    x = randn(7 * kv_heads * CAPACITY, head_dim) * torch.logspace(-5, 3, 7 * kv_heads * CAPACITY, device=DEVICE)[:, None]
    values, scale = decoding.plain_fp8_rows(x)
    return decoding.Fp8Cache(values.view(7, kv_heads, CAPACITY, head_dim), scale.view(7, kv_heads, CAPACITY))


@in_8_bits
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("programs", [1, 512])
def test_attention_over_keys_and_values_in_8_bits(monkeypatch, heads, kv_heads, head_dim, window, programs):
    monkeypatch.setattr(decoding.triton_kernels(), "PROGRAMS", programs)
    query = randn(ROWS, heads, head_dim, dtype=DTYPES[-1])
    keys, values = cache(kv_heads, head_dim), cache(kv_heads, head_dim)
    keys = keys._replace(scale=keys.scale / keys.scale * 0.01)  # scores that leave several keys a say
    place = torch.tensor([0, 3, 64, 199, 130], device=DEVICE)
    ours, wanted = both(monkeypatch, lambda: decoding.attend(query, keys, values, place, window, 0.1))
    for one, other in zip(ours.float(), wanted.float(), strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


@in_8_bits
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("seated", [False, True])
def test_keys_and_values_are_stored_in_8_bits(monkeypatch, heads, kv_heads, head_dim, seated):
    qkv = randn(ROWS, (heads + 2 * kv_heads) * head_dim, dtype=DTYPES[-1]) * torch.logspace(-4, 4, ROWS, device=DEVICE)[:, None]
    qkv = qkv.to(DTYPES[-1])
    cos, sin = (randn(CAPACITY, head_dim // 2, dtype=DTYPES[-1]).repeat(1, 2) for _ in range(2))  # an angle turns two entries
    place = torch.tensor([0, 3, 64, 199, 130], device=DEVICE)
    seat = torch.tensor([6, 0, 2, 3, 1], device=DEVICE) if seated else None

    def run():
        empty = [torch.zeros(7, kv_heads, CAPACITY, head_dim, device=DEVICE) for _ in range(2)]
        keys, values = (decoding.Fp8Cache(x.to(decoding.FP8), x[..., 0].clone()) for x in empty)
        decoding.rotate_and_store(qkv.clone(), cos, sin, place, keys, values, None, seat)
        return keys, values

    for one, other in zip(*both(monkeypatch, run), strict=True):
        assert torch.allclose(one.scale, other.scale, rtol=0.01)
        assert ((one.scale > 0).sum(), (other.scale > 0).sum()) == (ROWS * kv_heads, ROWS * kv_heads)
        stored = other.scale > 0
        held, wanted = one.front(7, CAPACITY)[stored], other.front(7, CAPACITY)[stored]
        within = (held - wanted).abs() <= wanted.abs() * 2**-3 + other.scale[stored][:, None] * 2**-8
        assert within.float().mean() > 0.9 if INTERPRETED else within.all()  # the interpreter makes 64 of 127.97


@in_8_bits
@pytest.mark.parametrize("kind", ["rows", "norm", "first norm", "gated"])
def test_rows_in_8_bits(monkeypatch, kind):
    dtype = DTYPES[-1]
    x, residual, weight = (randn(*shape, dtype=dtype) for shape in ((ROWS, 96), (ROWS, 96), (96,)))
    runs = {
        "rows": lambda: decoding.fp8_rows(torch.cat([x, torch.zeros_like(x)])),
        "norm": lambda: decoding.add_norm_fp8(x.clone(), residual.clone(), weight, 1e-6),
        "first norm": lambda: decoding.add_norm_fp8(x.clone(), None, weight, 1e-6),
        "gated": lambda: decoding.silu_mul_fp8(x),
    }
    check(monkeypatch, lambda: [decoding.scaled(x, weight[:ROWS, None].float(), weight[:, None].float())])
    for ours, wanted in [both(monkeypatch, runs[kind])]:
        assert ours.values.dtype == decoding.FP8 and torch.allclose(ours.scale, wanted.scale, rtol=0.01)
        one, other = (rows.values.float() * rows.scale for rows in (ours, wanted))
        assert (one - other).norm() < 0.01 * other.norm()  # a tie may be rounded otherwise

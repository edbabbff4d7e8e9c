"""Generation against transformers' own and against arithmetic: tokens, log-probabilities, draws, and what must not matter."""

import collections
import dataclasses
import importlib.util
import itertools
import math

import pytest
import torch
from tiny_training import LORA, ending_in, liven

from posttrain.config.schema import Lora
from posttrain.errors import UserError
from posttrain.generation import engines, loop, steps
from posttrain.generation.engines import auto_batch_size, plan_batches
from posttrain.generation.loop import Sampling, choose, decode_batch, prepare_to_decode
from posttrain.models.adapters import new_adapter
from posttrain.models.base import load_base
from posttrain.models.chat import chat_ids
from posttrain.models.policy_copy import PolicyCopy
from posttrain.records import Example, read_jsonl

LENGTH = 40


@pytest.fixture(scope="module")
def reference(fp32_settings, plain_tokenizer):
    """The model as transformers loads it, never prepared to decode: the standard of comparison."""
    return liven(load_base(fp32_settings, "none", plain_tokenizer)).eval()


@pytest.fixture(scope="module")
def model(fp32_settings, plain_tokenizer):
    return liven(load_base(fp32_settings, "none", plain_tokenizer))


@pytest.fixture(scope="module")
def prompts(plain_tokenizer, tiny_data_dir):
    """Ten prompts of 1 to 92 tokens."""
    examples = read_jsonl(tiny_data_dir / "train.jsonl", Example)[:7]
    return [
        [300],
        *(chat_ids(plain_tokenizer, e.prompt, add_generation_prompt=True) for e in examples),
        [300, 301, 302],
        [7] * 30,
    ]


@pytest.fixture(scope="module")
def tokenizer(reference, plain_tokenizer, prompts):
    """About half of the greedy completions come to its end token, some early and some late."""
    endless = [greedy(reference, prompt, None) for prompt in prompts]
    counts = collections.Counter(token for ids in endless for token in set(ids))
    stop = next(token for token, count in sorted(counts.items()) if 4 <= count <= 6)
    return ending_in(plain_tokenizer, stop)


def generate(*args, **kwargs):
    return engines.generate(*args, **kwargs).completions


def greedy(model, prompt, stop_id, max_new_tokens=LENGTH):
    """transformers' own greedy tokens for one prompt."""
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop_id, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def ids(results):
    return [[completion.ids for completion in group] for group in results]


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(reference, prompts, tokenizer):
    return [greedy(reference, prompt, tokenizer.eos_token_id) for prompt in prompts]


def test_the_prompts_make_some_rows_stop_and_some_not(expected, tokenizer):
    stopped = [ids[-1] == tokenizer.eos_token_id for ids in expected]
    assert 4 <= sum(stopped) <= 6
    assert len({len(ids) for ids in expected}) >= 4


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10, None])
def test_greedy_tokens_are_those_of_transformers_in_any_batch(model, prompts, tokenizer, expected, batch_size):
    results = generate(model, prompts, Sampling(LENGTH), tokenizer, batch_size)
    assert ids(results) == [[tokens] for tokens in expected]


def test_the_order_of_the_prompts_does_not_matter(model, prompts, tokenizer, expected):
    order = [3, 9, 0, 7, 1, 8, 2, 6, 5, 4]
    results = generate(model, [prompts[i] for i in order], Sampling(LENGTH), tokenizer, 4)
    assert ids(results) == [[expected[i]] for i in order]


def test_greedy_samples_of_one_prompt_are_equal(model, prompts, tokenizer, expected):
    results = generate(model, prompts, Sampling(LENGTH, num_samples=3), tokenizer, 4)
    assert ids(results) == [[tokens] * 3 for tokens in expected]


def test_finish_says_whether_the_end_token_came(model, prompts, tokenizer, expected):
    results = generate(model, prompts, Sampling(LENGTH), tokenizer, 4)
    for (completion,), tokens in zip(results, expected, strict=True):
        ended = tokens[-1] == tokenizer.eos_token_id
        assert completion.finish == ("stop" if ended else "length")
        assert tokenizer.eos_token_id not in completion.ids[:-1]
        assert ended or len(completion.ids) == LENGTH
        assert len(completion.logprobs) == len(completion.ids)


def test_the_end_token_at_the_last_place_counts_as_stopped(model, prompts, tokenizer, expected):
    prompt, tokens = next(
        (p, t) for p, t in zip(prompts, expected, strict=True) if t[-1] == tokenizer.eos_token_id and len(t) > 1
    )
    (exact,), (short,) = (generate(model, [prompt], Sampling(n), tokenizer)[0] for n in (len(tokens), len(tokens) - 1))
    assert (exact.ids, exact.finish) == (tokens, "stop")
    assert (short.ids, short.finish) == (tokens[:-1], "length")


def test_one_new_token(model, prompts, tokenizer, expected):
    assert ids(generate(model, prompts, Sampling(1), tokenizer)) == [[tokens[:1]] for tokens in expected]


def test_a_single_prompt(model, prompts, tokenizer, expected):
    assert ids(generate(model, prompts[:1], Sampling(LENGTH), tokenizer)) == [[expected[0]]]


@pytest.mark.parametrize("num_tokens", [1, 100, 200])
def test_prefill_in_slices_changes_nothing(model, prompts, tokenizer, expected, monkeypatch, num_tokens):
    monkeypatch.setitem(loop.PREFILL_TOKENS, "cpu", num_tokens)
    assert ids(generate(model, prompts, Sampling(LENGTH), tokenizer, 10)) == [[tokens] for tokens in expected]


def test_prompts_are_prefilled_once_for_all_their_samples(model, prompts, tokenizer):
    seen = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    generate(model, prompts[1:3], Sampling(2, temperature=1.0, num_samples=5), tokenizer)
    handle.remove()
    width = max(map(len, prompts[1:3]))
    assert seen == [(2, width), (10, 1)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_grouped_attention_is_the_models_own(model, reference, fp32_settings, plain_tokenizer, prompts, attention):
    other = liven(load_base(fp32_settings.model_copy(update={"attn_implementation": attention}), "none", plain_tokenizer)).eval()
    batch = torch.tensor([prompts[-1]])
    prepare_to_decode(model)
    ids = decode_batch(model, [prompts[-1]], Sampling(8), stop_id=-2)[0][0][0].ids
    assert ids == greedy(other, prompts[-1], None, 8)
    assert torch.allclose(other(batch).logits, reference(batch).logits, atol=1e-4)


# --- draws ------------------------------------------------------------------------------------------------------------

SAMPLED = Sampling(LENGTH, temperature=0.9, num_samples=3, seed=11)


def test_the_same_seed_draws_the_same_and_another_seed_does_not(model, prompts, tokenizer):
    first, again, other = (
        ids(generate(model, prompts, dataclasses.replace(SAMPLED, seed=seed), tokenizer, 4)) for seed in (11, 11, 12)
    )
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_the_samples_of_a_prompt_and_equal_prompts_of_two_batches_differ(model, tokenizer):
    groups = ids(generate(model, [[300, 301]] * 4, SAMPLED, tokenizer, 2))
    drawn = [tuple(sample) for group in groups for sample in group]
    assert len(set(drawn)) == len(drawn) == 12


@pytest.mark.parametrize("block", [1, 3, 7])
def test_a_draw_does_not_depend_on_which_rows_finished_before(model, prompts, tokenizer, monkeypatch, block):
    """STEPS_BETWEEN_DROPS is how often finished rows are dropped: never within 40 tokens at 1000."""
    monkeypatch.setattr(steps, "STEPS_BETWEEN_DROPS", 1000)
    whole = generate(model, prompts, SAMPLED, tokenizer, 10)
    assert {completion.finish for group in whole for completion in group} == {"stop", "length"}
    monkeypatch.setattr(steps, "STEPS_BETWEEN_DROPS", block)
    widths = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    dropped = generate(model, prompts, SAMPLED, tokenizer, 10)
    handle.remove()
    assert ids(dropped) == ids(whole)
    assert widths[1] == 30 > widths[-1]


def test_generation_leaves_the_global_random_state_alone(model, prompts, tokenizer):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate(model, prompts[:2], SAMPLED, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_logprobs_are_the_models_at_that_temperature(model, reference, prompts, tokenizer):
    for prompt, group in zip(prompts, generate(model, prompts, SAMPLED, tokenizer, 4), strict=True):
        for completion in group:
            logits = reference(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
            scores = (logits / SAMPLED.temperature).log_softmax(-1)
            wanted = scores.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
            assert torch.allclose(torch.tensor(completion.logprobs), wanted, atol=2e-3)


def chi_square(counts, probabilities, num_draws):
    """Pearson's statistic and its degrees of freedom, cells expected below 5 pooled."""
    large = probabilities * num_draws >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([probabilities[large], probabilities[~large].sum()[None]]) * num_draws
    keep = expected > 0
    return float(((observed - expected)[keep] ** 2 / expected[keep]).sum()), int(keep.sum()) - 1


def check_frequencies(tokens, probabilities):
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    statistic, freedom = chi_square(counts, probabilities.double(), len(tokens))
    # Wilson and Hilferty: the cube root of a chi-square is nearly normal. Beyond 4 deviations is one in 30,000.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4, f"chi-square {statistic:.0f} at {freedom} degrees of freedom"


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_sampled_frequencies_are_the_softmax(model, reference, prompts, tokenizer, temperature):
    sampling = Sampling(1, temperature=temperature, num_samples=20_000, seed=5)
    tokens = torch.tensor([c.ids[0] for c in generate(model, prompts[1:2], sampling, tokenizer)[0]])
    logits = reference(torch.tensor(prompts[1:2])).logits[0, -1]
    check_frequencies(tokens, (logits / temperature).softmax(-1))


def test_sampled_frequencies_are_the_softmax_at_a_later_token_too(model, reference, tokenizer):
    """The second token's frequencies, given the first: draws of successive tokens must not be correlated."""
    sampling = Sampling(2, temperature=1.0, num_samples=40_000, seed=6)
    drawn = [c.ids for c in generate(model, [[300, 301]], sampling, tokenizer)[0] if len(c.ids) == 2]
    first, _ = collections.Counter(ids[0] for ids in drawn).most_common(1)[0]
    second = torch.tensor([ids[1] for ids in drawn if ids[0] == first])
    logits = reference(torch.tensor([[300, 301, first]])).logits[0, -1]
    assert len(second) > 1_000
    check_frequencies(second, logits.softmax(-1))


def nucleus(probabilities, top_p):
    """By the definition, one token after another: the fewest tokens whose probability reaches top_p."""
    kept, mass = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if mass >= top_p:
            break
        kept.add(token)
        mass += probabilities[token]
    return kept


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
def test_top_p_keeps_exactly_the_nucleus(top_p):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 3
    grid = torch.linspace(0, 1, 20_001)[:-1]
    for row in logits:
        probabilities = row.double().softmax(-1)
        tokens, logprobs = choose(row.expand(len(grid), -1), Sampling(1, temperature=1.0, top_p=top_p), grid)
        kept = nucleus(probabilities.tolist(), top_p)
        likely = {token for token in kept if probabilities[token] > 1e-3 * top_p}
        assert likely <= set(tokens.tolist()) <= kept
        inside = torch.zeros(50, dtype=torch.double)
        inside[list(kept)] = probabilities[list(kept)]
        shares = torch.bincount(tokens, minlength=50).double() / len(grid)
        assert torch.allclose(shares, inside / inside.sum(), atol=2e-4)
        assert torch.allclose(logprobs.double(), probabilities.log()[tokens], atol=1e-5)  # of the whole distribution


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_no_draw_however_extreme_takes_a_token_of_no_probability(top_p):
    generator = torch.Generator().manual_seed(2)
    extremes = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    for size, spread in itertools.product((2, 7, 614, 50_000), (0.1, 3.0, 40.0)):
        logits = torch.randn(size, generator=generator) * spread
        logits[[0, -1]] = -math.inf  # at both ends, where a search goes astray
        logits[size // 2] = 1.0
        tokens, logprobs = choose(logits.expand(4, -1), Sampling(1, temperature=1.0, top_p=top_p), extremes)
        assert (logits[tokens] > -math.inf).all()
        assert logprobs.isfinite().all()


def test_bf16_logits_are_sampled_in_fp32():
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)  # a running sum in bf16 would stop growing at 256 entries
    tokens, logprobs = choose(logits.expand(3, -1), Sampling(1, temperature=1.0), torch.tensor([0.1, 0.5, 0.9]))
    assert (tokens - torch.tensor([5_000, 25_000, 45_000])).abs().max() < 50
    assert torch.allclose(logprobs, torch.full((3,), -math.log(50_000)), atol=1e-4)


def test_a_nearly_cold_temperature_is_greedy(model, prompts, tokenizer, expected):
    assert ids(generate(model, prompts, Sampling(LENGTH, temperature=1e-4), tokenizer, 4)) == [[tokens] for tokens in expected]


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_plan_holds_every_prompt_once_longest_first(batch_size):
    lengths = [5, 90, 5, 30, 31, 1, 90]
    batches = plan_batches(lengths, batch_size)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(7))
    assert flat == [1, 6, 4, 3, 0, 2, 5]
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_the_automatic_batch_shrinks_with_length_and_samples(model):
    sizes = [auto_batch_size(model, 10**n, samples) for n, samples in ((2, 1), (6, 1), (8, 1), (8, 50))]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 128
    assert sizes[-1] == 1


# --- other engines ----------------------------------------------------------------------------------------------------


CONTINUOUS = "continuous_batching"


@pytest.fixture
def unprepared(fp32_settings, plain_tokenizer):
    return liven(load_base(fp32_settings, "none", plain_tokenizer)).eval()


def test_continuous_batching_is_equal_greedily(unprepared, tokenizer, prompts, expected):
    results = generate(unprepared, prompts, Sampling(LENGTH), tokenizer, 4, CONTINUOUS)
    assert ids(results) == [[tokens] for tokens in expected]
    finishes = [completion.finish for (completion,) in results]
    assert finishes == ["stop" if tokens[-1] == tokenizer.eos_token_id else "length" for tokens in expected]


def test_engines_take_turns_on_one_model(unprepared, tokenizer, prompts, expected):
    """As in GRPO, whose rollouts and dev accuracy share the copy of the policy."""
    for name in ("transformers", CONTINUOUS, "transformers"):
        assert ids(generate(unprepared, prompts[:3], Sampling(LENGTH), tokenizer, 3, name)) == [[t] for t in expected[:3]], name


def test_continuous_batching_draws_by_its_seed_alone(unprepared, tokenizer, prompts):
    before = torch.get_rng_state()
    first, again, other = (
        ids(generate(unprepared, prompts[:2], Sampling(6, temperature=1.0, num_samples=2, seed=seed), tokenizer, 4, CONTINUOUS))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert all(one != two for one, two in first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_its_engine_says_what_to_install(model, prompts, tokenizer):
    with pytest.raises(UserError, match=r"pip install 'posttrain\[vllm\]'.*engine=transformers"):
        generate(model, prompts, Sampling(4), tokenizer, engine="vllm")


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(LENGTH), SAMPLED])
def test_the_cuda_graph_step_equals_the_eager_step(fp32_settings, plain_tokenizer, tokenizer, prompts, monkeypatch, sampling):
    model = liven(load_base(fp32_settings, "none", plain_tokenizer, to=torch.device("cuda")))
    graphed = generate(model, prompts, sampling, tokenizer, 10)
    monkeypatch.setattr(steps, "GraphStep", steps.EagerStep)
    assert ids(graphed) == ids(generate(model, prompts, sampling, tokenizer, 10))


@pytest.mark.parametrize("sampling", [Sampling(LENGTH), SAMPLED])
def test_stepping_over_the_front_of_a_stage_equals_the_eager_step(
    fp32_settings, plain_tokenizer, tokenizer, prompts, monkeypatch, sampling
):
    """All of GraphStep but the capture, on any device: rows that leave, spans that grow, a batch larger than the one before."""
    model = liven(load_base(fp32_settings, "none", plain_tokenizer))
    wanted = generate(model, prompts, sampling, tokenizer, 10)
    one = generate(model, prompts[1:2], sampling, tokenizer, 1)
    captured = []
    monkeypatch.setattr(steps, "EagerStep", steps.GraphStep)
    monkeypatch.setattr(steps, "capture", lambda run: captured.append(run) or run)
    monkeypatch.setattr(steps, "SPAN", 8)
    assert ids(generate(model, prompts[1:2], sampling, tokenizer, 1)) == ids(one)
    small = model._graphs
    for _ in range(2):
        assert ids(generate(model, prompts, sampling, tokenizer, 10)) == ids(wanted)
    assert small.num_rows < model._graphs.num_rows
    assert len(model._graphs.captured) + len(small.captured) == len(captured), "a graph was made twice"
    rows, spans = (set(part) for part in zip(*model._graphs.captured, strict=True))
    assert len(spans) > 3 and (len(rows) > 1 or sampling is SAMPLED)  # of ten prompts' rows half finish early, of thirty not
    steps.release_graphs(model)
    assert not hasattr(model, "_graphs")


# --- the copy that generates, as the engines use it -------------------------------------------------------------------


def test_a_policy_generates_what_its_adapter_says(fp32_settings, plain_tokenizer, tokenizer, prompts):
    policy = new_adapter(liven(load_base(fp32_settings, "none", plain_tokenizer)), Lora(**LORA), plain_tokenizer, 0).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wanted = [greedy(policy, prompt, tokenizer.eos_token_id, 12) for prompt in prompts]
    results = generate(PolicyCopy(policy).refresh(), prompts, Sampling(12), tokenizer, 4)
    assert ids(results) == [[tokens] for tokens in wanted]
    with policy.disable_adapter():
        assert wanted != [greedy(policy, prompt, tokenizer.eos_token_id, 12) for prompt in prompts]

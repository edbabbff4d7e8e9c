"""Adapters from the first tensor to the merged model: identity, continuation, other shapes, and rows of special tokens."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import LINEAR, LORA
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from posttrain.config.schema import GrpoConfig, Lora, Model
from posttrain.errors import UserError
from posttrain.models.adapter_checks import check_adapter_fits
from posttrain.models.adapter_modes import check_adapter_mode, merged_with_new, rescale
from posttrain.models.adapters import (
    adapter_sha256,
    count_trainable,
    live_adapter_sha256,
    load_adapter,
    merge,
    new_adapter,
    resolve_adapter,
    tensors_sha256,
)
from posttrain.models.base import load_base
from posttrain.models.chat import load_tokenizer
from posttrain.models.policy_copy import PolicyCopy
from posttrain.models.special_tokens import special_token_report, special_tokens_to_train
from posttrain.training.label_head import LabelHead

END, START, TEXT_END = 2, 1, 0  # <|im_end|>, <|im_start|>, <|endoftext|>
IDS = torch.tensor([[1, 300, 301, 2, 17, 2], [1, 2, 3, 4, 5, 6]])


@pytest.fixture
def exact(load):
    """A base in fp32, in which equal means equal."""
    return load(dtype="float32")


def lora(**changes):
    return Lora(**LORA | changes)


def stirred(policy, seed=0, std=0.2):
    """Random values where an adapter starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return policy.eval()


@pytest.fixture
def saved(exact, tokenizer, tmp_path):
    """A trained adapter on disk, special tokens included, and what its policy says."""
    policy = stirred(new_adapter(exact, lora(train_special_tokens="always"), tokenizer, 0))
    policy.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(policy)


@torch.no_grad()
def logits(model):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        return model.eval()(input_ids=IDS).logits.float()


def embedding(model):
    return model.get_input_embeddings().weight.data


# --- special tokens: which rows are untrained -------------------------------------------------------------------------


def report(base, tokenizer):
    return {row["id"]: row for row in special_token_report(base, tokenizer)}


def test_healthy_rows_are_not_flagged(exact, tokenizer):
    rows = report(exact, tokenizer)
    assert {*rows} == {START, END}
    assert not any(row["untrained"] for row in rows.values())
    norms = embedding(exact).norm(dim=1)
    assert rows[END]["token"] == "<|im_end|>"
    assert rows[END]["norm"] == pytest.approx(norms[END].item(), abs=1e-4)
    assert rows[END]["z"] == pytest.approx(((norms[END] - norms.mean()) / norms.std()).item(), abs=0.01)


def zeroed(rows):
    rows[END] = 0


def tiny(rows):
    rows[END] *= 0.05


def merely_small(rows):
    rows[END] *= 0.3  # four deviations below, with norms as alike as a random model's


def twins(rows):
    rows[END] = rows[START]


def scaled_twins(rows):
    rows[END] = 1.3 * rows[START]


def cousins(rows):
    rows[END] = rows[START] + 0.14 * rows[END]  # cosine 0.99, as SmolLM2-Instruct's: told apart


def large(rows):
    rows[END] *= 3


UNTRAINED = {zeroed: {END}, tiny: {END}, merely_small: {END}, twins: {START, END}, scaled_twins: {START, END}}


@pytest.mark.parametrize(("damage", "flagged"), UNTRAINED.items(), ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("form", ["nf4", "none"])
def test_untrained_rows_are_flagged(load, tokenizer, damage, flagged, form):
    base = load(form)
    damage(embedding(base))
    assert {token for token, row in report(base, tokenizer).items() if row["untrained"]} == flagged


@pytest.mark.parametrize("change", [cousins, large])
def test_rows_that_are_only_unusual_are_not_flagged(exact, tokenizer, change):
    change(embedding(exact))
    assert not any(row["untrained"] for row in report(exact, tokenizer).values())


def test_the_report_of_an_adapted_model_is_about_its_base(exact, tokenizer):
    before = special_token_report(exact, tokenizer)
    policy = stirred(new_adapter(exact, lora(train_special_tokens="always"), tokenizer, 0), std=5)
    assert special_token_report(policy, tokenizer) == before


@pytest.mark.parametrize(
    ("setting", "damage", "rows"),
    [
        ("auto", None, []),
        ("auto", zeroed, [END]),
        ("auto", twins, [START, END]),
        ("always", None, [START, END]),
        ("never", zeroed, []),
    ],
)
def test_the_setting_decides_which_rows_are_trained(exact, tokenizer, setting, damage, rows):
    if damage:
        damage(embedding(exact))
    settings = lora(train_special_tokens=setting)
    assert special_tokens_to_train(exact, settings, tokenizer) == rows
    policy = new_adapter(exact, settings, tokenizer, 0)
    trained = [p for n, p in policy.named_parameters() if "trainable_tokens_delta" in n and p.requires_grad]
    assert [p.shape for p in trained] == ([(len(rows), 64)] if rows else [])


# --- special tokens: their gradient, through both ends of the tied matrix ---------------------------------------------

LABELS = torch.tensor([[-100, -100, 301, 2, 17, 2], [-100, 2, 3, 4, 5, 6]])


def plain_gradients(base):
    """The gradient of a plain model's embedding through the input and through the output, by autograd."""
    table = embedding(base).clone().requires_grad_()
    head = embedding(base).clone().requires_grad_()
    hidden = base.model(inputs_embeds=torch.nn.functional.embedding(IDS, table)).last_hidden_state
    scores = hidden[:, :-1] @ head.T
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), LABELS[:, 1:].flatten()).backward()
    return table.grad[[START, END]], head.grad[[START, END]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_rows_gradient_comes_through_the_embedding_and_the_tied_head(exact, tokenizer, checkpointing):
    through_input, through_output = plain_gradients(exact)
    assert through_input.abs().max() > 1e-4
    assert through_output.abs().max() > 1e-4
    policy = new_adapter(exact, lora(train_special_tokens="always"), tokenizer, 0)  # B is 0: the same model
    add_fused_lm_head(policy.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    LabelHead(policy.get_base_model(), 1.0, ())
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()(input_ids=IDS, labels=LABELS, fused_lm_head=True).loss.backward()
    (delta,) = (p for n, p in policy.named_parameters() if "trainable_tokens_delta" in n)
    assert torch.allclose(delta.grad, through_input + through_output, atol=1e-6)


def test_trls_own_head_cannot_score_trained_rows(exact, tokenizer):
    """This is why our head replaces TRL's on every device with such an adapter. When TRL mends it, ours may go."""
    policy = new_adapter(exact, lora(train_special_tokens="always"), tokenizer, 0)
    add_fused_lm_head(policy.get_base_model())
    with pytest.raises(AttributeError, match="bias"):
        policy(input_ids=IDS, labels=LABELS, fused_lm_head=True)


# --- a new adapter's random half --------------------------------------------------------------------------------------


def test_a_new_adapter_depends_on_its_seed_alone(load, tokenizer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = live_adapter_sha256(new_adapter(load(), lora(), tokenizer, 7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert live_adapter_sha256(new_adapter(load("nf4"), lora(), tokenizer, 7)) == first
    assert live_adapter_sha256(new_adapter(load(), lora(), tokenizer, 8)) != first


def test_a_new_adapter_changes_nothing_yet(exact, tokenizer):
    wanted = logits(exact)
    assert torch.equal(logits(new_adapter(exact, lora(train_special_tokens="always"), tokenizer, 0)), wanted)


# --- identity ---------------------------------------------------------------------------------------------------------


def test_the_hash_in_memory_is_the_hash_on_disk_and_after_loading(saved, load):
    folder, wanted = saved
    policy = load_adapter(load(dtype="float32"), folder, trainable=True)
    assert live_adapter_sha256(policy) == adapter_sha256(folder)
    assert torch.equal(logits(policy), wanted)
    assert count_trainable(policy) == sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "trainable_tokens_delta"])
def test_the_hash_changes_with_any_one_entry(saved, load, part):
    folder, _ = saved
    policy = load_adapter(load(dtype="float32"), folder, trainable=True)
    parameter = [p for n, p in policy.named_parameters() if part in n][-1]
    parameter.data.view(-1)[-1] = torch.nextafter(parameter.data.view(-1)[-1], torch.tensor(9.0))
    assert live_adapter_sha256(policy) != adapter_sha256(folder)


def test_the_hash_is_of_names_shapes_and_values_alone(saved):
    folder, _ = saved
    before, tensors = adapter_sha256(folder), load_file(folder / "adapter_model.safetensors")
    save_file(dict(reversed(tensors.items())), folder / "adapter_model.safetensors", metadata={"who": "me"})
    assert adapter_sha256(folder) == before
    name = next(iter(tensors))
    assert tensors_sha256({**tensors, name: tensors[name].T.contiguous()}) != before
    assert tensors_sha256({k if k != name else "other": v for k, v in tensors.items()}) != before


def test_a_frozen_adapter_has_nothing_to_train(saved, load):
    folder, wanted = saved
    policy = load_adapter(load(dtype="float32"), folder, trainable=False)
    assert count_trainable(policy) == 0
    assert torch.equal(logits(policy), wanted)


def test_a_bf16_adapter_comes_back_in_fp32_with_its_values(saved, load):
    folder, _ = saved
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    policy = load_adapter(load("nf4"), folder, trainable=True)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert live_adapter_sha256(policy) == adapter_sha256(folder)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_an_adapter_is_found_by_its_folder_and_by_its_run(saved):
    folder, _ = saved
    assert resolve_adapter(str(folder)) == resolve_adapter(str(folder.parent)) == folder


def test_no_adapter_where_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no adapter at .*: train one first \(python sft_train.py --config"):
        resolve_adapter(str(tmp_path))


def test_no_adapter_on_the_hub():
    with pytest.raises(UserError, match="someone/nothing is neither a local folder nor reachable on the Hub"):
        resolve_adapter("someone/nothing")


def test_a_pickled_adapter_is_refused(saved):
    folder, _ = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors: only safetensors adapters are loaded"):
        resolve_adapter(str(folder))


def test_an_adapter_of_another_base_is_refused(saved, settings, tiny_model_dir, tmp_path):
    """The base has the same shape, so PEFT would load the adapter without a word."""
    folder, _ = saved
    assert check_adapter_fits(folder, settings).r == 4
    shutil.copytree(tiny_model_dir, tmp_path / "other")
    other = Model(name_or_path=str(tmp_path / "other"))
    with pytest.raises(
        UserError, match=rf"belongs to base {tiny_model_dir}, not to {other.name_or_path}: set model.name_or_path"
    ):
        check_adapter_fits(folder, other)
    with pytest.raises(UserError, match="belongs to base"):
        check_adapter_fits(folder, Model(name_or_path="meta-llama/Llama-3.2-3B"))


def test_the_base_may_be_written_as_another_path_to_the_same_folder(saved, tiny_model_dir, tmp_path):
    folder, _ = saved
    (tmp_path / "link").symlink_to(tiny_model_dir)
    assert check_adapter_fits(folder, Model(name_or_path=str(tmp_path / "link")))


def test_targets_that_the_model_lacks_are_named(exact, tokenizer):
    with pytest.raises(UserError, match=r"names no layer of this model: W_pack, fc1"):
        new_adapter(exact, lora(target_modules=["q_proj", "W_pack", "fc1"]), tokenizer, 0)


def grpo(mode, **shape):
    settings = {"lora": LORA | shape} if mode != "continue" else {}
    return GrpoConfig(run_dir="r", model={"name_or_path": "m"}, adapter="a", adapter_mode=mode, data={"path": "d"}, **settings)


CHANGES = {
    "r": ({"r": 8}, "r 4 -> 8"),
    "targets": ({"target_modules": ["q_proj"]}, "target_modules"),
    "rslora": ({"use_rslora": True}, "use_rslora False -> True"),
}


@pytest.mark.parametrize(("shape", "named"), CHANGES.values(), ids=CHANGES.keys())
def test_rescaling_refuses_another_shape_and_a_fresh_adapter_does_not(saved, settings, shape, named):
    start = check_adapter_fits(saved[0], settings)
    with pytest.raises(UserError, match=rf"rescale can change lora.alpha alone, not {named}.*use adapter_mode=merge_and_new"):
        check_adapter_mode(grpo("rescale", **shape), start)
    check_adapter_mode(grpo("merge_and_new", **shape), start)


def test_another_alpha_and_another_order_of_targets_are_no_other_shape(saved, settings):
    start = check_adapter_fits(saved[0], settings)
    check_adapter_mode(grpo("rescale", alpha=2, target_modules=LINEAR[::-1]), start)
    check_adapter_mode(grpo("continue"), start)


# --- merged -----------------------------------------------------------------------------------------------------------


def test_merging_keeps_the_policy_and_so_do_saving_and_loading_it(saved, load, tokenizer, tmp_path):
    folder, wanted = saved
    merged = merge(load_adapter(load(dtype="float32"), folder, trainable=False))
    assert torch.allclose(logits(merged), wanted, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation=merged.config._attn_implementation)
    assert torch.equal(logits(again), logits(merged))
    assert torch.equal(again.lm_head.weight[END], again.model.embed_tokens.weight[END])  # still tied, trained row and all


@pytest.mark.parametrize("tokens", ["never", "always"])
def test_merging_a_packed_base_does_not_round_to_four_bits_again(load, tokenizer, tokens):
    policy = stirred(new_adapter(load("nf4"), lora(train_special_tokens=tokens), tokenizer, 0))
    wanted, copied = logits(policy), logits(PolicyCopy(policy).model)
    with policy.disable_adapter():
        effect = (logits(policy) - wanted).norm()
    merged = merge(policy)
    assert (logits(merged) - wanted).norm() < 0.02 * effect
    assert (logits(merged) - copied).norm() < 0.02 * effect
    assert {type(module).__name__ for module in merged.modules()} & {"Linear4bit", "TrainableTokensWrapper"} == set()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert "quantization_config" not in merged.config.to_dict()


# --- another alpha ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(64, 32), (32, 64), (8, 1)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_rescaling_by_a_power_of_two_keeps_the_policy_exactly(exact, load, tokenizer, tmp_path, before, after, use_rslora):
    shape = lora(alpha=before, use_rslora=use_rslora, train_special_tokens="always")
    policy = stirred(new_adapter(exact, shape, tokenizer, 0), std=0.02)
    wanted, start = logits(policy), live_adapter_sha256(policy)
    scale = policy.get_base_model().model.layers[0].mlp.up_proj.scaling["default"]
    rescale(policy, after)
    layer = policy.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == scale * after / before
    assert torch.equal(logits(policy), wanted)
    assert live_adapter_sha256(policy) != start  # it is another adapter, of the same policy
    policy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == after
    assert torch.equal(logits(load_adapter(load(dtype="float32"), tmp_path, trainable=True)), wanted)


def test_rescaling_by_another_factor_keeps_it_within_rounding(exact, tokenizer):
    policy = stirred(new_adapter(exact, lora(alpha=64), tokenizer, 0), std=0.02)
    wanted = logits(policy)
    rescale(policy, 24)
    assert torch.allclose(logits(policy), wanted, atol=1e-5)


def test_a_step_moves_the_rescaled_policy_by_less(exact, tokenizer):
    """What alpha is for: the same change of B moves the policy in proportion to alpha / r."""
    policy = new_adapter(exact, lora(alpha=64), tokenizer, 0)
    moved = []
    for alpha in (64, 32):
        rescale(policy, alpha)
        layer = policy.get_base_model().model.layers[0].mlp.up_proj
        before = layer.get_delta_weight("default")
        layer.lora_B["default"].weight.data += 1e-3
        moved.append((layer.get_delta_weight("default") - before).norm().item())
        layer.lora_B["default"].weight.data -= 1e-3
    assert moved[1] / moved[0] == pytest.approx(0.5, rel=1e-4)


# --- merged under a new adapter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_a_fresh_adapter_on_the_merged_base_starts_at_the_same_policy(load, tokenizer, tmp_path, form):
    policy = stirred(new_adapter(load(form), lora(train_special_tokens="always"), tokenizer, 0))
    wanted = logits(policy)
    with policy.disable_adapter():
        effect = (logits(policy) - wanted).norm()
    fresh = merged_with_new(policy, lora(r=2, alpha=4, target_modules=["q_proj"]), tokenizer, tmp_path / "base", 0)
    assert (logits(fresh) - wanted).norm() < 0.02 * effect
    assert {name.split(".")[-3] for name, p in fresh.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert count_trainable(fresh) == 2 * 2 * (64 + 64)
    with fresh.disable_adapter():  # the KL reference is then the base, so this must be the policy too
        assert torch.equal(logits(fresh), logits(fresh.get_base_model()))


def test_the_fresh_adapter_belongs_to_the_stored_base(load, settings, tokenizer, tmp_path):
    policy = stirred(new_adapter(load("nf4"), lora(), tokenizer, 0))
    fresh = stirred(merged_with_new(policy, lora(r=2), tokenizer, tmp_path / "base", 0), seed=1)
    fresh.save_pretrained(tmp_path / "adapter")
    stored = settings.model_copy(update={"name_or_path": str(tmp_path / "base")})
    assert check_adapter_fits(tmp_path / "adapter", stored).r == 2
    with pytest.raises(UserError, match="belongs to base"):
        check_adapter_fits(tmp_path / "adapter", settings)
    again = load_adapter(load_base(stored, "none", load_tokenizer(stored)), tmp_path / "adapter", trainable=False)
    assert torch.equal(logits(again), logits(fresh))


def test_a_stored_base_is_not_written_again(load, tokenizer, tmp_path):
    """A resumed run finds its base as it was, whatever it merges now."""
    for seed in (0, 1):
        merged_with_new(stirred(new_adapter(load(), lora(), tokenizer, 0), seed), lora(), tokenizer, tmp_path, 0)
        if seed == 0:
            stored = (tmp_path / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == stored

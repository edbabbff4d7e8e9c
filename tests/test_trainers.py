"""What the two trainers really do: what they learn from, loss, advantages, KL; and what upstream does where ours differs.

A test named `test_upstream_...` holds a behaviour of TRL, PEFT or transformers that an override in posttrain/training/
answers to. When one fails after an upgrade, the override may have become unnecessary, or may have to change.
"""

import shutil

import pytest
import torch
from tiny_training import (
    LENGTHS,
    LORA,
    Tiny,
    adapter_tensors,
    dtypes,
    first_step,
    largest_difference,
    loss_and_gradient,
    pay_tiny,
    plain_grpo,
    ragged,
    relative,
    scored,
    stir,
)
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer

from posttrain.errors import UserError
from posttrain.models.adapters import load_adapter
from posttrain.models.chat import chat_ids
from posttrain.records import Example, read_jsonl

# --- SFT: what is learnt from -----------------------------------------------------------------------------------------


def test_labels_are_the_completion_with_its_end_token_and_nothing_else(tiny, tokenizer):
    examples = {example.completion[0]["content"]: example for example in read_jsonl(f"{tiny.data}/train.jsonl", Example)}
    with tiny.sft({"per_device_train_batch_size": 44}) as trainer:
        batch = next(iter(trainer.get_train_dataloader()))
    seen = set()
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        learnt = labels != -100
        text = tokenizer.decode(ids[learnt])
        content = text.removesuffix("<|im_end|>\n")  # the template writes the line break after every turn
        assert content != text
        prompt = chat_ids(tokenizer, examples[content].prompt, add_generation_prompt=True)
        assert ids[: len(prompt)].tolist() == prompt
        assert not learnt[: len(prompt)].any()
        assert learnt.tolist() == [False] * len(prompt) + [True] * int(mask.sum() - len(prompt)) + [False] * int((1 - mask).sum())
        assert torch.equal(labels[learnt], ids[learnt])
        seen.add(content)
    assert seen == {*examples}


SPLITS = [(4, 1), (2, 2), (1, 4)]


@pytest.mark.parametrize("fast_loss", [True, False])
def test_sft_is_the_same_in_any_split_of_its_batch(tiny, fp32, fast_loss):
    results = [
        first_step(
            tiny.sft(
                {"max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps},
                fast_loss=fast_loss,
                lora=LORA | {"train_special_tokens": "always" if fast_loss else "never"},
                **fp32,
            )
        )
        for size, steps in SPLITS
    ]
    loss, gradient = results[0]
    for other_loss, other_gradient in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert relative(gradient, other_gradient) < 1e-5


@pytest.mark.slow  # inductor's C++ takes half a minute
@pytest.mark.parametrize("fast_adapter", [True, False])
def test_compiled_layers_take_the_same_step(tiny, fp32, fast_adapter):
    torch.compiler.reset()
    (loss, gradient), (compiled_loss, compiled_gradient) = (
        first_step(tiny.sft({"max_steps": 1, "max_grad_norm": 0.0}, compile=compiled, fast_adapter=fast_adapter, **fp32))
        for compiled in (False, True)
    )
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert relative(gradient, compiled_gradient) < 1e-5


def test_sft_over_nf4_is_the_same_in_any_split_within_rounding(tiny):
    results = [
        first_step(
            tiny.sft({"max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": s, "gradient_accumulation_steps": n})
        )
        for s, n in SPLITS
    ]
    loss, gradient = results[0]
    for other_loss, other_gradient in results[1:]:
        assert other_loss == pytest.approx(loss, rel=2e-3)
        assert relative(gradient, other_gradient) < 0.05


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_grpo_is_the_same_in_any_split_of_its_batch(tiny, sft, fp32, loss_type):
    results = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
        results.append(first_step(pay_tiny(tiny, sft, split | {"loss_type": loss_type, "beta": 0.1}, **fp32)))
    gradient = results[0][1]
    assert max(tensor.abs().max() for tensor in gradient.values()) > 1e-4
    for _, other in results[1:]:
        assert relative(gradient, other) < 1e-5


def test_padding_does_not_leak_into_a_row(tiny, fp32):
    with tiny.sft({"per_device_train_batch_size": 8}, **fp32) as trainer:
        stir(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        together = trainer.model(**batch, fused_lm_head=True).log_probs
        lengths = batch["attention_mask"].sum(1)
        assert len(set(lengths.tolist())) > 3
        for row, length in enumerate(lengths):
            alone = trainer.model(**{key: value[row : row + 1, :length] for key, value in batch.items()}, fused_lm_head=True)
            assert torch.allclose(alone.log_probs[0], together[row, : length - 1], atol=1e-5)
        noise = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)}
        assert torch.allclose(trainer.model(**noise, fused_lm_head=True).log_probs, together, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_rows_do_not_see_each_other(tiny, fp32):
    """Two questions in one row of 512 tokens score as they do apart, though only the positions tell SDPA of the border."""
    with tiny.sft({"packing": True, "per_device_train_batch_size": 1}, **fp32) as packed, tiny.sft(**fp32) as plain:
        for trainer in (packed, plain):
            stir(trainer.model)
        batch = next(iter(packed.get_train_dataloader()))
        starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
        assert len(starts) > 2
        together = packed.model(**batch, fused_lm_head=True).log_probs[0]
        for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            piece = {key: batch[key][:, start:end] for key in ("input_ids", "labels")}
            alone = plain.model(**piece, fused_lm_head=True).log_probs[0]
            assert torch.allclose(together[start : end - 1], alone, atol=1e-5)
            assert alone.abs().sum() > 1


# --- GRPO: advantages, loss and KL ------------------------------------------------------------------------------------


GROUPS = [1.2, 0.0, 0.0, 0.2, 1.0, 1.0, 0.0, 1.2]  # two groups of four


# Worked by hand. Means 0.35 and 0.8. Sums of squared deviations: 0.7225 + 2 * 0.1225 + 0.0225 = 0.99, and
# 2 * 0.04 + 0.64 + 0.16 = 0.88; standard deviations with n - 1: sqrt(0.33) = 0.5744563 and sqrt(0.88 / 3) = 0.5416026.
# All eight: mean 0.575, sum of squares 4.92 - 8 * 0.330625 = 2.275, standard deviation sqrt(0.325) = 0.5700877.
# Each divisor has 1e-4 added to it.
CENTRED = [0.85, -0.35, -0.35, -0.15, 0.2, 0.2, -0.8, 0.4]


ADVANTAGES = {
    "none": CENTRED,
    "group": [*(x / 0.5745563 for x in CENTRED[:4]), *(x / 0.5417026 for x in CENTRED[4:])],
    "batch": [x / 0.5701877 for x in CENTRED],
}


@pytest.mark.parametrize("scale", ADVANTAGES)
def test_advantages_are_those_worked_by_hand(tiny, sft, scale):
    with pay_tiny(tiny, sft, {"scale_rewards": scale}, reward=lambda ids: GROUPS) as trainer:
        advantages = scored(trainer)["advantages"].tolist()
    assert advantages == pytest.approx(ADVANTAGES[scale], abs=1e-6)


def test_rewards_are_summed_by_their_weights(tiny, sft):
    with pay_tiny(tiny, sft, {"scale_rewards": "none"}, reward=lambda ids: GROUPS) as trainer:
        trainer.reward_funcs[1] = lambda completion_ids, **_: [1.0, 0.0] * 4
        trainer.reward_weights = torch.tensor([2.0, 0.5])
        advantages = scored(trainer)["advantages"].tolist()
    wanted = [2 * centred + 0.25 * sign for centred, sign in zip(CENTRED, [1, -1] * 4, strict=True)]
    assert advantages == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.2, 1.2])
def test_equal_rewards_leave_the_weights_as_they_were(tiny, sft, reward):
    with pay_tiny(tiny, sft, {"learning_rate": 1.0, "max_steps": 2}, reward=lambda ids: [reward] * len(ids)) as trainer:
        before = adapter_tensors(trainer.model)
        trainer.train()
        rows = trainer.state.log_history[:2]
        assert [row["frac_groups_without_signal"] for row in rows] == [1.0, 1.0]
        if reward == 0.0:
            assert largest_difference(before, adapter_tensors(trainer.model)) == 0
            assert [row["grad_norm"] for row in rows] == [0.0, 0.0]


@torch.no_grad()
def completion_logps(model, inputs, temperature):
    """Log-probabilities of the completions' tokens by a plain forward of the model, (rows, tokens)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    start = inputs["prompt_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(2, inputs["completion_ids"][:, :, None]).squeeze(2)


def test_the_logged_kl_is_its_formula(tiny, sft, fp32):
    """k3 (http://joschu.net/blog/kl-approx.html): exp(d) - d - 1 with d = log reference - log policy, over all tokens."""
    with pay_tiny(tiny, sft, {"beta": 0.1}, **fp32) as trainer:
        stir(trainer.model)
        inputs = ragged(scored(trainer), LENGTHS)
        policy = completion_logps(trainer.model, inputs, 0.8)
        trainer.model.set_adapter("ref")
        reference = completion_logps(trainer.model, inputs, 0.8)
        trainer.model.set_adapter("default")
        mask = inputs["completion_mask"].bool()
        inputs["ref_per_token_logps"] = reference
        trainer.compute_loss(trainer.model, inputs)
        (logged,) = trainer._metrics["train"]["kl"]
    d = (reference - policy)[mask].double()
    assert logged == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-3)
    assert logged > 1e-4


def test_the_references_logps_are_the_sft_policys(tiny, any_sft, fp32):
    with tiny.grpo(any_sft, {"beta": 0.1}, **fp32) as trainer:
        assert distance_to_reference(trainer) < 1e-5
        stir(trainer.model)
        assert distance_to_reference(trainer) > 1e-2


def test_the_base_is_the_reference_of_a_new_adapter_and_is_asked_with_the_adapter_off(tiny, fp32):
    with tiny.grpo(None, {"beta": 0.1}, **fp32, lora=LORA) as trainer:
        model = trainer.model
        assert "ref" not in model.peft_config and distance_to_reference(trainer) < 1e-5
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        stir(model)
        inputs = scored(trainer)
        with type(model).disable_adapter(model):
            wanted = completion_logps(model, inputs, 0.8)
        mask = inputs["completion_mask"].bool()
        assert (inputs["ref_per_token_logps"] - wanted)[mask].abs().max() < 1e-5
        assert (inputs["ref_per_token_logps"] - completion_logps(model, inputs, 0.8))[mask].abs().max() > 1e-2
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def distance_to_reference(trainer):
    inputs = scored(trainer)
    difference = inputs["ref_per_token_logps"] - completion_logps(trainer.model, inputs, 0.8)
    return difference[inputs["completion_mask"].bool()].abs().max()


def test_the_dapo_loss_is_its_formula(tiny, sft, fp32):
    with pay_tiny(tiny, sft, {"beta": 0.0, "loss_type": "dapo"}, **fp32) as trainer:
        inputs = ragged(scored(trainer), LENGTHS)
        inputs["old_per_token_logps"] = completion_logps(trainer.model, inputs, 0.8)
        stir(trainer.model, std=0.3)
        ratio = (completion_logps(trainer.model, inputs, 0.8) - inputs["old_per_token_logps"]).exp()
        loss, _ = loss_and_gradient(trainer, inputs)
    advantages, mask = inputs["advantages"][:, None], inputs["completion_mask"]
    clipped = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
    wanted = -(torch.minimum(ratio * advantages, clipped * advantages) * mask).sum() / mask.sum()
    assert ((ratio != clipped) & mask.bool()).any()
    assert loss == pytest.approx(wanted.item(), rel=1e-3)


def test_the_mismatch_is_corrected_with_the_samplers_logps(tiny, sft, fp32):
    settings = {"beta": 0.0, "loss_type": "dapo"}
    with pay_tiny(tiny, sft, settings, **fp32, rollouts={"correct_mismatch": True}) as trainer:
        inputs = ragged(scored(trainer), LENGTHS)
        noise = 0.3 * torch.randn(inputs["completion_ids"].shape, generator=torch.Generator().manual_seed(0))
        inputs["sampling_per_token_logps"] = completion_logps(trainer.model, inputs, 0.8) + noise
        loss, _ = loss_and_gradient(trainer, inputs)
    ratio, advantages, mask = (-noise).exp(), inputs["advantages"][:, None], inputs["completion_mask"]
    clipped = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
    wanted = -(torch.minimum(ratio * advantages, clipped * advantages) * mask).sum() / mask.sum()
    assert loss == pytest.approx(wanted.item(), rel=1e-3)


def test_without_correction_the_ratio_starts_at_one(tiny, sft, fp32):
    with pay_tiny(tiny, sft, {"beta": 0.0, "loss_type": "dapo"}, **fp32) as trainer:
        inputs = ragged(scored(trainer), LENGTHS)
        inputs["sampling_per_token_logps"] = inputs["sampling_per_token_logps"] - 3.0
        loss, _ = loss_and_gradient(trainer, inputs)
    wanted = -(inputs["advantages"][:, None] * inputs["completion_mask"]).sum() / inputs["completion_mask"].sum()
    assert loss == pytest.approx(wanted.item(), rel=1e-4)


def test_the_logged_mismatch_is_the_mean_over_completion_tokens(tiny, sft, fp32):
    with pay_tiny(tiny, sft, **fp32) as trainer:
        inputs = ragged(scored(trainer), LENGTHS)
        exact = completion_logps(trainer.model, inputs, 0.8)
        shift = torch.arange(8.0)[:, None].expand_as(exact)
        inputs["sampling_per_token_logps"] = exact + shift
        trainer.compute_loss(trainer.model, inputs)
        (logged,) = trainer._metrics["train"]["rollout/logp_difference"]
    mask = inputs["completion_mask"]
    assert logged == pytest.approx((shift * mask).sum().item() / mask.sum().item(), rel=1e-4)


# --- rewards that are no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_reward_that_is_no_number_stops_the_run_before_the_step(tiny, sft, value):
    rewards = iter([GROUPS, [0.0, 1.0, value, 0.0] + [0.0] * 4])
    with pay_tiny(tiny, sft, {"max_steps": 3, "beta": 0.04}, reward=lambda ids: next(rewards)) as trainer:
        after_first = AfterStep()
        trainer.add_callback(after_first)
        with pytest.raises(FloatingPointError, match=r"reward only is not finite at step 2, completion 2 of the batch"):
            trainer.train()
        assert trainer.state.global_step == 1
        assert largest_difference(after_first.weights, adapter_tensors(trainer.model)) == 0


class AfterStep(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights = adapter_tensors(model)


# --- TRL's own generation ---------------------------------------------------------------------------------------------


def everything(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_trls_own_engine_leaves_the_model_alone(tiny, any_sft, form):
    manager = pay_tiny(tiny, any_sft, {"beta": 0.1, "max_steps": 2}, quantization=form, rollouts={"engine": "trl"})
    with manager as trainer:
        before = {name: tensor.detach().clone() for name, tensor in everything(trainer.model).items()}
        scored(trainer)
        for name, tensor in everything(trainer.model).items():
            assert tensor.dtype == before[name].dtype, name
            assert torch.equal(tensor, before[name]), name
        trainer.train()
        assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)
        assert dtypes(trainer.model) == {torch.float32}


CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    # By default the cache fills the memory of the machine.
    "transformers_continuous_batching_config": {"page_size": 64, "num_blocks": 8, "max_batch_tokens": 1024},
}


def test_trls_continuous_batching_is_refused(tiny, sft):
    with pytest.raises(UserError, match=r"casts the trained weights to bf16: use rollouts.engine=continuous_batching"):
        tiny.grpo(sft, CONTINUOUS, rollouts={"engine": "trl"}).__enter__()


def test_upstreams_continuous_batching_casts_the_trained_model(tiny, load, sft, tokenizer, tmp_path):
    model = load_adapter(load("none", attn_implementation="sdpa"), sft / "adapter", trainable=True)
    trainer = plain_grpo(model, tokenizer, tiny, tmp_path, **CONTINUOUS)
    assert dtypes(model) == {torch.float32}
    with trainer.accelerator.autocast():
        trainer._generate_single_turn([[1, 2, 3]], None, {}, 1)
    assert dtypes(model) == {torch.bfloat16}, "TRL leaves the model alone now: its continuous batching need not be refused"


def test_upstream_generates_outside_autocast(tiny, sft):
    with tiny.grpo(sft, rollouts={"engine": "trl"}) as trainer, pytest.raises(RuntimeError, match="same dtype"):
        GRPOTrainer._generate_single_turn(trainer, [[1, 2, 3]], None, {}, 1)


# --- learning to stop -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_learns_to_stop(tiny_model_dir, tiny_data_dir, tmp_path):
    """At first nearly all completions run to the limit. After 60 steps none does."""
    lively = shutil.copytree(tiny_model_dir, tmp_path / "lively")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 4)
    model.save_pretrained(lively)
    manager = Tiny(lively, tiny_data_dir, tmp_path).sft(
        {
            "max_steps": 60,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 8,
            "lr_scheduler_type": "constant",
            "max_length": 200,
        },
        lora={"r": 32, "alpha": 64, "target_modules": LORA["target_modules"], "train_special_tokens": "always"},
        data={"path": str(tiny_data_dir), "num_dev": 8},
    )
    with manager as trainer:
        trainer.train()
        rows = trainer.state.log_history
    clipped = [row["dev/clipped_ratio"] for row in rows if "dev/clipped_ratio" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert clipped[0] >= 0.75
    assert clipped[-1] == 0.0
    assert losses[-1] < losses[0] - 2

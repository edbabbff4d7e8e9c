"""Prompts that are run once for all of their completions: scores and gradients stay the same."""

import pytest
import torch
from tiny_training import (
    LENGTHS,
    GradientsBeforeStep,
    by_content,
    loss_and_gradient,
    paid,
    pay_tiny,
    ragged,
    relative,
    scored,
    stir,
)

from posttrain.errors import UserError
from posttrain.training.batches import keep_rows, trim
from posttrain.training.shared_prompts import SharedPrompts


class OwnPrompts:
    """Replaces SharedPrompts and runs every row whole."""

    def __init__(self, model, ids, mask):
        self.model, self.width, self.prompts = model, ids.shape[1], ids

    def scorer(self, rows):
        return self.model

    def nothing(self, *_):
        pass

    run = detach = backward = nothing


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_prompts_are_shared_across_a_step_of_as_many_rows_and_the_step_is_the_same(tiny, sft, fp32, monkeypatch, rows, skip):
    """Two prompts with four completions each, against every row with a prompt of its own."""
    split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows, "max_grad_norm": 0.0}
    settings = split | {"beta": 0.0 if skip else 0.1, "loss_type": "dapo", "max_steps": 2, "gradient_checkpointing": False}
    results, seen = [], []

    class Watched(paid):
        def __enter__(self):
            trainer = super().__enter__()
            generate = trainer._generate_and_score_completions
            trainer._generate_and_score_completions = lambda inputs: ragged(generate(inputs), LENGTHS)
            embed = trainer.model.get_base_model().model.embed_tokens
            embed.register_forward_pre_hook(lambda _, a: seen[-1].append(len(a[0])) if torch.is_grad_enabled() else None)
            return trainer

    for prompts in (SharedPrompts, OwnPrompts):
        monkeypatch.setattr("posttrain.training.grpo_trainer.SharedPrompts", prompts)
        seen.append([])
        with Watched(tiny.grpo(sft, settings, **fp32, rollouts={"skip_zero_signal": skip}), by_content) as trainer:
            stir(trainer.model)
            gradients = GradientsBeforeStep()
            trainer.add_callback(gradients)
            trainer.train()
            assert trainer._step_prompts is None
            results.append(gradients.of)
    assert len(results[0]) == 2
    for shared, apart in zip(*results, strict=True):
        assert relative(apart, shared) < 1e-5
    if rows == 1:  # at most one prompt in a micro-batch: none is held, and none is shared
        assert seen[0] == seen[1]
    elif not skip:
        assert seen == [2 * [2, *[rows] * (8 // rows)], 2 * [rows] * (8 // rows)]


@pytest.mark.parametrize("form", ["fp32", "nf4"])
@pytest.mark.parametrize("attention", ["matmul", "varlen", "sdpa", "eager"])
def test_sharing_prompts_changes_no_score_and_no_gradient(tiny, any_sft, fp32, monkeypatch, form, attention):
    """Rows of two groups in any order, one prompt padded, against a prompt for every row; over NF4 within bf16's rounding."""
    model = fp32["model"] if form == "fp32" else {"name_or_path": tiny.model}
    settings = {"model": model | {"attn_implementation": attention}, "quantization": "none" if form == "fp32" else "nf4"}
    with pay_tiny(tiny, any_sft, {"beta": 0.1, "gradient_checkpointing": False}, **settings) as trainer:
        stir(trainer.model)
        inputs = ragged(scored(trainer), LENGTHS)
        order = torch.tensor([3, 0, 5, 6, 1, 7, 2, 4])
        inputs = {k: v[order] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in inputs.items()}
        seen, trainer._head_checked = [], True  # the once a run comparison of the heads has batches of its own
        hook = trainer.model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape))
        loss, gradient = loss_and_gradient(trainer, inputs)
        logps = trainer._last_logps
        hook.remove()
        monkeypatch.setattr("posttrain.training.grpo_trainer.SharedPrompts", OwnPrompts)
        whole_loss, whole_gradient = loss_and_gradient(trainer, inputs)
    prompt = inputs["prompt_mask"].sum(1).max()
    assert len({int(row.sum()) for row in inputs["prompt_mask"]}) == 2, "both prompts have one length: padding is not tested"
    assert seen == [(2, prompt - 1), (8, 1 + max(LENGTHS))]
    mask = trim(inputs)["completion_mask"].bool()
    assert (logps - trainer._last_logps)[mask].abs().max() < (1e-5 if form == "fp32" else 0.1)
    assert loss == pytest.approx(whole_loss, rel=1e-4 if form == "fp32" else 0.05, abs=1e-6)
    assert relative(whole_gradient, gradient) < (1e-5 if form == "fp32" else 0.05)


def test_prompts_are_not_shared_where_layers_are_checkpointed_or_none_is_repeated(tiny, sft, fp32):
    with pay_tiny(tiny, sft, {"beta": 0.0, "gradient_checkpointing": True}, **fp32) as trainer:
        inputs = trim(ragged(scored(trainer), LENGTHS))
        width = inputs["prompt_ids"].shape[1]
        seen, trainer._head_checked = [], True
        trainer.model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape))
        trainer.compute_loss(trainer.model, dict(inputs))
        trainer.args.gradient_checkpointing = False
        trainer.compute_loss(trainer.model, keep_rows(inputs, torch.tensor([0, 4])))
    assert seen == [(8, width + 9), (2, width + 7)]


# --- parts of a micro-batch, sized by tokens --------------------------------------------------------------------------


def an_update(tiny, sft, trainer, **settings):
    """Losses and gradients of two steps of 8 completions, and the shapes of what the model ran."""
    shapes = []
    with pay_tiny(
        tiny, sft, {"max_grad_norm": 0.0, "max_steps": 2, "gradient_accumulation_steps": 1} | trainer, **settings
    ) as grpo:
        stir(grpo.model)
        generate = grpo._generate_and_score_completions
        grpo._generate_and_score_completions = lambda inputs: ragged(generate(inputs), LENGTHS)
        embed = grpo.model.get_base_model().model.embed_tokens
        embed.register_forward_pre_hook(lambda _, a: shapes.append(tuple(a[0].shape)) if torch.is_grad_enabled() else None)
        gradients = GradientsBeforeStep()
        grpo.add_callback(gradients)
        grpo.train()
        losses = [row["loss"] for row in grpo.state.log_history if "loss" in row]
    return losses, gradients.of, shapes


@pytest.mark.parametrize(("loss_type", "checkpointing"), [("dapo", False), ("grpo", True), ("bnpo", False)])
def test_an_update_in_parts_of_so_many_tokens_is_the_update(tiny, sft, fp32, loss_type, checkpointing):
    trainer = {"per_device_train_batch_size": 8, "beta": 0.1, "loss_type": loss_type, "gradient_checkpointing": checkpointing}
    losses, gradients, _ = an_update(tiny, sft, trainer, **fp32)
    tokens = 300 if checkpointing else 25  # with its prompt a row is 80 to 100 tokens
    parts, in_parts, shapes = an_update(tiny, sft, trainer, **fp32, update_tokens=tokens)
    assert parts == pytest.approx(losses, abs=1e-6)
    for whole, part in zip(gradients, in_parts, strict=True):
        assert relative(whole, part) < 1e-5
    if not checkpointing:  # the two prompts once a step, then rows of like length: 2 x 10, 3 x 8, 3 x 4
        assert [shape[0] for shape in shapes] == 2 * [2, 2, 3, 3]
        assert [shape[1] for shape in shapes[1:4]] == [10, 8, 4]
    else:
        assert all(rows * columns <= tokens for rows, columns in shapes) and len(shapes) > 2


def test_lean_layers_share_prompts_and_take_the_same_step(tiny, sft, fp32):
    trainer = {"per_device_train_batch_size": 8, "beta": 0.1}
    losses, gradients, _ = an_update(tiny, sft, trainer, **fp32)
    lean, found, _ = an_update(tiny, sft, trainer, **fp32, lean_layers=True, update_tokens=25)
    assert lean == pytest.approx(losses, abs=1e-6)
    for whole, part in zip(gradients, found, strict=True):
        assert relative(whole, part) < 1e-5


def test_parts_with_an_entropy_of_a_whole_micro_batch_are_refused(tiny, sft):
    with (
        pytest.raises(UserError, match="update_tokens: entropy terms"),
        pay_tiny(tiny, sft, {"entropy_coef": 0.1}, update_tokens=100),
    ):
        pass

"""Which rows share a micro-batch and how it is cut: the step stays the same."""

import pytest
import torch
from tiny_training import (
    LENGTHS,
    adapter_tensors,
    by_content,
    first_step,
    largest_difference,
    loss_and_gradient,
    paid,
    pay_tiny,
    ragged,
    relative,
    scored,
    stir,
)
from trl import GRPOTrainer

from posttrain.errors import UserError
from posttrain.training import grpo_trainer
from posttrain.training.batches import by_length, groups_without_signal, rows_with_signal, trim


def test_groups_without_signal_are_those_of_equal_reward():
    scores = torch.tensor([[1.0, 0.2], [1.0, 0.2], [1.0, 0.0], [0.0, 0.0], [0.2, 1.0], [0.2 + 1e-8, 1.0]])
    assert groups_without_signal(scores, torch.tensor([1.0, 1.0]), 2) == pytest.approx(2 / 3)
    assert groups_without_signal(scores, torch.tensor([0.0, 0.0]), 3) == 1.0


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo"])
def test_leaving_out_rows_without_signal_keeps_the_gradient(tiny, sft, fp32, loss_type):
    settings = {"beta": 0.0, "loss_type": loss_type, "scale_rewards": "none"}
    skipping = {"rollouts": {"skip_zero_signal": True}}
    with pay_tiny(tiny, sft, settings, **fp32) as whole, pay_tiny(tiny, sft, settings, **fp32, **skipping) as fewer:
        inputs = ragged(scored(whole), LENGTHS)
        inputs["advantages"] = torch.tensor([0.5, 0.0, 0.0, -0.5, 1e-8, 0.0, 0.0, 1.0])
        scored(fewer)
        seen, fewer._head_checked = [], True  # the once a run comparison of the heads has batches of its own
        handle = fewer.model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape))
        (loss, gradient), (fewer_loss, fewer_gradient) = loss_and_gradient(whole, inputs), loss_and_gradient(fewer, inputs)
        handle.remove()
    prompts = inputs["prompt_mask"][[0, 3, 7]].sum(1).max()
    assert seen == [(3, prompts + 5)]  # the rows with signal, cut to the longest of them
    assert max(grad.abs().max() for grad in gradient.values()) > 1e-5
    assert relative(gradient, fewer_gradient) < 1e-5
    if loss_type not in ("cispo", "sapo"):  # these have a value even without a gradient
        assert fewer_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)


def test_a_batch_without_any_signal_is_a_step_of_zero(tiny, sft):
    settings = {"rollouts": {"skip_zero_signal": True}}
    with pay_tiny(tiny, sft, {"learning_rate": 1.0}, reward=lambda ids: [0.2] * len(ids), **settings) as trainer:
        before = adapter_tensors(trainer.model)
        trainer.train()
        assert largest_difference(before, adapter_tensors(trainer.model)) < 1e-6
    assert rows_with_signal(torch.zeros(4)).tolist() == [0]
    assert rows_with_signal(torch.tensor([0.0, -0.1, 1e-9, 2.0])).tolist() == [1, 3]


@pytest.mark.parametrize("terms", [{"entropy_coef": 0.01}, {"top_entropy_quantile": 0.2}])
def test_leaving_out_rows_is_refused_where_they_count(tiny, sft, terms):
    with pytest.raises(UserError, match=r"skip_zero_signal needs trainer.beta 0 and no entropy terms"):
        tiny.grpo(sft, terms, rollouts={"skip_zero_signal": True}).__enter__()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_trimming_changes_no_loss_and_no_gradient(tiny, sft, fp32, loss_type):
    """TRL's own loss of the untrimmed batch is the same."""
    with pay_tiny(tiny, sft, {"beta": 0.1, "loss_type": loss_type}, **fp32) as trainer:
        stir(trainer.model)
        inputs = ragged(scored(trainer), LENGTHS)
        loss, gradient = loss_and_gradient(trainer, inputs)
        trainer.model.zero_grad()
        untrimmed = GRPOTrainer.compute_loss(trainer, trainer.model, dict(inputs))
        untrimmed.backward()
        theirs = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(untrimmed.item(), rel=1e-4, abs=1e-7)
    assert relative(theirs, gradient) < 1e-5


def test_trimming_cuts_padding_and_only_padding(tiny, sft):
    with tiny.grpo(sft, {"beta": 0.1}) as trainer:
        inputs = ragged(scored(trainer), LENGTHS)
    inputs = {k: v[:3] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in inputs.items()}
    cut = trim(inputs)
    prompt = int(inputs["prompt_mask"].sum(1).max())
    assert cut["prompt_ids"].shape == cut["prompt_mask"].shape == (3, prompt)
    assert {cut[key].shape for key in cut if "completion" in key or "logps" in key} == {(3, 9)}
    assert cut["completion_mask"].sum() == inputs["completion_mask"].sum()
    assert cut["prompt_mask"].sum() == inputs["prompt_mask"].sum()
    nothing = trim({**inputs, "completion_mask": torch.zeros_like(inputs["completion_mask"])})
    assert nothing["completion_ids"].shape == (3, 1)  # all of it masked, as truncated completions may be


def test_upstream_pads_a_micro_batch_to_the_whole_generation_batch(tiny, sft):
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_generations": 2}
    with tiny.grpo(sft, single) as trainer:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 8
        trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        widths = [batch["prompt_ids"].shape[1] for batch in trainer._buffered_inputs]
        needed = [int(batch["prompt_mask"].sum(1).max()) for batch in trainer._buffered_inputs]
    assert len(set(widths)) == 1
    assert min(needed) < widths[0], "TRL pads less now: trim may go"


def dealt(lengths, signal, size):
    """Micro-batches of `size` rows: completions of these lengths, each row with its number, and a scalar beside them."""
    width = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    rows = {"completion_mask": mask, "advantages": torch.tensor(signal), "number": torch.arange(len(lengths))}
    return [
        {key: value[start : start + size] for key, value in rows.items()} | {"num_items_in_batch": mask.sum(), "images": None}
        for start in range(0, len(lengths), size)
    ]


def test_by_length_moves_rows_within_an_optimizer_step_and_nothing_else():
    lengths, signal = [3, 9, 1, 7, 2, 8, 4, 4, 6, 5, 9, 1], [0.5, 0.0, -1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1e-9, 0.0, -0.5, 0.5]
    before = dealt(lengths, signal, size=3)
    for signal_first in (False, True):
        after = by_length(before, per_step=2, signal_first=signal_first)
        assert [len(batch["number"]) for batch in after] == [3, 3, 3, 3]
        for step in (slice(0, 2), slice(2, 4)):
            numbers = [torch.cat([batch["number"] for batch in some[step]]).tolist() for some in (before, after)]
            assert sorted(numbers[0]) == sorted(numbers[1])
            kept = [number for number in numbers[1] if not signal_first or abs(signal[number]) > 1e-6]
            assert [lengths[number] for number in kept] == sorted((lengths[number] for number in kept), reverse=True)
            assert numbers[1][: len(kept)] == kept, "a row without signal stands before one with it"
        for batch in after:
            for row, number in enumerate(batch["number"].tolist()):
                assert batch["completion_mask"][row].sum() == lengths[number] and batch["advantages"][row] == signal[number]
            assert batch["num_items_in_batch"] == before[0]["num_items_in_batch"] and batch["images"] is None


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_micro_batches_by_length_take_the_same_step(tiny, sft, fp32, monkeypatch, loss_type):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    results, widths = [], []

    class Ragged(paid):
        def __enter__(self):
            trainer = super().__enter__()
            generate, compute_loss = trainer._generate_and_score_completions, trainer.compute_loss
            trainer._generate_and_score_completions = lambda inputs: ragged(generate(inputs), LENGTHS)
            trainer.compute_loss = lambda model, inputs, *a, **k: (
                widths[-1].append(int(inputs["completion_mask"].sum(1).max())) or compute_loss(model, inputs, *a, **k)
            )
            return trainer

    for sort in (by_length, lambda batches, *_: batches):
        monkeypatch.setattr("posttrain.training.grpo_trainer.by_length", sort)
        widths.append([])
        manager = tiny.grpo(sft, split | {"loss_type": loss_type, "beta": 0.1}, **fp32)
        results.append(first_step(Ragged(manager, by_content)))
    assert relative(results[0][1], results[1][1]) < 1e-5
    assert widths[0] == sorted(widths[0], reverse=True) and sum(widths[0]) < sum(widths[1])


@pytest.mark.parametrize(("size", "at_once"), [(1, 1), (3, 1), (8, 1), (None, 1), (1, 4), (3, 4)])
def test_the_reference_is_scored_in_parts_by_length_and_put_back_in_order(tiny, sft, fp32, monkeypatch, size, at_once):
    monkeypatch.setitem(grpo_trainer.SCORED_AT_ONCE, "cpu", at_once)
    with pay_tiny(tiny, sft, {"beta": 0.1, "gradient_checkpointing": False}, **fp32) as trainer:
        stir(trainer.model)
        inputs = ragged(scored(trainer), LENGTHS)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width = inputs["completion_ids"].shape[1]
        seen = []
        trainer.model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, a: seen.append(tuple(a[0].shape)))
        with torch.no_grad():
            logps, entropies, nothing = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, width, batch_size=size, compute_entropy=True
            )
            theirs = GRPOTrainer._get_per_token_logps_and_entropies(
                trainer, trainer.model, ids, mask, width, batch_size=8, compute_entropy=True
            )
    kept = inputs["completion_mask"].bool()
    assert nothing is None and logps.shape == entropies.shape == kept.shape
    assert (logps - theirs[0])[kept].abs().max() < 1e-5 and (entropies - theirs[1])[kept].abs().max() < 1e-4
    together = min(8, (size or 8) * at_once)
    prompts = 2 if together == 1 else 1  # passes over the two prompts
    parts = seen[prompts:-1]
    assert sum(rows for rows, _ in parts) == 8 and max(rows for rows, _ in parts) == together
    if size:
        assert [tokens for _, tokens in parts] == sorted((tokens for _, tokens in parts), reverse=True)

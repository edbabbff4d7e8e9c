"""The output head that scores labels alone, beside TRL's."""

import copy

import pytest
import torch
import trl.trainer.utils
from tiny_training import (
    LORA,
    liven,
    relative,
    stir,
)
from trl.trainer.utils import add_fused_lm_head

from posttrain.config.schema import Lora
from posttrain.models.adapters import new_adapter
from posttrain.training import label_head
from posttrain.training.label_head import LabelHead


def two_heads(load, tokenizer, temperature, dtype):
    """The same policy with TRL's head and with our head."""
    theirs = new_adapter(liven(load(dtype=dtype)), Lora(**LORA), tokenizer, seed=0)
    stir(theirs)
    add_fused_lm_head(theirs.get_base_model(), temperature=temperature, outputs=("log_probs", "entropy", "is_top1"))
    ours = copy.deepcopy(theirs)  # a deep copy keeps the forward that is bound to the original
    add_fused_lm_head(ours.get_base_model(), temperature=temperature, outputs=("log_probs", "entropy", "is_top1"))
    LabelHead(ours.get_base_model(), temperature, ("entropy", "is_top1"))
    return theirs, ours


def labelled_batch(num_rows=6, length=80, seed=0):
    """Ids and labels: more labels than one tile holds, one row with none, one with all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 600, (num_rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    labels[0] = -100
    labels[1] = ids[1]
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def scores_and_gradient(policy, batch):
    policy.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=policy.dtype == torch.bfloat16):
        out = policy.train()(**batch, fused_lm_head=True)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_our_head_scores_as_trls_does(load, tokenizer, temperature, dtype, tolerance):
    batch = labelled_batch()
    (theirs, gradient), (ours, our_gradient) = (
        scores_and_gradient(policy, batch) for policy in two_heads(load, tokenizer, temperature, dtype)
    )
    assert int(ours.label_mask.sum()) > 256
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=tolerance / 10)
    assert torch.allclose(ours.log_probs, theirs.log_probs, atol=tolerance * 5)
    assert torch.allclose(ours.entropy, theirs.entropy, atol=tolerance * 5)
    assert (ours.is_top1 != theirs.is_top1).float().mean() <= tolerance / 10
    assert relative(gradient, our_gradient) < tolerance
    unscored = ~ours.label_mask
    assert ours.log_probs[unscored].abs().sum() == ours.entropy[unscored].abs().sum() == ours.is_top1[unscored].sum() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_our_heads_scores_are_arithmetic(load, tokenizer, temperature):
    """Against log_softmax of the logits, in double precision."""
    batch = labelled_batch()
    _, policy = two_heads(load, tokenizer, temperature, "float32")
    with torch.no_grad():
        out = policy(**batch, fused_lm_head=True)
        scores = (policy(input_ids=batch["input_ids"]).logits[:, :-1].double() / temperature).log_softmax(-1)
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    assert torch.allclose(out.log_probs[mask].double(), scores[mask].gather(1, labels[mask][:, None]).squeeze(1), atol=1e-4)
    assert torch.allclose(out.entropy[mask].double(), -(scores.exp() * scores).sum(-1)[mask], atol=1e-4)
    assert torch.equal(out.is_top1[mask].bool(), scores.argmax(-1)[mask] == labels[mask])
    assert out.loss.item() == pytest.approx(-out.log_probs.sum().item() / int(mask.sum()), rel=1e-6)


def test_a_batch_without_labels_has_a_loss_of_zero_and_no_gradient(load, tokenizer):
    _, policy = two_heads(load, tokenizer, 1.0, "float32")
    batch = labelled_batch()
    out, gradient = scores_and_gradient(policy, batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert out.loss.item() == 0
    assert all(not grad.any() for grad in gradient.values())


def test_entropy_is_not_a_number_where_it_is_not_computed_and_is_not_logged(tiny):
    with tiny.sft() as trainer:
        batch = next(iter(trainer.get_train_dataloader()))
        with trainer.accelerator.autocast():
            assert trainer.model(**batch, fused_lm_head=True).entropy.isnan().any()
        trainer.train()
        assert "entropy" not in trainer.state.log_history[0]
        assert "mean_token_accuracy" in trainer.state.log_history[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA, TRL's head is used")
def test_entropy_is_computed_of_the_policy_and_not_of_the_reference(tiny, any_sft, monkeypatch):
    asked = []
    original = label_head._LabelScores.apply

    def spy(*args):
        asked.append((torch.is_grad_enabled(), args[-1]))
        return original(*args)

    monkeypatch.setattr(label_head._LabelScores, "apply", spy)
    with tiny.grpo(any_sft, {"max_steps": 1, "beta": 0.04}) as trainer:
        trainer.train()
        assert {(False, ()), (True, ("entropy",))} == set(asked)
        assert trainer.state.log_history[0]["entropy"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA, TRL scores the labels alone too")
def test_upstreams_head_scores_every_position_on_cpu(tiny, monkeypatch):
    scored_positions = []
    original = trl.trainer.utils._ChunkedLogProbFunction.apply

    def spy(hidden, *args):
        scored_positions.append(len(hidden))
        return original(hidden, *args)

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", spy)
    with tiny.sft(fast_loss=False) as theirs, tiny.sft() as ours:
        batch = next(iter(theirs.get_train_dataloader()))
        for trainer in (theirs, ours):
            with trainer.accelerator.autocast():
                trainer.model(**batch, fused_lm_head=True)
    rows, length = batch["input_ids"].shape
    assert scored_positions == [rows * (length - 1)], "TRL scores less now: LabelHead may go"

"""Packed rows: each sees itself alone, a step of them is the step of the same rows apart, and it is told in tokens and rows."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from datasets import Dataset
from families import FAMILIES
from tiny_training import relative, stir
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.errors import UserError
from posttrain.training.packing import num_bins

LENGTHS = [23, 5, 1, 40, 12]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": None}
KINDS = ["Llama", "Qwen2", "Gemma2", "Gemma3 (text)", "Mistral", "SmolLM3"]  # windows, capped scores


def made(name, attention):
    class_name, special, *_ = FAMILIES[name]
    special = {key: value[:1] + value[-1:] if isinstance(value, list) else value for key, value in special.items()}
    config = getattr(transformers, class_name)(**(SIZES | {"hidden_size": 64, "intermediate_size": 128} | special))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name:
                parameter.mul_(4)  # or scores are near 0, and every mask gives about the same
    return model.eval()


def packed(rows):
    """In one row, as TRL packs them."""
    joined = {"input_ids": [token for row in rows for token in row], "seq_lengths": [len(row) for row in rows]}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([joined])
    del batch["labels"]
    return batch


def moved(model):
    """How far each row's logits are from what they are alone, in the largest of those."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 90, (length,), generator=draw).tolist() for length in LENGTHS]
    with torch.no_grad():
        together = model(**packed(rows), use_cache=False).logits[0].split(LENGTHS)
        apart = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]
    return [((one - other).abs().max() / other.abs().max()).item() for one, other in zip(together, apart, strict=True)]


CASES = [(name, kind) for name in KINDS for kind in ("varlen", "matmul", "sdpa", "eager") if name != "Gemma2" or kind == "eager"]


@pytest.mark.parametrize(("name", "attention"), CASES)  # Gemma2 loads as eager: SDPA caps no scores
def test_packed_rows_see_themselves_alone_in_every_family(name, attention):
    assert max(moved(made(name, attention))) < 1e-3


def test_upstream_lets_packed_rows_of_gpt_oss_see_one_another():
    """Its model makes its masks without the positions. Once it does not, check_packing has nothing to refuse there."""
    first, *others = moved(made("gpt-oss", "eager"))
    assert first < 1e-3 and min(others) > 0.1


def test_a_family_whose_packed_rows_see_one_another_is_refused(tiny, fp32):
    """As gpt-oss would be: with the mask of one long row."""
    with tiny.sft({"packing": True, "max_steps": 1}, **fp32) as trainer:
        model = trainer.model.get_base_model().model
        forward = model.forward
        model.forward = lambda *args, **kwargs: forward(*args, **kwargs | {"attention_mask": as_one(kwargs["input_ids"])})
        with pytest.raises(UserError, match="packed rows see one another: .* move by .* a label"):
            trainer.train()


def as_one(ids):
    """The causal mask of one long row."""
    tokens = ids.shape[1]
    return torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]


@pytest.mark.parametrize(
    ("lengths", "size", "bins"),
    [([5, 4, 3, 2], 7, 2), ([9, 9, 1], 9, 3), ([20, 1], 10, 2), ([1] * 10, 10, 1), ([6, 5, 4, 4], 10, 2)],
)
def test_rows_are_packed_as_trl_packs_them(lengths, size, bins):
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    assert num_bins(lengths, size) == bins == len(pack_dataset(rows, size))


def rows_of(batch):
    """The packed rows of a batch, as one padded batch."""
    ends = batch["cu_seq_lens_q"].tolist()
    spans = list(itertools.pairwise(ends))
    padded = {
        key: torch.nn.utils.rnn.pad_sequence([batch[key][0, a:b] for a, b in spans], batch_first=True, padding_value=fill)
        for key, fill in (("input_ids", 0), ("labels", -100))
    }
    lengths = torch.tensor([b - a for a, b in spans])
    return padded | {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}


def loss_and_gradient(trainer, batches, items):
    trainer.model.zero_grad()
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        loss.backward()
        losses.append(loss.item())
    return sum(losses), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["matmul", "varlen"])
def test_a_packed_step_is_the_step_of_the_same_rows(tiny, fp32, lean, checkpointing, attention):
    """Two packed micro-batches against their rows padded: the mean is over the labels of the whole step in both."""
    form = fp32 | {"model": fp32["model"] | {"attn_implementation": attention}, "lean_layers": lean}
    settings = {"packing": True, "per_device_train_batch_size": 2, "gradient_checkpointing": checkpointing}
    with tiny.sft(settings, **form) as trainer, tiny.sft({"gradient_checkpointing": False}, **fp32) as plain:
        for each in (trainer, plain):
            stir(each.model)
        loader = iter(trainer.get_train_dataloader())
        batches, items = trainer.get_batch_samples(loader, 2, torch.device("cpu"))
        assert all(batch["input_ids"].shape[0] == 1 and len(batch["cu_seq_lens_q"]) > 4 for batch in batches)
        assert items == sum((rows_of(batch)["labels"][:, 1:] != -100).sum() for batch in batches)
        loss, gradient = loss_and_gradient(trainer, batches, items)
        wanted, apart = loss_and_gradient(plain, [rows_of(batch) for batch in batches], items)
    assert loss == pytest.approx(wanted, abs=1e-5)
    assert relative(apart, gradient) < 1e-4


@pytest.mark.parametrize("lean", [False, True])
def test_packed_rows_train_over_packed_weights(tiny, lean):
    """NF4, bf16: a packed step rounds as the padded one does."""
    settings = {"packing": True, "per_device_train_batch_size": 2}
    with tiny.sft(settings, lean_layers=lean) as trainer, tiny.sft() as plain:
        for each in (trainer, plain):
            stir(each.model)
        batch = next(iter(trainer.get_train_dataloader()))
        items = (batch["labels"] != -100).sum()
        loss, gradient = loss_and_gradient(trainer, [batch], items)
        wanted, apart = loss_and_gradient(plain, [rows_of(batch)], items)
    assert loss == pytest.approx(wanted, abs=5e-3)
    assert relative(apart, gradient) < 0.1


def test_a_step_is_told_in_tokens_and_in_rows(tiny):
    settings = {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    with tiny.sft(settings) as trainer:
        seen = []
        compute = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, **kwargs: seen.append(inputs) or compute(model, inputs, **kwargs)
        trainer.train()
        first, second = (row for row in trainer.state.log_history if "loss" in row)
    sizes = [(len(batch["cu_seq_lens_q"]) - 1, batch["input_ids"].numel()) for batch in seen]
    for row, (one, two) in zip((first, second), (sizes[:2], sizes[2:]), strict=True):
        assert (row["update/rows"], row["update/tokens"]) == (one[0] + two[0], one[1] + two[1])


def test_padding_is_no_token_of_a_step(tiny):
    with tiny.sft({"per_device_train_batch_size": 4, "max_steps": 1}) as trainer:
        seen = []
        compute = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, **kwargs: seen.append(inputs) or compute(model, inputs, **kwargs)
        trainer.train()
        row = trainer.state.log_history[0]
    assert row["update/rows"] == 4 and row["update/tokens"] == seen[0]["attention_mask"].sum() < seen[0]["input_ids"].numel()

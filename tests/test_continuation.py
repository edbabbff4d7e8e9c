"""From the SFT adapter to GRPO: where it starts, the KL reference, and what a run leaves."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import FORMS, LORA, adapter_tensors, in_file, largest_difference, pay_tiny, plain_grpo

from posttrain.errors import UserError
from posttrain.models.adapters import adapter_sha256, count_trainable, live_adapter_sha256, load_adapter
from posttrain.training.checkpoints import save_adapter
from posttrain.training.masters import copy_to_reference


@pytest.mark.parametrize("form", FORMS)
def test_kl_is_zero_at_the_first_step(tiny, any_sft, form):
    with pay_tiny(tiny, any_sft, {"beta": 0.1, "max_steps": 3, "learning_rate": 1e-2}, quantization=form) as trainer:
        trainer.train()
        kls = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kls[0] == 0.0
    assert min(kls[1:]) > 0


def test_upstreams_reference_misses_trained_token_rows(tiny, load, sft_with_tokens, tokenizer, tmp_path):
    model = load_adapter(load("none"), sft_with_tokens / "adapter", trainable=True)
    trainer = plain_grpo(model, tokenizer, tiny, tmp_path, beta=0.1)
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    default, reference = (model.get_parameter(f"{name}.{adapter}") for adapter in ("default", "ref"))
    assert not torch.equal(default, reference), "TRL copies the rows now: copy_to_reference may go"
    assert reference.requires_grad, "PEFT freezes the rows of a second adapter now"
    copy_to_reference(trainer.model)
    assert torch.equal(default, reference)
    assert not reference.requires_grad


def test_the_reference_does_not_move_and_is_not_in_the_optimizer(tiny, sft_with_tokens):
    with pay_tiny(tiny, sft_with_tokens, {"beta": 0.1, "max_steps": 2, "learning_rate": 1e-2}) as trainer:
        before = adapter_tensors(trainer.model, "ref")
        trainer.train()
        assert largest_difference(before, adapter_tensors(trainer.model, "ref")) == 0
        assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before) == 29


def test_training_that_changes_nothing_is_a_failed_run(tiny, sft):
    with pay_tiny(tiny, sft, {"max_steps": 2}, reward=lambda ids: [1.0] * len(ids)) as trainer:
        trainer.train()
        with pytest.raises(
            UserError, match=r"left every adapter weight as it was: .* check trainer.learning_rate, trainer.warmup"
        ):
            save_adapter(trainer, trainer.run, trainer.processing_class, trainer.run.manifest["start_sha256"])


def test_a_finished_run_has_another_hash_and_names_its_parent(tiny, any_sft):
    with pay_tiny(tiny, any_sft, {"beta": 0.04}) as trainer:
        trainer.train()
        save_adapter(trainer, trainer.run, trainer.processing_class, trainer.run.manifest["start_sha256"])
        manifest = trainer.run.manifest
    folder = trainer.run.folder / "adapter"
    assert manifest["adapter_sha256"] == adapter_sha256(folder) == live_adapter_sha256(trainer.model)
    assert manifest["adapter_sha256"] != manifest["start_sha256"] == manifest["parent"]["adapter_sha256"]
    assert not (folder / "ref").exists()  # the reference is the parent, and the pushed folder holds one adapter
    assert manifest["train_seconds"] > 0


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_rescaled_grpo_starts_at_the_sft_policy(tiny, any_sft, form):
    """From alpha 8 to 4 at the same rank: the reproduction's 64 to 32."""
    shape = {"adapter_mode": "rescale", "lora": LORA | {"alpha": 4}, "quantization": form}
    with tiny.grpo(any_sft) as plain, pay_tiny(tiny, any_sft, {"beta": 0.1}, **shape) as trainer:
        assert trainer.model.peft_config["default"].lora_alpha == 4
        assert torch.equal(own_logits(trainer), own_logits(plain)) or form == "none"
        trainer.train()
        assert trainer.state.log_history[0]["kl"] == 0.0
        save_adapter(trainer, trainer.run, trainer.processing_class, trainer.run.manifest["start_sha256"])
    resaved = load_file(trainer.run.folder / "adapter/adapter_model.safetensors")
    name = next(name for name in resaved if "lora_B" in name)
    assert torch.allclose(resaved[name], 2 * in_file(any_sft)[name], atol=3e-3)


IDS = torch.tensor([[1, 300, 301, 2, 17, 2], [1, 2, 3, 4, 5, 6]])


@torch.no_grad()
def own_logits(trainer):
    with trainer.accelerator.autocast():
        return trainer.model.eval()(input_ids=IDS).logits.float()


def test_merged_and_new_grpo_starts_at_the_sft_policy(tiny, any_sft):
    """It does within bf16 rounding, and the KL holds it to exactly that start."""
    shape = {"adapter_mode": "merge_and_new", "lora": LORA | {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
    with tiny.grpo(any_sft) as plain, pay_tiny(tiny, any_sft, {"beta": 0.1}, **shape) as trainer:
        wanted = own_logits(plain)
        with plain.model.disable_adapter():
            effect = (own_logits(plain) - wanted).norm()
        assert (own_logits(trainer) - wanted).norm() < 0.02 * effect
        assert trainer.run.manifest["model"]["name_or_path"] == str(trainer.run.folder / "merged_base")
        trainer.train()
        assert trainer.state.log_history[0]["kl"] == 0.0
        assert count_trainable(trainer.model) == 2 * 2 * (64 + 64 + 64 + 32)  # two layers of rank 2, q 64 -> 64, v 64 -> 32

"""A resumed run equals an uninterrupted one."""

import pytest
import torch
from tiny_training import LORA, adapter_tensors, by_content, dtypes, in_file, largest_difference, opened, pay
from transformers import TrainerCallback

from posttrain.training.checkpoints import last_checkpoint
from posttrain.training.trainers import GRPO


class Interrupted(Exception):
    pass


class InterruptAfterSaving(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise Interrupted


def straight(config, tensors=adapter_tensors):
    with opened(config) as trainer:
        return trained(trainer, tensors=tensors)


def interrupted_and_resumed(config, tensors=adapter_tensors):
    with pytest.raises(Interrupted), opened(config) as trainer:
        trainer.add_callback(InterruptAfterSaving())
        trained(trainer, tensors=tensors)
    with opened(config, resume=True) as trainer:
        checkpoint = last_checkpoint(trainer.run, resume=True)
        assert checkpoint.endswith("checkpoint-2")
        result = trained(trainer, checkpoint, tensors)
        assert dtypes(trainer.model) == {torch.float32}
        return result


def trained(trainer, checkpoint=None, tensors=adapter_tensors):
    if isinstance(trainer, GRPO):
        pay(trainer, by_content)
    start = tensors(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint)
    end = tensors(trainer.model)
    assert largest_difference(start, end) > 1e-4
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return end, adapter_tensors(trainer.model, "ref"), losses


FOUR_STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_resumed_sft_equals_uninterrupted_sft(tiny, form):
    """That includes dropout, shuffling and the schedule."""
    lora = LORA | {"dropout": 0.1, "train_special_tokens": "always"}
    (one, _, losses), (two, _, again) = (
        how(tiny.sft_config(FOUR_STEPS, lora=lora, quantization=form)) for how in (straight, interrupted_and_resumed)
    )
    assert largest_difference(one, two) == 0
    assert losses == again
    assert len(losses) == 4


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_resumed_grpo_equals_uninterrupted_grpo(tiny, any_sft, form):
    """That includes rollouts and the KL reference, which is the SFT policy and not the checkpoint's."""
    (one, reference, losses), (two, reference_again, again) = (
        how(tiny.grpo_config(any_sft, FOUR_STEPS | {"beta": 0.05, "learning_rate": 1e-2}, quantization=form))
        for how in (straight, interrupted_and_resumed)
    )
    assert largest_difference(one, two) == 0
    assert losses == again
    assert largest_difference(reference, reference_again) == 0
    assert largest_difference(sorted_values(reference), sorted_values(in_file(any_sft))) == 0


def sorted_values(tensors):
    """Tensors sorted by kind and place, whatever their adapter is called."""
    parts = {
        n: [part for part in n.split(".") if part not in ("ref", "default", "token_adapter", "modules_to_save")] for n in tensors
    }
    return {".".join(parts[name]): tensor for name, tensor in tensors.items()}


def test_upstream_writes_trainer_state_last(tiny):
    """`last_checkpoint` takes that file for the sign of a complete checkpoint."""
    with tiny.sft(FOUR_STEPS | {"max_steps": 2}) as trainer:
        trainer.train()
        files = {
            file: file.stat().st_mtime_ns for file in trainer.run.folder.glob("checkpoints/checkpoint-2/*") if file.is_file()
        }
    assert max(files, key=files.get).name == "trainer_state.json"
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {file.name for file in files}

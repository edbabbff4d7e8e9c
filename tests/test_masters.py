"""Master weights: both trainers start from exactly the adapter that they were given, in fp32, and keep it so."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_training import (
    FORMS,
    LORA,
    GradientsBeforeStep,
    adapter_tensors,
    dtypes,
    in_file,
    largest_difference,
    pay_tiny,
    plain_grpo,
)
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, OPTConfig
from trl import SFTConfig, SFTTrainer

from posttrain.config.schema import Lora
from posttrain.models.adapters import adapter_sha256, count_trainable, live_adapter_sha256, load_adapter, new_adapter
from posttrain.records import Example, as_dataset, read_jsonl
from posttrain.training.grpo_trainer import GRPO
from posttrain.training.masters import train_once
from posttrain.training.sft_trainer import SFT

FP32 = {"dtype": "float32"}


@pytest.mark.parametrize("form", FORMS)
def test_sft_starts_from_the_adapter_it_was_given_bit_for_bit(tiny, load, tokenizer, form):
    given = adapter_tensors(new_adapter(load(form), Lora(**LORA), tokenizer, seed=0))
    with tiny.sft(quantization=form) as trainer:
        assert dtypes(trainer.model) == {torch.float32}
        assert largest_difference(adapter_tensors(trainer.model), given) == 0
        assert count_trainable(trainer.model) == 8192


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("form", FORMS)
def test_grpo_starts_from_the_sft_adapter_bit_for_bit(tiny, any_sft, form, beta):
    with tiny.grpo(any_sft, {"beta": beta}, quantization=form) as trainer:
        assert dtypes(trainer.model) == {torch.float32}
        assert live_adapter_sha256(trainer.model) == adapter_sha256(any_sft / "adapter") == trainer.run.manifest.start_sha256
        assert count_trainable(trainer.model) == sum(tensor.numel() for tensor in in_file(any_sft).values()) > 0


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_gradients_and_optimizer_state_are_fp32_over_nf4(tiny, sft, stage):
    with tiny.sft() if stage == "sft" else pay_tiny(tiny, sft) as trainer:
        seen = GradientsBeforeStep()
        trainer.add_callback(seen)
        trainer.train()
        state = [tensor for entry in trainer.optimizer.state.values() for tensor in entry.values() if tensor.dim()]
    assert len(state) == 2 * len(seen.of[0])  # both moments of every tensor
    assert {tensor.dtype for tensor in state} == {torch.float32}
    assert {grad.dtype for grad in seen.of[0].values()} == {torch.float32}


def plain_sft(model, tokenizer, tiny, folder, trainer_class=SFTTrainer):
    """A trainer as TRL's documentation sets it up."""
    args = SFTConfig(output_dir=str(folder), bf16=True, use_cpu=True, report_to=[])
    data = as_dataset(read_jsonl(f"{tiny.data}/train.jsonl", Example), ("prompt", "completion"))
    return trainer_class(model=model, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_upstream_casts_the_adapter_of_a_quantized_model_to_bf16(tiny, load, tokenizer, tmp_path, stage):
    model = new_adapter(load("nf4"), Lora(**LORA), tokenizer, seed=0)
    assert dtypes(model) == {torch.float32}
    {"sft": plain_sft, "grpo": plain_grpo}[stage](model, tokenizer, tiny, tmp_path)
    assert dtypes(model) == {torch.bfloat16}, "TRL keeps fp32 now: MasterWeights may go"


def test_a_frozen_adapter_is_refused(tiny, load, sft, tokenizer, tmp_path):
    frozen = load_adapter(load("nf4"), sft / "adapter", trainable=False)
    with pytest.raises(AssertionError, match=r"no trainable parameter: load the adapter with trainable=True"):
        plain_sft(frozen, tokenizer, tiny, tmp_path, SFT)
    with pytest.raises(AssertionError, match="no trainable parameter"):
        plain_grpo(frozen, tokenizer, tiny, tmp_path, GRPO)


def test_upstream_says_nothing_about_a_frozen_adapter(tiny, load, sft, tokenizer, tmp_path):
    trainer = plain_grpo(load_adapter(load("nf4"), sft / "adapter", trainable=False), tokenizer, tiny, tmp_path)
    assert count_trainable(trainer.model) == 0


def test_a_model_is_brought_into_a_mode_when_its_layers_are_not_in_it(tiny, monkeypatch):
    """As it is loaded, the base evaluates below an adapter that trains."""
    with tiny.sft() as trainer:
        model = trainer.model
        visits = []
        train = type(model).train
        monkeypatch.setattr(type(model), "train", lambda self, mode=True: visits.append(mode) or train(self, mode))
        model.get_base_model().eval()
        for mode in (True, True, False, False, True):
            assert model.train(mode) is model
            assert {module.training for module in model.modules()} == {mode}
    assert visits == [True, False, True]


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, eos_token_id=1, bos_token_id=1), "c_attn"),
        (OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, vocab_size=9), "q_proj"),
        (FalconConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9), "query_key_value"),
    ],
    ids=["gpt2", "opt", "falcon"],
)
def test_a_model_that_calls_its_layers_otherwise_is_brought_into_a_mode(config, target):
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(target_modules=[target]))
    model.get_base_model().eval()
    for mode in (True, False, True):
        assert train_once(model, mode) is model
        assert {module.training for module in model.modules()} == {mode}

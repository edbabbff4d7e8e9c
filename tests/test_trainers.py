"""What the two trainers really do: precision, continuation, loss and advantages; and what upstream does where ours differs.

A test named `test_upstream_...` holds a behaviour of TRL, PEFT or transformers that an override in posttrain/training/trainers.py
answers to. When one fails after an upgrade, the override may have become unnecessary, or may have to change.
"""

import copy
import shutil

import pytest
import torch
import trl.trainer.utils
from safetensors.torch import load_file
from tiny_training import LORA, Tiny, adapter_tensors, by_content, liven, opened, pay, scored
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from posttrain.config.schema import Lora, Model
from posttrain.errors import UserError
from posttrain.models.adapters import adapter_sha256, count_trainable, live_adapter_sha256, load_adapter, new_adapter
from posttrain.models.base import load_base
from posttrain.models.chat import chat_ids, load_tokenizer
from posttrain.records import Example, as_dataset, read_jsonl
from posttrain.training import label_head, trainers
from posttrain.training.batches import by_length, groups_without_signal, keep_rows, rows_with_signal, trim
from posttrain.training.checkpoints import last_checkpoint, save_adapter
from posttrain.training.label_head import LabelHead
from posttrain.training.masters import copy_to_reference
from posttrain.training.shared_prompts import SharedPrompts
from posttrain.training.trainers import GRPO, SFT

FP32 = {"dtype": "float32"}
FORMS = ("nf4", "nf4_unpacked", "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tiny(tiny_model_dir, tiny_data_dir, folder):
    return Tiny(tiny_model_dir, tiny_data_dir, folder)


@pytest.fixture(scope="module")
def fp32(tiny, tiny_model_dir):
    """Settings of a run in which equal means equal."""
    return {"model": {"name_or_path": str(tiny_model_dir)} | FP32, "quantization": "none"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(Model(name_or_path=str(tiny_model_dir)))


@pytest.fixture(scope="module")
def base(tiny_model_dir, tokenizer):
    def base(form="none", **changes):
        return load_base(Model(name_or_path=str(tiny_model_dir), **changes), form, tokenizer)

    return base


def finished_sft(tiny, **settings):
    """The run directory of an SFT that has moved its adapter a good way."""
    with tiny.sft({"max_steps": 3, "learning_rate": 1e-2}, **settings) as trainer:
        trainer.train()
        save_adapter(trainer, trainer.run, trainer.processing_class, "")
        return trainer.run.folder


@pytest.fixture(scope="module")
def sft(tiny):
    return finished_sft(tiny)


@pytest.fixture(scope="module")
def sft_with_tokens(tiny):
    return finished_sft(tiny, lora=LORA | {"train_special_tokens": "always"})


@pytest.fixture(params=["plain", "with token rows"])
def any_sft(request, sft, sft_with_tokens):
    return sft if request.param == "plain" else sft_with_tokens


def in_file(run):
    return load_file(run / "adapter/adapter_model.safetensors")


def largest_difference(one, two):
    assert one.keys() == two.keys()
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)


def stir(model, seed=0, std=0.1, part="default"):
    """Move the policy away from where it is."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if part in name.split(".") and ("lora_B" in name or "trainable_tokens_delta" in name):
            parameter.data += std * torch.randn(parameter.shape, generator=generator)


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


# --- master weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_sft_starts_from_the_adapter_it_was_given_bit_for_bit(tiny, base, tokenizer, form):
    given = adapter_tensors(new_adapter(base(form), Lora(**LORA), tokenizer, seed=0))
    with tiny.sft(quantization=form) as trainer:
        assert dtypes(trainer.model) == {torch.float32}
        assert largest_difference(adapter_tensors(trainer.model), given) == 0
        assert count_trainable(trainer.model) == 8192


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("form", FORMS)
def test_grpo_starts_from_the_sft_adapter_bit_for_bit(tiny, any_sft, form, beta):
    with tiny.grpo(any_sft, {"beta": beta}, quantization=form) as trainer:
        assert dtypes(trainer.model) == {torch.float32}
        assert live_adapter_sha256(trainer.model) == adapter_sha256(any_sft / "adapter") == trainer.run.manifest["start_sha256"]
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


def plain_grpo(model, tokenizer, tiny, folder, trainer_class=GRPOTrainer, **settings):
    def nothing(completions, **_):
        return [0.0] * len(completions)

    sizes = {"max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 4}
    args = GRPOConfig(output_dir=str(folder), bf16=True, use_cpu=True, report_to=[], **sizes, **settings)
    data = as_dataset(read_jsonl(f"{tiny.data}/train.jsonl", Example), ("prompt", "answer"))
    return trainer_class(model=model, args=args, reward_funcs=[nothing], train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_upstream_casts_the_adapter_of_a_quantized_model_to_bf16(tiny, base, tokenizer, tmp_path, stage):
    model = new_adapter(base("nf4"), Lora(**LORA), tokenizer, seed=0)
    assert dtypes(model) == {torch.float32}
    {"sft": plain_sft, "grpo": plain_grpo}[stage](model, tokenizer, tiny, tmp_path)
    assert dtypes(model) == {torch.bfloat16}, "TRL keeps fp32 now: MasterWeights may go"


def test_a_frozen_adapter_is_refused(tiny, base, sft, tokenizer, tmp_path):
    frozen = load_adapter(base("nf4"), sft / "adapter", trainable=False)
    with pytest.raises(AssertionError, match=r"no trainable parameter: load the adapter with trainable=True"):
        plain_sft(frozen, tokenizer, tiny, tmp_path, SFT)
    with pytest.raises(AssertionError, match="no trainable parameter"):
        plain_grpo(frozen, tokenizer, tiny, tmp_path, GRPO)


def test_upstream_says_nothing_about_a_frozen_adapter(tiny, base, sft, tokenizer, tmp_path):
    trainer = plain_grpo(load_adapter(base("nf4"), sft / "adapter", trainable=False), tokenizer, tiny, tmp_path)
    assert count_trainable(trainer.model) == 0


# --- resumed ----------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class InterruptAfterSaving(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise Interrupted


def straight(config):
    with opened(config) as trainer:
        return trained(trainer)


def interrupted_and_resumed(config):
    with pytest.raises(Interrupted), opened(config) as trainer:
        trainer.add_callback(InterruptAfterSaving())
        trained(trainer)
    with opened(config, resume=True) as trainer:
        checkpoint = last_checkpoint(trainer.run, resume=True)
        assert checkpoint.endswith("checkpoint-2")
        result = trained(trainer, checkpoint)
        assert dtypes(trainer.model) == {torch.float32}
        return result


def trained(trainer, checkpoint=None):
    if isinstance(trainer, GRPO):
        pay(trainer, by_content)
    start = adapter_tensors(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint)
    end = adapter_tensors(trainer.model)
    assert largest_difference(start, end) > 1e-4
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return end, adapter_tensors(trainer.model, "ref"), losses


FOUR_STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_resumed_sft_equals_uninterrupted_sft(tiny, form):
    """Dropout, shuffling and the schedule included."""
    lora = LORA | {"dropout": 0.1, "train_special_tokens": "always"}
    (one, _, losses), (two, _, again) = (
        how(tiny.sft_config(FOUR_STEPS, lora=lora, quantization=form)) for how in (straight, interrupted_and_resumed)
    )
    assert largest_difference(one, two) == 0
    assert losses == again
    assert len(losses) == 4


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_resumed_grpo_equals_uninterrupted_grpo(tiny, any_sft, form):
    """Its rollouts and its KL reference, which is the SFT policy and not the checkpoint's, included."""
    (one, reference, losses), (two, reference_again, again) = (
        how(tiny.grpo_config(any_sft, FOUR_STEPS | {"beta": 0.05, "learning_rate": 1e-2}, quantization=form))
        for how in (straight, interrupted_and_resumed)
    )
    assert largest_difference(one, two) == 0
    assert losses == again
    assert largest_difference(reference, reference_again) == 0
    assert largest_difference(sorted_values(reference), sorted_values(in_file(any_sft))) == 0


def sorted_values(tensors):
    """By what a tensor is and where, whatever its adapter is called."""
    parts = {
        n: [part for part in n.split(".") if part not in ("ref", "default", "token_adapter", "modules_to_save")] for n in tensors
    }
    return {".".join(parts[name]): tensor for name, tensor in tensors.items()}


def test_upstream_writes_trainer_state_last(tiny):
    """What `last_checkpoint` takes for the sign of a complete checkpoint."""
    with tiny.sft(FOUR_STEPS | {"max_steps": 2}) as trainer:
        trainer.train()
        files = {
            file: file.stat().st_mtime_ns for file in trainer.run.folder.glob("checkpoints/checkpoint-2/*") if file.is_file()
        }
    assert max(files, key=files.get).name == "trainer_state.json"
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {file.name for file in files}


# --- continuation and the KL reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_kl_is_zero_at_the_first_step(tiny, any_sft, form):
    with pay_tiny(tiny, any_sft, {"beta": 0.1, "max_steps": 3, "learning_rate": 1e-2}, quantization=form) as trainer:
        trainer.train()
        kls = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kls[0] == 0.0
    assert min(kls[1:]) > 0


def pay_tiny(tiny, adapter, trainer=(), reward=by_content, **settings):
    """A GRPO trainer whose completions are paid by what they hold."""
    return paid(tiny.grpo(adapter, trainer, **settings), reward)


class paid:
    def __init__(self, manager, reward):
        self.manager, self.reward = manager, reward

    def __enter__(self):
        return pay(self.manager.__enter__(), self.reward)

    def __exit__(self, *error):
        return self.manager.__exit__(*error)


def test_upstreams_reference_misses_trained_token_rows(tiny, base, sft_with_tokens, tokenizer, tmp_path):
    model = load_adapter(base("none"), sft_with_tokens / "adapter", trainable=True)
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
    assert not (folder / "ref").exists()  # the reference is the parent: what is pushed holds one adapter
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
    """Within bf16 rounding; what it is held to by the KL is that very start."""
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


# --- SFT: what is learnt from -----------------------------------------------------------------------------------------


def test_labels_are_the_completion_with_its_end_token_and_nothing_else(tiny, tokenizer):
    examples = {example.completion[0]["content"]: example for example in read_jsonl(f"{tiny.data}/train.jsonl", Example)}
    with tiny.sft({"per_device_train_batch_size": 44}) as trainer:
        batch = next(iter(trainer.get_train_dataloader()))
    seen = set()
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        learnt = labels != -100
        text = tokenizer.decode(ids[learnt])
        content = text.removesuffix("<|im_end|>\n")  # the line break is the template's own, behind every turn
        assert content != text
        prompt = chat_ids(tokenizer, examples[content].prompt, add_generation_prompt=True)
        assert ids[: len(prompt)].tolist() == prompt
        assert not learnt[: len(prompt)].any()
        assert learnt.tolist() == [False] * len(prompt) + [True] * int(mask.sum() - len(prompt)) + [False] * int((1 - mask).sum())
        assert torch.equal(labels[learnt], ids[learnt])
        seen.add(content)
    assert seen == {*examples}


class GradientsBeforeStep(TrainerCallback):
    """Copies of the gradients of every optimizer step, before clipping would scale them (it is off in these tests)."""

    def __init__(self):
        self.of = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.of.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def first_step(manager):
    with manager as trainer:
        stir(trainer.model)
        seen = GradientsBeforeStep()
        trainer.add_callback(seen)
        trainer.train()
        return trainer.state.log_history[0]["loss"], seen.of[0]


def relative(one, two):
    """Norm of the difference of two gradients, in norms of the first."""
    assert one.keys() == two.keys()
    difference, size = (
        torch.cat([t.flatten() for t in tensors]).norm() for tensors in ([one[n] - two[n] for n in one], one.values())
    )
    return float(difference / size)


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
    """Two questions in one row of 512 tokens score as they do apart, though SDPA is told of no borders but the positions."""
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


# --- the output head --------------------------------------------------------------------------------------------------


def two_heads(base, tokenizer, temperature, dtype):
    """The same policy with TRL's head, and with ours laid over it."""
    theirs = new_adapter(liven(base(dtype=dtype)), Lora(**LORA), tokenizer, seed=0)
    stir(theirs)
    add_fused_lm_head(theirs.get_base_model(), temperature=temperature, outputs=("log_probs", "entropy", "is_top1"))
    ours = copy.deepcopy(theirs)  # a deep copy's bound forward would still be the original's
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
def test_our_head_scores_as_trls_does(base, tokenizer, temperature, dtype, tolerance):
    batch = labelled_batch()
    (theirs, gradient), (ours, our_gradient) = (
        scores_and_gradient(policy, batch) for policy in two_heads(base, tokenizer, temperature, dtype)
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
def test_our_heads_scores_are_arithmetic(base, tokenizer, temperature):
    """Against log_softmax of the logits, in double precision."""
    batch = labelled_batch()
    _, policy = two_heads(base, tokenizer, temperature, "float32")
    with torch.no_grad():
        out = policy(**batch, fused_lm_head=True)
        scores = (policy(input_ids=batch["input_ids"]).logits[:, :-1].double() / temperature).log_softmax(-1)
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    assert torch.allclose(out.log_probs[mask].double(), scores[mask].gather(1, labels[mask][:, None]).squeeze(1), atol=1e-4)
    assert torch.allclose(out.entropy[mask].double(), -(scores.exp() * scores).sum(-1)[mask], atol=1e-4)
    assert torch.equal(out.is_top1[mask].bool(), scores.argmax(-1)[mask] == labels[mask])
    assert out.loss.item() == pytest.approx(-out.log_probs.sum().item() / int(mask.sum()), rel=1e-6)


def test_a_batch_without_labels_has_a_loss_of_zero_and_no_gradient(base, tokenizer):
    _, policy = two_heads(base, tokenizer, 1.0, "float32")
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


def test_groups_without_signal_are_those_of_equal_reward():
    scores = torch.tensor([[1.0, 0.2], [1.0, 0.2], [1.0, 0.0], [0.0, 0.0], [0.2, 1.0], [0.2 + 1e-8, 1.0]])
    assert groups_without_signal(scores, torch.tensor([1.0, 1.0]), 2) == pytest.approx(2 / 3)
    assert groups_without_signal(scores, torch.tensor([0.0, 0.0]), 3) == 1.0


def ragged(inputs, lengths):
    """The batch with completions of these lengths, padded on the right as TRL pads them."""
    inputs = dict(inputs)
    width = inputs["completion_ids"].shape[1]
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    inputs["completion_ids"] = inputs["completion_ids"].masked_fill(mask == 0, 0)
    inputs["completion_mask"], inputs["num_items_in_batch"] = mask, mask.sum()
    return inputs


LENGTHS = [5, 9, 1, 3, 7, 2, 9, 4]  # of at most 12


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


def distance_to_reference(trainer):
    inputs = scored(trainer)
    difference = inputs["ref_per_token_logps"] - completion_logps(trainer.model, inputs, 0.8)
    return difference[inputs["completion_mask"].bool()].abs().max()


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


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


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo"])
def test_leaving_out_rows_without_signal_keeps_the_gradient(tiny, sft, fp32, loss_type):
    settings = {"beta": 0.0, "loss_type": loss_type, "scale_rewards": "none"}
    skipping = {"rollouts": {"skip_zero_signal": True}}
    with pay_tiny(tiny, sft, settings, **fp32) as whole, pay_tiny(tiny, sft, settings, **fp32, **skipping) as fewer:
        inputs = ragged(scored(whole), LENGTHS)
        inputs["advantages"] = torch.tensor([0.5, 0.0, 0.0, -0.5, 1e-8, 0.0, 0.0, 1.0])
        scored(fewer)
        seen = []
        handle = fewer.model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape))
        (loss, gradient), (fewer_loss, fewer_gradient) = loss_and_gradient(whole, inputs), loss_and_gradient(fewer, inputs)
        handle.remove()
    prompts = inputs["prompt_mask"][[0, 3, 7]].sum(1).max()
    assert seen == [(3, prompts + 5)]  # the rows with signal, cut to the longest of them
    assert max(grad.abs().max() for grad in gradient.values()) > 1e-5
    assert relative(gradient, fewer_gradient) < 1e-5
    if loss_type not in ("cispo", "sapo"):  # these have a value also where they have no gradient
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
    """Against TRL's own loss of the batch as it came."""
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
        monkeypatch.setattr("posttrain.training.trainers.by_length", sort)
        widths.append([])
        manager = tiny.grpo(sft, split | {"loss_type": loss_type, "beta": 0.1}, **fp32)
        results.append(first_step(Ragged(manager, by_content)))
    assert relative(results[0][1], results[1][1]) < 1e-5
    assert widths[0] == sorted(widths[0], reverse=True) and sum(widths[0]) < sum(widths[1])


class OwnPrompts:
    """In the place of SharedPrompts: every row is run whole."""

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
        monkeypatch.setattr("posttrain.training.trainers.SharedPrompts", prompts)
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
    if rows == 1:  # one prompt a micro-batch at most: none is held, and none shared
        assert seen[0] == seen[1]
    elif not skip:
        assert seen == [2 * [2, *[rows] * (8 // rows)], 2 * [rows] * (8 // rows)]


@pytest.mark.parametrize(("size", "at_once"), [(1, 1), (3, 1), (8, 1), (None, 1), (1, 4), (3, 4)])
def test_the_reference_is_scored_in_parts_by_length_and_put_back_in_order(tiny, sft, fp32, monkeypatch, size, at_once):
    monkeypatch.setitem(trainers.SCORED_AT_ONCE, "cpu", at_once)
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
        seen = []
        hook = trainer.model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape))
        loss, gradient = loss_and_gradient(trainer, inputs)
        logps = trainer._last_logps
        hook.remove()
        monkeypatch.setattr("posttrain.training.trainers.SharedPrompts", OwnPrompts)
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
        seen = []
        trainer.model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape))
        trainer.compute_loss(trainer.model, dict(inputs))
        trainer.args.gradient_checkpointing = False
        trainer.compute_loss(trainer.model, keep_rows(inputs, torch.tensor([0, 4])))
    assert seen == [(8, width + 9), (2, width + 7)]


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
    # Left to itself it fills the memory of the machine.
    "transformers_continuous_batching_config": {"page_size": 64, "num_blocks": 8, "max_batch_tokens": 1024},
}


def test_trls_continuous_batching_is_refused(tiny, sft):
    with pytest.raises(UserError, match=r"casts the trained weights to bf16: use rollouts.engine=continuous_batching"):
        tiny.grpo(sft, CONTINUOUS, rollouts={"engine": "trl"}).__enter__()


def test_upstreams_continuous_batching_casts_the_trained_model(tiny, base, sft, tokenizer, tmp_path):
    model = load_adapter(base("none", attn_implementation="sdpa"), sft / "adapter", trainable=True)
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
    """Of completions that nearly all ran to the limit, none does after 60 steps."""
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

"""What a run watches, writes and refuses: rows, moved weights, non-finite numbers, dev accuracy, samples, checkpoints."""

import copy
import functools
import json
import math
import re
import shutil

import pytest
import torch
from conftest import ROOT
from scripts import retell
from tiny_training import LORA, adapter_tensors, by_content, opened, pay
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from posttrain.config.schema import Lora, Model
from posttrain.errors import UserError
from posttrain.evaluation.stats import wilson
from posttrain.generation import steps
from posttrain.models.adapters import new_adapter
from posttrain.models.base import load_base
from posttrain.models.chat import chat_ids, load_tokenizer
from posttrain.records import Example, as_dataset, read_jsonl, read_rows, sha256_text
from posttrain.runs.data_sets import read_data_manifest
from posttrain.training import callbacks
from posttrain.training.arguments import trainer_arguments
from posttrain.training.callbacks import MovedShare, StopOnNonFinite, add_callbacks
from posttrain.training.checkpoints import last_checkpoint
from posttrain.training.dev import DevAccuracy, dev_accuracy
from posttrain.training.examples import load_examples
from rewards import correctness_reward, extract, grade


def rows_of(trainer):
    return list(read_rows(trainer.run.folder / "metrics.jsonl"))


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_every_logged_row_is_written_with_its_step_and_time(tiny):
    with tiny.sft({"max_steps": 3}) as trainer:
        trainer.train()
        logged = [{k: v for k, v in row.items() if k != "total_flos"} for row in trainer.state.log_history]
        written = rows_of(trainer)
    assert [{k: v for k, v in row.items() if k != "time"} for row in written] == logged
    assert [row["step"] for row in written] == [1, 2, 3, 3]
    assert written[0]["time"] <= written[-1]["time"]
    assert {"loss", "grad_norm", "learning_rate", "lora_moved_share", "mean_token_accuracy"} <= written[0].keys()


GRPO_KEYS = {
    "loss", "grad_norm", "learning_rate", "lora_moved_share", "kl", "entropy", "reward", "reward_std", "frac_reward_zero_std",
    "frac_groups_without_signal", "completions/mean_length", "completions/clipped_ratio", "rewards/correctness_reward/mean",
    "rewards/format_reward/mean", "num_markers", "rollout/logp_difference", "rollout/tokens_per_second",
}  # fmt: skip


def test_grpo_writes_the_signals_one_watches(tiny, sft):
    with tiny.grpo(sft, {"beta": 0.04}) as trainer:
        trainer.train()
        assert rows_of(trainer)[0].keys() >= GRPO_KEYS


def test_the_phases_of_a_step_are_the_step(tiny, sft):
    with tiny.grpo(sft, {"beta": 0.04, "max_steps": 3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1}) as trainer:
        trainer.train()
        rows = [row for row in rows_of(trainer) if "time/decode" in row]
    assert ["time/save" in row for row in rows] == [
        False,
        True,
        True,
    ]  # a step logs its row before it saves
    phases = [{key for key in row if key.startswith("time/") and key != "time/rollout_seconds"} for row in rows]
    parts = "data fold prefill decode rewards logprobs forward backward optimizer"
    assert all({f"time/{name}" for name in parts.split()} <= names for names in phases)
    for (
        row
    ) in rows:  # that phases add up to the whole is in test_phases, by a clock of its own: a busy machine stops between marks
        assert 0 < row["time/fold"] + row["time/prefill"] + row["time/decode"] <= row["time/rollout_seconds"]
        assert 0 < row["rollout/useful_slots"] <= 1 and 0 < row["update/useful_slots"] <= 1


def test_docs_define_every_logged_key(tiny, sft):
    dev = {"data": {"path": tiny.data, "num_dev": 2}}
    keys = set()
    for manager in (
        tiny.sft({"eval_strategy": "steps", "eval_steps": 1, "max_length": 160}, fast_loss=False, **dev),
        tiny.grpo(sft, {"beta": 0.04}, **dev),
    ):
        with manager as trainer:
            trainer.train()
            keys |= {key for row in rows_of(trainer) for key in row}
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    names = {re.sub(r"rewards/\w+/", "rewards/<name>/", key) for key in keys if not key.startswith("eval_")}
    assert len(names) > 40
    assert {name for name in names if f"`{name}`" not in text} == set()


# --- the share of weights that moved ----------------------------------------------------------------------------------


def share_of_one_step(dtype, learning_rate):
    """AdamW's first step moves every entry by the learning rate."""
    weight = torch.nn.Parameter(torch.linspace(-0.1, 0.1, 1001).to(dtype))
    optimizer = torch.optim.AdamW([weight], lr=learning_rate, weight_decay=0.0)
    reported = []
    watch = MovedShare(lambda key, value: reported.append((key, value)))
    args, state = TrainingArguments(output_dir="x", logging_steps=1, use_cpu=True), type("State", (), {"global_step": 0})()
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    watch.on_pre_optimizer_step(args, state, None, optimizer)
    optimizer.step()
    watch.on_optimizer_step(args, state, None, optimizer)
    ((key, share),) = reported
    assert key == "lora_moved_share"
    assert share == int((weight != before).sum()) / weight.numel()
    return share


def test_the_moved_share_is_one_in_fp32_and_less_in_bf16_at_small_steps():
    assert [share_of_one_step(torch.float32, rate) for rate in (1e-4, 3e-5, 1e-6)] == pytest.approx([1.0] * 3, abs=0.005)
    in_bf16 = [share_of_one_step(torch.bfloat16, rate) for rate in (1e-2, 1e-4, 3e-5, 1e-6)]
    assert in_bf16 == sorted(in_bf16, reverse=True)
    assert in_bf16[0] > 0.99
    # A step moves |w| below lr * 2^8 to 2^9: half the spacing of bf16 is |w| * 2^-8 to 2^-9.
    assert 3e-5 * 2**8 / 0.1 * 0.9 < in_bf16[2] < 3e-5 * 2**9 / 0.1 * 1.1
    assert in_bf16[3] < 0.01


def test_a_run_logs_one_in_fp32_over_nf4(tiny):
    with tiny.sft({"max_steps": 3, "learning_rate": 1e-5}) as trainer:
        trainer.train()
        shares = [row["lora_moved_share"] for row in rows_of(trainer) if "lora_moved_share" in row]
    assert shares[0] == pytest.approx(0.5, abs=0.01)  # B is 0 at first, so A, half of the entries, has no gradient yet
    assert all(share > 0.99 for share in shares[1:])


def test_upstreams_bf16_adapter_stands_still_at_that_rate(tiny, tiny_model_dir, tmp_path):
    settings = Model(name_or_path=str(tiny_model_dir))
    tokenizer = load_tokenizer(settings)
    model = new_adapter(load_base(settings, "nf4", tokenizer), Lora(**LORA), tokenizer, seed=0)
    args = SFTConfig(
        output_dir=str(tmp_path), bf16=True, use_cpu=True, report_to=[], max_steps=3, learning_rate=1e-5, logging_steps=1
    )
    data = as_dataset(read_jsonl(f"{tiny.data}/train.jsonl", Example), ("prompt", "completion"))
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    shares = []
    trainer.add_callback(MovedShare(lambda _, value: shares.append(value)))
    first = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    trainer.train()
    assert shares[-1] < 0.9
    moved = sum(int((model.get_parameter(name) != value).sum()) for name, value in first.items())
    assert moved / sum(value.numel() for value in first.values()) < 0.2


def test_the_share_is_measured_at_logged_steps_alone(tiny):
    with tiny.sft({"max_steps": 4, "logging_steps": 2}) as trainer:
        kept = []
        watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, MovedShare))
        trainer.add_callback(Look(lambda: kept.append(watch.before is not None)))
        trainer.train()
    assert kept == [False, True, False, True]


class MadeTensors(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes, in memory that was not there before."""

    def __init__(self, *there):
        super().__init__()
        self.known, self.largest = {tensor.untyped_storage().data_ptr() for tensor in there}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, made.numel() * made.element_size())
        return made


def test_the_share_is_counted_in_the_memory_of_one_copy(monkeypatch):
    """At the end of a step lie the checkpoints of all layers, and between two copies torch counts in eight bytes an entry."""
    monkeypatch.setattr(callbacks, "COUNTED_AT_ONCE", 64)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((20, 30), (7,), (500,))]
    weights[0].data[3, :5] = 0
    optimizer, reported = torch.optim.SGD(weights), []
    args, state = TrainingArguments(output_dir="x", logging_steps=1, use_cpu=True), type("State", (), {"global_step": 0})()
    watch = MovedShare(lambda _, value: reported.append(value))
    watch.on_pre_optimizer_step(args, state, None, optimizer)
    weights[0].data[3, :5] = 1e-40  # as little as fp32 knows
    weights[2].data[::2] *= 2
    with MadeTensors(*weights, watch.before) as made:
        watch.on_optimizer_step(args, state, None, optimizer)
    assert reported == [255 / 1107]
    assert 0 < made.largest <= 64 * 8


class Look(TrainerCallback):
    """Calls a function before every optimizer step, after the other callbacks."""

    def __init__(self, look):
        self.look = look

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.look()


# --- numbers that are not finite --------------------------------------------------------------------------------------


class PoisonGradient(TrainerCallback):
    """From the given step on, one entry of one gradient is `value`."""

    def __init__(self, value, step):
        self.value, self.step = value, step

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.step:
            parameter = next(p for n, p in model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in n)
            parameter.register_hook(self.poison)
        self.weights = adapter_tensors(model)

    def poison(self, grad):
        grad = grad.clone()
        grad[0, 0] = self.value
        return grad


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_no_number_stops_the_run_before_the_step(tiny, value, clip):
    with tiny.sft({"max_steps": 4, "max_grad_norm": clip, "gradient_accumulation_steps": 2}) as trainer:
        poison = PoisonGradient(value, step=3)
        trainer.add_callback(poison)
        with pytest.raises(FloatingPointError, match=r"non-finite gradient at step 3, not applied.*learning_rate"):
            trainer.train()
        assert trainer.state.global_step == 2
        for name, tensor in adapter_tensors(trainer.model).items():
            assert torch.equal(tensor, poison.weights[name]), name


def test_upstream_applies_a_gradient_that_is_no_number_and_logs_nothing(tiny):
    """transformers turns `logging_nan_inf_filter` on. posttrain turns it off and stops the run first."""
    assert TrainingArguments(output_dir="x", use_cpu=True).logging_nan_inf_filter
    with tiny.sft({"max_steps": 1}) as trainer:
        assert not trainer.args.logging_nan_inf_filter
        trainer.remove_callback(StopOnNonFinite)
        trainer.add_callback(PoisonGradient(math.nan, step=1))
        trainer.train()
        assert any(tensor.isnan().any() for tensor in adapter_tensors(trainer.model).values())


@pytest.mark.parametrize("key", ["loss", "reward", "kl", "grad_norm"])
def test_a_logged_number_that_is_none_stops_the_run(tiny, key):
    with tiny.sft() as trainer:
        trainer.log({key: 1.0})
        with pytest.raises(FloatingPointError, match=rf"{key} is nan at step 0: the run stops here"):
            trainer.log({key: math.nan})


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_its_batch(tiny, sft, stage):
    """An infinite weight of the frozen base, as in a broken download, is the cause."""
    with tiny.sft(quantization="none") if stage == "sft" else tiny.grpo(sft, quantization="none") as trainer:
        before = adapter_tensors(trainer.model)
        trainer.add_callback(BreakBase())
        with pytest.raises(FloatingPointError, match=r"loss is nan at step 1, in the batch that begins with 'user\\n\w+ has \d+"):
            trainer.train()
        for name, tensor in adapter_tensors(trainer.model).items():
            assert torch.equal(tensor, before[name])


class BreakBase(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.data[0, 0] = math.nan


# --- dev accuracy -----------------------------------------------------------------------------------------------------


def with_dev(tiny, num_dev=6):
    return {"data": {"path": tiny.data, "num_dev": num_dev}}


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_dev_rows_come_before_between_and_after_and_take_no_other_row_s_place(tiny, sft, stage, every):
    settings = with_dev(tiny) | {"dev_every_steps": every}
    trainer_settings = {"max_steps": 4, "max_length": 160}
    manager = tiny.sft(trainer_settings, **settings) if stage == "sft" else tiny.grpo(sft, {"max_steps": 4}, **settings)
    with manager as trainer:
        trainer.train()
        rows = rows_of(trainer)
    dev = [row for row in rows if "dev/accuracy" in row]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in dev] == ([0, 2, 4] if every else [0, 4])
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert len({frozenset(row) - {"time/dev"} for row in steps}) == 1  # the same keys in every row
    assert ["time/dev" in row for row in steps] == [row["step"] - 1 in {d["step"] for d in dev} for row in steps]
    assert {key for row in dev for key in row if not key.startswith("dev/")} == {"step", "time", "epoch"}
    assert {"lora_moved_share"} <= steps[0].keys()


def test_a_dev_row_between_two_training_rows_takes_nothing_from_the_second(tiny):
    """With a training row every other step and a dev row every step."""

    def training_rows(**settings):
        with tiny.sft({"max_steps": 4, "logging_steps": 2, "max_length": 160}, **settings) as trainer:
            trainer.train()
            rows = rows_of(trainer)
        times = ("time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
        dev = [row for row in rows if "dev/accuracy" in row]
        clock = {key for row in rows for key in row if key.startswith("time/")}.union(times)
        return [{k: v for k, v in row.items() if k not in clock} for row in rows if row not in dev], dev

    alone, _ = training_rows()
    beside, dev = training_rows(dev_every_steps=1, **with_dev(tiny, 2))
    assert beside == alone
    assert len(dev) == 5
    assert not any("mean_token_accuracy" in row for row in dev)


def test_upstream_drops_the_loss_of_a_step_at_whose_end_something_is_logged(tiny):
    """Why DevAccuracy measures at the beginning of the next step: `on_log` clears `control.should_log`."""

    class AtStepEnd(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.log({"dev/accuracy": 0.5})

    with tiny.sft({"max_steps": 2}) as trainer:
        trainer.add_callback(AtStepEnd())
        trainer.train()
        rows = rows_of(trainer)
    assert not any("loss" in row for row in rows), "transformers logs both now: DevAccuracy may measure at the end of a step"
    assert "mean_token_accuracy" in rows[0]  # and TRL's `log` moves what it has gathered into that row


def test_a_resumed_run_does_not_measure_its_start_again(tiny):
    config = tiny.sft_config(
        {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "max_length": 160}, dev_every_steps=2, **with_dev(tiny, 2)
    )
    with pytest.raises(KeyboardInterrupt), opened(config) as trainer:
        trainer.add_callback(Interrupt())
        trainer.train()
    with opened(config, resume=True) as trainer:
        trainer.train(resume_from_checkpoint=last_checkpoint(trainer.run, resume=True))
        rows = rows_of(trainer)
    assert [row["step"] for row in rows if "dev/accuracy" in row] == [0, 2, 4]


class Interrupt(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_dev_accuracy_is_what_grading_one_by_one_gives(tiny, tiny_model_dir, tiny_data_dir):
    """A random model is never right. So its own words make the golds: half are right, a third strictly so."""
    settings = Model(name_or_path=str(tiny_model_dir))
    tokenizer = load_tokenizer(settings)
    policy = load_base(settings, "none", tokenizer)
    examples = read_jsonl(tiny_data_dir / "dev.jsonl", Example)[:6]
    plain = copy.deepcopy(policy).eval()
    texts = []
    for example in examples:
        ids = torch.tensor([chat_ids(tokenizer, example.prompt, add_generation_prompt=True)])
        out = plain.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(out, skip_special_tokens=True))
    values = [extract(text).value for text in texts]
    golds = [value if index % 2 else "123456" for index, value in enumerate(values)]
    dev = [Example(**{**as_dict(example), "answer": gold or "7"}) for example, gold in zip(examples, golds, strict=True)]
    measured = dev_accuracy(policy, tokenizer, dev, max_new_tokens=12)
    grades = [grade(text, example.answer) for text, example in zip(texts, dev, strict=True)]
    right = sum(verdict.correct for verdict in grades)
    low, high = wilson(right, 6)
    assert measured["dev/accuracy"] == right / 6
    assert measured["dev/accuracy_strict"] == sum(verdict.strict for verdict in grades) / 6
    assert (measured["dev/accuracy_low"], measured["dev/accuracy_high"]) == (low, high)
    assert low <= right / 6 <= high
    assert measured["dev/clipped_ratio"] == 1.0


def as_dict(example):
    return {name: getattr(example, name) for name in example.__dataclass_fields__}


def test_dev_accuracy_gives_back_what_graphs_step_over(tiny, sft, monkeypatch):
    monkeypatch.setattr(steps, "EagerStep", steps.GraphStep)
    monkeypatch.setattr(steps, "capture", lambda run: run)
    kept = []
    monkeypatch.setattr(
        "posttrain.training.dev.release_graphs", lambda model: kept.append(model._graphs) or steps.release_graphs(model)
    )
    with tiny.grpo(sft, **with_dev(tiny)) as trainer:
        next(c for c in trainer.callback_handler.callbacks if isinstance(c, DevAccuracy)).measure()
        copied = trainer.rollout_func.copy.model
    assert len(kept) == 1 and kept[0].captured and not hasattr(copied, "_graphs")


def test_dev_accuracy_follows_the_policy_and_leaves_it_in_training(tiny, sft):
    with tiny.grpo(sft, **with_dev(tiny)) as trainer:
        trainer.model.train()
        before = adapter_tensors(trainer.model)
        watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DevAccuracy))
        watch.measure()
        assert trainer.model.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(trainer.model).items())


def test_dev_rows_that_are_asked_for_and_are_not_there_are_said(tiny, tiny_data_dir, tmp_path, capsys):
    config = tiny.sft_config(data={"path": str(shutil.copytree(tiny_data_dir, tmp_path / "data")), "num_dev": 4})
    assert len(load_examples(config)[1]) == 4 and not capsys.readouterr().out
    (tmp_path / "data" / "dev.jsonl").write_text("")
    retell(tmp_path / "data", files=read_data_manifest(tmp_path / "data")["files"] | {"dev.jsonl": sha256_text("")})
    assert load_examples(config)[1] == []
    assert capsys.readouterr().out == f"{tmp_path}/data/dev.jsonl has no row: this run measures no dev accuracy\n"


def test_without_dev_examples_nothing_is_measured(tiny):
    with tiny.sft() as trainer:
        assert not any(isinstance(callback, DevAccuracy) for callback in trainer.callback_handler.callbacks)
        row = {"dev/accuracy": 1.0, "dev/accuracy_low": 0.5, "dev/accuracy_high": 1.0}
        add_callbacks(trainer, trainer.run, lambda: row, None)
        (watch,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DevAccuracy))
        assert isinstance(watch.log, functools.partial)
        assert watch.log.func is Trainer.log


# --- samples.jsonl ----------------------------------------------------------------------------------------------------


def test_samples_hold_every_completion_of_a_step_with_its_verdict(tiny, sft, tiny_data_dir, capsys):
    golds = {e.prompt[-1]["content"]: e.answer for e in read_jsonl(tiny_data_dir / "train.jsonl", Example)}
    with tiny.grpo(sft, {"max_steps": 2, "scale_rewards": "none"}) as trainer:
        pay(trainer, by_content)
        trainer.reward_funcs[1] = correctness_reward  # it logs value and gold, and pays a random model nothing
        trainer.train()
        rows = list(read_rows(trainer.run.folder / "samples.jsonl"))
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    for start in range(0, 16, 4):
        group = rows[start : start + 4]
        assert len({row["question"] for row in group}) == 1
        rewards = [row["rewards"]["only"] for row in group]
        assert [row["advantage"] for row in group] == pytest.approx([r - sum(rewards) / 4 for r in rewards], abs=1e-4)
    for row in rows:
        assert row["gold"] == golds[row["question"]]
        assert row["value"] == extract(row["completion"]).value
        assert row["rewards"]["nothing"] == 0.0
    best = max(rows[:8], key=lambda row: row["advantage"])
    assert (
        f"        only {best['rewards']['only']:g} nothing 0, read {best['value']}, gold {best['gold']}: "
        in capsys.readouterr().out
    )


# --- checkpoints and arguments ----------------------------------------------------------------------------------------


def test_without_a_checkpoint_a_resumed_run_begins_again(tiny):
    with tiny.sft() as trainer:
        assert last_checkpoint(trainer.run, resume=True) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has the paged optimizer")
def test_a_paged_optimizer_gives_way_without_cuda_and_the_run_says_so(tiny):
    with tiny.sft({"optim": "paged_adamw_32bit"}) as trainer:
        assert trainer.args.optim == "adamw_torch"
        assert any("paged_adamw_32bit" in note and "adamw_torch" in note for note in trainer.run.manifest.notes)
        assert json.loads((trainer.run.folder / "manifest.json").read_text())["notes"] == trainer.run.manifest.notes


@pytest.mark.parametrize(
    ("dtype", "key", "value"), [("bfloat16", "bf16", False), ("float32", "bf16", True), ("float32", "fp16", True)]
)
def test_a_precision_that_contradicts_the_models_is_refused(tiny, tiny_model_dir, dtype, key, value):
    config = tiny.sft_config({key: value}, model={"name_or_path": str(tiny_model_dir), "dtype": dtype}, quantization="none")
    with pytest.raises(UserError, match=rf"trainer.{key} contradicts model.dtype {dtype}: remove it"), opened(config):
        pass


def test_what_the_run_owns_overrides_nothing_that_the_block_may_hold(tiny):
    config = tiny.sft_config({"learning_rate": 3e-4, "bf16": True}, seed=7)
    with opened(config) as trainer:
        arguments = trainer_arguments(config, trainer.run)
        assert arguments["seed"] == 7
        assert arguments["learning_rate"] == 3e-4
        assert arguments["output_dir"] == str(trainer.run.folder / "checkpoints")
        assert trainer.args.bf16
        assert not trainer.args.remove_unused_columns

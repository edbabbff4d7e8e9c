"""A resumed run equals an uninterrupted one, in every bit of the adapter and every row of its record."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import LORA, adapter_tensors, by_content, dtypes, in_file, largest_difference, opened, pay
from transformers import TrainerCallback

from posttrain.errors import Interrupted, UserError, exit_on_user_error, stop
from posttrain.records import read_rows
from posttrain.runs.manifest import read_manifest
from posttrain.training.checkpoints import last_checkpoint, save_adapter
from posttrain.training.grpo_trainer import GRPO


class Killed(Exception):
    pass


class KillAfterSaving(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def straight(config, tensors=adapter_tensors):
    with opened(config) as trainer:
        return trained(trainer, tensors=tensors)


def interrupted_and_resumed(config, *steps, tensors=adapter_tensors):
    """Killed after the checkpoint of each of these steps, and resumed each time."""
    for number, step in enumerate(steps):
        with pytest.raises(Killed), opened(config, resume=True) as trainer:
            trainer.add_callback(KillAfterSaving(step))
            trained(trainer, last_checkpoint(trainer.run, resume=number > 0), tensors)
    with opened(config, resume=True) as trainer:
        checkpoint = last_checkpoint(trainer.run, resume=True)
        assert checkpoint.endswith(f"checkpoint-{steps[-1]}")
        result = trained(trainer, checkpoint, tensors)
        assert dtypes(trainer.model) == {torch.float32}
        return result


def trained(trainer, checkpoint=None, tensors=adapter_tensors):
    if isinstance(trainer, GRPO):
        pay(trainer, by_content)
    start = tensors(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint)
    end = tensors(trainer.model)
    assert checkpoint or largest_difference(start, end) > 1e-4
    save_adapter(trainer, trainer.run, trainer.processing_class, "")
    return end, adapter_tensors(trainer.model, "ref"), told(trainer.run.folder)


TIMES = ("time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "rollout/tokens_per_second")


def told(folder):
    """What a run says of itself, but for how long it took."""
    files = [folder / name for name in ("metrics.jsonl", "samples.jsonl")]
    rows = [row for file in files if file.is_file() for row in read_rows(file)]
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("time/")} for row in rows]


FOUR_STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_resumed_sft_equals_uninterrupted_sft(tiny, form):
    """That includes dropout, shuffling and the schedule."""
    lora = LORA | {"dropout": 0.1, "train_special_tokens": "always"}
    config = [tiny.sft_config(FOUR_STEPS, lora=lora, quantization=form) for _ in range(2)]
    (one, _, rows), (two, _, again) = straight(config[0]), interrupted_and_resumed(config[1], 2)
    assert largest_difference(one, two) == 0
    assert rows == again
    assert sum("loss" in row for row in rows) == 4


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_moments_in_8_bits_outlive_a_kill(tiny, fp32, any_sft, stage):
    """bitsandbytes keeps those of 4,096 entries and more in 8 bits."""
    more, lora = FOUR_STEPS | {"optim": "adamw_8bit", "learning_rate": 1e-2}, LORA | {"r": 128}
    if stage == "sft":
        config = [tiny.sft_config(more, lora=lora) for _ in range(2)]
    else:
        config = [tiny.grpo_config(None, more, lora=lora) for _ in range(2)]
    (one, _, rows), (two, _, again) = straight(config[0]), interrupted_and_resumed(config[1], 2)
    assert largest_difference(one, two) == 0
    assert rows == again
    saved = torch.load(Path(config[1].run_dir, "checkpoints", "checkpoint-4", "optimizer.pt"), weights_only=True)["state"]
    kinds = {tensor.dtype for state in saved.values() for tensor in state["__bnb_optimizer_quant_state__"].values()}
    assert torch.uint8 in kinds


@pytest.mark.parametrize("form", ["nf4", "none"])
def test_resumed_grpo_equals_uninterrupted_grpo(tiny, any_sft, form):
    """That includes rollouts and the KL reference, which is the SFT policy and not the checkpoint's."""
    more = FOUR_STEPS | {"beta": 0.05, "learning_rate": 1e-2}
    config = [tiny.grpo_config(any_sft, more, quantization=form) for _ in range(2)]
    (one, reference, rows), (two, reference_again, again) = straight(config[0]), interrupted_and_resumed(config[1], 2)
    assert largest_difference(one, two) == 0
    assert rows == again
    assert largest_difference(reference, reference_again) == 0
    assert largest_difference(sorted_values(reference), sorted_values(in_file(any_sft))) == 0


def sorted_values(tensors):
    """Tensors sorted by kind and place, whatever their adapter is called."""
    parts = {
        n: [part for part in n.split(".") if part not in ("ref", "default", "token_adapter", "modules_to_save")] for n in tensors
    }
    return {".".join(parts[name]): tensor for name, tensor in tensors.items()}


# --- where a run may end, and where it may be killed ------------------------------------------------------------------

SLOW = pytest.mark.slow
CONSTANT = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "max_length": 192}


@pytest.mark.parametrize(
    ("trainer", "rows", "steps"),
    [
        # In the second epoch, killed three times; where the last checkpoint is inside an epoch, transformers trains a step more.
        pytest.param({"max_steps": 3, "logging_steps": 2}, 4, (1, 2, 3), id="three times"),
        pytest.param({"max_steps": 3}, 40, (3,), id="inside an epoch", marks=SLOW),
        pytest.param({"max_steps": 4}, 4, (2, 4), id="at an epoch's end", marks=SLOW),
        # Three micro-batches an epoch: a step of two and one of one.
        pytest.param({"max_steps": 3, "gradient_accumulation_steps": 2}, 6, (2, 3), id="accumulation", marks=SLOW),
        pytest.param({"max_steps": -1, "num_train_epochs": 1.5}, 8, (6,), id="an epoch and a half", marks=SLOW),
        pytest.param({"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}, 4, (2,), id="by epoch", marks=SLOW),
        # A row averages steps of both attempts.
        pytest.param({"max_steps": 5, "save_steps": 2, "logging_steps": 3}, 40, (2, 4), id="rows across", marks=SLOW),
    ],
)
def test_not_a_step_more_and_not_a_row_twice(tiny, fp32, trainer, rows, steps):
    data = {"path": tiny.data, "num_dev": 0, "num_train": rows}
    settings = fp32 | {"data": data, "lora": LORA | {"dropout": 0.1}}
    config = [tiny.sft_config(CONSTANT | trainer, **settings) for _ in range(2)]
    (one, _, rows), (two, _, again) = straight(config[0]), interrupted_and_resumed(config[1], *steps)
    assert largest_difference(one, two) == 0
    assert rows == again
    whole, resumed = (read_manifest(c.run_dir) for c in config)
    assert whole.steps == resumed.steps and whole.adapter_sha256 == resumed.adapter_sha256


WINDOWS = {
    "steps_per_generation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 4},
    "num_iterations": {"num_iterations": 2},
    "generation batch": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "generation_batch_size": 8},
    "both": {"num_iterations": 2, "steps_per_generation": 4},
    "within a step": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
}


@pytest.mark.parametrize(
    ("window", "steps"),
    [
        pytest.param(window, steps, marks=() if (window, steps) == ("num_iterations", (1,)) else SLOW)
        for window in WINDOWS
        for steps in ((1,), (2, 3), (5,))
    ],
)
def test_a_window_of_completions_outlives_a_kill_inside_it(tiny, fp32, sft, window, steps):
    """As does the order of the questions in a later epoch, which TRL draws from where the epoch before left its generator."""
    more = WINDOWS[window] | {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    settings = fp32 | {"data": {"path": tiny.data, "num_dev": 0, "num_train": 4}}
    config = [tiny.grpo_config(sft, more | {"beta": 0.04, "learning_rate": 1e-2}, **settings) for _ in range(2)]
    (one, _, rows), (two, _, again) = straight(config[0]), interrupted_and_resumed(config[1], *steps)
    assert largest_difference(one, two) == 0
    assert rows == again


def test_upstream_draws_the_order_of_a_later_epoch_from_the_state_of_its_generator(tiny, sft):
    with tiny.grpo(sft) as trainer:
        sampler = trainer._get_train_sampler()
        first, second = list(sampler), list(sampler)
        assert first != second and list(trainer._get_train_sampler()) == first


# --- finished means finished ------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    """Ends the training at an event of its second step, as some callback of somebody may."""

    def __init__(self, event, how):
        def act(args, state, control, **kwargs):
            if state.global_step == (1 if event in ("on_step_begin", "on_substep_end", "on_pre_optimizer_step") else 2):
                how(state, control)

        setattr(self, event, act)


def stop_training(state, control):
    control.should_training_stop = True


def stop_epoch(state, control):
    control.should_epoch_stop = True


def plan_less(state, control):
    state.max_steps = state.global_step


EARLY = {
    "step end": ("on_step_end", stop_training, 2),
    "while logging": ("on_log", stop_training, 2),
    "while saving": ("on_save", stop_training, 2),
    "before the optimizer": ("on_pre_optimizer_step", stop_training, 2),
    "between micro-batches": ("on_substep_end", stop_training, 1),
    "of a shorter plan": ("on_step_end", plan_less, 3),
    "of an epoch": ("on_step_end", stop_epoch, 2),
}


@pytest.mark.parametrize(
    ("event", "how", "ended"),
    [pytest.param(*case, id=name, marks=() if name == "step end" else SLOW) for name, case in EARLY.items()],
)
def test_a_run_that_ends_early_is_interrupted_and_goes_on(tiny, fp32, event, how, ended):
    more = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    settings = fp32 | {"data": {"path": tiny.data, "num_dev": 0, "num_train": 16}}
    config = [tiny.sft_config(more, **settings) for _ in range(2)]
    one, _, rows = straight(config[0])
    with pytest.raises(Interrupted) as early, opened(config[1]) as trainer:
        trainer.add_callback(StopAt(event, how))
        trained(trainer)
    manifest = read_manifest(config[1].run_dir)
    assert manifest.exit == f"interrupted at step {ended} of 4" and manifest.adapter_sha256 is None
    assert f"at step {ended} of 4" in str(early.value) and "--resume" in str(early.value)
    assert not (trainer.run.folder / "adapter").exists()
    with opened(config[1], resume=True) as trainer:
        two, _, again = trained(trainer, last_checkpoint(trainer.run, resume=True))
    assert largest_difference(one, two) == 0 and rows == again and read_manifest(config[1].run_dir).exit == "ok"


# --- signals ----------------------------------------------------------------------------------------------------------


class SignalAt(TrainerCallback):
    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def as_a_command(config, *callbacks, resume=False):
    """Exit code of a training as the script runs it, in this process."""

    def main():
        with opened(config, resume=resume) as trainer, stop.held():
            for callback in callbacks:
                trainer.add_callback(callback)
            trained(trainer, last_checkpoint(trainer.run, resume))

    try:
        exit_on_user_error(main)
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("sft", signal.SIGTERM),
        *(pytest.param("sft", number, marks=SLOW) for number in (signal.SIGINT, signal.SIGUSR1)),
        pytest.param("grpo", signal.SIGTERM, marks=SLOW),
    ],
)
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_goes_on(tiny, fp32, sft, capsys, stage, number):
    more = {"max_steps": 3, "save_strategy": "no", "enable_jit_checkpoint": True}
    if stage == "grpo":
        config = [tiny.grpo_config(sft, more | {"num_iterations": 2}, **fp32) for _ in range(2)]
    else:
        config = [tiny.sft_config(more, lora=LORA | {"dropout": 0.1}, **fp32) for _ in range(2)]
    rows = straight(config[0])[2]
    capsys.readouterr()
    before = signal.getsignal(number)
    assert as_a_command(config[1], SignalAt(1, number)) == 75
    assert signal.getsignal(number) is before
    said = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert len(said) == 1 and said[0].endswith(
        "stopped at step 1 of 3, checkpoint on disk: the same command with --resume goes on"
    )
    assert read_manifest(config[1].run_dir).exit == "interrupted at step 1 of 3"
    assert as_a_command(config[1], resume=True) == 0
    assert read_manifest(config[1].run_dir).exit == "ok"
    two = load_file(f"{config[1].run_dir}/adapter/adapter_model.safetensors")
    assert largest_difference(load_file(f"{config[0].run_dir}/adapter/adapter_model.safetensors"), two) == 0
    assert told(folder_of(config[1])) == rows


def folder_of(config):
    return Path(config.run_dir)


def test_a_signal_in_the_last_step_lets_the_run_finish(tiny, fp32):
    config = tiny.sft_config({"max_steps": 2, "save_strategy": "no"}, **fp32)
    assert as_a_command(config, SignalAt(2, signal.SIGTERM)) == 0
    assert read_manifest(config.run_dir).exit == "ok"
    assert (folder_of(config) / "checkpoints/checkpoint-2/commit.json").is_file()  # what follows may take minutes


def test_a_second_signal_leaves_at_once(tiny, fp32):
    config = tiny.sft_config({"max_steps": 3, "save_strategy": "no"}, **fp32)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        as_a_command(config, SignalAt(1, signal.SIGTERM, signal.SIGTERM))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert read_manifest(config.run_dir).exit == "running"


# --- the record -------------------------------------------------------------------------------------------------------


def test_times_and_tokens_go_on_over_a_kill(tiny, fp32, monkeypatch):
    config = tiny.sft_config({"max_steps": 4, "save_strategy": "steps", "save_steps": 2}, **fp32)
    with pytest.raises(Killed), opened(config) as trainer:
        trainer.add_callback(KillAfterSaving(2))
        trained(trainer)
    manifest = read_manifest(config.run_dir)
    assert 0 < manifest.train_seconds < manifest.seconds
    killed = json.loads((trainer.run.folder / "manifest.json").read_text())
    killed |= {"train_seconds": 1000.0, "seconds": 2000.0, "exit": "running"}
    (trainer.run.folder / "manifest.json").write_text(json.dumps(killed))
    with opened(config, resume=True) as trainer:
        trained(trainer, last_checkpoint(trainer.run, resume=True))
    manifest = read_manifest(config.run_dir)
    assert 1000 < manifest.train_seconds < 1500 and 2000 < manifest.seconds < 2500
    tokens = [row["num_tokens"] for row in read_rows(trainer.run.folder / "metrics.jsonl") if "num_tokens" in row]
    assert tokens == sorted(set(tokens)) and len(tokens) >= 4


class KillAfterLogging(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed


def test_tensorboard_shows_no_step_twice(tiny, fp32):
    config = tiny.sft_config({"max_steps": 4, "save_strategy": "steps", "save_steps": 2}, tracking="tensorboard", **fp32)
    with pytest.raises(Killed), opened(config) as trainer:
        trainer.add_callback(KillAfterLogging())
        trained(trainer)
    with opened(config, resume=True) as trainer:
        trained(trainer, last_checkpoint(trainer.run, resume=True))
    curves = EventAccumulator(str(trainer.run.folder / "tensorboard")).Reload()
    assert [point.step for point in curves.Scalars("loss")] == [1, 2, 3, 4]


def test_a_checkpoint_of_other_processes_is_refused(tiny, fp32, monkeypatch):
    config = tiny.sft_config({"max_steps": 2, "save_strategy": "steps", "save_steps": 1}, **fp32)
    with pytest.raises(Killed), opened(config) as trainer:
        trainer.add_callback(KillAfterSaving(1))
        trained(trainer)
    monkeypatch.setattr("posttrain.training.checkpoints.num_processes", lambda: 2)
    with pytest.raises(UserError, match=r"written by 1 processes and this run has 2"), opened(config, resume=True) as trainer:
        last_checkpoint(trainer.run, resume=True)

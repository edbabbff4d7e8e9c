"""The same with a real model in NF4, whose folder `--model` names: few steps of few rows, so that a CPU takes them."""

import os
from pathlib import Path

from scripts import CONFIGS

from reliability.place import Place
from reliability.rows import SAVING, TRAINED, Row, kill_row

VARIABLE = "RELIABILITY_MODEL"  # reaches every process of the harness
NAME = "smollm2-135m-instruct"  # as the configs of the demo have it


def command(script, config, *overrides):
    return (script, "--config", str(CONFIGS / f"{config}_demo.yaml"), *overrides)


DATA = command("data_prep", "data", "source.num_train=64", "source.num_dev=4", "source.num_test=4")
BATCH = ("trainer.per_device_train_batch_size=4", "trainer.save_steps=1", "trainer.logging_steps=1", "--resume")
PARENT = command("sft_train", "sft", "data.num_train=64", "trainer.max_steps=12")  # GRPO needs some right answers
SFT = command("sft_train", "sft", "data.num_train=32", "trainer.max_steps=4", "run_dir=runs/x", *BATCH)
SFT_WAYS = {
    "cosine": (),
    "constant rate, dropout": ("trainer.lr_scheduler_type=constant", "lora.dropout=0.1"),
    "accumulation, epochs": ("trainer.gradient_accumulation_steps=2", "data.num_train=16", "trainer.max_steps=-1",
                             "trainer.num_train_epochs=2"),
}  # fmt: skip
GRPO = command(
    "grpo_train", "grpo", "trainer.max_steps=4", "trainer.warmup_steps=0", "trainer.num_generations=4", "run_dir=runs/x", *BATCH
)
GRPO_WAYS = {"plain": ("trainer.per_device_train_batch_size=16",), "two iterations": ("trainer.per_device_train_batch_size=16",
             "trainer.num_iterations=2")}  # fmt: skip


def prepared(place):
    """The user's folder with the model, data and an SFT run, made once by the product."""
    real = Place(place.folder.parent / "real", place.off)
    if not real.folder.is_dir():
        (real.folder / "models").mkdir(parents=True)
        (real.folder / "models" / NAME).symlink_to(Path(os.environ[VARIABLE]).resolve())
        for line in (DATA, PARENT):
            done = real.run(line)
            assert done.code == 0, done.said
    return real


def sft_kills(place, count):
    row = Row("kills, SFT of a real model", f"the same in NF4 ({'; '.join(SFT_WAYS)})")
    return kill_row(row, prepared(place), SFT_WAYS, SFT, TRAINED, ("data",), count, saving=SAVING)


def grpo_kills(place, count):
    row = Row("kills, GRPO of a real model", f"the same in NF4 ({'; '.join(GRPO_WAYS)})")
    return kill_row(row, prepared(place), GRPO_WAYS, GRPO, TRAINED, ("data", "runs/sft_demo"), count, saving=SAVING)


REAL = {
    "kills, SFT of a real model": (sft_kills, 10, 2),
    "kills, GRPO of a real model": (grpo_kills, 5, 1),
}

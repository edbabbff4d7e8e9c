"""Which examples a training run reads."""

from __future__ import annotations

from pathlib import Path

from posttrain.config.schema import PassRate, SftConfig, TrainConfig
from posttrain.errors import UserError
from posttrain.records import Example, Prediction, read_jsonl
from posttrain.runs.contents import check_contents
from posttrain.runs.data_sets import check_split
from posttrain.runs.manifest import read_manifest


def load_examples(config: TrainConfig) -> tuple[list[Example], list[Example]]:
    """Training and dev examples, as many as the config asks for.

    Raises:
        UserError: there is nothing to train on, or nothing that the trainer was told to evaluate.
    """
    folder = Path(config.data.path)
    train = read_jsonl(folder / "train.jsonl", Example)
    if config.data.pass_rate:
        train = with_pass_rate(train, config.data.pass_rate)
    if not train:
        kept = f" with a pass rate in {config.data.pass_rate.run_dir} between low and high" if config.data.pass_rate else ""
        raise UserError(f"{folder}/train.jsonl has no row{kept}: there is nothing to train on")
    if config.data.num_dev:
        check_split(folder, "dev")
    dev = read_jsonl(folder / "dev.jsonl", Example)[: config.data.num_dev] if config.data.num_dev else []
    if isinstance(config, SftConfig):
        refuse_unsolved(train, dev if config.trainer.get("eval_strategy", "no") != "no" else [], folder)
    if not dev and config.trainer.get("eval_strategy", "no") != "no":
        raise UserError(f"{folder}/dev.jsonl has no row: set trainer.eval_strategy=no, or prepare the data with a dev_fraction")
    if config.data.num_dev and not dev:
        print(f"{folder}/dev.jsonl has no row: this run measures no dev accuracy")
    return train[: config.data.num_train], dev


def refuse_unsolved(train: list[Example], dev: list[Example], folder: Path) -> None:
    """SFT imitates worked solutions. GRPO and evaluation ask for the answer alone."""
    for rows, split in ((train, "training"), (dev, "dev")):
        if unsolved := sum(not example.completion for example in rows):
            raise UserError(
                f"{unsolved} of {len(rows)} {split} rows in {folder} have no worked solution, which SFT learns from: map one "
                "(source.fields.solution of the data config), sample some (source.kind rejection_sampled), or use grpo_train.py"
            )


def with_pass_rate(examples: list[Example], settings: PassRate) -> list[Example]:
    """The questions that an evaluation run solved in a share of its samples between `low` and `high`.

    Questions that a policy always or never solves give groups without signal. Questions that it was not asked are left out.

    Raises:
        UserError: there are no samples, or they are not those that the evaluation ended with.
    """
    file = Path(settings.run_dir, "predictions.jsonl")
    if not file.is_file():
        raise UserError(f"no samples at {file}: evaluate the train split first (data.split=train generation.samples=8)")
    predictions = read_jsonl(file, Prediction)
    check_contents(file.parent, read_manifest(file.parent), predictions)
    samples: dict[str, list[bool]] = {}
    for prediction in predictions:
        samples.setdefault(prediction.id, []).append(prediction.correct)
    kept = {name for name, hits in samples.items() if settings.low <= sum(hits) / len(hits) <= settings.high}
    return [example for example in examples if example.id in kept]

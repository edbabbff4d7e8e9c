"""Every key is described where it is defined, and what is made of the descriptions is up to date."""

import re

import pytest
from scripts import ROOT, run

from posttrain.config.__main__ import files
from posttrain.config.reference import STAGES, entries, page
from posttrain.config.trl_fields import trl_fields

SCRIPTS = {"data": "data_prep", "sft": "sft_train", "grpo": "grpo_train", "eval": "evaluate"}
OURS = list(dict.fromkeys(entry for cls in STAGES.values() for entry in entries(cls) if not entry.path.startswith("trainer.")))
CONFIGS = [file for file in sorted(ROOT.glob("configs/**/*.yaml")) if "accelerate" not in file.parts]


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: f"{entry.path} {entry.kind} {entry.where}")
def test_a_key_of_ours_has_a_description_and_acts_where_it_says(entry):
    assert re.match(r"[A-Za-z].*[^\s.]\.$", entry.text), entry
    name = entry.path.rpartition(".")[2]
    names = {name, re.sub("train|dev|test", "{split}", name)}
    for file in entry.where.split(" and "):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in names), entry


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_what_is_made_from_the_schema_is_up_to_date(path):
    assert path.read_text(encoding="utf-8") == files()[path], "python -m posttrain.config --write"


def test_every_key_is_on_the_page():
    shown = set(re.findall(r"(?m)^\| `([\w.]+)` \|", page()))
    assert shown == {entry.path for entry in OURS} and len(shown) > 90


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_an_editor_finds_the_schema_of_a_config(file):
    (named,) = re.findall(r"(?m)^# yaml-language-server: \$schema=(\S+)$", file.read_text(encoding="utf-8"))
    assert (file.parent / named).resolve() == ROOT / "configs" / "schemas" / f"{file.name.split('_')[0]}.json"


@pytest.mark.parametrize("config_class", ["SFTConfig", "GRPOConfig"])
def test_upstream_trl_describes_its_keys(config_class):
    fields = trl_fields(config_class)
    assert sum(bool(field.help) for field in fields.values()) > 0.95 * len(fields)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_help_of_a_key(stage):
    done = run(SCRIPTS[stage], "--help", "seed")
    assert done.code == 0 and done.out.startswith("seed: whole number; ") and "acts in posttrain/" in done.out
    assert run(SCRIPTS[stage], "--help").out.startswith("usage: ")
    done = run(SCRIPTS[stage], "--help", "sead")
    assert done.code == 2 and "no key of this config (did you mean 'seed'?)" in done.err and done.err.count("\n") == 1


def test_help_of_keys_of_trl_and_of_blocks():
    said = run("grpo_train", "--help", "trainer.num_generations").out
    assert (
        said.startswith("trainer.num_generations: ") and "8 where it is not set" in said and "TRL: Number of generations" in said
    )
    assert "did you mean 'trainer.num_train_epochs'?" in run("sft_train", "--help", "num_train_epochs").err
    assert "keys: lora.r, lora.alpha" in run("sft_train", "--help", "lora").out
    said = run("data_prep", "--help", "source.path").out
    assert all(f"with source.kind {kind}" in said for kind in ("jsonl", "files", "svamp"))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("num_train_epochs=1", "num_train_epochs: unknown key (did you mean 'trainer.num_train_epochs'?)"),
        ("learning_rate=1", "learning_rate: unknown key (did you mean 'trainer.learning_rate'?)"),
        ("optim=x", "optim: unknown key (did you mean 'trainer.optim'?)"),
        ("report_to=wandb", "report_to: posttrain sets this itself: use tracking"),
        ("output_dir=x", "output_dir: posttrain sets this itself: use run_dir"),
        ("trainer.num_dev=1", "trainer.num_dev: unknown key (did you mean 'data.num_dev'?)"),
    ],
)
def test_a_key_in_the_wrong_place_is_told_its_own(key, told):
    done = run("sft_train", "--config", ROOT / "configs" / "sft_demo.yaml", key)
    assert done.code == 2 and done.err == f"command line: {told}\n"

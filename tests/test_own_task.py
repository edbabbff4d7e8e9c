"""docs/own_task.md, run from its first block to its last."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from scripts import ROOT, run, workplace

from posttrain.config.load import load
from posttrain.config.schema import DataConfig, GrpoConfig

PAGE = (ROOT / "docs" / "own_task.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```", PAGE)
CONFIG = "configs/data_own.yaml"
# The demo's steps are for a model of 135M, and take minutes.
TINY = {
    "data_prep.py": ("tokenizer.name_or_path=models/tiny",),
    "sft_train.py": ("model.name_or_path=models/tiny", "trainer.max_steps=30", "trainer.learning_rate=1e-2"),
    "grpo_train.py": (
        "model.name_or_path=models/tiny",
        "trainer.max_steps=1",
        "trainer.warmup_steps=0",
        "trainer.temperature=1.0",
    ),
    "evaluate.py": ("model.name_or_path=models/tiny", "data.limit=4", "generation.max_new_tokens=8"),
}


def of(language):
    return [text for kind, text in BLOCKS if kind == language]


def commands(text):
    return [shlex.split(line) for line in text.splitlines()]


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(workplace(tmp_path, tiny_model_dir))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    exec(of("python")[0], {})
    return tmp_path


def said(words):
    python, script, *arguments = words
    assert python == "python"
    done = run(script.removesuffix(".py"), *arguments, *TINY[script])
    return done.out + done.err


def test_the_page_has_no_block_that_is_not_tested():
    assert {kind for kind, _ in BLOCKS} == {"python", "yaml", "bash", "text"}
    assert all(before == "bash" for (before, _), (kind, _) in itertools.pairwise(BLOCKS) if kind == "text")


def test_what_the_page_shows_is_said(place):
    """Each text is in what the command of the block before it says."""
    pairs = [(before, text) for (_, before), (kind, text) in itertools.pairwise(BLOCKS) if kind == "text"]
    assert len(pairs) >= 2
    for before, text in pairs:
        heard = said(commands(before)[-1])
        for line in text.splitlines():
            assert line in heard, heard


def test_the_first_map_is_that_of_the_config():
    shown, whole = yaml.safe_load(of("yaml")[0]), yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))
    assert shown.items() <= whole.items()


def test_the_rewards_and_the_start_are_settings_of_grpo(tmp_path):
    (block,) = [text for text in of("yaml") if "rewards" in yaml.safe_load(text)]
    values = yaml.safe_load((ROOT / "configs/grpo_demo.yaml").read_text(encoding="utf-8")) | yaml.safe_load(block)
    file = tmp_path / "grpo.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load(file, [], GrpoConfig).rewards.named().keys() == {"overlong"}


def test_every_yaml_is_of_the_data_or_of_grpo():
    assert all({"source", "rewards"} & yaml.safe_load(text).keys() for text in of("yaml"))


def test_the_other_form_is_prepared_as_it_is_shown(place):
    (block,) = [text for text in of("yaml") if "form" in yaml.safe_load(text).get("answer", {})]
    values = yaml.safe_load(Path(CONFIG).read_text(encoding="utf-8")) | yaml.safe_load(block)
    Path("data.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert "wrote data/own" in said(["python", "data_prep.py", "--config", "data.yaml"])
    assert "\\nAnswer: " in Path("data/own/train.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", [text for text in of("yaml") if "source" in yaml.safe_load(text)])
def test_every_source_is_one(tmp_path, block):
    values = yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8")) | yaml.safe_load(block)
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load(file, [], DataConfig).source.kind in ("files", "hub")


@pytest.mark.slow
def test_the_page_from_file_to_report(place):
    from posttrain.report import main as report

    (steps,) = [text for text in of("bash") if "sft_train.py" in text]
    said(commands(of("bash")[0])[0])
    for words in commands(steps):
        if words[1] == "-m":
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("sys.argv", words[2:])
                report()
        else:
            done = run(words[1].removesuffix(".py"), *words[2:], *TINY[words[1]])
            assert done.code == 0, done
    assert "grpo" in Path("report/own/report.md").read_text(encoding="utf-8")

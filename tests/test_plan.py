"""Hours and cost of a chain, by the commands of which it consists."""

import json
import re

import pytest
from made_runs import manifest
from scripts import CONFIGS, workplace

from posttrain import plan
from posttrain.errors import UserError
from posttrain.training.machines import MACHINES

COMMANDS = f"""
data_prep.py --config {CONFIGS}/data_tiny.yaml
evaluate.py --config {CONFIGS}/eval_tiny.yaml generation.samples=2 generation.temperature=1.0
python sft_train.py --config {CONFIGS}/sft_tiny.yaml --resume
grpo_train.py --config {CONFIGS}/grpo_tiny.yaml adapter=runs/sft_tiny   # which is not there yet
"""


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_dir, tiny_data_dir):
    monkeypatch.chdir(workplace(tmp_path, tiny_model_dir, data=tiny_data_dir))
    (tmp_path / "commands.txt").write_text(COMMANDS)
    return tmp_path


def said(monkeypatch, capsys, gpu="h100"):
    monkeypatch.setattr("sys.argv", ["plan", "--gpu", gpu, "commands.txt"])
    plan.main()
    return capsys.readouterr().out.splitlines()


def test_each_run_has_a_line_and_the_sum_is_theirs(place, monkeypatch, capsys):
    head, *rows, total, counted = said(monkeypatch, capsys)
    assert head.startswith("planned for 1 x H100 80GB SXM")
    assert [row.split()[0] for row in rows] == ["runs/eval_tiny_base", "runs/sft_tiny", "runs/grpo_tiny"]
    assert [re.sub(r".* (m?in|s)  ", "", row) for row in rows] == [
        "evaluation of 20 questions x 2",
        "SFT, 30 steps",
        "GRPO, 2 steps",
    ]
    machine = MACHINES["h100"]
    stages = [plan.planned(config, machine) for config in plan.read_commands(place / "commands.txt")]
    hours = sum(stage.seconds for stage in stages) / 3600
    assert total == f"3 runs: {hours:.2f} hours, {hours * 3.95:,.2f} dollars at 3.95 an hour (list price, May 2026)"
    assert "reach their limit" in counted


def test_a_slower_card_takes_longer_and_has_its_price(place, monkeypatch, capsys):
    machines = {name: MACHINES[name] for name in ("h100", "t4", "cpu")}
    configs = list(plan.read_commands(place / "commands.txt"))
    seconds = {name: sum(plan.planned(config, card).seconds for config in configs) for name, card in machines.items()}
    assert seconds["h100"] < seconds["t4"]
    assert "at 2.50 an hour" in said(monkeypatch, capsys, "h100=2.5")[-2]
    assert "dollars" not in said(monkeypatch, capsys, "cpu")[-2]


def test_what_is_finished_is_not_counted(place, monkeypatch, capsys):
    before = said(monkeypatch, capsys)
    (place / "runs" / "sft_tiny").mkdir(parents=True)
    (place / "runs" / "sft_tiny" / "manifest.json").write_text(json.dumps(manifest("sft", "sft_tiny", [])))
    after = said(monkeypatch, capsys)
    assert after[2].split() == ["runs/sft_tiny", "finished"] and after[1] == before[1] and after[3] == before[3]


def test_what_does_not_fit_is_told_and_left_out(place, monkeypatch, capsys):
    many = "trainer.max_length=100000000 trainer.packing=true trainer.gradient_checkpointing=false trainer.max_steps=3"
    (place / "commands.txt").write_text(f"sft_train.py --config {CONFIGS}/sft_tiny.yaml {many}\n")
    _, row, total, _, left_out = said(monkeypatch, capsys, "t4")
    assert row.endswith("SFT, 3 steps: does not fit") and total.startswith("1 runs: 0.00 hours")
    assert left_out == "what does not fit a T4 is not in the sum"


@pytest.mark.parametrize("line", ["rm -r x", "sft_train.py", "sft_train.py --resume --config", "python sft_train.py key=1"])
def test_a_line_that_is_no_command_is_named(place, line):
    (place / "commands.txt").write_text(f"# a comment\n{line}\n")
    with pytest.raises(UserError, match=r"commands.txt:2: no command of a stage"):
        list(plan.read_commands(place / "commands.txt"))


def test_without_the_file_or_the_models_config_there_is_no_plan(place):
    with pytest.raises(UserError, match="none.txt: no such file"):
        list(plan.read_commands(place / "none.txt"))
    (place / "commands.txt").write_text(f"evaluate.py --config {CONFIGS}/eval_tiny.yaml model.name_or_path=me/none\n")
    (config,) = plan.read_commands(place / "commands.txt")
    with pytest.raises(UserError, match="the config.json of me/none is not on this machine"):
        plan.planned(config, MACHINES["h100"])

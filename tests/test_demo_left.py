"""What `make demo` says of the time that is left."""

import importlib.util
import json
import subprocess
import sys

from scripts import ROOT

spec = importlib.util.spec_from_file_location("demo_left", ROOT / "bench" / "demo_left.py")
demo_left = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo_left)

PUBLISHED = [20.0, 80.0, 20.0, 300.0, 20.0]


def runs(folder, *seconds, exit="ok"):
    names = [folder / name for name in ("base", "sft", "eval_sft", "grpo", "eval_grpo")]
    for name, took in zip(names, seconds, strict=False):
        name.mkdir(parents=True)
        (name / "manifest.json").write_text(json.dumps({"exit": exit, "seconds": took}))
    return names


def test_the_seconds_are_those_of_the_readme():
    seconds = demo_left.published((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(seconds) == 5 and min(seconds) > 0 and max(seconds) == seconds[3]


def test_a_machine_that_is_twice_as_slow_takes_twice_the_rest(tmp_path):
    assert demo_left.left(runs(tmp_path, 40.0), PUBLISHED) == ", about 14 min left"
    assert demo_left.left(runs(tmp_path / "b", 40.0, 160.0, 40.0), PUBLISHED) == ", about 11 min left"


def test_what_is_not_finished_is_still_to_come(tmp_path):
    assert demo_left.left(runs(tmp_path), PUBLISHED) == ""
    assert demo_left.left(runs(tmp_path / "b", 9.0, exit="interrupted at step 3 of 30"), PUBLISHED) == ""
    assert demo_left.left(runs(tmp_path / "c", *PUBLISHED), PUBLISHED) == ""


def test_it_is_a_command_of_the_makefile(tmp_path):
    names = runs(tmp_path, 40.0, 142.0)
    done = subprocess.run([sys.executable, ROOT / "bench" / "demo_left.py", *names], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(", about ")
    said = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "python bench/demo_left.py runs/eval_demo_base runs/sft_demo runs/eval_demo_sft_demo runs/grpo_demo" in said

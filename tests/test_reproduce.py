"""Every command of reproduce.sh is put to the script that it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


# RFT and GRPO from there, which only the small model has yet, are eight more runs; SVAMP, where it is prepared, one for each
# model that is sampled.
@pytest.mark.parametrize(("model", "num_runs", "num_sampled"), [("llama3.2-3b", 17, 2), ("smollm2-135m", 25, 3)])
def test_each_stage_has_settings_that_hold(model, num_runs, num_sampled):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"MODEL": model, "FLAGS": "--print-config", "PATH": path}
    done = subprocess.run([ROOT / "reproduce.sh"], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    run_dirs = re.findall(r"(?m)^run_dir: (\S+)", done.stdout)
    assert len(run_dirs) == len(set(run_dirs)) == num_runs + num_sampled * (ROOT / "data" / "svamp").is_dir()
    assert all(folder.startswith(f"runs/{model}/") for folder in run_dirs)
    adapters = set(re.findall(r"(?m)^adapter: (\S+)", done.stdout)) - {"null"}
    assert adapters <= set(run_dirs), "an adapter that no stage trains"


def test_the_model_that_it_is_run_on_by_default_is_the_publisheds():
    text = (ROOT / "reproduce.sh").read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text and "MODEL:-llama3.2-3b" in text

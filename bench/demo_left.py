"""`, about 5 min left`: what of the demo is still to run, by the seconds in README.md's table and how this machine compares.

    python bench/demo_left.py BASE SFT EVAL_SFT GRPO EVAL_GRPO     # the run directories, in the order in which they come

Before the first of them is finished it says nothing: there is nothing to compare with.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def published(text: str) -> list[float]:
    """Seconds of the five runs, in their order, out of the table's last two columns: training, evaluation."""
    table = text.split("<!-- demo:start -->")[1].split("<!-- demo:end -->")[0]
    rows = re.findall(r"(?m)^\| \w+ \(\w+\) .*\| *(\d*) \| (\d+) \|$", table)
    return [float(cell) for row in rows for cell in row if cell]


def left(folders: list[Path], seconds: list[float]) -> str:
    took = measured = rest = 0.0
    for folder, there in zip(folders, seconds, strict=True):
        file = folder / "manifest.json"
        manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if manifest.get("exit") == "ok":
            took, measured = took + manifest["seconds"], measured + there
        else:
            rest += there
    return f", about {max(1, round(rest * took / measured / 60))} min left" if took and rest else ""


if __name__ == "__main__":
    print(left([Path(name) for name in sys.argv[1:]], published(README.read_text(encoding="utf-8"))))

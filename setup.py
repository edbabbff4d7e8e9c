"""What pyproject.toml cannot say: a wheel holds the scripts and configs/ as well, inside the package, and its commit.

Beside the package an installed evaluate.py would hide the Hugging Face package of that name.
"""

import json
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SCRIPTS = ("data_prep.py", "sft_train.py", "grpo_train.py", "evaluate.py")


class WithScripts(build_py):
    def run(self) -> None:
        # What an earlier build left there would come along, under the name of this commit.
        shutil.rmtree(Path(self.build_lib, "posttrain"), ignore_errors=True)
        super().run()

    def build_package_data(self) -> None:  # of a wheel; an editable install runs what is here
        super().build_package_data()
        shipped = Path(self.build_lib, "posttrain", "shipped")
        for file in [*map(Path, SCRIPTS), *(path for path in Path("configs").rglob("*") if path.is_file())]:
            self.mkpath(str((shipped / file).parent))
            self.copy_file(str(file), str(shipped / file))
        (shipped / "built.json").write_text(json.dumps(git_state()) + "\n", encoding="utf-8")


def git_state() -> dict[str, str | bool | None]:
    """Commit and uncommitted changes, in the words of posttrain/runs/manifest.py; none in an unpacked archive."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return {"commit": None, "dirty": False}

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False).stdout.strip()

    return {"commit": git("rev-parse", "--verify", "--quiet", "HEAD") or None, "dirty": bool(git("status", "--porcelain"))}


setup(cmdclass={"build_py": WithScripts})

"""What every key does, as files: docs/settings_reference.md, and the JSON schemas that editors read.

python -m posttrain.config            # print the page
python -m posttrain.config --write    # write both
"""

from __future__ import annotations

import argparse
from pathlib import Path

from posttrain.config.reference import page, schemas
from posttrain.errors import exit_on_user_error
from posttrain.records import write_atomic

ROOT = Path(__file__).resolve().parents[2]


def files() -> dict[Path, str]:
    """Path -> text of everything that is made from the schema."""
    folder = ROOT / "configs" / "schemas"
    return {ROOT / "docs" / "settings_reference.md": page()} | {folder / name: text for name, text in schemas().items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.config", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the page and the schemas")
    if not parser.parse_args().write:
        return print(page(), end="")
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    exit_on_user_error(main)

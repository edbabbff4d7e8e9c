"""A picture of a console from what commands said: docs/console.md shows it.

python bench/console_picture.py docs/console.txt --out docs/console.svg
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 132  # columns


def picture(lines: list[str], title: str) -> str:
    """SVG of a terminal: commands bold, the rest as it was said. A longer line goes on in the next, as in a terminal."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for line in lines:
        console.print(Text(line, style="bold" if line.startswith("$ ") else "", no_wrap=False))
    return console.export_svg(title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="what was said, each command on a line that begins with $")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="make demo")
    args = parser.parse_args()
    args.out.write_text(picture(args.text.read_text(encoding="utf-8").splitlines(), args.title), encoding="utf-8")


if __name__ == "__main__":
    main()

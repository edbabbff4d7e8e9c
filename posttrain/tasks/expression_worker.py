"""The process that expressions.py starts: one JSON line in, one out. It may be killed at any moment."""

from __future__ import annotations

import json
import logging
import resource
import sys
from typing import Any

MEMORY_BYTES = 4 * 2**30
DIGITS = 40  # compared, where sympy cannot decide by algebra: a decimal that is cut off must not pass for pi


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    import math_verify

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(compared(math_verify, **json.loads(line))), flush=True)


def compared(math_verify: Any, value: str, gold: str) -> dict[str, Any]:
    said, wanted = parsed(math_verify, value), parsed(math_verify, gold)
    if not said or not wanted:
        return {"equal": False, "spelled": spelled(said[0]) if said else None}
    equal = math_verify.verify(wanted, said, float_rounding=DIGITS, numeric_precision=DIGITS + 10, timeout_seconds=None)
    return {"equal": bool(equal), "spelled": spelled(said[0])}


def spelled(expression: Any) -> str:
    """It is read without being worked out: `-1*9*x`."""
    return str(expression.doit() if hasattr(expression, "doit") else expression)


def parsed(math_verify: Any, text: str) -> list[Any]:
    """The time limit is the caller's, who kills this process."""
    latex = [math_verify.LatexExtractionConfig()]
    found: list[Any] = math_verify.parse(f"${text}$", latex, "no_fallback", "first_match", parsing_timeout=None)
    return found


if __name__ == "__main__":
    main()

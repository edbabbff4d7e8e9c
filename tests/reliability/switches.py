"""Protections of the product, each with the way to switch it off in a forked process: the row that stands on it then fails."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

SCRIPTS = ("data_prep", "sft_train", "grpo_train", "evaluate")


@dataclasses.dataclass(frozen=True)
class Switch:
    row: str  # a name of rows.ROWS, run in its short form
    turn_off: Callable[[], None]


def plain_write(path, text):
    Path(path).write_text(text, encoding="utf-8")


def put(name, value):
    """A function that replaces a name in the product's modules that have it."""

    def turn_off():
        import sys

        for module in [*sys.modules.values()]:
            ours = getattr(module, "__name__", "").split(".")[0] in ("posttrain", *SCRIPTS)
            if ours and hasattr(module, name):
                setattr(module, name, value)

    return turn_off


def without_policy_key():
    import evaluate

    evaluate.policy_key = lambda run: ""


def trusting_rows():
    """Rows of part files are read without a look at them."""
    import json

    from posttrain.evaluation import predictions

    def rows(file, policy):
        for line in file.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            row.pop(predictions.SEAL, None)
            yield predictions.Prediction(**row)

    predictions._whole_rows = rows


def strict_parser():
    """Rows of a source: only what json calls a JSONDecodeError is a bad row."""
    import json

    from posttrain.tasks import gsm8k

    def parse_line(line, file, number, split):
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            return gsm8k.Row(file, number, split, problem=f"not JSON: {error}")
        if not isinstance(row, dict):
            return gsm8k.Row(file, number, split, problem="not a JSON object")
        return gsm8k.checked_row(row, file, number, split)

    gsm8k.parse_line = parse_line


def unguarded_numbers():
    from posttrain.config import yaml_lines

    yaml_lines.Document._converted = lambda self, node, kind, path: yaml_lines._CONSTRUCTOR.construct_object(node)


def shown_passwords():
    from posttrain.config import schema, yaml_lines

    yaml_lines.Document.refuse_passwords = lambda self: None
    schema.Hub.problems = lambda self: iter(())


def unbounded():
    from posttrain.config import yaml_lines
    from posttrain.tasks import gsm8k

    yaml_lines.MOST_BYTES = gsm8k.MOST_CHARACTERS = 2**28


def trainers_own_end():
    from transformers import Trainer

    from posttrain.training.masters import MasterWeights

    MasterWeights._run_epoch = Trainer._run_epoch


def nothing_carried():
    from posttrain.training.grpo_trainer import GRPO

    GRPO.carry_on = lambda self, carried: None


SWITCHES = {
    "checkpoints are verified": Switch("damaged checkpoints", put("damage", lambda folder: None)),
    "adapters are compared with their run": Switch("damaged adapters", put("check_adapter", lambda folder: None)),
    "no step follows the last": Switch("kills at a checkpoint", trainers_own_end),
    "a window outlives a kill": Switch("kills at a checkpoint", nothing_carried),
    "a resumed run's record is cut back": Switch("crash points, SFT", put("cut_record", lambda run, sizes: None)),
    "files are written beside and renamed": Switch("crash points, data", put("write_atomic", plain_write)),
    "a kill in the first write locks nobody out": Switch("crash points, data", put("BEFORE_MANIFEST", frozenset())),
    "a torn row is cut off": Switch("damaged part files", put("cut_torn_tail", lambda file: None)),
    "damaged rows are answered again": Switch("damaged part files", trusting_rows),
    "part files name their policy": Switch("forged predictions", without_policy_key),
    "completions have their hash": Switch("forged predictions", put("check_contents", lambda *args: None)),
    "what the machine refuses is one line": Switch("full disk, data", put("machine_trouble", lambda error: None)),
    "splits are compared with their hash": Switch("damaged data sets", put("check_split", lambda path, split: "")),
    "rows that no parser takes are bad rows": Switch("malformed rows and files", strict_parser),
    "numbers that no parser takes are faults": Switch("malformed configs", unguarded_numbers),
    "texts and configs have an end": Switch("malformed configs", unbounded),
    "settings hold no password": Switch("canaries", shown_passwords),
}

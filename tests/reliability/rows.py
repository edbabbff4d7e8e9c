"""The rows of the table: each injects faults of one kind, `count` of them, and says how many were met as they should be."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from faults import DAMAGES, empty, flip, halve, zero
from scripts import CONFIGS, ROOT, retell

from posttrain.records import read_rows
from reliability import inputs
from reliability.place import ADAPTER, DATA, EVAL, EVALUATED, GRPO, HANGS, HERE, PREPARED, SFT, SLOW, Fault, tree_sha256


@dataclass
class Row:
    """`tried` faults, and a line for each that was not met."""

    name: str
    says: str
    tried: int = 0
    failed: list = field(default_factory=list)
    counted: Counter = field(default_factory=Counter)  # where the faults fell, for the table
    broken: str = ""  # why the row itself could not be tried
    seconds: float = 0.0
    minutes: ClassVar[float] = float("inf")

    def __post_init__(self):
        self.ends = time.monotonic() + 60 * self.minutes

    def in_time(self, faults):
        """Those that begin before the row's minutes are over: the first in any case."""
        for number, fault in enumerate(faults):
            if number == 0 or time.monotonic() < self.ends:
                yield fault

    def check(self, held, what):
        self.tried += 1
        if not held:
            self.failed.append(str(what))

    @property
    def told(self):
        """What holds, and where the faults fell."""
        if self.broken:
            return f"could not be tried: {self.broken}"
        fell = ", ".join(f"{n} {what}" for what, n in self.counted.items())
        return f"{self.says}; {fell}" if fell else self.says


# --- kills ------------------------------------------------------------------------------------------------------------

SFT_WAYS = {
    "plain": (),
    "dropout": ("lora.dropout=0.1",),
    "accumulation": ("trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=4"),
    "epochs": ("trainer.max_steps=-1", "trainer.num_train_epochs=3"),
    "constant rate": ("trainer.lr_scheduler_type=constant", "trainer.max_steps=10"),
    "cosine": ("trainer.lr_scheduler_type=cosine", "trainer.warmup_steps=2"),
    "two kept": ("trainer.save_total_limit=2", "trainer.save_steps=2"),
}
GRPO_WAYS = {
    "plain": (),
    "constant rate": ("trainer.lr_scheduler_type=constant", "trainer.max_steps=3"),
    "two iterations": ("trainer.num_iterations=2", "trainer.save_steps=2"),
    "window of two": ("trainer.steps_per_generation=2", "trainer.save_steps=2"),
}


def straight(place, command, names, kept):
    """What an uninterrupted run ends with, and its seconds."""
    trial = place.copy(*kept)
    began = time.monotonic()
    done = trial.run(command)
    seconds, left = time.monotonic() - began, ending(trial, names)
    trial.drop()
    assert done.code == 0 and left[0], done.said
    return left, seconds


def ending(trial, names):
    """The hash over files, and the steps in the order in which a training recorded them."""
    file = trial.folder / "runs" / "x" / "metrics.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
    return trial.sha256(*names), [row["step"] for row in rows if "loss" in row]


def kill_row(row, place, ways, base, names, kept, count, number=signal.SIGKILL, saving=None):
    """Each trial is killed one to three times at random moments, then run to its end: the ending has to be the same bytes.

    `saving` is a file of a checkpoint: the first kill of every fourth trial comes as the first of that name is being written.
    """
    rng, known = random.Random(0), {}
    if number == signal.SIGKILL:
        row.counted.update(dict.fromkeys(("kills", "in a save", "in a resumed run") if saving else ("kills",), 0))
    for trial_number in row.in_time(range(count)):
        way = list(ways)[trial_number % len(ways)]
        line = (*base, *ways[way])
        if way not in known:
            known[way] = straight(place, line, names, kept)
        expected, seconds = known[way]
        trial, kills = place.copy(*kept), []
        for attempt in range(rng.randint(1, 3)):
            after, before = rng.uniform(0.02, 1.0) * seconds, checkpoints(trial)
            if saving and attempt == 0 and trial_number % 4 == 3:
                killed = trial.killed_when(line, saving)
            else:
                killed = trial.killed(line, after, number)
            while attempt == 0 and killed.code == 0:  # it had ended: the machine is less busy than it was for the straight run
                trial.drop()
                trial, after = place.copy(*kept), after / 2
                killed = trial.killed(line, after, number)
            if killed.code == -signal.SIGKILL:
                kills.append(fell(before, checkpoints(trial)))
        count_kills(row, kills)
        done = trial.run(line)
        row.check(done.code == 0 and ending(trial, names) == expected, f"{way}: {done}, or another ending")
        trial.drop()
    return row


def checkpoints(trial):
    """Each checkpoint of a run by its name, and whether it is whole."""
    return {folder.name: (folder / "commit.json").is_file() for folder in trial.folder.glob("runs/x/checkpoints/checkpoint-*")}


def fell(before, after):
    """Where a kill fell, by the checkpoints that its process found and left: in a save, in a resumed run."""
    return any(not whole and before.get(name) is not False for name, whole in after.items()), any(before.values())


def count_kills(row, kills):
    """Those of one trial, for the table."""
    if "kills" in row.counted:
        row.counted["kills"] += len(kills)
        row.counted["trials of three"] += len(kills) == 3
    if "in a save" in row.counted:
        row.counted["in a save"] += sum(save for save, _ in kills)
        row.counted["in a resumed run"] += sum(resumed for _, resumed in kills)


TRAINED = [f"runs/x/{name}" for name in ADAPTER]
SAVING = "runs/x/checkpoints/checkpoint-*/adapter_model.safetensors"


def sft_kills(place, count):
    says = "killed at random moments, up to three times, then resumed: the same adapter, each step recorded once"
    row = Row("kills, SFT", f"{says} ({', '.join(SFT_WAYS)})")
    return kill_row(row, place, SFT_WAYS, (*SFT, "run_dir=runs/x"), TRAINED, ("data",), count, saving=SAVING)


def grpo_kills(place, count):
    row = Row("kills, GRPO", f"the same ({', '.join(GRPO_WAYS)})")
    kept = ("data", "runs/sft_tiny")
    return kill_row(row, place, GRPO_WAYS, (*GRPO, "run_dir=runs/x"), TRAINED, kept, count, saving=SAVING)


def evaluation_kills(place, count):
    row = Row("kills, evaluation", "the same predictions and results")
    return kill_row(row, place, {"plain": ()}, EVAL, EVALUATED, ("data", "runs/sft_tiny"), count)


def data_kills(place, count):
    row = Row("kills, data", "the same five files")
    return kill_row(row, place, {"plain": ()}, DATA, PREPARED, (), count)


AT_CHECKPOINTS = {
    "SFT, constant rate": ((*SFT, *SFT_WAYS["constant rate"]), ("data",), (9, 10)),
    "GRPO, constant rate": ((*GRPO, *GRPO_WAYS["constant rate"], "trainer.save_steps=1"), ("data", "runs/sft_tiny"), (3,)),
    "GRPO, two iterations": ((*GRPO, "trainer.num_iterations=2", "trainer.save_steps=1"), ("data", "runs/sft_tiny"), (1, 3)),
    "GRPO, window of two": ((*GRPO, "trainer.steps_per_generation=2", "trainer.save_steps=1"), ("data", "runs/sft_tiny"), (1, 3)),
}  # fmt: skip


def checkpoint_kills(place, count):
    row = Row(
        "kills at a checkpoint",
        "killed as one is whole, the last or one inside a generation window: the same adapter, no step more",
    )
    for way, (line, kept, steps) in list(AT_CHECKPOINTS.items())[:count]:
        line = (*line, "run_dir=runs/x")
        expected, _ = straight(place, line, TRAINED, kept)
        for step in steps:
            trial = place.copy(*kept)
            trial.killed_when(line, f"runs/x/checkpoints/checkpoint-{step}/commit.json")
            done = trial.run(line)
            row.check(done.code == 0 and ending(trial, TRAINED) == expected, f"{way}, step {step}: {done}, or another ending")
            trial.drop()
    return row


def two_processes(place, count):
    """SFT under torchrun, to which SIGTERM, SIGINT and SIGUSR1 go in turn, once to the launcher and once to one process."""
    row = Row("signals, two processes", "both stop after the same step with its checkpoint and one line, then end the same")
    straight_run = place.copy("data")
    assert launched(straight_run).returncode == 0
    expected = ending(straight_run, TRAINED)
    straight_run.drop()
    cases = [(number, to) for to in ("the launcher", "one process") for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    for number, to in row.in_time(cases[:count]):
        trial = place.copy("data")
        stopped = launched(trial, number, to)
        left = max((int(name.split("-")[1]) for name, whole in checkpoints(trial).items() if whole), default=0)
        says = f"stopped at step {left} of 30, checkpoint on disk: the same command with --resume goes on"
        row.check(stopped.stderr.count(says) == 1, f"{number.name} to {to}: {stopped.stderr[-300:]!r}")
        done = launched(trial)
        fine = done.returncode == 0 and f"resuming from runs/x/checkpoints/checkpoint-{left}\n" in done.stdout
        row.check(fine and ending(trial, TRAINED) == expected, f"{number.name} to {to}, resumed: {done.stderr[-300:]!r}")
        trial.drop()
    return row


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # fmt: skip
UNDER_IT = ("trainer.max_steps=30", "trainer.save_steps=1", "trainer.save_total_limit=2", "trainer.logging_steps=1",
            "data.num_train=20", "data.num_dev=0", "run_dir=runs/x", "--resume")  # fmt: skip


def launched(trial, number=None, to=None):
    """A training of two processes to its end, or a signal once its first checkpoint is whole."""
    script = (str(ROOT / "sft_train.py"), "--config", str(CONFIGS / "sft_tiny.yaml"), *UNDER_IT)
    with subprocess.Popen(
        [*TORCHRUN, *script], cwd=trial.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        while number and run.poll() is None and not any(checkpoints(trial).values()):
            time.sleep(0.05)
        if number:
            os.kill(run.pid if to == "the launcher" else workers_of(run.pid)[-1], number)
        said = run.communicate(timeout=2 * HANGS)
    return subprocess.CompletedProcess(script, run.returncode, *said)


def workers_of(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, listed.stdout.split()))


def signals(place, count):
    """SIGTERM, SIGINT and SIGUSR1 to SFT: whatever it says of it, the resumed run ends the same."""
    row = Row("signals, SFT", "sent at random moments, then resumed: the same adapter")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        line = (*SFT, "run_dir=runs/x")
        kill_row(row, place, {signal.Signals(number).name: ()}, line, TRAINED, ("data",), max(1, count // 3), number)
    return row


# --- every call to the file system, and every tenth of a byte count ---------------------------------------------------


def crash_row(row, place, line, names, kept, count):
    """The command goes on from what it leaves when it dies in front of the k-th call, for each k or for `count` of them.

    What that is, is copied in front of each call of one run: a killed process leaves the same. Equal copies are tried once.
    """
    expected, _ = straight(place, line, names, kept)
    trial = place.copy(*kept)
    copies = trial.folder.with_name(f"{trial.folder.name}-copies")
    copies.mkdir()
    calls = trial.run(line, Fault(copies=copies)).calls
    assert calls, "fault.so counts nothing: is it laid under the fork server?"
    states = sorted({tree_sha256(copies / str(k)): k for k in range(calls, 0, -1)}.values())
    row.says += f" ({calls} calls leave {len(states)} different folders)"
    for index in row.in_time(spread(len(states), count)):
        trial.drop()
        shutil.move(copies / str(states[index - 1]), trial.folder)
        done = trial.run(line)
        fine = done.code == 0 and ending(trial, names) == expected
        row.check(fine, f"call {states[index - 1]} of {calls}: {done}, or another ending")
    trial.drop()
    shutil.rmtree(copies)
    return row


def full_row(row, place, line, names, kept, count):
    """The disk is full at the n-th byte: one line. Then there is room, and the command ends as it would have.

    `count` places, or one at each tenth of the bytes of a checkpoint.
    """
    expected, _ = straight(place, line, names, kept)
    counted = place.copy(*kept)
    total = counted.run(line, Fault()).bytes
    size, upto = checkpoint_size(counted), total * 19 // 20  # two runs differ by some bytes: their rows have the time
    counted.drop()
    places = spread(upto, count or 1 + 10 * upto // size)
    row.says += f" (places {upto / len(places):,.0f} bytes apart{f', a checkpoint has {size:,}' if size else ''})"
    for n in row.in_time(places):
        trial = place.copy(*kept)
        full = trial.run(line, Fault(full_at=n - 1))
        row.check(full.is_one_line, f"byte {n} of {total}: {full}")
        done = trial.run(line)
        row.check(done.code == 0 and ending(trial, names) == expected, f"byte {n} of {total}, then room: {done}")
        trial.drop()
    return row


def checkpoint_size(trial):
    """How many bytes the newest checkpoint has; 0 for a stage without one."""
    newest = max(trial.folder.glob("runs/x/checkpoints/checkpoint-*"), default=None)
    return sum(file.stat().st_size for file in newest.rglob("*")) if newest else 0


def spread(total, count):
    """`count` whole numbers from 1 to `total`, the first and the last among them; all of them if `count` is None."""
    if count is None or count >= total:
        return range(1, total + 1)
    return sorted({1 + round(i * (total - 1) / max(1, count - 1)) for i in range(count)})


# The trainings are short and their adapters small, because each call costs two of them: three checkpoints of which one is rotated
# away, and two of which the first lies inside a generation window.
SMALL = ("trainer.save_steps=1", "lora.target_modules=[q_proj]", "data.num_dev=0", "run_dir=runs/x")
SMALL_SFT = (*SFT, *SMALL, "trainer.max_steps=3", "trainer.save_total_limit=2", "trainer.per_device_train_batch_size=2")
SMALL_GRPO = (*GRPO, *SMALL, "trainer.max_steps=2", "trainer.num_iterations=2", "adapter=null", "lora.r=16", "lora.alpha=32",
              f"rewards={{{HERE / 'reward.py'}:tokens: 1.0}}")  # fmt: skip
STAGES = {
    "data": (DATA, PREPARED, ()),
    "evaluation": (EVAL, EVALUATED, ("data", "runs/sft_tiny")),
    "SFT": (SMALL_SFT, TRAINED, ("data",)),
    "GRPO": (SMALL_GRPO, TRAINED, ("data",)),
}


def crash_points(stage):
    def row(place, count):
        says = "run again from what a death in front of each call that changes a file leaves: the same ending"
        return crash_row(Row(f"crash points, {stage}", says), place, *STAGES[stage], count)

    return row


def full_disk(stage):
    def row(place, count):
        return full_row(Row(f"full disk, {stage}", "one line at each place, and with room the same ending"),
                        place, *STAGES[stage], count)  # fmt: skip

    return row


# --- damages ----------------------------------------------------------------------------------------------------------


def damage_row(row, place, kept, folder, readers, same, count):
    """Each file below a folder is damaged in each way. A reader says so in a line, or does what it would have done.

    `readers` are commands, and `same` what a reader has to leave when it says nothing: a function of the trial.
    """
    expected = {}
    for line in readers:
        trial = place.copy(*kept)
        done = trial.run(line)
        assert done.code == 0, done.said
        expected[line] = same(trial)
        trial.drop()
    every = [(file, damage) for file in files_below(place, folder) for damage in DAMAGES]
    for index in row.in_time(spread(len(every), count)):
        file, damage = every[index - 1]
        for line in readers:
            trial = place.copy(*kept)
            damage(trial.folder / file)
            done = trial.run(line)
            fine = done.is_one_line or (done.code == 0 and same(trial) == expected[line])
            row.check(fine, f"{file}, {damage.__name__}, then {line[0]}: {done}, or another ending")
            trial.drop()
    return row


def files_below(place, folder):
    files = sorted((place.folder / folder).rglob("*"))
    return [path.relative_to(place.folder) for path in files if path.is_file() and path.name != ".lock"]


TWO_STEPS = (*SFT, "run_dir=runs/x", "trainer.max_steps=2")


def trained(trial):
    return trial.sha256("runs/x/adapter/adapter_model.safetensors")


def evaluated(trial):
    return trial.sha256(*EVALUATED)


def damaged_data(place, count):
    row = Row("damaged data sets", "said in a line by SFT and evaluation, or of no effect")
    kept = ("data", "runs/sft_tiny")
    return damage_row(row, place, kept, "data", [TWO_STEPS, EVAL], lambda trial: (trained(trial), evaluated(trial)), count)


def damaged_runs(place, count):
    row = Row("damaged runs", "a finished SFT run, read by GRPO and evaluation: said in a line, or of no effect")
    readers = [(*GRPO, "run_dir=runs/x", "trainer.max_steps=3"), EVAL]
    both = lambda trial: (trained(trial), evaluated(trial))  # noqa: E731
    return damage_row(row, place, ("data", "runs/sft_tiny"), "runs/sft_tiny", readers, both, count)


def damaged_adapters(place, count):
    row = Row("damaged adapters", "each file of a finished adapter, read by evaluation: said in a line, or of no effect")
    kept = ("data", "runs/sft_tiny")
    damage_row(row, place, kept, "runs/sft_tiny/adapter", [EVAL], evaluated, count)
    expected, _ = straight(place, EVAL, EVALUATED, kept)
    for key, value in BY_HAND.items():
        trial = place.copy(*kept)
        file = trial.folder / "runs" / "sft_tiny" / "adapter" / "adapter_config.json"
        before = json.loads(file.read_text())
        file.write_text(json.dumps(before | {key: value(before[key])}))
        done = trial.run(EVAL)
        row.check(done.is_one_line or ending(trial, EVALUATED) == expected, f"{key} by hand: {done}, or another ending")
        trial.drop()
    return row


# What someone may change in adapter_config.json to see what it does: each loads, and computes something else.
BY_HAND = {
    "lora_alpha": lambda alpha: 4 * alpha,
    "use_rslora": lambda used: not used,
    "target_modules": lambda names: names[:-1],
    "alpha_pattern": lambda pattern: {"q_proj": 1},
}


def damaged_checkpoints(place, count):
    """An SFT run that was stopped after its last but one checkpoint, of which one file is damaged."""
    row = Row("damaged checkpoints", "resumed from one that is whole with the same ending, or said in a line")
    line = (*SFT, "run_dir=runs/x")
    stopped = place.copy("data")
    assert stopped.run(line).code == 0
    run_dir = stopped.folder / "runs" / "x"
    newest = sorted(run_dir.glob("checkpoints/checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))[-1]
    shutil.rmtree(newest)
    shutil.rmtree(run_dir / "adapter")
    retell(run_dir, exit="running", finished=None)
    before = f"runs/x/checkpoints/checkpoint-{int(newest.name.split('-')[1]) - 3}"
    try:
        return damage_row(row, stopped, ("data", "runs/x"), before, [line], trained, count)
    finally:
        stopped.drop()


REGRADE = (*EVAL, "--regrade")
REPORT = ("report", "runs/eval", "--out", "report")


def damaged_evaluations(place, count):
    row = Row("damaged evaluations", "said in a line by --regrade and the report, or of no effect")
    done = place.copy("data", "runs/sft_tiny")
    assert done.run(EVAL).code == 0
    same = lambda trial: (trial.sha256(*EVALUATED), trial.sha256("report/report.md"))  # noqa: E731
    try:
        return damage_row(row, done, ("data", "runs/sft_tiny", "runs/eval"), "runs/eval", [REGRADE, REPORT], same, count)
    finally:
        done.drop()


def middle(file, new):
    lines = file.read_bytes().split(b"\n")
    lines[len(lines) // 2 - 1] = new(lines[len(lines) // 2 - 1])
    file.write_bytes(b"\n".join(lines))


GARBAGE = {
    "garbage": lambda file: middle(file, lambda line: b"\xff\x00 garbage"),
    "null": lambda file: middle(file, lambda line: b"null"),
    "a key less": lambda file: middle(file, lambda line: line.replace(b'"finish"', b'"finnish"')),
    "a number for a text": lambda file: middle(file, lambda line: line.replace(b'"stop"', b"1").replace(b'"length"', b"1")),
    "deep": lambda file: middle(file, lambda line: b"[" * 100_000),
    "another completion": lambda file: middle(file, lambda line: line.replace(b'"completion": "', b'"completion": "#### 1 ')),
    "torn": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "half": halve, "a bit": flip, "zeros": zero, "empty": empty,
}  # fmt: skip


def stopped_evaluation(place, line=EVAL):
    """A copy in which an evaluation died with half of its answers on disk."""
    counted = place.copy("data", "runs/sft_tiny")
    calls = counted.run(line, Fault()).calls
    counted.drop()
    for k in range(calls // 2, calls):
        trial = place.copy("data", "runs/sft_tiny")
        trial.run(line, Fault(crash_at=k))
        part = trial.folder / "runs" / "eval" / "predictions.part0.jsonl"
        if part.is_file() and len(part.read_bytes().splitlines()) >= 4:
            return trial, part.relative_to(trial.folder)
        trial.drop()
    raise AssertionError("no evaluation could be stopped half way")


def damaged_parts(place, count):
    row = Row("damaged part files", "answered again: the same predictions and results")
    expected, _ = straight(place, EVAL, EVALUATED, ("data", "runs/sft_tiny"))
    stopped, part = stopped_evaluation(place)
    for way, damage in list(GARBAGE.items())[:count]:
        trial = stopped.copy("data", "runs")
        damage(trial.folder / part)
        done = trial.run(EVAL)
        row.check(done.code == 0 and ending(trial, EVALUATED) == expected, f"{way}: {done}, or another ending")
        trial.drop()
    stopped.drop()
    return row


def forged(place, count):
    row = Row("forged predictions", "refused in a line, or put right")
    done = place.copy("data", "runs/sft_tiny")
    assert done.run(EVAL).code == 0
    true = done.sha256(*EVALUATED)

    def forge(name, change):
        file = done.folder / "runs" / "eval" / name
        before = file.read_bytes()
        rows = [json.loads(line) for line in before.splitlines()]
        file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in change(rows)), encoding="utf-8")
        for line in (REGRADE, REPORT):
            ended = done.run(line)
            row.check(ended.is_one_line or done.sha256(*EVALUATED) == true, f"{name}, then {line[0]}: {ended}")
            file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in change(rows)), encoding="utf-8")
        file.write_bytes(before)
        assert done.run(REGRADE).code == 0 and done.sha256(*EVALUATED) == true

    golds = {one["id"]: one["answer"] for one in read_rows(done.folder / "runs" / "eval" / "questions.jsonl")}
    forge("predictions.jsonl", lambda rows: [one | {"completion": f"#### {golds[one['id']]}"} for one in rows])
    forge("predictions.jsonl", lambda rows: [one | {"correct": True, "strict": True} for one in rows])
    forge("predictions.jsonl", lambda rows: rows[:-1])
    forge("predictions.jsonl", lambda rows: [*rows, rows[0]])
    forge("predictions.jsonl", lambda rows: [one | {"id": "nobody"} for one in rows])
    forge("questions.jsonl", lambda rows: [one | {"answer": "1"} for one in rows])
    forge("questions.jsonl", lambda rows: rows[1:])
    done.drop()
    other, part = stopped_evaluation(place, (*EVAL, "seed=1", "generation.temperature=0.7"))
    mine, _ = stopped_evaluation(place)
    shutil.copy(other.folder / part, mine.folder / part)
    ended = mine.run(EVAL)
    row.check(ended.code == 0 and mine.sha256(*EVALUATED) == true, f"a part file of other settings: {ended}, or another ending")
    other.drop(), mine.drop()
    return row


# --- inputs -----------------------------------------------------------------------------------------------------------

JSONL = """name: raw
output_dir: data/raw
source:
  kind: jsonl
  path: raw
prompt:
  instruction: '{question}'
tokenizer:
  name_or_path: models/tiny
"""


def check_input(row, what, code, said, seconds):
    lines = len(said.strip().splitlines())
    held = code in (0, 2) and "Traceback" not in said and seconds < SLOW and lines <= 25
    row.check(held, f"{what}: rc {code} after {seconds:.1f} s, {lines} lines: {said.strip()[-160:]!r}")


def malformed_rows(place, count):
    row = Row("malformed rows and files", "refused by line and reason, or taken; no traceback, none slow")
    trial = place.copy()
    (trial.folder / "raw.yaml").write_text(JSONL)
    good = json.dumps(inputs.GOOD).encode() + b"\n"
    makes = [(lambda path, line=line: path.write_bytes(good + line + b"\n")) for line in inputs.rows()]
    makes = [*inputs.files(), *makes] if count is None else [*inputs.files()][::3] + makes[:: max(1, len(makes) // count)]
    commands = []
    for number, make in enumerate(makes):
        inputs.written(trial.folder / f"raw{number}", make)
        commands.append(("data_prep", "--config", "raw.yaml", f"source.path=raw{number}", f"output_dir=data/{number}"))
    for number, (code, said, seconds) in enumerate(trial.many(commands)):
        check_input(row, f"input {number}", code, said, seconds)
    row.check(row.tried == len(makes), f"{row.tried} of {len(makes)} inputs were answered at all")
    trial.drop()
    return row


def malformed_configs(place, count):
    row = Row("malformed configs", "every fault with its line, or taken; no code run, no traceback, none slow")
    trial = place.copy()
    changed = [JSONL + change for change in inputs.configs()]
    commands = []
    for number, text in enumerate([*(changed[index - 1] for index in spread(len(changed), count)), *inputs.bulk()]):
        (trial.folder / f"{number}.yaml").write_text(text, encoding="utf-8")
        commands.append(("data_prep", "--config", f"{number}.yaml", "--print-config"))
    answers = trial.many(commands)
    for line, (code, said, seconds) in zip(commands, answers, strict=False):
        check_input(row, line[2], code, said if code else "", seconds)
    row.check(len(answers) == len(commands), f"{len(answers)} of {len(commands)} configs were answered at all")
    trial.drop()
    return row


PLACES = ("{file}", "{file}/below", "gone/../{file}", "dangling", "loop", "/proc/x", "/dev/null", "n" * 300, ".", "models/tiny")


def bad_places(place, count):
    row = Row("folders that cannot be written", "one line from each script, and nothing changed")
    trial = place.copy("data", "runs/sft_tiny")
    (trial.folder / "file").write_text("mine")
    (trial.folder / "dangling").symlink_to("nowhere/at/all")
    (trial.folder / "loop").symlink_to("loop")
    commands = [
        (*line, f"{key}={name.format(file='file')}")
        for name in PLACES[:count]
        for line, key in ((DATA, "output_dir"), (TWO_STEPS, "run_dir"), (GRPO, "run_dir"), (EVAL, "run_dir"))
    ]
    for line in commands:
        done = trial.run(line)
        row.check(done.is_one_line and (trial.folder / "file").read_text() == "mine", f"{line[0]} {line[-1][:40]}: {done}")
    trial.drop()
    return row


# --- secrets ----------------------------------------------------------------------------------------------------------

CANARIES = {
    "HF_TOKEN": "hf_canaryCanaryCanaryCanaryCanary42", "WANDB_API_KEY": "c" * 38 + "4e", "HF_HUB_USER_AGENT_ORIGIN": "canary-43",
    "AWS_SECRET_ACCESS_KEY": "canary/secret/key/44",
}  # fmt: skip
PASSWORD = "canaryPassw0rd45"
LEAKS = ("hub.repo_id=https://me:{}@hub.example/x", "model.name_or_path=https://me:{}@hub.example/x", "adapter=https://me:{}@x/y",
         "run_dir=https://me:{}@hub.example/x")  # fmt: skip


def canaries(place, count):
    """The fork server has them in its environment (see __main__.py), so that every stage runs with them."""
    row = Row("canaries", "no token of the environment and no password of a setting in any file or on the console")
    trial = place.copy()
    said = [trial.run(line).said for line in (DATA, SFT, GRPO, EVAL, REPORT)]
    said += [trial.run((*TWO_STEPS, leak.format(PASSWORD))).said for leak in LEAKS]
    said += [trial.run(("hub", "runs/sft_tiny", "--repo-id", f"https://me:{PASSWORD}@hub.example/x")).said]
    files = [path for path in trial.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for secret in (*CANARIES.values(), PASSWORD):
        hits = [path.name for path in files if secret.encode() in path.read_bytes()]
        hits += [text.strip()[-160:] for text in said if secret in text]
        row.check(not hits, f"{secret[:12]}... in {hits}")
    trial.drop()
    return row


# --- the Hub ----------------------------------------------------------------------------------------------------------


def hub_faults(place, count):
    """The faults that tests/test_hub.py knows, against a Hub on this machine: one line, and the next push succeeds."""
    row = Row("Hub faults", "a line with its remedy, the run unchanged, one commit after the second push")
    which = "a_failure or a_passing or no_network" if count is None else "a_passing or no_network"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "tests/test_hub.py", "-k", which],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith(("PASSED ", "FAILED ", "ERROR ")):
            row.check(line.startswith("PASSED"), line)
    assert row.tried, done.stdout + done.stderr
    return row


# Name -> the function, its count in full (None: all there are) and in the short form.
ROWS = {
    "kills, SFT": (sft_kills, 100, 5),
    "kills, GRPO": (grpo_kills, 60, 2),
    "kills, evaluation": (evaluation_kills, 30, 2),
    "kills, data": (data_kills, 15, 2),
    "kills at a checkpoint": (checkpoint_kills, None, 3),
    "signals, SFT": (signals, 15, 3),
    "signals, two processes": (two_processes, 6, 1),
    "crash points, data": (crash_points("data"), None, 12),
    "crash points, evaluation": (crash_points("evaluation"), None, 6),
    "crash points, SFT": (crash_points("SFT"), None, 6),
    "crash points, GRPO": (crash_points("GRPO"), None, 2),
    "full disk, data": (full_disk("data"), 10, 4),
    "full disk, evaluation": (full_disk("evaluation"), 10, 4),
    "full disk, SFT": (full_disk("SFT"), None, 4),
    "full disk, GRPO": (full_disk("GRPO"), None, 2),
    "damaged data sets": (damaged_data, None, 6),
    "damaged runs": (damaged_runs, None, 6),
    "damaged adapters": (damaged_adapters, None, None),
    "damaged checkpoints": (damaged_checkpoints, None, 6),
    "damaged evaluations": (damaged_evaluations, None, 10),
    "damaged part files": (damaged_parts, None, None),
    "forged predictions": (forged, None, None),
    "malformed rows and files": (malformed_rows, None, 40),
    "malformed configs": (malformed_configs, None, 45),
    "folders that cannot be written": (bad_places, None, 4),
    "canaries": (canaries, None, None),
    "Hub faults": (hub_faults, None, 5),
}

"""Who is told of a run beside its directory: wandb, trackio, tensorboard, mlflow, any of them at once.

Each gets the resolved settings, every row of metrics.jsonl under its own names, tables of sampled completions, and what
evaluate.py found. None of them can stop a run: one that fails is left out, and a line says so.

transformers has callbacks for them. They raise into the training, show no tables, begin a second mlflow run after an
interruption, and are not there when an evaluation ends.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Values = Mapping[str, Any]
PROJECT = "posttrain"


class Place(NamedTuple):
    """Where a run is found again: an interrupted one that goes on, and the evaluation of what it made, use the same."""

    folder: Path  # the run directory
    name: str
    id: str
    settings: Values  # none: they are there already


class Tracker(Protocol):
    where: str  # what to tell a reader

    def row(self, step: int, values: dict[str, float]) -> None: ...
    def table(self, name: str, step: int, columns: list[str], rows: list[list[Any]]) -> None: ...
    def close(self, ok: bool) -> None: ...


class Trackers:
    """Those of one run. Without any, nothing is told."""

    def __init__(self, say: Callable[[str], None] = print, note: Callable[[str], None] = print) -> None:
        self._say, self._note = say, note
        self._open: dict[str, Tracker] = {}

    def open(self, names: Iterable[str], place: Place) -> None:
        for name in names:
            self._without_stopping(name, self._begin, name, place)

    def row(self, step: int, values: Values) -> None:
        """The numbers of a row; what is no number a curve cannot show."""
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        for name, tracker in [*self._open.items()]:
            self._without_stopping(name, tracker.row, step, numbers)

    def table(self, title: str, step: int, rows: Sequence[Values]) -> None:
        """Rows of equal keys."""
        if not rows:
            return
        columns = list(rows[0])
        cells = [[row[key] if isinstance(row[key], (int, float)) else str(row[key]) for key in columns] for row in rows]
        for name, tracker in [*self._open.items()]:
            self._without_stopping(name, tracker.table, title, step, columns, cells)

    def close(self, ok: bool = True) -> None:
        for name, tracker in [*self._open.items()]:
            self._without_stopping(name, tracker.close, ok)
        self._open.clear()

    def _begin(self, name: str, place: Place) -> None:
        self._open[name] = OPENERS[name](place)
        self._say(f"tracking {name}: {self._open[name].where}")

    def _without_stopping(self, name: str, tell: Callable[..., None], *what: Any) -> None:
        """Whatever a tracker raises, as where its server is down or refuses a key, ends that tracker and nothing else."""
        try:
            tell(*what)
        except Exception as error:  # each of these packages raises its own
            self._open.pop(name, None)
            said = (str(error).splitlines() or [""])[0][:200]
            self._note(f"tracking {name} failed ({type(error).__name__}: {said}) and is left out; every row is in metrics.jsonl")


# --- each of them -----------------------------------------------------------------------------------------------------


class Wandb:
    """https://docs.wandb.ai/ref/python. Without a login it writes below the run directory, for `wandb sync`."""

    def __init__(self, place: Place) -> None:
        import wandb

        offline = not knows_wandb() or os.environ.get("WANDB_MODE") in ("offline", "disabled")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=place.name,
            id=place.id,
            resume="allow",
            dir=str(place.folder),
            config=dict(place.settings) or None,
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("*", step_metric="step")  # its own count only grows, and a resumed run repeats some steps
        self.where = f"offline in {place.folder}/wandb; `wandb sync` uploads it" if offline else str(self._run.url)

    def row(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def table(self, name: str, step: int, columns: list[str], rows: list[list[Any]]) -> None:
        self._run.log({"step": step, name: self._wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)})

    def close(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


def knows_wandb() -> bool:
    """Whether this machine has a login, or was told the mode."""
    told = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")
    return bool(told) or Path("~/.netrc").expanduser().is_file()


class Trackio:
    """https://huggingface.co/docs/trackio. A run is found again by its name."""

    def __init__(self, place: Place) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._trackio = trackio
        trackio.init(project=project, name=place.id, resume="allow", config=dict(place.settings) or None, embed=False)
        self.where = f"`trackio show --project {project}`"

    def row(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def table(self, name: str, step: int, columns: list[str], rows: list[list[Any]]) -> None:
        self._trackio.log({name: self._trackio.Table(columns=columns, data=rows)}, step=step)

    def close(self, ok: bool) -> None:
        self._trackio.finish()  # type: ignore[no-untyped-call]


class TensorBoard:
    """https://pytorch.org/docs/stable/tensorboard.html. A resumed run hides its steps from the first that comes again."""

    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._folder, self._settings = SummaryWriter, str(place.folder / "tensorboard"), place.settings
        self._writer: SummaryWriter | None = None
        self.where = f"tensorboard --logdir {self._folder}"

    def _at(self, step: int) -> Any:
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=step)
            if self._settings:
                rows = [[key, value] for key, value in _flat(self._settings).items()]
                self._writer.add_text("settings", _as_markdown(["key", "value"], rows))
        return self._writer

    def row(self, step: int, values: dict[str, float]) -> None:
        writer = self._at(step)
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    def table(self, name: str, step: int, columns: list[str], rows: list[list[Any]]) -> None:
        self._at(step).add_text(name, _as_markdown(columns, rows), step)

    def close(self, ok: bool) -> None:
        if self._writer:
            self._writer.close()


class MLflow:
    """https://mlflow.org/docs/latest/api_reference. A run is found again by a tag."""

    TAG = "posttrain.id"

    def __init__(self, place: Place) -> None:
        # A server that is away is tried for minutes by default, at each row.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        found = mlflow.search_runs(filter_string=f"tags.`{self.TAG}` = '{place.id}'", output_format="list", max_results=1)
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=place.name, tags={self.TAG: place.id})
        if place.settings:
            mlflow.log_dict(dict(place.settings), "settings.json")
        self.where = f"run {place.name} at {mlflow.get_tracking_uri()}"

    def row(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics({key.replace("@", "_at_"): value for key, value in values.items()}, step=step)

    def table(self, name: str, step: int, columns: list[str], rows: list[list[Any]]) -> None:
        data = {column: [row[place] for row in rows] for place, column in enumerate(columns)}
        self._mlflow.log_table(data, artifact_file=f"{name}/step_{step}.json")

    def close(self, ok: bool) -> None:
        self._mlflow.end_run("FINISHED" if ok else "FAILED")


OPENERS: dict[str, Callable[[Place], Tracker]] = {
    "wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard, "mlflow": MLflow,
}  # fmt: skip


def _flat(values: Values, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def _as_markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """A table in which no cell breaks its row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in line) + " |" for line in lines)

"""What a run tells: a live display or plain lines, ``metrics.jsonl`` always, trackers where asked for."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from tract_fast import perf
from tract_fast.checkpoint import replace_file
from tract_fast.errors import UserError


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` after ``step``: a resumed run writes them again. A torn one goes."""
    if path.exists():
        replace_file(path, "".join(json.dumps(r) + "\n" for r in read_metrics(path) if r["step"] <= step))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, in order; none where there is no file.

    A line that a killed run left half written is the last one and is left out. Raises UserError at another line that is
    no record.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is not a line of JSON: give the metrics.jsonl of a run") from None
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            raise UserError(f"{path}:{number} is no record of a step: give the metrics.jsonl of a run")
        records.append(record)
    return records


def has_evaluation(path: Path, step: int) -> bool:
    """Whether ``metrics.jsonl`` holds an evaluation after ``step`` steps."""
    return any(record["step"] == step and "eval" in record for record in read_metrics(path))


class Tracker(NamedTuple):
    """A place outside the run's folder that metrics go to as well."""

    write: Callable[[int, dict[str, float]], None]  # (step, {name: value})
    close: Callable[[], None]


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError for the first of ``train.trackers`` that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers names {name}, which is not installed: pip install {name}")


def open_tracker(name: str, run_dir: Path, recipe: dict, done: int) -> Tracker:
    """Open one of ``train.trackers`` for a run that has ``done`` steps."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run wrote after the checkpoint is written again
        writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1 if done else None)

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return Tracker(write, writer.close)
    tracker = importlib.import_module(name)  # wandb, and trackio, which has its calls
    tracker.init(project="tract-fast", name=run_dir.name, config=recipe)
    return Tracker(lambda step, values: tracker.log(values, step=step), tracker.finish)


def _speed(record: dict[str, Any]) -> str:
    """Tokens computed a second; where prompts are shared, also as if each were computed for each of its sequences."""
    computed, logical = (record[name] / record["seconds"] for name in ("tokens", "logical_tokens"))
    return f"{computed:.0f} tok/s" + (f" ({logical:.0f} logical)" if logical > computed else "")


class RunLog:
    """The one place a run writes to. Only the main rank makes one that is ``loud``; the others write nothing."""

    def __init__(self, run_dir: Path, *, total: int, done: int, trackers: list[Tracker], loud: bool):
        self.console = Console(quiet=not loud, highlight=False, soft_wrap=True)
        self.total, self.trackers = total, trackers
        self.recent: deque[float] = deque(maxlen=20)  # seconds of the last steps, for the time left
        self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8") if loud else None
        self.bar = None
        if loud and self.console.is_terminal:
            columns = (  # what must be seen on a narrow terminal first; metrics are cut off before it
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total)) + 1)),
                TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=12)),
                BarColumn(bar_width=12, table_column=Column(min_width=6)),
                TextColumn("{task.fields[now]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("starting", total=total, completed=done, now="")
            self.bar.start()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc) -> None:
        if self.bar:
            self.bar.stop()
        for tracker in self.trackers:
            tracker.close()
        if self.file:
            self.file.close()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step: the keys of DESIGN section 5, ``metrics.jsonl``."""
        self._write(record, {f"train/{k}": v for k, v in record.items() if k != "step"})
        self.recent.append(record["seconds"])
        left = perf.duration(sum(self.recent) / len(self.recent) * (self.total - record["step"]))
        now = (
            f"loss {record['loss']:.4f}  ce {record['ce']:.4f}  mse {record['mse']:.3f}  "
            f"mass {record['score_mass']:.3f}  "
            f"mae {record['score_mae']:.3f}  lr {record['lr']:.2e}  |g| {record['grad_norm']:.2f}  "
            f"{_speed(record)}  {record['samples'] / record['seconds']:.1f} samples/s  "
            + (f"mfu {record['mfu']:.1%}  " if "mfu" in record else "")
            + f"{record['memory']:.1f} GiB"
        )
        if self.bar:
            self.bar.update(self.task, completed=record["step"], now=now, description=f"{left} left")
        else:
            self.say(f"step {record['step']}/{self.total}  {now}  left {left}")

    def evaluating(self, count: int) -> None:
        """Held-out examples are being scored, which may take minutes."""
        if self.bar:
            self.bar.update(self.task, description="evaluating", now=f"{count} held-out examples")

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Held-out metrics after ``step`` steps."""
        self._write({"step": step, "eval": metrics}, {f"eval/{k}": v for k, v in metrics.items()})
        shown = "  ".join(f"{k} {'undefined' if v is None else f'{v:.4g}'}" for k, v in metrics.items())
        self.say(f"held out after step {step} (teacher-forced): {shown}")

    def _write(self, record: dict[str, Any], flat: dict[str, Any]) -> None:
        if not self.file:
            return
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
        finite = {k: v for k, v in flat.items() if v is not None and math.isfinite(v)}
        for tracker in self.trackers:
            tracker.write(record["step"], finite)

"""Checkpoints that are written beside training: a copy is taken between two steps, and a thread writes it.

Every rank writes the rows it holds; the ranks agree over a process group of their own (on the group that training uses,
their calls would meet those of the steps and both would wait for ever) that all of it is on disk; then the main rank
renames the folder and replaces the pointer. Killed at any instant, the checkpoint before is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tract_fast import shards
from tract_fast.checkpoint import (
    Progress,
    flush,
    folder,
    make_readable,
    one_line,
    replace_file,
    training_state,
    written,
)
from tract_fast.errors import RunStopped
from tract_fast.memory import ran_out
from tract_fast.model import TractModel
from tract_fast.sections import LOWER_IS_BETTER, Checkpoint

MORE_MEMORY = "the host holds a copy of what is saved; end what else takes its memory, or use more nodes"
MESSAGE = 500  # bytes of a rank's reason that the others learn


class Saver:
    """The one writer of a run's checkpoints. Every rank makes one and calls its methods at the same steps."""

    def __init__(self, run_dir: Path, settings: Checkpoint):
        self.checkpoints, self.settings = folder(run_dir), settings
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=settings.timeout))
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None  # of the last write, until ``wait`` raises it
        self.told: list[str] = []  # what was written since ``news`` was asked last

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, RunStopped):  # what ends the run does not harm the state that was copied before it
            with contextlib.suppress(OSError):
                self.wait()

    @property
    def failed(self) -> bool:
        """Whether the last write came to nothing; ranks may learn it at different steps."""
        return self.error is not None

    def start(
        self,
        model: TractModel,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        scores: Mapping[int, float | None],
    ) -> None:
        """Copy what is to be saved and begin to write it; waits for the write before, and raises what ``wait`` does.

        ``scores``: the value of ``checkpoint.metric`` by step, for ``keep_best``.
        """
        self.wait()
        began = time.perf_counter()
        try:
            copied: dict[str, shards.Part] | BaseException = self._copy(model, optimizer)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            copied = error.with_traceback(None)  # which holds what was copied; the thread tells the other ranks
        held = time.perf_counter() - began
        arguments = (copied, progress, dict(scores), began, held)
        self.thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self.thread.start()

    def _copy(self, model: TractModel, optimizer: torch.optim.Optimizer) -> dict[str, shards.Part]:
        """In host memory: the rows that this rank writes."""
        copied = {}
        for name, tensor in training_state(model, optimizer).items():
            mine = shards.part(tensor, is_main=self.rank == 0)
            if mine.writes and mine.local.numel():
                copied[name] = mine._replace(local=mine.local.detach().to("cpu", copy=True).contiguous())
        return copied

    def wait(self) -> None:
        """Until the last write is whole. Raises OSError where it came to nothing: the one before is whole then."""
        if self.thread:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error:
            raise error

    def news(self) -> list[str]:
        """A line for each checkpoint that was completed since the last call."""
        lines, self.told = self.told, []
        return lines

    def _run(self, *arguments) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # of a thread: the loop raises it at its next step
            self.error = error

    def _write(self, copied: dict | BaseException, progress: Progress, scores: dict, began: float, held: float) -> None:
        final = self.checkpoints / f"step_{progress.step:06d}"
        partial = final.with_suffix(".tmp")
        file = partial / f"rank_{self.rank:05d}.safetensors"
        try:
            self._together(lambda: self._make(partial), main_only=True)
            self._together(lambda: self._write_rows(file, copied))
            self._together(lambda: self._commit(partial, final, progress), main_only=True)
        except OSError as error:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"checkpoint of step {progress.step} could not be written: {error}") from error
        seconds = time.perf_counter() - began
        self.told.append(f"checkpoint: {final} (training held {held:.2f} s, whole after {seconds:.2f} s)")
        if self.rank == 0:
            self._retain(progress.step, scores)

    def _together(self, work, main_only: bool = False) -> None:
        """Do ``work`` and wait until all ranks have; raises OSError on all where it failed on one."""
        problem = ""
        if self.rank == 0 or not main_only:
            try:
                work()
            except shards.FAILURES as error:
                problem = one_line(error)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                problem = f"out of memory ({one_line(error)}): {MORE_MEMORY}"
        texts = torch.zeros(self.world, MESSAGE, dtype=torch.uint8)
        if problem:
            text = problem.encode()[:MESSAGE]
            texts[self.rank, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        dist.all_reduce(texts, group=self.group)
        for rank, row in enumerate(texts):
            if row[0]:
                where = f"rank {rank}: " if self.world > 1 else ""
                raise OSError(where + bytes(row[row != 0].tolist()).decode(errors="replace"))

    def _make(self, partial: Path) -> None:
        for left in self.checkpoints.glob("step_*.tmp"):  # by a run that was killed, or ``set_aside``
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)

    def _write_rows(self, file: Path, copied: dict[str, shards.Part] | BaseException) -> None:
        if isinstance(copied, BaseException):
            raise copied
        shards.write(file, copied)
        make_readable(file)

    def _commit(self, partial: Path, final: Path, progress: Progress) -> None:
        replace_file(partial / "state.json", json.dumps(asdict(progress) | {"world": self.world}))
        if final.exists():  # an earlier run was stopped between rename and pointer
            shutil.rmtree(set_aside(final), ignore_errors=True)
        os.rename(partial, final)
        flush(final.parent)
        replace_file(final.parent / "latest", final.name + "\n")

    def _retain(self, step: int, scores: dict[int, float | None]) -> None:
        """Delete what is not to be kept; ``latest`` names the new checkpoint by now. One that cannot be deleted costs
        space, not the run."""
        for path in outdated(self.checkpoints, step, self.settings, scores):
            try:
                shutil.rmtree(set_aside(path))
            except OSError as error:
                reason = one_line(error)
                self.told.append(f"warning: {path} could not be deleted ({reason}): the next save tries again")


def set_aside(path: Path) -> Path:
    """Take a checkpoint's name from it before it is deleted, so that none is ever there in part; the next save deletes
    what is left under the name it has then."""
    aside = path.with_suffix(".old.tmp")
    os.rename(path, aside)
    return aside


def outdated(checkpoints: Path, step: int, settings: Checkpoint, scores: Mapping[int, float | None]) -> list[Path]:
    """The checkpoints that go once that of ``step`` is complete: neither among the newest nor among the best."""
    complete = {int(p.name.removeprefix("step_")): p for p in written(checkpoints)}
    # a later step is what a kill left between its rename and its pointer: this run will write it again
    steps = sorted(s for s in complete if s <= step)
    known = [s for s in steps if scores.get(s) is not None]
    sign = -1 if settings.metric in LOWER_IS_BETTER else 1
    best = sorted(known, key=lambda s: (sign * scores[s], s), reverse=True)[: settings.keep_best]
    return [complete[s] for s in complete.keys() - set(steps[-settings.keep_last :]) - set(best)]

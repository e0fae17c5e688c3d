"""One process or many: start ranks through ``torch.distributed.run``, or join those that torchrun or Slurm started.

The launcher stays beside its ranks: it hands signals on, starts them again where ``run.max_restarts`` allows it, and
when one ends badly it tells which and why, once. A rank leaves a note of how it ended in a folder that the launcher
names.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tract_fast import recipe as recipes
from tract_fast.errors import UserError
from tract_fast.recipe import Recipe

NOTES = "TRACT_FAST_NOTES"  # environment of a launched rank: the folder for its note
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}  # exit codes; 75: saved, start again to go on
STOP_SECONDS = 600  # that ranks have to finish a step and save after a signal, before they are killed
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Joined(NamedTuple):
    """This process among the ranks that a launcher started."""

    rank: int
    local_rank: int
    world: int
    by: str


def joined(environment: Mapping[str, str] = os.environ) -> Joined | None:
    """The ranks that torchrun, or srun with a task per rank, started; None without. The latter's environment is
    completed to that of torchrun."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        return Joined(*(int(environment.get(name, 0)) for name in names), "torchrun")
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1:
        return None
    host, port = slurm_endpoint(environment)
    found = Joined(int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"]), tasks, "Slurm")
    complete = {"RANK": found.rank, "LOCAL_RANK": found.local_rank, "WORLD_SIZE": tasks, "MASTER_ADDR": host}
    os.environ.update({name: str(value) for name, value in {**complete, "MASTER_PORT": port}.items()})
    return found


def slurm_endpoint(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the ranks of a Slurm step meet: its first node, at a port that follows from the job, or what MASTER_ADDR
    and MASTER_PORT say."""
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[]*)(?:\[(\d+))?", nodes)
    port = 20_000 + int(environment.get("SLURM_JOB_ID", 0)) % 20_000
    host = environment.get("MASTER_ADDR") or first[1] + (first[2] or "")
    return host, int(environment.get("MASTER_PORT") or port)


def train(recipe: Recipe, dry_run: bool = False) -> int:
    """Train by a recipe: here, among ranks that were started already, or in ``run.nproc`` new ones. Returns the exit
    code. Raises what ``tract_fast.train.run`` does where it runs here."""
    nproc = processes(recipe.run.nproc)
    many_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if nproc > 1 and not launched and not dry_run:
        return launch(recipe, nproc, nodes=many_tasks)
    begin_note()
    from tract_fast import train

    code = train.run(recipe, dry_run=dry_run, joined=None if dry_run else joined())
    if code:
        note(code, "")
    return code


def processes(nproc: int | str) -> int:
    """``run.nproc`` as a number. Raises UserError where there are fewer GPUs."""
    if nproc == 1:
        return 1
    import torch

    gpus = torch.cuda.device_count()
    if nproc == "auto":
        print(f"run.nproc: auto is {max(gpus, 1)} ({f'{gpus} GPUs' if gpus else 'no GPU: one process with all cores'})")
        return max(gpus, 1)
    if gpus and nproc > gpus:
        raise UserError(f"run.nproc = {nproc}: this node has {gpus} GPUs; write auto or at most {gpus}")
    return nproc


def launch(recipe: Recipe, nproc: int, nodes: bool = False) -> int:
    """Start ``nproc`` ranks here (``nodes``: as one node of a Slurm step of several) and stay until all have ended."""
    threads = max(1, len(os.sched_getaffinity(0)) // nproc) if hasattr(os, "sched_getaffinity") else 1
    if "OMP_NUM_THREADS" not in os.environ:
        print(f"OMP_NUM_THREADS: {threads} (this node's cores over {nproc} ranks)")
    # not in run.dir: ranks read the recipe at each start, and another launcher may write there before it is refused
    with tempfile.TemporaryDirectory(prefix="tract_fast_") as own:
        resolved, notes = Path(own, "recipe.yaml"), Path(own, "notes")
        resolved.write_text(recipes.dump(recipe), encoding="utf-8")
        notes.mkdir()
        words = command(resolved, nproc, recipe.run.max_restarts, os.environ if nodes else {})
        print("launching:", shlex.join([sys.executable, "-m", "torch.distributed.run", *words]), flush=True)
        with _environment({NOTES: str(notes), "OMP_NUM_THREADS": str(threads)}):
            return watch(words, notes, loud=recipe.run.max_restarts > 0)


def command(recipe: Path, nproc: int, max_restarts: int, slurm: Mapping[str, str]) -> list[str]:
    """Arguments for ``torch.distributed.run``."""
    from torch.distributed.run import get_args_parser

    words = ["--nproc-per-node", str(nproc), "--max-restarts", str(max_restarts), "--monitor-interval", "0.2"]
    known = get_args_parser().format_help()  # torch 2.11 lacks some
    asked = {"--signals-to-handle": "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout": str(STOP_SECONDS)}
    words += [word for flag, value in asked.items() if flag in known for word in (flag, value)]
    if slurm:
        host, port = slurm_endpoint(slurm)
        words += ["--nnodes", slurm["SLURM_STEP_NUM_TASKS"], "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", slurm.get("SLURM_JOB_ID", "0")]
    else:
        words += ["--standalone"]
    return [*words, "-m", "tract_fast", "train", str(recipe)]


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Variables that are not set already, set inside."""
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def watch(words: list[str], notes: Path, loud: bool) -> int:
    """Run ``torch.distributed.run`` in this process and return the exit code; ``loud`` lets its errors be seen, which
    tell why ranks are started again."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    logging.disable(logging.WARNING if loud else logging.ERROR)  # its account of a failure is told below, in a line
    try:
        torchrun.run(torchrun.parse_args(words))
        return 0
    except ChildFailedError as error:
        ends = {rank: (failure.exitcode, failure.pid) for rank, failure in error.failures.items()}
        code, message = verdict(ends, read_notes(notes))
    except SignalException as error:
        for pid in children():  # a second signal cut the wait for them short
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code, message = verdict({}, read_notes(notes))
        code = code or STOPPED.get(error.sigval, 1)
    except RendezvousError as error:
        place = words[words.index("--rdzv-endpoint") + 1] if "--rdzv-endpoint" in words else "this node"
        told = " ".join(str(error.__cause__ or error).split())[:200]
        code, message = 1, f"the nodes did not meet at {place} ({told}): see that it can be reached, or set MASTER_ADDR"
    finally:
        logging.disable(logging.NOTSET)
    if message:
        print("error:", message, file=sys.stderr, flush=True)
    return code


def children() -> list[int]:
    """Processes that this one has started and that are still there (Linux; elsewhere none are found)."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def note(code: int, message: str, *, lost: bool = False, hangs: bool = False) -> bool:
    """Leave word for the launcher of how this rank ends; False where there is none. ``lost``: another rank is the
    cause, which has ended or ``hangs``."""
    folder = os.environ.get(NOTES)
    if folder is None or "RANK" not in os.environ:
        return False
    _write_note(folder, json.dumps({"code": code, "message": message, "lost": lost, "hangs": hangs}))
    return True


def begin_note() -> None:
    """Leave word for the launcher that this rank has started again: what was noted before is no longer true."""
    if NOTES in os.environ and "RANK" in os.environ:
        _write_note(os.environ[NOTES], "")


def _write_note(folder: str, text: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # the launcher is gone
        Path(folder, f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}_{os.environ['RANK']}").write_text(text)


def read_notes(folder: Path) -> dict[int, dict]:
    """The notes that ranks left in their last start, by rank; one that was killed before it began has none."""
    files = [(*map(int, path.name.split("_")), path.read_text()) for path in folder.iterdir()]
    last = max((start for start, _, _ in files), default=0)
    return {rank: json.loads(text) for start, rank, text in files if start == last and text}


def verdict(ends: Mapping[int, tuple[int, int]], notes: Mapping[int, dict]) -> tuple[int, str]:
    """(exit code, message or nothing) from how ranks ended, ``{rank: (exit code, pid)}``, and their notes.

    The cause is a rank that did not end because of another one: one that was killed, then one with an error of its own.
    """
    again = "the same command goes on from the last checkpoint"
    killed = {rank: end for rank, end in ends.items() if end[0] < 0 and end[0] != -signal.SIGTERM}
    if killed:
        rank, (code, pid) = min(killed.items())
        if any(n["hangs"] for n in notes.values()):  # then the launcher has killed it
            return 1, f"rank {rank} (process {pid}) did not answer for run.timeout seconds and was ended; {again}"
        name = signal.Signals(-code).name
        hint = " (by the system, if it was short of memory)" if name == "SIGKILL" else ""
        return 1, f"rank {rank} (process {pid}) was killed by {name}{hint}; {again}"
    silent = {rank: end for rank, end in ends.items() if rank not in notes and end[0] != -signal.SIGTERM}
    wrong = {rank: n for rank, n in notes.items() if n["message"] and not (n["lost"] and silent)}
    if wrong:
        rank, found = min(wrong.items(), key=lambda item: (item[1]["lost"], item[0]))
        same = len(notes) > 1 and all(n["message"] == found["message"] for n in notes.values())
        return found["code"], found["message"] if same else f"rank {rank}: {found['message']}"
    if silent:
        rank, (code, pid) = min(silent.items())
        return 1, f"rank {rank} (process {pid}) ended with exit code {code}: what it printed says why; {again}"
    return max((n["code"] for n in notes.values()), default=0), ""


def follow_launcher() -> None:
    """Have the system send SIGTERM to this rank should its launcher die: it saves and leaves."""
    if NOTES in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


class StopSignal:
    """Remembers the first SIGINT, SIGTERM or SIGUSR1: the loop saves and leaves; a second SIGINT ends at once."""

    def __init__(self, loud: bool = True) -> None:
        self.received: signal.Signals | None = None
        self.loud = loud

    def __enter__(self) -> StopSignal:
        self.before = {s: signal.signal(s, self._note) for s in STOPPED}
        return self

    def __exit__(self, *exc) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if not self.loud:
            return
        hint = b"; Ctrl-C again ends at once" if number == signal.SIGINT else b""
        # not print: a handler may interrupt one
        os.write(2, b"stopping after this step or the next, with a checkpoint" + hint + b"\n")

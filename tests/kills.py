"""Commands that are killed again and again, for tests of what the next start makes of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def tree(pid: int) -> list[int]:
    """A process and all that it started, itself first."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(word) for word in path.read_text().split()] if path.exists() else []
    return [pid, *(other for child in below for other in tree(child))]


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill_all(pids: list[int]) -> None:
    """SIGKILL them at once, and wait until they are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while not all(map(gone, pids)):
        time.sleep(0.01)


def killed_again_and_again(
    command: list[str], progress: Callable[[], object], *, most: int, rng: random.Random, within: float
) -> int:
    """Start ``command`` and SIGKILL it, and what it started, up to ``most`` times, each ``within`` seconds after
    ``progress()`` has changed; returns how often. Every other time it is one of the processes that it started, if it
    has any, and it must end by itself. Ends early when the command does, which must then have exited with 0."""
    for kills in range(most):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before, patience = progress(), time.monotonic() + 90
        while process.poll() is None and time.monotonic() < patience and progress() == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, within))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            return kills
        everyone = tree(process.pid)
        if kills % 2 and len(everyone) > 1:
            kill_all([rng.choice(everyone[1:])])
            process.wait(timeout=90)
        kill_all(everyone)
        process.wait()
    return most


def sizes(folder: Path) -> dict[str, int]:
    """The files in a folder and how long they are; some may go while one looks."""
    found = {}
    for path in folder.rglob("*"):
        try:
            found[str(path)] = path.stat().st_size
        except FileNotFoundError:
            continue
    return found

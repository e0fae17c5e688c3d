"""Commands that are killed again and again, for tests of what the next start makes of it."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def killed_again_and_again(
    command: list[str], progress: Callable[[], object], *, most: int, rng: random.Random, within: float
) -> int:
    """Start ``command`` and SIGKILL it up to ``most`` times, each ``within`` seconds after ``progress()`` has changed;
    returns how often. Ends early when the command does, which must then have exited with 0."""
    for kills in range(most):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before, patience = progress(), time.monotonic() + 90
        while process.poll() is None and time.monotonic() < patience and progress() == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, within))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            return kills
        process.send_signal(signal.SIGKILL)
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

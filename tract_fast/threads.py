"""Work that waits for a server, several requests at a time. An interrupt or an error ends it at once: what is under way
may take an hour."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any


def as_done(work: Callable[[Any], Any], jobs: Sequence[Any], at_once: int) -> Iterator[tuple[Any, Any]]:
    """(job, its result), in the order in which they are done. An error is raised after all that was done with it."""
    if at_once == 1:
        for job in jobs:
            yield job, work(job)
        return
    pool = ThreadPoolExecutor(at_once)
    try:
        job_of = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(job_of):
            if error := future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
                rest = (f for f in job_of if f.done() and not f.cancelled() and not f.exception())
                yield from ((job_of[f], f.result()) for f in rest if job_of[f] is not None)
                raise error
            yield job_of[future], future.result()
            job_of[future] = None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_order(work: Callable[[Any], Any], jobs: Sequence[Any], at_once: int) -> list[Any]:
    """``[work(job) for job in jobs]``, several at a time."""
    found = dict(as_done(lambda i: work(jobs[i]), range(len(jobs)), at_once))
    return [found[i] for i in range(len(jobs))]


def leave(code: int) -> None:
    """End the process with this exit code, without waiting for threads that wait for a server."""
    if any(t is not threading.main_thread() and t.is_alive() and not t.daemon for t in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)

"""GGUF files through transformers in a fraction of the time, with the same result.

transformers parses such a file for the configuration, for the tokenizer and for the weights, each time from its start,
and makes gguf's table of tensor names anew for every module of the model: with the 135M weights of SmolLM2 three
quarters of a run's start. While ``reading`` lasts, gguf hands out what it has read before. These two names of gguf are
the only ones of an installed package that are replaced, while one of our own calls runs, and put back: transformers has
no door for a reader, and its own quick one does not know llama.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

_KEPT: ContextVar[dict[tuple, Any] | None] = ContextVar("_KEPT", default=None)  # readers, by file and its state
_ALONE = threading.RLock()  # two that replace at once would put each other's back


@contextlib.contextmanager
def kept() -> Iterator[dict[tuple, Any]]:
    """Until the end of the outermost of these, what ``reading`` has parsed is kept (about 60 MiB for a vocabulary of
    49152): put it around the readings of configuration, tokenizer and weights."""
    outer = _KEPT.get()
    if outer is not None:
        yield outer
        return
    token = _KEPT.set({})
    try:
        yield _KEPT.get()
    finally:
        _KEPT.reset(token)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """While transformers reads a GGUF file: parse it at most once, quickly, and make the table of names once. A file
    that has changed since is parsed again. Nothing is done where gguf is not installed: transformers says so."""
    try:
        import gguf
    except ImportError:
        yield
        return

    class Reader(gguf.GGUFReader):
        """Takes its hundred thousands of slices from a plain array; those of a memory map cost four times as much."""

        @property
        def data(self) -> np.ndarray:
            return self._array

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._array = mapped.view(np.ndarray)

    with kept() as readers, _ALONE, contextlib.ExitStack() as back:

        def once(path: str | Path, *rest, **options) -> Reader:
            state = Path(path).stat()
            key = (str(path), state.st_ino, state.st_size, state.st_mtime_ns, rest, *options.items())
            if key not in readers:
                readers.clear()  # one file at a time, as it is now
                readers[key] = Reader(path, *rest, **options)
            return readers[key]

        for name, instead in (("GGUFReader", once), ("get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))):
            back.callback(setattr, gguf, name, getattr(gguf, name))
            setattr(gguf, name, instead)
        yield

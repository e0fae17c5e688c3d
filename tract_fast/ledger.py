"""Bytes that live tensors hold, counted operator by operator on meta tensors: what a step needs, without a device.

Any PyTorch code runs on meta tensors, which have sizes and no memory; a ``Ledger`` sees each operator's results and,
by weak references to their storages, when they are let go. What operators do inside, and what is no tensor here
(FSDP2's buffers, optimizer state), is entered by ``hold`` and ``drop``. The highest total is kept with what it was made
of and when it was.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations"
Inside = Callable[[Any, tuple], int]


class Ledger(TorchDispatchMode):
    """Counts while it is entered. ``inside(operator, arguments)``: bytes that an operator holds while it runs, beside
    its results; ``multiple``: what an allocation is rounded up to."""

    def __init__(self, inside: Inside = lambda operator, args: 0, multiple: int = 1):
        super().__init__()
        self.inside, self.multiple = inside, multiple
        self.purpose, self.moment = ACTIVATIONS, ""
        self.live: Counter[str] = Counter()  # bytes by purpose
        self.peak: Counter[str] = Counter()
        self.peak_moment = ""
        self.instead: dict[Any, Callable] = {}  # what is called in place of an operator
        self._held: dict[Any, tuple[str, int]] = {}
        self._storages: dict[int, Any] = {}  # by address, while they live: a weak reference, or itself
        self._total = self._highest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.instead.get(func, func)(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_meta]
        extra = self.inside(func, args)
        for t in tensors:
            self._add(t)
        if extra:
            self.touch(extra, self.purpose)
        return out

    def hold(self, key: Any, purpose: str, size: int) -> None:
        """Enter ``size`` bytes under ``key``, which holds nothing yet."""
        if size:
            size = -(-size // self.multiple) * self.multiple
            self._held[key] = (purpose, size)
            self.live[purpose] += size
            self._total += size
            self._look()

    def drop(self, key: Any) -> None:
        """Take out what ``key`` holds, if anything."""
        purpose, size = self._held.pop(key, ("", 0))
        if size:
            self.live[purpose] -= size
            self._total -= size

    def touch(self, size: int, purpose: str) -> None:
        """Bytes that are held for a moment."""
        self.hold("touched", purpose, size)
        self.drop("touched")

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these when a view of them is made: they are entered otherwise."""
        for t in tensors:
            self._storages[t.untyped_storage()._cdata] = t.untyped_storage()

    def rename(self, t: Tensor, purpose: str) -> None:
        """What ``t`` holds is for another purpose from now on."""
        key = t.untyped_storage()._cdata
        if key in self._held:
            before, size = self._held[key]
            self.live[before] -= size
            self.live[purpose] += size
            self._held[key] = (purpose, size)

    @contextlib.contextmanager
    def during(self, moment: str, purpose: str | None = None) -> Iterator[None]:
        """Name the moment, and what is made in it."""
        before = self.moment, self.purpose
        self.moment, self.purpose = moment, purpose or self.purpose
        yield
        self.moment, self.purpose = before

    def _add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._storages or not storage.nbytes():
            return

        def gone(_, key=key):
            self._storages.pop(key, None)
            self.drop(key)

        self._storages[key] = weakref.ref(storage, gone)
        self.hold(key, self.purpose, storage.nbytes())

    def _look(self) -> None:
        if self._total > self._highest:
            self._highest, self.peak_moment = self._total, self.moment
            self.peak = Counter(self.live)

"""Launch configurations of the Triton kernels: a fixed default, or the fastest of a few by measurement.

Every kernel names its candidates, the default first; all of them compile without spills for sm_80, sm_90 and sm_100
(``benchmarks/aot.py``). With ``TRACT_FAST_AUTOTUNE=1`` in the environment the first call for a vocabulary, width, dtype
and set of options times them, which waits for the device and, for the row kernel, holds a second chunk of logits; the
winner is kept in Triton's cache on disk, by device and version. Otherwise nothing is ever timed, and runs on one kind
of device are the same to the last bit.
"""

from __future__ import annotations

import functools
import os

KEY = ["n_vocab", "width", "HAS_BIAS", "SOFTCAP", "VOCAB", "GRADIENT"]  # a kernel lacks some of them


def autotunes() -> bool:
    """Whether the environment asks for timing."""
    return os.environ.get("TRACT_FAST_AUTOTUNE") == "1"


@functools.cache
def tuned(kernel, candidates: tuple, in_place: str | None = None):
    """The kernel with its launch configuration, one of ``candidates`` (triton.Config), to be called as
    ``tuned(...)[grid](...)``.

    ``in_place`` is the argument that the kernel overwrites: timing puts it back.
    """
    import triton  # CPU installations lack it, and ask here whether timing is on

    chosen = candidates if autotunes() else candidates[:1]
    restore = [in_place] if in_place else None
    return triton.autotune(list(chosen), key=KEY, restore_value=restore, cache_results=True)(kernel)

"""Launch configurations of the fused kernels: a fixed default, or the fastest of a few by measurement.

A kernel names its candidates, the default first; all of them compile without spills for sm_80, sm_90 and sm_100
(``benchmarks/aot.py``). With ``TRACT_FAST_AUTOTUNE=1`` in the environment the first call for a vocabulary, width, dtype
and set of options times them, which waits for the device; the
winner is kept in Triton's cache on disk, by architecture and version, and every rank finds its own. Otherwise nothing
is ever timed, and runs on one kind of device are the same to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch

KEY = ["n_vocab", "width", "HAS_BIAS", "SOFTCAP"]


def autotunes() -> bool:
    """Whether the environment asks for timing."""
    return os.environ.get("TRACT_FAST_AUTOTUNE") == "1"


def on_device(x):
    """Triton launches on the current CUDA device: make that the one of the tensor ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def tuned(kernel, candidates: tuple):
    """The kernel with its launch configuration, one of ``candidates`` (triton.Config), to be called as
    ``tuned(...)[grid](...)``.
    """
    import triton  # CPU installations lack it, and ask here whether timing is on

    chosen = candidates if autotunes() else candidates[:1]
    return triton.autotune(list(chosen), key=KEY, cache_results=True)(kernel)

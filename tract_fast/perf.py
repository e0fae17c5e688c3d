"""Memory and speed of a run, and what a device is slow at."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def slow_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` is a CPU below AVX-512, where products in bfloat16 take many times float32's time (measured on
    AVX2: a GEMM of 58 GFLOP .4 s in float32, 3 to 70 s in bfloat16)."""
    return device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def duration(seconds: float) -> str:
    """``3725`` -> ``1:02:05``."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"

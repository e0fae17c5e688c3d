"""Peak memory inside a block: of a CUDA device what is allocated, of a CPU what is resident in this process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch


class PeakMemory:
    """``bytes``: the most memory inside the block; ``above``: how much of that came after its start."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before is given back, or it would not be counted
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *exc) -> None:
        cuda = self.device.type == "cuda"
        self.bytes = torch.cuda.max_memory_allocated(self.device) if cuda else _status("VmHWM")
        self.above = self.bytes - self.before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

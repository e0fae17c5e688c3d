"""What a process that computes on its CPU keeps: freed memory, and the code of its matrix products.

glibc gives large blocks back to the system when they are freed, and takes them again a moment later. A page that is new
to a process costs more than what is computed on it: the system fills it with zeros first. A training step frees and
takes the same gigabytes over and over, so that they are kept.

oneDNN compiles each product of bfloat16 matrices for its shape, and keeps the code of the last 1024; so does PyTorch's
layer above it, for itself. Attention to one sequence alone is a dozen products (5 MiB in the two), sequences have as
many lengths as there are sequences, and no code is used again after its micro-batch: it only fills the memory, up to
gigabytes, between blocks that could be joined otherwise (pytorch#27971).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

import torch

SHAPES = 16  # of products: attention to a document has 12, the layers' own as many; where code is compiled for every
# call, attention takes a twelfth longer, and small layers half as long again
MOST = 1024  # what both keep where nothing is said
CAPACITY = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of the layer above it
TUNABLES = "GLIBC_TUNABLES"
ALLOCATOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
OTHERS = ("jemalloc", "tcmalloc", "mimalloc")  # allocators that are put before glibc's
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1


def limit_code(device: torch.device, documents: int = 1) -> None:
    """Have a CPU keep the code of no more products than a micro-batch of so many documents, or a batch of one length,
    has. Without effect once a product has run in this process; what is set already stays. Processes that this one
    starts have the same limits."""
    if device.type == "cpu":
        for name in CAPACITY:
            os.environ.setdefault(name, str(min(MOST, SHAPES * (max(documents, 2) + 2))))


def keep_freed_memory(device: torch.device) -> str:
    """Have glibc keep what the main thread frees, for the rest of the process, where a model is computed on a CPU;
    returns what is done and why. Where the user has set the allocator up, it stays so."""
    if device.type != "cpu":
        return "as the system has it (the model is not computed there)"
    if own := set_up_by_user(os.environ):
        return f"as {own} has it"
    if platform.libc_ver()[0] != "glibc":
        return "as the system has it (only glibc's allocator can be told)"
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    return "freed memory is kept for the next step (new pages cost more than what is computed on them)"


def set_up_by_user(environment: Mapping[str, str]) -> str | None:
    """The variable by which a user has set glibc's allocator up or put another one before it; None: there is none."""
    if "glibc.malloc." in environment.get(TUNABLES, ""):
        return TUNABLES
    if any(name in environment.get("LD_PRELOAD", "") for name in OTHERS):
        return "LD_PRELOAD"
    return next((name for name in ALLOCATOR if environment.get(name)), None)

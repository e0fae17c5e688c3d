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
CAPACITY = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of the layer above it
ALLOCATOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1


def limit_code(device: torch.device, documents: int = 1) -> None:
    """Have a CPU keep the code of no more products than a micro-batch of so many documents, or a batch of one length,
    has. Without effect once a product has run in this process; what the user has set stays."""
    if device.type == "cpu":
        for name in CAPACITY:
            os.environ.setdefault(name, str(SHAPES * (max(documents, 2) + 2)))


def keep_freed_memory(device: torch.device) -> str:
    """Have glibc keep what is freed, for the rest of the process, where ``device`` is a CPU; returns what is done and
    why. Where the user has set the allocator up, by variables of glibc, it stays so."""
    if device.type != "cpu":
        return "as the system has it (nothing is computed there)"
    own = set_up_by_user(os.environ)
    if own:
        return f"as {own} has it"
    if platform.libc_ver()[0] != "glibc":
        return "as the system has it (only glibc's allocator can be told)"
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, NEVER)):
        return "as the system has it (glibc refused)"
    return "freed memory is kept for the next step (new pages cost more than what is computed on them)"


def set_up_by_user(environment: Mapping[str, str]) -> str | None:
    """The variable by which a user has set glibc's allocator up or put another one before it; None: there is none."""
    if "malloc" in environment.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES"
    return next((name for name in (*ALLOCATOR, "LD_PRELOAD") if environment.get(name)), None)

"""GPUs by name: what their makers state of memory, arithmetic, bandwidth and the link to their neighbours.

Peaks are dense bfloat16 (half of what is stated "with sparsity") and float32 without tensor cores, as in the makers'
data sheets of these names (B200: that of HGX B200; GeForce: those of the chips' architectures): PyTorch multiplies
float32 so, unless it is told to use TF32, which nothing here does. A link is one direction of NVLink, or of the PCIe
slot where there is none. Memory is about what PyTorch reports, less than the name says; that of a GPU that is here is
asked for.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from tract_fast.errors import UserError

GIB = 2**30
# of a device's name that has one of the below in it and is another chip, or a part of one
VARIANT = re.compile(r"Laptop|Max-Q|\bMIG\b|\bGRID\b|\b(Ti|SUPER|D)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """What ``--gpu`` calls it; empty: known by its peak alone."""
    pattern: str
    """Finds it in what a device calls itself."""
    peak: float
    """bfloat16 FLOP/s."""
    memory: float = 0.0
    """Bytes."""
    bandwidth: float = 0.0
    """Bytes a second of its memory."""
    link: float = 0.0
    """Bytes a second to other GPUs of a node, in one direction."""
    single: float = 0.0
    """float32 FLOP/s."""


GPUS = (  # the first whose pattern fits counts
    Gpu("", r"\bGB200\b", 2.5e15),
    Gpu("b200-180gb", r"\bB200\b", 2.25e15, 179 * GIB, 8.0e12, 900e9, 75e12),
    Gpu("", r"\bGH200\b", 989e12),
    Gpu("", r"\bH200 NVL\b", 835e12),
    Gpu("h200-141gb", r"\bH200\b", 989e12, 139.8 * GIB, 4.8e12, 450e9, 67e12),
    Gpu("h100-pcie-80gb", r"\bH100 PCIe\b", 756e12, 79.1 * GIB, 2.0e12, 64e9, 51e12),
    Gpu("", r"\bH100 NVL\b", 835e12),
    Gpu("h100-80gb", r"\bH100\b", 989e12, 79.1 * GIB, 3.35e12, 450e9, 67e12),
    Gpu("", r"\bH800\b", 989e12),
    Gpu("a100-pcie-40gb", r"\bA100-PCIE-40GB\b", 312e12, 39.4 * GIB, 1.555e12, 32e9, 19.5e12),
    Gpu("a100-pcie-80gb", r"\bA100 80GB PCIe\b", 312e12, 79.1 * GIB, 1.935e12, 32e9, 19.5e12),
    Gpu("a100-40gb", r"\bA100\b.*\b40GB", 312e12, 39.4 * GIB, 1.555e12, 300e9, 19.5e12),
    Gpu("a100-80gb", r"\bA100\b", 312e12, 79.3 * GIB, 2.039e12, 300e9, 19.5e12),
    Gpu("", r"\bA800\b", 312e12),
    Gpu("l40s-48gb", r"\bL40S\b", 362e12, 44.4 * GIB, 864e9, 32e9, 91.6e12),
    Gpu("", r"\bL40\b", 181e12),
    Gpu("", r"\bA40\b", 150e12),
    Gpu("a10-24gb", r"\bA10\b", 125e12, 22.0 * GIB, 600e9, 32e9, 31.2e12),  # not the A10G, which has fewer tensor cores
    Gpu("l4-24gb", r"\bL4\b", 121e12, 22.0 * GIB, 300e9, 32e9, 30.3e12),
    Gpu("rtx-4090-24gb", r"\bRTX 4090\b", 165e12, 23.6 * GIB, 1.008e12, 32e9, 82.6e12),
    Gpu("rtx-3090-24gb", r"\bRTX 3090\b", 71e12, 23.6 * GIB, 936e9, 32e9, 35.6e12),
)


def called(name: str) -> Gpu:
    """The GPU of a name as ``--gpu`` takes it. Raises UserError where there is none."""
    known = {gpu.name: gpu for gpu in GPUS if gpu.name}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--gpu {name}: no such GPU is known{meant}; those that are: {', '.join(sorted(known))}")


def recognised(device_name: str) -> Gpu | None:
    """The GPU that a device's own name says it is, if that is known."""
    if VARIANT.search(device_name):
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device_name)), None)

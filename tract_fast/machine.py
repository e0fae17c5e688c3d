"""What this machine is: system, processor, memory, GPUs, and what compiles code here. Nothing in it names the user."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sysconfig
from itertools import permutations
from pathlib import Path

import torch

from tract_fast.host import ALLOCATOR, CAPACITY, TUNABLES

DRIVER = Path("/proc/driver/nvidia/version")
# environment variables that change what runs or how fast; no others are shown
SHOWN = (
    "TRACT_FAST_CPU",
    "TRACT_FAST_AUTOTUNE",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    *CAPACITY,
    *ALLOCATOR,
    TUNABLES,
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def host() -> dict[str, str]:
    """System, processor, cores, memory and the disk of the current folder, a line each."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    disk = shutil.disk_usage(Path.cwd())
    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "CPU": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": f"{os.cpu_count()}, {mine} of them for this process; {torch.get_num_threads()} threads",
        "memory": memory(),
        "disk": f"{gib(disk.free)} free of {gib(disk.total)} GiB in this folder",
    }
    settings = [f"{name}={os.environ[name]}" for name in SHOWN if name in os.environ]
    return found | ({"environment": ", ".join(settings)} if settings else {})


def gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def cpu_name() -> str:
    """The processor's name, as Linux has it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or "unknown"


def memory(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> str:
    """Host memory, and the limit of the container where there is one."""
    if not meminfo.is_file():
        return "unknown"
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE))
    told = f"{gib(1024 * int(sizes['MemAvailable']))} free of {gib(1024 * int(sizes['MemTotal']))} GiB"
    most = limit.read_text().strip() if limit.is_file() else "max"
    return told if most == "max" else f"{told}; this container may have {gib(int(most))} GiB"


def driver() -> str | None:
    """Version of NVIDIA's driver; None where none is loaded."""
    if not DRIVER.is_file():
        return None
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", DRIVER.read_text())
    return version[0] if version else "of an unknown version"


def gpus() -> dict[str, str]:
    """GPUs, driver, CUDA and NCCL, and which GPUs reach each other directly; without any GPU, why."""
    if not torch.cuda.is_available():
        loaded = f"NVIDIA's driver {driver()} is loaded" if driver() else "no NVIDIA driver is loaded"
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return {"GPU": f"none that torch can use: {built}, {loaded}"}
    found = {}
    count = torch.cuda.device_count()
    for i in range(count):
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        found[f"GPU {i}"] = f"{about.name}, sm_{about.major}{about.minor}, {gib(free)} free of {gib(total)} GiB"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "not there"
    found["driver"] = f"{driver() or 'unknown'}, CUDA {torch.version.cuda}, NCCL {nccl}"
    if count > 1:
        apart = [f"{a}-{b}" for a, b in permutations(range(count), 2) if not torch.cuda.can_device_access_peer(a, b)]
        found["GPU to GPU"] = f"through the host: {', '.join(apart)}" if apart else "all directly (P2P)"
    return found


def compiler(device: torch.device) -> tuple[bool, str]:
    """(whether ``torch.compile`` and Triton can build code for ``device``, with what or why not).

    Both look for these when they run: on CUDA Triton compiles a small C library for each kernel's launch, on a CPU
    torch compiles C++.
    """
    if device.type == "cuda":
        names, setting = (("gcc", "clang"), "CC")  # Triton's order
    else:
        names, setting = (("clang++",) if platform.system() == "Darwin" else ("g++",), "CXX")
    asked = os.environ.get(setting)
    found = next(filter(None, map(shutil.which, [asked] if asked else names)), None)
    if found is None:
        return False, f"{setting} = {asked}: no such command" if asked else f"no {' or '.join(names)} on the PATH"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if device.type == "cuda" and not header.is_file():
        return False, "Python.h is missing (a package python3-dev or python3-devel has it)"
    return True, Path(found).name

"""What is kept between steps: measured in processes of their own, since it holds for the whole process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from tract_fast import host

CPU = torch.device("cpu")
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator that is told")

KEPT = """
import ctypes, sys, torch
from pathlib import Path
from tract_fast import host
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "kept":
    print(host.keep_freed_memory(torch.device("cpu")))
resident = lambda: 4096 * int(Path("/proc/self/statm").read_text().split()[1])
before = resident()
block = libc.malloc(64 * 2**20)
ctypes.memset(block, 1, 64 * 2**20)
libc.free(block)
print(resident() - before)
"""

CODE = """
import ctypes, sys, torch
from tract_fast import host
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
if sys.argv[1] == "limited":
    host.limit_code(torch.device("cpu"))
weight = torch.randn(64, 64).bfloat16()
def of_lengths(first, last):
    for n in range(first, last):
        torch.nn.functional.linear(torch.ones(n, 64).bfloat16(), weight)
    return libc.mallinfo2().uordblks
start = of_lengths(100, 200)
print(of_lengths(200, 500) - start)
"""


def last_number(script: str, *arguments: str) -> int:
    drop = {*host.ALLOCATOR, *host.CAPACITY, host.TUNABLES, "LD_PRELOAD"}
    clean = {name: value for name, value in os.environ.items() if name not in drop}
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1])


@GLIBC
def test_freed_memory_is_kept():
    assert last_number(KEPT, "kept") > 60 * 2**20
    assert last_number(KEPT, "as it is") < 2**20


@GLIBC
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="its bfloat16 products are not oneDNN's")
def test_code_of_products_is_bounded():
    assert last_number(CODE, "limited") < 0.1 * last_number(CODE, "as it is")


@pytest.mark.parametrize("name", host.ALLOCATOR)
def test_users_own_settings_stay(name, monkeypatch):
    monkeypatch.setattr(os, "environ", {name: "1"})
    assert host.keep_freed_memory(CPU) == f"as {name} has it"


def test_other_allocators_stay():
    assert host.set_up_by_user({"GLIBC_TUNABLES": "glibc.rtld.nns=4:glibc.malloc.mmap_max=1"}) == "GLIBC_TUNABLES"
    assert host.set_up_by_user({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}) == "LD_PRELOAD"
    assert host.set_up_by_user({"GLIBC_TUNABLES": "glibc.rtld.nns=4", "LD_PRELOAD": "libiomp5.so"}) is None


def test_where_nothing_can_be_told(monkeypatch):
    assert "not computed there" in host.keep_freed_memory(torch.device("meta"))
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert "only glibc" in host.keep_freed_memory(CPU)


@pytest.mark.parametrize("documents, shapes", [(1, 64), (10, 192), (500, 1024)])
def test_limit_follows_documents(documents, shapes, monkeypatch):
    monkeypatch.setattr(os, "environ", {host.CAPACITY[1]: "7"})
    host.limit_code(torch.device("meta"))
    assert host.CAPACITY[0] not in os.environ
    host.limit_code(CPU, documents)
    assert os.environ == {host.CAPACITY[0]: str(shapes), host.CAPACITY[1]: "7"}

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

PAGES = """
import ctypes, resource, sys, torch
from tract_fast import host
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "kept":
    print(host.keep_freed_memory(torch.device("cpu")))
def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 * 2**20)
    ctypes.memset(block, 1, 64 * 2**20)
    libc.free(block)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
touched()
print(touched())
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


def last_line(script: str, *arguments: str, **environment: str) -> str:
    drop = {*host.ALLOCATOR, *host.CAPACITY, "GLIBC_TUNABLES", "LD_PRELOAD"}
    clean = {name: value for name, value in os.environ.items() if name not in drop}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@GLIBC
def test_freed_memory_is_taken_again():
    assert int(last_line(PAGES, "kept")) < 2**20
    assert int(last_line(PAGES, "as it is")) > 60 * 2**20


@GLIBC
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="its bfloat16 products are not oneDNN's")
def test_code_of_products_is_bounded():
    assert int(last_line(CODE, "limited")) < 0.1 * int(last_line(CODE, "as it is"))


@GLIBC
@pytest.mark.parametrize("name", [*host.ALLOCATOR, "LD_PRELOAD"])
def test_users_own_settings_stay(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert host.keep_freed_memory(CPU) == f"as {name} has it"


def test_users_own_tunables_stay():
    assert host.set_up_by_user({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=1"}) == "GLIBC_TUNABLES"
    assert host.set_up_by_user({"GLIBC_TUNABLES": "glibc.rtld.nns=4", "LD_PRELOAD": ""}) is None


def test_limit_follows_documents_and_user(monkeypatch):
    for name in host.CAPACITY:
        monkeypatch.delenv(name, raising=False)
    host.limit_code(torch.device("meta"))
    assert host.CAPACITY[0] not in os.environ
    monkeypatch.setenv(host.CAPACITY[1], "7")
    monkeypatch.setenv(host.CAPACITY[0], "")
    monkeypatch.delenv(host.CAPACITY[0])
    host.limit_code(CPU, 10)
    assert os.environ[host.CAPACITY[0]] == str(12 * host.SHAPES) and os.environ[host.CAPACITY[1]] == "7"

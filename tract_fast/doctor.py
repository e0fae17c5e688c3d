"""What this machine is, what runs on it and why, and whether what runs computes what it should: a bug report.

Plain lines without wrapping, to be pasted as they are. ``machine`` has the facts and ``selftest`` the checks; each
choice is made by the function that training calls.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tract_fast import __version__, attention, machine, optim, selfcheck, selftest, vllm
from tract_fast.errors import UserError
from tract_fast.head import choose_loss
from tract_fast.lean import choose_lean
from tract_fast.loss import native, proposal
from tract_fast.loss.choice import runs_triton
from tract_fast.loss.tuning import autotunes
from tract_fast.model import choose_liger
from tract_fast.sections import Generate, Loss, Model, Train
from tract_fast.shard import local_device

PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "flash-attn", "liger-kernel")
DTYPES = tuple(selftest.TOLERANCE)
PRODUCTS = {"bfloat16": "avx512_bf16", "VNNI": "avx512_vnni", "AMX": "amx_bf16"}  # what a CPU multiplies with


class Head(NamedTuple):
    """Llama-3.1-8B's, as far as the choice of a loss asks a model's configuration: what it is shown for."""

    vocab_size: int = 128_256
    hidden_size: int = 4096

    def get_text_config(self) -> Head:
        return self


def versions(others: tuple[str, ...] = ()) -> dict[str, str]:
    """Version of everything that numbers depend on, and of ``others``."""
    found = {"tract-fast": __version__, "python": platform.python_version()}
    for name in dict.fromkeys(PACKAGES + others):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_device(device: torch.device) -> str:
    """Name, generation, memory; of a CPU its instructions and threads."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        count = torch.cuda.device_count()
        return f"{count} x {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    there = torch.cpu.get_capabilities()
    more = [name for name, said in PRODUCTS.items() if there.get(said, False)]
    kinds = torch.backends.cpu.get_cpu_capability() + (f" ({', '.join(more)})" if more else "")
    held = f", products no further than {held_back()} (ONEDNN_MAX_CPU_ISA)" if held_back() else ""
    return f"CPU, {kinds}, {torch.get_num_threads()} threads{held}"


def held_back() -> str | None:
    """The instructions below AMX that oneDNN's products are held to by the user."""
    name = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    return None if "AMX" in name.upper() or name.upper() in ("ALL", "DEFAULT") else name


def describe_row_pass(device: torch.device) -> str:
    """Which row pass the chunked loss has on this device."""
    if runs_triton(device.type):
        timed = (
            "timed at first use (TRACT_FAST_AUTOTUNE=1)" if autotunes() else "fixed (TRACT_FAST_AUTOTUNE=1 times them)"
        )
        return f"Triton, launch configurations {timed}"
    if device.type != "cpu":
        return f"PyTorch: there is no triton for {device.type} here"
    return f"PyTorch: {native.missing()}" if native.missing() else f"C++ ({native.variant()}); float16: PyTorch"


def choices(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """(part, function that says what it will use and why) of a run with the recipe's defaults."""
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        # a model that caps its attention logits says at its start what else it needs
        attend = partial(attention.resolve_attention, "auto", device, dtype, softcap=False)
        yield f"attention, {short}", partial(with_reason, attend)
        for gradient in ("exact", "sampled"):
            loss = partial(choose_loss, Loss(gradient=gradient), dtype, device, Head())
            yield f"loss, {gradient}, {short}", partial(with_reason, loss)
    for kind in proposal.KINDS:
        yield f"proposal, {kind}", partial(describe_proposal, kind, device)
    yield "row pass", partial(describe_row_pass, device)
    yield "liger", lambda: choose_liger(Model(path="any").liger, device)[1]
    yield "lean", partial(describe_lean, device)
    yield "compiled code", partial(describe_compiler, device)
    yield "optimizer", partial(describe_optimizer, device)
    yield "generation", partial(describe_generation, Generate().backend)


def describe_proposal(kind: str, device: torch.device) -> str:
    """Whether ``loss.proposal`` can be of this kind, for a bfloat16 model of a usual width."""
    reason = proposal.refusal(kind, device, torch.bfloat16, Head().hidden_size)
    if reason:
        return reason.partition(": must be")[0]
    amx = kind == "int8" and torch.cpu.get_capabilities().get(PRODUCTS["AMX"], False) and not held_back()
    return "can run; no faster than none for a bfloat16 model here, whose products AMX makes, too" if amx else "can run"


def describe_lean(device: torch.device) -> str:
    """What norms and gated MLPs of a model are computed by; a run says which of them."""
    applied, reason = choose_lean(Model(path="any").lean, Train().compile)
    by = "C++" if device.type == "cpu" and native.missing() is None else "PyTorch operations"
    return f"RMSNorm and gated MLP keep less for backward, by {by}" if applied else reason


def with_reason(choose: Callable[[], tuple[str, str]]) -> str:
    name, reason = choose()
    return f"{name} ({reason})"


def describe_compiler(device: torch.device) -> str:
    """Whether code can be compiled when it is needed: ``train.compile``, and on CUDA every Triton kernel."""
    what = "train.compile" + (" and Triton" if device.type == "cuda" else "")
    builds, reason = machine.compiler(device)
    return f"{what} can run: {reason}" if builds else f"{what} cannot run: {reason}"


def describe_optimizer(device: torch.device) -> str:
    """Which AdamW the optimizer of a run is."""
    (group,) = optim.adamw([torch.nn.Parameter(torch.zeros(1, 1, device=device))], Train()).param_groups
    return "AdamW, fused: one pass over weights and state" if group["fused"] else "AdamW, foreach or a loop"


def describe_generation(backend: str) -> str:
    """Who writes rationales, and whether vLLM could be."""
    try:
        vllm.check_vllm()
        other = "generate.backend vllm can be, too"
    except UserError as error:
        other = str(error)
    return f"{'transformers, in this process' if backend == 'auto' else backend} ({other})"


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, check) of the self-test."""
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for name in ("chunked", "fused") if runs_triton(device.type) else ("chunked",):
            yield f"loss {name}, {short}", partial(selftest.check_loss, name, device, dtype)
        yield f"loss sampled, {short}", partial(selftest.check_sampled, device, dtype)
        for kind in proposal.KINDS:
            if proposal.refusal(kind, device, dtype, Head().hidden_size) is None:
                yield f"loss {kind}, {short}", partial(selftest.check_sampled, device, dtype, kind)
        yield f"attention, {short}", partial(check_attention, device, dtype)
        yield f"save, {short}", partial(selftest.check_save, dtype)


def check_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The start-up check of the attention that a run would take."""
    name, _ = attention.resolve_attention("auto", device, dtype, softcap=False)
    return selfcheck.alignment(name, device, dtype)


def facts(failed: list[str]) -> Iterator[tuple[str, str]]:
    """Of the machine, and the names of those that cannot be told into ``failed``."""
    yield from machine.host().items()
    try:
        yield from machine.gpus().items()
    except Exception as error:  # of a driver that answers some calls and fails others
        failed.append("GPU")
        yield "GPU", selftest.failure(error)


def told(lines: Iterable[tuple[str, Callable[[], str]]], failed: list[str]) -> Iterator[tuple[str, str]]:
    """Each line as soon as it is known, and the names of those that cannot be told into ``failed``."""
    for name, text in lines:
        try:
            yield name, text()
        except Exception as error:  # told, and the rest is still printed
            failed.append(name)
            yield name, selftest.failure(error)


def tested(tests: Iterable[tuple[str, Callable[[], str]]], failed: list[str]) -> Iterator[tuple[str, str]]:
    """The verdict of each test, and the names of those that are wrong or fail into ``failed``."""
    for name, test in tests:
        bad, text = selftest.verdict(test)
        failed.extend([name] * bad)
        yield name, text


def show(title: str, lines: Iterable[tuple[str, str]]) -> None:
    """A titled table. The user's name is in the path of a home folder, which some errors tell."""
    print(f"\n{title}")
    home = str(Path.home())
    for name, text in lines:
        print(f"  {name:24} {text.replace(home, '~') if home != '/' else text}", flush=True)


def run() -> int:
    """Print it all; returns 1 where something is wrong or fails here, else 0. UserError: no such TRACT_FAST_CPU."""
    began = time.perf_counter()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        native.check_variant()
    except ValueError as error:
        raise UserError(str(error)) from error
    failed: list[str] = []
    print(f"tract-fast doctor: {describe_device(device)}")
    show("machine", facts(failed))
    show("versions", versions().items())
    show("what runs here", told(choices(device), failed))
    show("self-test", tested(checks(device), failed))
    print(f"\nin {time.perf_counter() - began:.0f} s; wrong: {', '.join(failed) or 'nothing'}")
    if any(name.startswith("loss") for name in failed):
        print("the loss is wrong here: train with loss.implementation reference, and report this output")
    elif failed:
        print("report this output")
    return int(bool(failed))

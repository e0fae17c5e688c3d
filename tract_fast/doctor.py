"""What this machine is, what runs on it and why, and whether the loss computes what it should here."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tract_fast import __version__, attention
from tract_fast.errors import UserError
from tract_fast.loss import linear_tract_loss, native
from tract_fast.loss.choice import choose, runs_triton
from tract_fast.loss.tuning import autotunes
from tract_fast.shard import local_device

PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "flash-attn", "liger-kernel")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, of loss and gradients against float64
LLAMA_HEAD = {"n_vocab": 128_256, "width": 4096}  # Llama-3.1-8B: what the choices are shown for


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
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def check_loss(implementation: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of loss, dX and dW against the definition in float64: 2500 rows of a small head in one
    chunk, and in several with bias, cap and the vocabulary's normalisation."""
    n, v, d = 2500, 1003, 96
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    head = [(3 * random(n, d)).to(dtype), (random(v, d) / 10).to(dtype), random(v).to(dtype)]
    labels = torch.randint(v, (n,), generator=generator)
    rows, targets = torch.arange(50, n, 100), 1 + 4 * torch.rand(25, generator=generator)
    rest = [x.to(device) for x in (labels, rows, targets, torch.arange(11, 40, 7), torch.arange(1.0, 6.0))]

    def grads(implementation: str, dtype: torch.dtype, several: bool) -> list[Tensor]:
        hidden, weight, bias = (x.to(device, dtype).requires_grad_() for x in head)
        more = {"bias": bias, "softcap": 20.0, "normalize": "vocab", "memory_budget": 1} if several else {}
        loss = linear_tract_loss(hidden, weight, *rest, implementation=implementation, **more).loss
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    errors = dict.fromkeys(("loss", "dX", "dW"), 0.0)
    for several in (False, True):
        pairs = zip(grads(implementation, dtype, several), grads("reference", torch.float64, several), strict=True)
        for name, (got, true) in zip(errors, pairs, strict=True):
            error = ((got.double() - true).norm() / true.norm()).item()
            errors[name] = error if not error <= errors[name] else errors[name]  # a NaN stays
    return errors


def verdict(implementation: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """(whether something is wrong, what to print)."""
    try:
        errors = check_loss(implementation, device, dtype)
    except Exception as error:  # whatever a compiler, a driver or a library raises: told, and the rest is still printed
        return True, f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    bad = not max(errors.values()) <= TOLERANCE[dtype]
    told = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
    return bad, f"{'WRONG' if bad else 'right'}; error against float64: {told}"


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


def run() -> int:
    """Print it all; returns 1 where the loss is wrong or fails here, else 0. UserError: no such TRACT_FAST_CPU."""
    console = Console(highlight=False, soft_wrap=True)
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        native.check_variant()
    except ValueError as error:
        raise UserError(str(error)) from error
    row_pass = describe_row_pass(device)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, version in versions().items():
        table.add_row(name, version)
    console.print(table)
    console.print(f"\ndevice: {describe_device(device)}", markup=False)
    wrong = False
    for dtype in TOLERANCE:
        short = str(dtype).removeprefix("torch.")
        console.print(f"\nin {short}:", markup=False)
        name, reason = attention.resolve_attention("auto", device, dtype, softcap=False)
        console.print(f"  attention: {name} ({reason})", markup=False)
        name, reason = choose("auto", device_type=device.type, dtype=dtype, **LLAMA_HEAD)
        console.print(f"  loss: {name} ({reason})", markup=False)
        for name in ("chunked", "fused") if runs_triton(device.type) else ("chunked",):
            bad, told = verdict(name, device, dtype)
            wrong |= bad
            console.print(f"  {name}: {told}", markup=False)
    console.print(f"\nrow pass: {row_pass}", markup=False)
    if wrong:
        console.print("the loss is wrong here: train with loss.implementation reference, and report this output")
    return int(wrong)

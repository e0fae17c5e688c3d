"""Which implementation runs: ``auto`` by device, sizes and what needs a gradient.

``chunked`` is the rule. On the CPU that is measured (docs/results.md). On CUDA it is calculated: per logit the row pass
of ``chunked`` moves 6 bytes (2 for the loss alone), 2.1 ps (0.7) on an H100, which ``fused`` saves; for that it
computes every logit twice, by a GEMM of about 380 TFLOP/s (published for Cut Cross-Entropy, a Triton kernel of the same
form) where cuBLAS reaches about 550 at such widths. A GEMM takes ``2 D / rate``, so ``fused`` is ahead below
``FUSED_BELOW``; and wherever the memory budget is too small for a chunk that keeps the GEMMs busy, since it then holds
less.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from tract_fast.loss.plan import MIN_ROWS

FUSED_BELOW = {"gradient": 300, "loss only": 430}  # D on CUDA, 16 bit: calculated, not measured


def choose(
    implementation: str,
    *,
    device_type: str,
    dtype: torch.dtype,
    n_vocab: int,
    width: int,
    n_rows: int | None = None,
    gradient: bool = True,
    budget: int | None = None,
    triton: bool | None = None,
) -> tuple[str, str]:
    """(name of the implementation that runs, reason) for a call of ``linear_tract_loss`` with these sizes.

    ``n_rows`` matters only with a ``budget`` (bytes). ``triton``: whether it runs there; None: as it does here.

    Raises ValueError where the implementation that is asked for cannot run.
    """
    triton = runs_triton(device_type) if triton is None else triton
    if implementation == "fused" and not triton:
        needed = "triton, which is not installed" if device_type == "cuda" else f"CUDA, and this is {device_type}"
        raise ValueError(f"implementation = 'fused': it needs {needed}; must be 'chunked' or 'auto'")
    if dtype == torch.float64 and implementation in ("chunked", "fused"):
        raise ValueError(f"implementation = {implementation!r}: must be 'reference' for float64 tensors")
    if implementation != "auto":
        return implementation, "asked for"
    if dtype == torch.float64:
        return "reference", "only it computes in float64"
    if device_type == "cuda" and triton:
        return _choose_on_cuda(dtype, n_vocab, width, n_rows, gradient, budget)
    if device_type == "cpu":
        return "chunked", "the fastest of all that were measured on a CPU"
    return "chunked", f"its row pass in PyTorch: there is no triton for {device_type} here"


def _choose_on_cuda(
    dtype: torch.dtype, n_vocab: int, width: int, n_rows: int | None, gradient: bool, budget: int | None
) -> tuple[str, str]:
    if budget is not None and n_rows is not None:
        fit = budget // (dtype.itemsize * n_vocab)
        if fit < min(n_rows, MIN_ROWS["cuda"]):
            return "fused", f"a memory budget of {budget} bytes holds {fit} rows of logits, too few for chunks"
    least = FUSED_BELOW["gradient" if gradient else "loss only"]
    if dtype.itemsize == 2 and width < least:
        return "fused", f"D = {width} is below {least}, where computing logits twice is cheaper (calculated)"
    return "chunked", f"D = {width}: computing logits twice would cost more than keeping a chunk (calculated)"


def runs_triton(device_type: str) -> bool:
    """Whether Triton kernels run on the device: CUDA, or anything where Triton interprets (slow, for tests)."""
    return (interprets_triton() or device_type == "cuda") and importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether Triton runs its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"

"""The row pass of CPU tensors in C++ (``csrc/``), built when the package is installed; PyTorch operations without it.

``rows.py`` says what is computed, ``csrc/row_pass.h`` how. ``TRACT_FAST_CPU=portable|avx2|avx512|avx512bf16`` forces
a variant.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from tract_fast.loss import rows
from tract_fast.loss.rows import Picked
from tract_fast.loss.terms import Arguments, RowStats, RowTerms

LIBRARY = Path(__file__).parents[1] / "_native.so"
REFUSED = "must be portable, or avx2, avx512 or avx512bf16 where this processor has them; unset it for the best"
ABI = 6  # of the operators in csrc/ops.cpp and csrc/ops_lean.cpp
DTYPES = (torch.float32, torch.bfloat16)
OF_THE_CPU = ("rms_norm", "rms_norm_backward", "gated", "gated_backward")  # they write into what they are given


@functools.cache
def missing() -> str | None:
    """Why the library is not there, with the remedy; None where it is. Loads it."""
    remedy = (
        "install the package again with a C++ compiler and torch there, TRACT_FAST_SKIP_EXT unset: make install in a "
        "checkout, else pip install --force-reinstall --no-deps . (with --no-build-isolation where torch is not found)"
    )
    if not LIBRARY.exists():
        return f"the native CPU kernels are not built; {remedy}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the native CPU kernels do not load ({error}); {remedy}"
    if not hasattr(torch.ops.tract_fast, "abi") or torch.ops.tract_fast.abi() != ABI:
        return f"the native CPU kernels are those of another version; {remedy}"
    for name in OF_THE_CPU:
        torch.library.register_fake(f"tract_fast::{name}", lambda *args: None)
    return None


def variant() -> str:
    """The instruction set whose kernels run here."""
    return torch.ops.tract_fast.variant()


def runs(dtype: torch.dtype) -> bool:
    """Whether the native row pass takes CPU logits of this dtype; warns once where it was not built."""
    if dtype not in DTYPES:
        return False
    if reason := missing():
        warn(reason)
        return False
    check_variant()
    return True


def check_variant() -> None:
    """Raise ValueError where ``TRACT_FAST_CPU`` names a variant that is not there."""
    if missing():
        return
    try:
        variant()
    except RuntimeError as error:
        raise ValueError(f"TRACT_FAST_CPU = {os.environ.get('TRACT_FAST_CPU')}: {REFUSED}") from error


@functools.cache  # once a process; Python's own "once" is forgotten whenever a library changes the filters
def warn(reason: str) -> None:
    warnings.warn(f"tract_fast computes the loss in PyTorch, with the same results but slower: {reason}", stacklevel=2)


def takes(matrix: Tensor, device_type: str | None = None) -> bool:
    """Whether kernels read a matrix where it lies: on the CPU, the elements of a row side by side. ``device_type``:
    where it will be, None: where it is."""
    apart = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return apart and (device_type or matrix.device.type) == "cpu" and runs(matrix.dtype)


def pick(hidden: Tensor, labels: Tensor, a: Arguments) -> Picked:
    """``rows.pick`` with the same arguments and results, in C++ for CPU tensors where it was built."""
    if not (takes(hidden) and takes(a.weight)):
        return rows.pick(hidden, labels, a)
    empty, ids = hidden.new_empty, a.score_token_ids
    picked = Picked(empty(len(hidden), dtype=torch.float32), empty(len(hidden), len(ids), dtype=torch.float32))
    torch.ops.tract_fast.pick(hidden, a.weight, labels, ids, *picked)
    return picked


def quantize(matrix: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """Write the rows of ``matrix`` in 8 bits, in C++; False where it does not run, and nothing is done."""
    if codes.dtype != torch.int8 or not takes(matrix):
        return False
    torch.ops.tract_fast.quantize(matrix, codes, scales)
    return True


def row_pass(logits: Tensor, picked: Picked, terms: RowTerms, stats: RowStats, a: Arguments, *, gradient: bool) -> None:
    """``rows.row_pass`` with the same arguments and results, in C++ where it was built."""
    if not runs(logits.dtype):
        rows.row_pass(logits, picked, terms, stats, a, gradient=gradient)
        return
    torch.ops.tract_fast.row_pass(
        logits, a.bias, *picked,
        terms.labels, terms.ce, terms.score, terms.score_target, terms.used,
        a.score_token_ids, a.score_values, *stats,
        a.softcap or 0.0, a.logit_scale, a.vocab, gradient,
    )  # fmt: skip


def sampled_rows(
    logits: Tensor, picked: Picked, terms: RowTerms, stats: RowStats, a: Arguments, x: Tensor, begins: Tensor,
    reference: Tensor, eps: float, lists: tuple[Tensor, ...], dx: Tensor, spread: Tensor, norm: Tensor,
    factor: Tensor | None, weights: Tensor,
) -> None:  # fmt: skip
    """``sampled.sampled_rows`` in C++; only where ``runs`` says so."""
    torch.ops.tract_fast.sampled_rows(
        logits, a.bias, *picked,
        terms.labels, terms.ce, terms.score, terms.score_target, terms.used,
        a.score_token_ids, a.score_values, *stats,
        a.softcap or 0.0, a.logit_scale, a.vocab,
        x, a.weight, begins, reference, eps, *lists, dx, spread, norm, factor, weights,
    )  # fmt: skip


def sampled_weight(lists: tuple[Tensor, ...], x: Tensor, scale: Tensor, dw: Tensor, db: Tensor, n_vocab: int) -> None:
    """``sampled.sampled_weight`` in C++; only where ``runs`` says so."""
    torch.ops.tract_fast.sampled_weight(*lists, x, scale, dw, db, n_vocab)


def add(total: Tensor, part: Tensor, *, first: bool) -> None:
    """``total += part``, or ``=`` at ``first``, of a float32 sum and a 16-bit part, in one pass."""
    if part.device.type == "cpu" and runs(part.dtype):
        torch.ops.tract_fast.add(total, part, first)
    elif first:
        total.copy_(part)
    else:
        total += part


def scaled(total: Tensor, scale: Tensor, out: Tensor) -> bool:
    """``out = total * scale`` in one pass, of float32 or of ``out``'s dtype; False where it does not run."""
    known = total.dtype in (torch.float32, out.dtype) and total.is_contiguous()
    if total.device.type != "cpu" or not known or not runs(out.dtype):
        return False
    torch.ops.tract_fast.scale(total, scale, out)
    return True


def scratch(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty (rows, columns) tensor of the dtype and device of ``like``, for a chunk of logits or dW. On the CPU its
    memory is kept when it is let go: a fresh one would be paged in and zeroed at every call."""
    if like.device.type == "cpu" and missing() is None:
        return torch.ops.tract_fast.scratch(like, rows, columns)
    return like.new_empty(rows, columns)


def release() -> int:
    """Give back the memory that ``scratch`` keeps for the next call; returns how many bytes it was."""
    return torch.ops.tract_fast.release() if missing() is None else 0

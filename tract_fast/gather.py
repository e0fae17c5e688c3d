"""Rows of a matrix picked by an index that may name a row many times, with a gradient that is always the same.

The gradient of a row that is picked k times is a sum of k terms. ``index_select``'s own backward adds them on CUDA in
whatever order threads arrive, in the dtype of the gradient; here the order is that of the index, and 16-bit gradients
are summed in float32 and rounded once. ``x.index_select(0, index)`` is the reference.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor


@torch.library.custom_op("tract_fast::gather_rows", mutates_args=())
def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, (K, ...), of ``x`` (T, ...) and ``index`` (K,) int64; one operator, also inside torch.compile."""
    return x.index_select(0, index)


@gather_rows.register_fake
def _(x, index):
    return x.new_empty(index.shape[0], *x.shape[1:])


@torch.library.custom_op("tract_fast::add_rows", mutates_args=())
def add_rows(grad: Tensor, index: Tensor, count: int) -> Tensor:
    """(T, ...) in ``grad``'s dtype, T = ``count``: at t the sum of ``grad`` (K, ...) where ``index`` (K,) is t."""
    precise = torch.promote_types(grad.dtype, torch.float32)
    out = grad.new_zeros((count, *grad.shape[1:]), dtype=precise)
    add = add_sorted if grad.device.type == "cuda" else add_runs
    return add(out, index, grad).to(grad.dtype)


def add_runs(out: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """``out`` with ``grad`` added, in place, a run of consecutive rows at a time: an index of segments has few."""
    where = index.cpu().numpy()
    cuts = [0, *(np.flatnonzero(np.diff(where) != 1) + 1).tolist(), len(where)] if len(where) else []
    for a, b in itertools.pairwise(cuts):
        start = int(where[a])
        out[start : start + b - a] += grad[a:b]
    return out


def add_sorted(out: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """The same on CUDA, where accumulating ``index_put_`` sorts the index: no order is left open, and no host waits."""
    return out.index_put_((index,), grad.to(out.dtype), accumulate=True)


@add_rows.register_fake
def _(grad, index, count):
    return grad.new_empty(count, *grad.shape[1:])


def _remember(ctx, inputs, output) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.count = x.shape[0]


def _backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return add_rows(grad, index, ctx.count), None


gather_rows.register_autograd(_backward, setup_context=_remember)

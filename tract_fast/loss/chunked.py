"""The loss a chunk of rows at a time: the logits of a chunk become its dZ in place and are never kept beside it.

Per chunk: ``mm`` into a reused buffer -> one row pass (statistics, loss and dZ of cross-entropy and score rows alike)
-> ``dX = dZ W`` -> ``dW += dZ^T X`` in float32. The gradient is computed in forward, where the logits are, and backward
only scales it by the upstream gradient, a scalar on the device; the dW of an only chunk is computed there. ``plan.py``
decides the chunks.

Numerics: logits and dZ have the dtype of ``hidden``, statistics and all row arithmetic are float32, GEMMs accumulate in
float32. dX is rounded as it is written, dW once over all chunks (on the CPU 16-bit dW once per chunk); an upstream
gradient that is no power of two rounds both again. Rows that are not used reach dX and dW as zeros. Cost: 2 N V D FLOP
for the loss alone, as much again for dX and for dW if they are needed; C V logits, plus V D float32 with several
chunks. Nothing waits for the device and everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tract_fast.loss import native
from tract_fast.loss.choice import runs_triton
from tract_fast.loss.plan import ChunkPlan, plan_chunks, round_up
from tract_fast.loss.rows import row_pass
from tract_fast.loss.terms import OP_SCHEMA, Arguments, new_scalar, new_stats, row_terms, total_loss, used_rows

ROW_ALIGNMENT = 64  # logits
SCALE_BLOCK = 2**24  # elements that are converted to float32 at a time
AMX_COLUMNS = 32  # of 16 bits, that a product takes at a time
SUMMAND = 2**22  # elements of dW that are added at a time


@torch.library.custom_op("tract_fast::chunked_loss", mutates_args=(), schema=OP_SCHEMA)
def chunked_loss(*args) -> tuple[Tensor, ...]:
    """(loss, *RowStats, unit, dx, dw, db, dz) of ``Arguments``, at least one row.

    Gradients are in units of ``unit``; those that are not needed are empty. ``dz`` (N, V) is there instead of ``dw``
    where the plan defers dW.
    """
    a = Arguments(*args)
    n, n_vocab = len(a.hidden), len(a.weight)
    plan, rows = chunks_of(a), row_pass_for(a.hidden.device)
    terms, stats = row_terms(a), new_stats(a)
    dx, dw, db = _new_gradients(a, plan.defer, native.scratch)
    logits = logits_buffer(a.hidden, plan.rows, n_vocab)
    with torch.autocast(a.hidden.device.type, enabled=False):
        for start in range(0, n, plan.rows):
            stop = min(start + plan.rows, n)
            x, part, chunk = a.hidden[start:stop], terms.rows(start, stop), logits[: stop - start]
            torch.mm(beside_zeros(x), a.weight.t(), out=chunk)
            picked = native.pick(x, part.labels, a)
            rows(chunk, picked, part, stats.rows(start, stop), a, gradient=a.need_dx or a.need_dw or a.need_db)
            if a.need_dx:
                torch.mm(chunk, a.weight, out=dx[start:stop])
            if a.need_dw and not plan.defer:
                accumulate(dw, chunk.t(), read(x, part.used), first=start == 0)
            if a.need_db:
                db += chunk.sum(0, dtype=torch.float32)
        loss = total_loss(stats, a)
    return loss, *stats, terms.unit, dx, dw, db, logits if plan.defer else a.hidden.new_empty(0, n_vocab)


@chunked_loss.register_fake
def empty_results(*args, device_type: str | None = None) -> tuple[Tensor, ...]:
    """The results without values; ``device_type``: that whose chunks are planned, None: that of the arguments."""
    # len() of a tensor would fix its size in the trace: shape here and in what is called
    a = Arguments(*args)
    plan = chunks_of(a, device_type)
    n_vocab = a.weight.shape[0]
    dz = a.hidden.new_empty(plan.rows, padded(n_vocab))[:, :n_vocab] if plan.defer else a.hidden.new_empty(0, n_vocab)
    return new_scalar(a), *new_stats(a), new_scalar(a), *_new_gradients(a, plan.defer, torch.Tensor.new_empty), dz


def padded(n_vocab: int) -> int:
    """Columns of the buffer: rows start at multiples of 128 bytes, so that GEMMs and kernels load whole vectors."""
    return round_up(n_vocab, ROW_ALIGNMENT)


def beside_zeros(matrix: Tensor) -> Tensor:
    """``matrix`` (n, K), with zeros behind each row up to a multiple of 32 columns on a CPU, in 16 bits.

    With AMX, oneDNN up to 3.14 reads a left operand's rows as far as that and multiplies what is there with 0: a NaN
    of the next row, or one that memory has held before, would be in this row's products (oneDNN#5717)."""
    width = matrix.shape[1]
    if matrix.device.type != "cpu" or matrix.element_size() != 2 or width % AMX_COLUMNS == 0:
        return matrix
    return torch.nn.functional.pad(matrix, (0, -width % AMX_COLUMNS))[:, :width]


def logits_buffer(like: Tensor, rows: int, n_vocab: int) -> Tensor:
    """(rows, n_vocab) of the dtype and device of ``like``, undefined, in rows of ``padded`` columns; on a CPU zeros are
    behind each row, as with ``beside_zeros``, for the product of dZ and W."""
    whole = native.scratch(like, rows, padded(n_vocab))
    if whole.device.type == "cpu":
        whole[:, n_vocab:] = 0
    return whole[:, :n_vocab]


def _new_gradients(a: Arguments, defer: bool, new: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dW (of ``new``) and db to be filled, empty where they are not needed; dW also where it waits for backward."""
    (n, width), n_vocab = a.hidden.shape, a.weight.shape[0]
    return (
        a.hidden.new_empty(n if a.need_dx else 0, width),
        new(a.weight.new_empty(0, dtype=torch.float32), n_vocab if a.need_dw and not defer else 0, width),
        a.weight.new_zeros(n_vocab if a.need_db else 0, dtype=torch.float32),
    )


def row_pass_for(device: torch.device):
    """The Triton kernel where it runs, C++ for other CPU tensors, PyTorch otherwise."""
    if runs_triton(device.type):
        from tract_fast.loss.triton_rows import row_pass as triton_row_pass

        return triton_row_pass
    return native.row_pass if device.type == "cpu" else row_pass


def chunks_of(a: Arguments, device_type: str | None = None) -> ChunkPlan:
    """How a call is cut on a device of that type, or its own."""
    return plan_chunks(
        a.hidden.shape[0],
        a.weight.shape[0],
        a.hidden.shape[1],
        logit_bytes=a.hidden.element_size(),
        trained_weight=a.need_dw,
        budget=a.budget,
        device=device_type or a.hidden.device.type,
    )


def read(rows: Tensor, used: Tensor) -> Tensor:
    """Rows of ``hidden`` with zeros where they are not used, so that an infinity there is not 0 * inf in dW."""
    return rows.masked_fill(~used[:, None], 0.0)


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``total += a @ b`` in float32, or ``=`` at ``first``, without rounding in between where the device can."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.device.type == "cuda":
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # no 16-bit GEMM with a float32 result on the CPU: each summand is rounded once, a part that caches hold
        step = max(1, SUMMAND // max(1, b.shape[1]))
        part = native.scratch(a, min(step, len(a)), b.shape[1])
        for i in range(0, len(a), step):
            summand = part[: min(step, len(a) - i)]
            torch.mm(a[i : i + step], b, out=summand)
            native.add(total[i : i + step], summand, first=first)


def _remember(ctx, inputs, output) -> None:
    a = Arguments(*inputs)
    unit, dx, dw, db, dz = output[-5:]
    # hidden is read again only where dW waits for backward; the weight never is
    hidden = a.hidden if dz.shape[0] else a.hidden.new_empty(0, a.hidden.shape[1])
    ctx.save_for_backward(hidden, a.labels, a.score_rows, unit, dx, dw, db, dz)
    ctx.dtype = a.weight.dtype
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, grad_loss: Tensor | None, *others) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    grads = chunked_backward(grad_loss, *ctx.saved_tensors, ctx.dtype)
    return input_gradients(ctx, grads)


def input_gradients(ctx, grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """dX, dW and db where they are needed, and None for all other inputs of an op."""
    needed = ctx.needs_input_grad
    return *(g if need else None for g, need in zip(grads, needed[:3], strict=True)), *(None,) * (len(needed) - 3)


@torch.library.custom_op("tract_fast::chunked_backward", mutates_args=())
def chunked_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    labels: Tensor,
    score_rows: Tensor,
    unit: Tensor,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
    dz: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) of the loss, from what forward left, times the upstream gradient. Nothing saved is changed."""
    scale = grad_loss * unit
    with torch.autocast(dx.device.type, enabled=False):
        if dz.shape[0]:
            used = used_rows(labels, score_rows)
            # scaling the rows costs N D instead of V D, and is exact for an upstream gradient of 1
            grad_w = native.scratch(dz, dz.shape[1], hidden.shape[1])
            torch.mm(dz.t(), scaled(read(hidden, used), scale, hidden.dtype), out=grad_w)
        else:
            grad_w = scaled(dw, scale, dtype, native.scratch(dx, *dw.shape) if len(dw) else None)
        return scaled(dx, scale, dx.dtype), grad_w, (db * scale).to(dtype)


@chunked_backward.register_fake
def _(grad_loss, hidden, labels, score_rows, unit, dx, dw, db, dz, dtype):
    return (
        torch.empty_like(dx),
        dz.new_empty(dz.shape[1], hidden.shape[1]) if dz.shape[0] else torch.empty_like(dw, dtype=dtype),
        torch.empty_like(db, dtype=dtype),
    )


chunked_loss.register_autograd(_scale_gradients, setup_context=_remember)


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``(x * scale).to(dtype)``, into ``out`` if given, multiplied in float32 a block at a time: a 16-bit scalar would
    be rounded first."""
    out = torch.empty_like(x, dtype=dtype) if out is None else out
    if native.scaled(x, scale, out):
        return out
    step = max(1, SCALE_BLOCK // max(1, x.shape[1]))
    for i in range(0, len(x), step):
        out[i : i + step] = x[i : i + step].float() * scale
    return out

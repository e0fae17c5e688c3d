"""The loss a chunk of rows at a time: the logits of a chunk become its dZ in place and are never kept beside it.

Per chunk: ``mm`` into a reused buffer -> one row pass (statistics, loss and dZ of cross-entropy and score rows alike)
-> ``dX = dZ W`` -> ``dW += dZ^T X`` in float32. The gradient is computed in forward, where the logits are, and backward
only scales it by the upstream gradient, a scalar on the device; the dW of an only chunk is computed there. ``plan.py``
decides the chunks.

Numerics: logits and dZ have the dtype of ``hidden``, statistics and all row arithmetic are float32, GEMMs accumulate in
float32, dX and dW are rounded once. Rows that are not used reach dX and dW as zeros. Cost: 2 N V D FLOP for the loss
alone, as much again for dX and for dW if they are needed; C V logits, plus V D float32 with several chunks. Nothing
waits for the device and everything is deterministic.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tract_fast.loss.plan import plan_chunks
from tract_fast.loss.rows import pick, row_pass
from tract_fast.loss.terms import (
    new_stats,
    row_terms,
    total_loss,
    used_rows,
)

INPUTS = ("hidden", "weight", "bias")  # what gradients flow into
SCALE_BLOCK = 2**24  # elements that are converted to float32 at a time


@torch.library.custom_op("tract_fast::chunked_loss", mutates_args=())
def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    score_rows: Tensor,
    score_targets: Tensor,
    score_token_ids: Tensor,
    score_values: Tensor,
    row_weights: Tensor,
    score_weights: Tensor,
    softcap: float | None,
    logit_scale: float,
    vocab: bool,
    budget: int | None,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, row statistics and what backward needs: (loss, nll, lse, expected, mass, probs, unit, dx, dw, dz, db).

    Gradients are in units of ``unit``; those that are not needed are empty. ``dz`` (N, V) is there instead of ``dw``
    where the plan defers dW. At least one row.
    """
    (n, width), n_vocab = hidden.shape, len(weight)
    gradient = need_dx or need_dw or need_db
    plan = _plan(hidden, weight, budget, need_dw)
    rows = row_pass_for(hidden.device)
    terms = row_terms(n_vocab, labels, score_rows, score_targets, score_values, row_weights, score_weights)
    stats = new_stats(hidden, len(score_token_ids))
    logits = hidden.new_empty(plan.rows, n_vocab)
    dx = hidden.new_empty(n if need_dx else 0, width)
    dw = weight.new_empty(n_vocab if need_dw and not plan.defer else 0, width, dtype=torch.float32)
    db = weight.new_zeros(n_vocab if need_db else 0, dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, n, plan.rows):
            stop = min(start + plan.rows, n)
            chunk = logits[: stop - start]
            torch.mm(hidden[start:stop], weight.t(), out=chunk)
            part = terms.rows(start, stop)
            rows(
                chunk,
                pick(hidden[start:stop], weight, part.labels, score_token_ids),
                part,
                score_token_ids,
                score_values,
                stats.rows(start, stop),
                bias=bias,
                softcap=softcap,
                logit_scale=logit_scale,
                vocab=vocab,
                gradient=gradient,
            )
            if need_dx:
                torch.mm(chunk, weight, out=dx[start:stop])
            if need_dw and not plan.defer:
                accumulate(dw, chunk, read(hidden[start:stop], part.used), first=start == 0)
            if need_db:
                db += chunk.sum(0, dtype=torch.float32)
        loss = total_loss(stats, row_weights, score_rows, score_targets, score_weights)
    dz = logits if plan.defer else hidden.new_empty(0, n_vocab)
    return loss, *stats, terms.unit, dx, dw, dz, db


@chunked_loss.register_fake
def _(hidden, weight, bias, labels, score_rows, score_targets, score_token_ids, score_values, row_weights,
      score_weights, softcap, logit_scale, vocab, budget, need_dx, need_dw, need_db):  # fmt: skip
    (n, width), n_vocab = hidden.shape, len(weight)
    defer = _plan(hidden, weight, budget, need_dw).defer
    real = {"dtype": torch.float32}
    return (
        hidden.new_empty((), **real),
        *new_stats(hidden, len(score_token_ids)),
        hidden.new_empty((), **real),
        hidden.new_empty(n if need_dx else 0, width),
        weight.new_empty(n_vocab if need_dw and not defer else 0, width, **real),
        hidden.new_empty(n if defer else 0, n_vocab),
        weight.new_empty(n_vocab if need_db else 0, **real),
    )


def interprets_triton() -> bool:
    """Whether Triton runs its kernels on the CPU, which is slow and for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def row_pass_for(device: torch.device):
    """The Triton kernel on CUDA, and on the CPU where Triton interprets; PyTorch otherwise."""
    if device.type == "cuda" or interprets_triton():
        from tract_fast.loss.triton_rows import row_pass as triton_row_pass

        return triton_row_pass
    return row_pass


def _plan(hidden: Tensor, weight: Tensor, budget: int | None, need_dw: bool):
    return plan_chunks(
        len(hidden),
        len(weight),
        hidden.shape[1],
        logit_bytes=hidden.element_size(),
        trained_weight=need_dw,
        budget=budget,
        device=hidden.device.type,
    )


def read(rows: Tensor, used: Tensor) -> Tensor:
    """Rows of ``hidden`` with zeros where they are not used, so that an infinity there is not 0 * inf in dW."""
    return rows.masked_fill(~used[:, None], 0.0)


def accumulate(dw: Tensor, dz: Tensor, rows: Tensor, *, first: bool) -> None:
    """``dw (V, D) float32 += dz.T @ rows``, or ``=`` at ``first``, without rounding in between where the device can."""
    if dz.dtype == torch.float32:
        torch.addmm(dw, dz.t(), rows, beta=0 if first else 1, out=dw)
    elif dz.device.type == "cuda":
        if first:
            torch.mm(dz.t(), rows, out_dtype=torch.float32, out=dw)
        else:
            torch.addmm(dw, dz.t(), rows, out_dtype=torch.float32, out=dw)
    elif first:  # no 16-bit GEMM with a float32 result on the CPU: each chunk's dW is rounded once
        dw.copy_(torch.mm(dz.t(), rows))
    else:
        dw += torch.mm(dz.t(), rows)


def _remember(ctx, inputs, output) -> None:
    hidden, weight, labels, score_rows = inputs[0], inputs[1], inputs[3], inputs[4]
    unit, dx, dw, dz, db = output[-5:]
    # hidden is read again only where dW waits for backward; the weight never is
    ctx.save_for_backward(hidden if len(dz) else hidden[:0], labels, score_rows, unit, dx, dw, dz, db)
    ctx.dtype = weight.dtype
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, grad_loss: Tensor | None, *others) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 17
    return *_finish(ctx, grad_loss), *(None,) * 14


def _finish(ctx, grad_loss: Tensor) -> list[Tensor | None]:
    grads = chunked_backward(grad_loss, *ctx.saved_tensors, ctx.dtype)
    return [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:3], strict=True)]


@torch.library.custom_op("tract_fast::chunked_backward", mutates_args=())
def chunked_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    labels: Tensor,
    score_rows: Tensor,
    unit: Tensor,
    dx: Tensor,
    dw: Tensor,
    dz: Tensor,
    db: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) of the loss, from what forward left, times the upstream gradient. Nothing saved is changed."""
    scale = grad_loss * unit
    with torch.autocast(dx.device.type, enabled=False):
        if len(dz):
            used = used_rows(labels, score_rows)
            # scaling the rows costs N D instead of V D, and is exact for an upstream gradient of 1
            grad_w = torch.mm(dz.t(), scaled(read(hidden, used), scale, hidden.dtype))
        else:
            grad_w = scaled(dw, scale, dtype)
        return scaled(dx, scale, dx.dtype), grad_w, (db * scale).to(dtype)


@chunked_backward.register_fake
def _(grad_loss, hidden, labels, score_rows, unit, dx, dw, dz, db, dtype):
    return (
        torch.empty_like(dx),
        dz.new_empty(dz.shape[1], hidden.shape[1]) if len(dz) else torch.empty_like(dw, dtype=dtype),
        torch.empty_like(db, dtype=dtype),
    )


chunked_loss.register_autograd(_scale_gradients, setup_context=_remember)


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(x * scale).to(dtype)``, multiplied in float32 a block at a time: a scalar of 16 bit would be rounded first."""
    out = torch.empty_like(x, dtype=dtype)
    step = max(1, SCALE_BLOCK // max(1, x.shape[1]))
    for i in range(0, len(x), step):
        out[i : i + step] = x[i : i + step].float() * scale
    return out

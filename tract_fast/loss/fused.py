"""The loss without any row of logits in memory: Triton computes them tile by tile, and again in backward.

Forward: a program holds ``BM`` rows and walks over a share of the vocabulary in tiles of ``BN`` columns; a tile is a
GEMM over D on the matrix units whose result never leaves the registers: it updates (max, sum) of each row, without the
label and the score tokens. The shares of the vocabulary are put together per row, and ``rows.finish`` makes
statistics and coefficients. The logits of labels and score tokens come from ``rows.pick``.

Backward: for ``columns`` of the vocabulary at a time, the tiles are computed again and written as dZ (N x columns);
``dX += dZ W`` in float32 and ``dW[columns] = dZ^T X`` once, both GEMMs of cuBLAS. No atomics, no locks: deterministic.

Numerics: logits stay in float32 from the GEMM's accumulator on, so they are more exact than 16-bit ones in memory; dZ
is rounded to the dtype of ``hidden``. Cost: 2 N V D FLOP forward, 6 N V D backward (4 with W frozen): a third more than
``chunked``, by a GEMM that is slower than cuBLAS's, so it saves time only where D is small (``choice.py``). Memory:
O(N) between forward and backward; in it one block of dZ, dX in float32 and a scaled copy of the hidden states. Applies
to any N, V, D and K; offsets are 64 bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tract_fast.loss.choice import interprets_triton
from tract_fast.loss.chunked import accumulate, input_gradients, read, scaled
from tract_fast.loss.plan import plan_columns
from tract_fast.loss.rows import finish, pick, transform_picked
from tract_fast.loss.terms import (
    OP_SCHEMA,
    Arguments,
    column_labels,
    new_scalar,
    new_stats,
    row_terms,
    total_loss,
    used_rows,
)
from tract_fast.loss.triton_rows import transformed
from tract_fast.loss.tuning import on_device, tuned


def tile(bm: int, bn: int, bk: int, warps: int, stages: int) -> triton.Config:
    """Rows, columns and depth of a tile, warps and pipeline stages."""
    sizes = {"BM": bm, "BN": bn, "BK": bk, "UPCAST": False}
    # all the registers there are: ptxas takes fewer by itself and spills
    return triton.Config(sizes, num_warps=warps, num_stages=stages, maxnreg=255)


# By bytes of an element, the default first. Larger tiles spill in some variant on some GPU generation.
TILES = {2: (tile(128, 64, 64, 8, 4), tile(64, 128, 64, 8, 4)), 4: (tile(64, 64, 16, 8, 3),)}
# triton's interpreter multiplies bfloat16 as integers, hence UPCAST
INTERPRETED = (triton.Config({"BM": 16, "BN": 32, "BK": 16, "UPCAST": True}),)
ROWS, COLUMNS = 128, 128  # of a tile, where the host must know about how large it is


@triton.jit
def tile_logits(
    hidden, weight, bias, rows, cols, n_rows, n_vocab, width, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Capped logits of a tile (BM, BN) in float32 and their derivative with respect to the raw ones."""
    x = hidden + rows.to(tl.int64)[:, None] * width
    w = weight + cols.to(tl.int64)[None, :] * width
    row_here, col_here = (rows < n_rows)[:, None], (cols < n_vocab)[None, :]
    z = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + k[None, :], mask=row_here & (k < width)[None, :], other=0.0)
        b = tl.load(w + k[:, None], mask=col_here & (k < width)[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b, z, input_precision="ieee")
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=cols < n_vocab, other=0.0).to(tl.float32)[None, :]
    return transformed(z, softcap, logit_scale, SOFTCAP)


@triton.jit(do_not_specialize=["n_rows", "n_tokens"])
def sums_kernel(
    hidden, weight, bias, labels, ids, top, others,
    n_rows, n_vocab, width, n_tokens, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Per share of the vocabulary (grid axis 1) and row: largest logit and sum of exponentials, without the label and
    the score tokens."""
    share = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_here = rows < n_rows
    label = tl.load(labels + rows, mask=row_here, other=-1)
    m = tl.full((BM,), -3.4028234663852886e38, dtype=tl.float32)
    s = tl.zeros((BM,), dtype=tl.float32)
    tiles = tl.cdiv(n_vocab, BN)
    for tile in range(tiles * share // tl.num_programs(1), tiles * (share + 1) // tl.num_programs(1)):
        cols = tile * BN + tl.arange(0, BN)
        z, _ = tile_logits(
            hidden, weight, bias, rows, cols, n_rows, n_vocab, width, softcap, logit_scale,
            HAS_BIAS, SOFTCAP, BM, BN, BK, UPCAST,
        )  # fmt: skip
        z = tl.where((cols < n_vocab)[None, :] & (cols[None, :] != label[:, None]), z, float("-inf"))
        for k in range(n_tokens):
            token = tl.load(ids + k)
            if (token >= tile * BN) & (token < (tile + 1) * BN):
                z = tl.where((cols == token)[None, :], float("-inf"), z)
        new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        m = new
    at = share.to(tl.int64) * n_rows + rows
    tl.store(top + at, m, mask=row_here)
    tl.store(others + at, s, mask=row_here)


@triton.jit(do_not_specialize=["n_rows", "n_tokens", "first", "last"])
def dz_kernel(
    hidden, weight, bias, labels, used, top, factor, dz_label, dz_scores, ids, dz,
    n_rows, n_vocab, width, n_tokens, first, last, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dZ of the columns ``first`` to ``last``, as (n_rows, last - first), of raw logits as ``dz_label`` is."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    low = first + tl.program_id(1) * BN
    cols = low + tl.arange(0, BN)
    row_here = rows < n_rows
    z, slope = tile_logits(
        hidden, weight, bias, rows, cols, n_rows, n_vocab, width, softcap, logit_scale,
        HAS_BIAS, SOFTCAP, BM, BN, BK, UPCAST,
    )  # fmt: skip
    label = tl.load(labels + rows, mask=row_here, other=-1)
    m = tl.load(top + rows, mask=row_here, other=0.0)
    # times the slope at once: z and slope side by side would not fit the registers
    out = tl.load(factor + rows, mask=row_here, other=0.0)[:, None] * tl.exp(z - m[:, None]) * slope
    at_label = tl.load(dz_label + rows, mask=row_here, other=0.0)
    out = tl.where(cols[None, :] == label[:, None], at_label[:, None], out)
    for k in range(n_tokens):
        token = tl.load(ids + k)
        if (token >= low) & (token < low + BN):
            at_token = tl.load(dz_scores + rows.to(tl.int64) * n_tokens + k, mask=row_here, other=0.0)
            out = tl.where((cols == token)[None, :], at_token[:, None], out)
    is_used = tl.load(used + rows, mask=row_here, other=0) != 0
    out = tl.where(is_used[:, None], out, 0.0)
    place = dz + rows.to(tl.int64)[:, None] * (last - first) + (cols - first)[None, :]
    tl.store(place, out.to(dz.dtype.element_ty), mask=row_here[:, None] & (cols < last)[None, :])


def tiled(kernel, dtype: torch.dtype):
    return tuned(kernel, INTERPRETED if interprets_triton() else TILES[dtype.itemsize])


def shares(n_rows: int, n_vocab: int, device: torch.device) -> int:
    """Shares of the vocabulary: enough programs for four waves, whatever the number of rows."""
    if device.type != "cuda":
        return 3
    programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(n_vocab, COLUMNS), triton.cdiv(programs, triton.cdiv(n_rows, ROWS))))


def vocabulary_sums(a: Arguments, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N,), (N,): the largest logit of each row and the sum of exponentials relative to it, without the label and the
    score tokens."""
    n, n_vocab = len(a.hidden), len(a.weight)
    count = shares(n, n_vocab, a.hidden.device)
    top, others = (a.hidden.new_empty(count, n, dtype=torch.float32) for _ in range(2))
    tiled(sums_kernel, a.hidden.dtype)[lambda meta: (triton.cdiv(n, meta["BM"]), count)](
        a.hidden, a.weight, a.hidden if a.bias is None else a.bias, labels, a.score_token_ids, top, others,
        n, n_vocab, a.hidden.shape[1], len(a.score_token_ids), 1.0 if a.softcap is None else a.softcap,
        a.logit_scale, HAS_BIAS=a.bias is not None, SOFTCAP=a.softcap is not None,
    )  # fmt: skip
    highest = top.amax(0)
    return highest, (others * torch.exp(top - highest)).sum(0)


@torch.library.custom_op("tract_fast::fused_loss", mutates_args=(), schema=OP_SCHEMA)
def fused_loss(*args) -> tuple[Tensor, ...]:
    """(loss, *RowStats, unit, top, factor, label, scores) of ``Arguments``, all O(N); at least one row."""
    a = Arguments(*args)
    a = a._replace(hidden=a.hidden.contiguous(), weight=a.weight.contiguous())
    terms, stats = row_terms(a), new_stats(a)
    with torch.autocast(a.hidden.device.type, enabled=False), on_device(a.hidden):
        picked, slopes = transform_picked(pick(a.hidden, terms.labels, a), terms.labels, a)
        top, others = vocabulary_sums(a, terms.labels)
        at = finish(top, others, picked, terms, stats, a)
        at = at._replace(label=at.label * slopes.label, scores=at.scores * slopes.scores)
        loss = total_loss(stats, a)
    return loss, *stats, terms.unit, top, at.factor, at.label, at.scores


@fused_loss.register_fake
def _(*args):
    a = Arguments(*args)
    stats = new_stats(a)
    return new_scalar(a), *stats, new_scalar(a), *(torch.empty_like(stats.nll) for _ in range(3)), stats.probs.clone()


@torch.library.custom_op("tract_fast::fused_backward", mutates_args=())
def fused_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    score_rows: Tensor,
    score_token_ids: Tensor,
    unit: Tensor,
    top: Tensor,
    factor: Tensor,
    dz_label: Tensor,
    dz_scores: Tensor,
    softcap: float | None,
    logit_scale: float,
    budget: int | None,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) times the upstream gradient; those that are not needed are empty."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (n, width), n_vocab = hidden.shape, len(weight)
    used, scale = used_rows(labels, score_rows), grad_loss * unit
    columns = plan_columns(n, n_vocab, logit_bytes=hidden.element_size(), multiple=COLUMNS, budget=budget)
    kernel = tiled(dz_kernel, hidden.dtype)
    dx = hidden.new_zeros(n if need_dx else 0, width, dtype=torch.float32)
    dw = weight.new_empty(n_vocab if need_dw else 0, width)
    db = weight.new_empty(n_vocab if need_db else 0)
    labels = column_labels(labels, n_vocab)
    with torch.autocast(hidden.device.type, enabled=False), on_device(hidden):
        rows = scaled(read(hidden, used), scale, hidden.dtype) if need_dw else None
        block = hidden.new_empty(n * columns)
        for first in range(0, n_vocab, columns):
            last = min(first + columns, n_vocab)
            size = last - first
            dz = block[: n * size].view(n, size)
            kernel[lambda meta, size=size: (triton.cdiv(n, meta["BM"]), triton.cdiv(size, meta["BN"]))](
                hidden, weight, hidden if bias is None else bias, labels, used, top, factor, dz_label, dz_scores,
                score_token_ids, dz, n, n_vocab, width, len(score_token_ids), first, last,
                1.0 if softcap is None else softcap, logit_scale,
                HAS_BIAS=bias is not None, SOFTCAP=softcap is not None,
            )  # fmt: skip
            if need_dx:
                accumulate(dx, dz, weight[first:last], first=first == 0)
            if need_dw:
                torch.mm(dz.t(), rows, out=dw[first:last])
            if need_db:
                db[first:last] = dz.sum(0, dtype=torch.float32) * scale
        return scaled(dx, scale, hidden.dtype), dw, db


@fused_backward.register_fake
def _(grad_loss, hidden, weight, bias, *others):
    need_dx, need_dw, need_db = others[-3:]
    n_vocab, width = weight.shape
    return (
        hidden.new_empty(hidden.shape[0] if need_dx else 0, width),
        weight.new_empty(n_vocab if need_dw else 0, width),
        weight.new_empty(n_vocab if need_db else 0),
    )


def _remember(ctx, inputs, output) -> None:
    a = Arguments(*inputs)
    ctx.save_for_backward(a.hidden, a.weight, a.bias, a.labels, a.score_rows, a.score_token_ids, *output[-5:])
    ctx.options = (a.softcap, a.logit_scale, a.budget, a.need_dx, a.need_dw, a.need_db)
    ctx.set_materialize_grads(False)


def _recompute(ctx, grad_loss: Tensor | None, *others) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    return input_gradients(ctx, fused_backward(grad_loss, *ctx.saved_tensors, *ctx.options))


fused_loss.register_autograd(_recompute, setup_context=_remember)

"""dW and db of a sampled gradient's lists on CUDA, as Triton kernels.

Algorithm. The entries by column, a counting sort in which a program counts, and later places, those of its share of the
rows, one row after another (columns are unique in a row); then ``weight_kernel``, a program per row of dW and share of
its width, sums them up. No atomics: deterministic. No host sync.

Numerics: products and sums in float32, rounded once. Cost: 16 bytes of order per entry, a row of X each, 8 V S bytes
for the counting sort of S shares; one write of dW. Not yet run on a GPU; compiled ahead of time without spills for
sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tract_fast.loss.sampled import Lists
from tract_fast.loss.tuning import on_device

# Entries and width of a tile of gathered rows. Not tuned.
WEIGHT = {"E": 16, "BD": 256, "num_warps": 4}
PLACE = {"E": 4 * 32, "num_warps": 4}  # an entry a thread: none reads an end that another has moved
SHARES, LEAST_ROWS = 64, 16  # of the rows, in the counting sort; rows of a share


@triton.jit(do_not_specialize=["n_rows", "most", "share_rows", "shares"])
def place_kernel(
    columns, values, counts, ends, rows, entries, n_rows, most, share_rows, shares,
    WRITE: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Advance ``ends`` (V, shares) by the entries of each column in each share of the rows, and write them there."""
    share = tl.program_id(0)
    for index in range(share * share_rows, tl.minimum((share + 1) * share_rows, n_rows)):
        row = tl.cast(index, tl.int64)
        count = tl.load(counts + row)
        for start in range(0, count, E):
            at = row * most + start + tl.arange(0, E)
            here = start + tl.arange(0, E) < count
            end = ends + tl.load(columns + at, mask=here, other=0).to(tl.int64) * shares + share
            place = tl.load(end, mask=here, other=0)
            if WRITE:
                tl.store(rows + place, tl.zeros((E,), tl.int32) + index, mask=here)
                tl.store(entries + place, tl.load(values + at, mask=here, other=0.0), mask=here)
            tl.store(end, place + 1, mask=here)
        tl.debug_barrier()  # the next row has columns of this one, in other threads


@triton.jit(do_not_specialize=["shares"])
def weight_kernel(
    ends, rows, entries, hidden, scale, dw, db, width, shares,
    NEED_DW: tl.constexpr, NEED_DB: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dW of a column of the logits and ``BD`` columns of X, and db, of entries by column: those of column v lie from
    ``ends[v * shares]`` to ``ends[(v + 1) * shares]``."""
    col = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total, sums = tl.zeros((E, BD), tl.float32), tl.zeros((E,), tl.float32)
    end = tl.load(ends + (col + 1) * shares)
    for start in range(tl.load(ends + col * shares), end, E):
        at = start + tl.arange(0, E)
        row = tl.load(rows + at, mask=at < end, other=0).to(tl.int64)
        entry = tl.load(entries + at, mask=at < end, other=0.0)
        sums += entry
        if NEED_DW:
            inside = (at < end)[:, None] & (d < width)[None, :]
            x = tl.load(hidden + row[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total += entry[:, None] * x
    by = tl.load(scale)
    if NEED_DW:
        tl.store(dw + col * width + d, (tl.sum(total, 0) * by).to(dw.dtype.element_ty), mask=d < width)
    if NEED_DB:
        tl.store(db + col + tl.arange(0, 1), (tl.sum(sums, 0) * by).to(db.dtype.element_ty), mask=tl.program_id(1) == 0)


def sampled_weight(lists: Lists, x: Tensor, scale: Tensor, dw: Tensor, db: Tensor, n_vocab: int) -> None:
    """``sampled.sampled_weight`` on CUDA: the same arguments and results."""
    n, most = lists.columns.shape
    shares = min(SHARES, triton.cdiv(n, LEAST_ROWS))
    share_rows = triton.cdiv(n, shares)
    whole = torch.int32 if n * most < 2**31 else torch.int64
    ends = torch.zeros(n_vocab * shares + 1, dtype=whole, device=x.device)
    rows, entries = torch.empty_like(lists.columns), torch.empty_like(lists.values)
    arguments = (*lists, ends[1:], rows, entries, n, most, share_rows, shares)
    with on_device(x):
        place_kernel[(shares,)](*arguments, WRITE=False, **PLACE)
        ends[1:] = ends[:-1].cumsum(0, dtype=whole)  # where a share's entries of a column begin
        place_kernel[(shares,)](*arguments, WRITE=True, **PLACE)
        weight_kernel[(n_vocab, triton.cdiv(x.shape[1], WEIGHT["BD"]) if len(dw) else 1)](
            ends, rows, entries, x, scale, dw, db, x.shape[1], shares,
            NEED_DW=len(dw) > 0, NEED_DB=len(db) > 0, **WEIGHT,
        )  # fmt: skip

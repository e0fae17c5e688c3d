"""The sampled gradient on CUDA: ``sampled.py``'s lists and their products as Triton kernels.

Algorithm. ``draw_kernel``, a program a row: the row pass's sums, the threshold, the row's longest list where the bound
does not say that it fits (a third read of the logits), then the draw. A block of columns is drawn by one scan of 64-bit
integers, which hold the proposals' running sum in the low 46 bits and the number of certain columns above: bit 31 of
the sum changes at a drawn column, and both together say its place in the list. ``settle_kernel``, a program a row: the
listed rows of W give their logits again in float32 (16-bit logits), the sum of exponentials is corrected, label and
score tokens are appended, and dX is the sum of the listed rows of W. Of a proposal (``proposal.py``) it corrects all
of the sum, as far as the lists know it, in the same pass over the listed rows. ``triton_weight.py`` makes dW.

Numerics: float32; proposals are whole numbers and their sums associative, so blocks do not change what is listed. A
product and a sum are not contracted in the draw, for the same reason. No atomics: deterministic. No host sync.

Cost beside the logits' GEMM: 2 reads of the logits (3 of rows with a large coefficient); per entry 2 rows of W (1 in
float32 with W's squares not wanted), 8 bytes of list. Not yet run on a GPU; compiled ahead of time without spills for
sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tract_fast.loss.rows import Picked
from tract_fast.loss.sampled import EXTRA, LOWEST, OVER, PER_NAT, STEPS, Lists
from tract_fast.loss.terms import Arguments, RowStats, RowTerms
from tract_fast.loss.triton_rows import (
    BLOCK_BYTES,
    LAUNCH,
    finish,
    load_block,
    picked_logits,
    programs,
    row_sums,
    take_out,
    transformed,
)
from tract_fast.loss.tuning import on_device

UNFUSED = {"enable_fp_fusion": False}  # of the draw, whose lists must not depend on what a compiler contracts
FARTHEST = 32.0  # of a logit from its proposal, in a weight whose square float32 holds
SCAN = 4096  # columns drawn at a time: twice as many spill
# Entries and width of a tile of gathered rows. Not tuned.
SETTLE = {"E": 8, "BD": 256, "num_warps": 4, "maxnreg": 255}


@triton.jit
def proposal(a, LOWEST: tl.constexpr, PER_NAT: tl.constexpr):
    """``sampled.proposals`` of ``a`` < 0."""
    steps = tl.minimum((tl.minimum(tl.maximum(a, LOWEST), -0.0) * PER_NAT).to(tl.int32), -1)
    return (steps + (158 << 23)).to(tl.float32, bitcast=True).to(tl.int32)


@triton.jit
def proposed(z, shift, LOWEST: tl.constexpr, PER_NAT: tl.constexpr):
    """(listed for certain, proposal of the others as int64: 0 where nothing is drawn)."""
    there = z > float("-inf")
    kept = there & (z >= shift)  # the shift may be -inf itself
    f = proposal(z - shift, LOWEST, PER_NAT).to(tl.int64)
    return kept, tl.where(there & (z < shift), f, 0)


@triton.jit
def longest(
    start_of_row, n_vocab, shift, bias, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr, PER_NAT: tl.constexpr,
):  # fmt: skip
    """Entries that no draw of the row exceeds."""
    certain, total = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for start in range(0, n_vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _slope = load_block(start_of_row, cols, n_vocab, bias, softcap, logit_scale, HAS_BIAS, SOFTCAP)
        kept, f = proposed(z, shift, LOWEST, PER_NAT)
        certain += tl.sum(kept.to(tl.int64), 0)
        total += tl.sum(f, 0)
    return certain + (total >> 31) + 1


@triton.jit
def threshold_shift(lse, e, STEPS: tl.constexpr):
    """The logit at which a column is listed for certain, in steps of 1 / STEPS."""
    return tl.floor((lse + tl.log(e)) * STEPS + 0.5) / STEPS


@triton.jit(do_not_specialize=["n_rows", "n_tokens", "room"])
def draw_kernel(
    logits, n_rows, n_vocab, stride,
    bias, picked_label, picked_scores,
    labels, ce, score, score_target, used,
    ids, values, n_tokens,
    nll, lse, expected, mass, probs,
    softcap, logit_scale,
    starts, reference, eps, columns, counts, most, room, tops, sums, shifts,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, VOCAB: tl.constexpr, PROPOSED: tl.constexpr,
    MAY_BE_LONG: tl.constexpr, OVER: tl.constexpr, EXTRA: tl.constexpr, STEPS: tl.constexpr, LOWEST: tl.constexpr,
    PER_NAT: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Statistics of raw logits, the columns that are drawn and their number, and per row the largest logit, the sum of
    exponentials and the shift, of all columns but label and score tokens."""
    k = tl.arange(0, K)
    is_token = k < n_tokens
    token = tl.load(ids + k, mask=is_token, other=0)
    value = tl.load(values + k, mask=is_token, other=0.0)
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        start_of_row = logits + row * stride
        label = tl.load(labels + row)
        take_out(start_of_row, label, token, is_token, k)
        top, others = row_sums(start_of_row, n_vocab, bias, softcap, logit_scale, HAS_BIAS, SOFTCAP, BLOCK)
        # names of their own for what is not used: to Triton "_" is one variable, of one shape
        z_label, _slope_label, z_scores, _slope_scores = picked_logits(
            row, label, token, is_token, bias, picked_label, picked_scores, k, n_tokens, softcap, logit_scale,
            HAS_BIAS, SOFTCAP,
        )  # fmt: skip
        _factor, _dz_label, _dz_scores, kappa, log_sum, share = finish(
            row, top, others, label, z_label, token, is_token, z_scores, value, k, n_tokens,
            ce, score, score_target, nll, lse, expected, mass, probs, VOCAB,
        )  # fmt: skip
        size = tl.abs(kappa)
        finite = (size < float("inf")) & (tl.abs(log_sum) < float("inf"))
        # a row without gradient needs no list, unless its statistics are those of a proposal
        draws = (tl.load(used + row) != 0) & ((size > 0) | PROPOSED) & (share > 0) & finite
        mean = tl.load(reference)
        e = eps * tl.where(size > mean, mean / size, 1.0)
        shift = threshold_shift(log_sum, e, STEPS)
        count = tl.full((), 0, tl.int32)
        if draws:
            if MAY_BE_LONG:
                sure = OVER * share / (room - (EXTRA - 1))
                if e < sure:
                    bound = longest(
                        start_of_row, n_vocab, shift, bias, softcap, logit_scale, HAS_BIAS, SOFTCAP, SCAN,
                        LOWEST, PER_NAT,
                    )  # fmt: skip
                    if bound > room:
                        shift = threshold_shift(log_sum, sure, STEPS)
            position = tl.load(starts + row)
            for start in range(0, n_vocab, SCAN):
                cols = start + tl.arange(0, SCAN)
                z, _slope = load_block(start_of_row, cols, n_vocab, bias, softcap, logit_scale, HAS_BIAS, SOFTCAP)
                kept, f = proposed(z, shift, LOWEST, PER_NAT)
                both = (kept.to(tl.int64) << 46) + f
                after = tl.cumsum(both, 0) + position
                drawn = after & ((1 << 46) - 1)
                chosen = kept | ((drawn >> 31) != ((drawn - f) >> 31))
                place = count + ((after >> 46) + (drawn >> 31)).to(tl.int32) - 1
                tl.store(columns + row * most + place, cols, mask=chosen & (place < room))
                end = tl.sum(both, 0) + position
                count += ((end >> 46) + ((end & ((1 << 46) - 1)) >> 31)).to(tl.int32)
                position = end & ((1 << 31) - 1)
        # more than the bound only where float32 does not resolve the logits: such a row has no draw
        tl.store(counts + row, tl.where(count <= room, count, 0))
        tl.store(tops + row, top)
        tl.store(sums + row, others)
        tl.store(shifts + row, shift)


@triton.jit
def products(row, col, here, hidden, weight, width, E: tl.constexpr, BD: tl.constexpr):
    """(x . w, w . w) of a row of X and the rows ``col`` (E,) of W, those that are ``here``."""
    xw, ww = tl.zeros((E, BD), tl.float32), tl.zeros((E, BD), tl.float32)
    for low in range(0, width, BD):
        d = low + tl.arange(0, BD)
        x = tl.load(hidden + row * width + d, mask=d < width, other=0.0).to(tl.float32)
        inside = here[:, None] & (d < width)[None, :]
        w = tl.load(weight + col[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
        xw += x[None, :] * w
        ww += w * w
    return tl.sum(xw, 1), tl.sum(ww, 1)


@triton.jit
def reread(
    row, count, top, shift, start_of_row, columns, values, most, hidden, weight, width, bias, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, READS_W: tl.constexpr, LOWEST: tl.constexpr,
    PER_NAT: tl.constexpr, E: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the drawn entries' values but for the row's factor. (The change of the sum of exponentials where those that
    are listed for certain take their logits of X and W, the draw's variance but for the factor's square)."""
    change, spread = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    for start in range(0, count, E):
        at = row * most + start + tl.arange(0, E)
        here = start + tl.arange(0, E) < count
        col = tl.load(columns + at, mask=here, other=0).to(tl.int64)
        raw = tl.load(start_of_row + col, mask=here, other=0.0).to(tl.float32)
        offset = tl.load(bias + col, mask=here, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros((E,), tl.float32)
        z, slope = transformed(raw + offset, softcap, logit_scale, SOFTCAP)
        certain = z >= shift
        ratio = tl.where(certain, 1.0, 2147483648.0 / proposal(z - shift, LOWEST, PER_NAT).to(tl.float32))
        xw, ww = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
        if READS_W:
            xw, ww = products(row, col, here, hidden, weight, width, E, BD)
        if EXACT:
            rounded = tl.exp(z - top)
            z, slope = transformed(xw + offset, softcap, logit_scale, SOFTCAP)
            change += tl.where(here & certain, tl.exp(z - top) - rounded, 0.0)
        entry = tl.exp(z - top) * slope * ratio
        tl.store(values + at, entry, mask=here)
        spread += tl.where(here, entry * entry * (1.0 - 1.0 / ratio) * ww, 0.0)
    tl.debug_barrier()
    return tl.sum(change, 0), tl.sum(spread, 0)


@triton.jit
def correct(
    row, count, top, others, shift, start_of_row, columns, values, most, hidden, weight, width, bias, softcap,
    logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, LOWEST: tl.constexpr, PER_NAT: tl.constexpr, FARTHEST: tl.constexpr,
    E: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``reread`` of logits that are a proposal: ``proposal.corrected``, with the sums moved along as larger logits are
    found. Writes the logarithms of the entries' sizes but for the row's factor. (The largest logit and the sum of
    exponentials anew, the draw's variance but for the factor's square, and of the entries listed at random how many
    they are and the largest, the sum and the sum of squares of exp(z - proposed z))."""
    peak, none = top, tl.full((), 0.0, tl.float32)
    certain, was, drawn, drawn_was = none, none, none, none
    spread, number, largest, weights, squares = none, none, none, none, none
    for start in range(0, count, E):
        at = row * most + start + tl.arange(0, E)
        here = start + tl.arange(0, E) < count
        col = tl.load(columns + at, mask=here, other=0).to(tl.int64)
        raw = tl.load(start_of_row + col, mask=here, other=0.0).to(tl.float32)
        offset = tl.load(bias + col, mask=here, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros((E,), tl.float32)
        drawn_on, _slope_there = transformed(raw + offset, softcap, logit_scale, SOFTCAP)
        at_random = here & (drawn_on < shift)
        ratio = 2147483648.0 / proposal(drawn_on - shift, LOWEST, PER_NAT).to(tl.float32)
        ratio = tl.where(at_random, ratio, 1.0)
        xw, ww = products(row, col, here, hidden, weight, width, E, BD)
        z, slope = transformed(xw + offset, softcap, logit_scale, SOFTCAP)
        slope += tl.zeros((E,), tl.float32)
        next_peak = tl.maximum(peak, tl.max(tl.where(here, z, float("-inf")), 0))
        by = tl.exp(peak - next_peak)
        now = tl.where(here, tl.exp(z - next_peak) * ratio, 0.0)
        before = tl.where(here, tl.exp(drawn_on - top) * ratio, 0.0)
        certain = certain * by + tl.sum(tl.where(at_random, 0.0, now), 0)
        drawn = drawn * by + tl.sum(tl.where(at_random, now, 0.0), 0)
        was += tl.sum(tl.where(at_random, 0.0, before), 0)
        drawn_was += tl.sum(tl.where(at_random, before, 0.0), 0)
        entry = now * slope
        spread = spread * by * by + tl.sum(entry * entry * (1.0 - 1.0 / ratio) * ww, 0)
        peak = next_peak
        tl.store(values + at, z + tl.log(tl.abs(slope) * ratio), mask=here)
        far = tl.minimum(tl.maximum(z - drawn_on, -FARTHEST), FARTHEST)
        each = tl.where(at_random, tl.exp(far), 0.0)
        number += tl.sum(at_random.to(tl.float32), 0)
        largest = tl.maximum(largest, tl.max(each, 0))
        weights += tl.sum(each, 0)
        squares += tl.sum(each * each, 0)
    tl.debug_barrier()
    rest = tl.where(others > was, others - was, 0.0)  # a NaN is found below
    rest *= tl.where(drawn_was > 0, drawn / tl.where(drawn_was > 0, drawn_was, 1.0), tl.exp(top - peak))
    found = certain + rest
    good = (found > 0) & (others == others)
    return tl.where(good, peak, top), tl.where(good, found, others), spread, number, largest, weights, squares


@triton.jit
def sum_of_rows(
    row, count, columns, values, most, weight, width, dx,
    E: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write dX of a row, the listed rows of W times their values; its squared norm."""
    norm = tl.zeros((BD,), tl.float32)
    for low in range(0, width, BD):
        d = low + tl.arange(0, BD)
        total = tl.zeros((E, BD), tl.float32)
        for start in range(0, count, E):
            at = row * most + start + tl.arange(0, E)
            here = start + tl.arange(0, E) < count
            col = tl.load(columns + at, mask=here, other=0).to(tl.int64)
            entry = tl.load(values + at, mask=here, other=0.0)
            inside = here[:, None] & (d < width)[None, :]
            w = tl.load(weight + col[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total += entry[:, None] * w
        found = tl.sum(total, 0)
        norm += found * found
        tl.store(dx + row * width + d, found.to(dx.dtype.element_ty), mask=d < width)
    return tl.sum(norm, 0)


@triton.jit(do_not_specialize=["n_tokens"])
def settle_kernel(
    logits, stride, hidden, weight, width,
    bias, picked_label, picked_scores,
    labels, ce, score, score_target, used,
    ids, score_values, n_tokens,
    nll, lse, expected, mass, probs,
    softcap, logit_scale,
    columns, values, counts, most, tops, sums, shifts, dx, spread, norm, weights,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, VOCAB: tl.constexpr, EXACT: tl.constexpr, PROPOSED: tl.constexpr,
    NEED_DX: tl.constexpr, LOWEST: tl.constexpr, PER_NAT: tl.constexpr, FARTHEST: tl.constexpr, K: tl.constexpr,
    E: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The lists of ``draw_kernel`` with their values, label and score tokens appended, and dX; statistics anew."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K)
    is_token = k < n_tokens
    token = tl.load(ids + k, mask=is_token, other=0)
    value = tl.load(score_values + k, mask=is_token, other=0.0)
    label = tl.load(labels + row)
    top, others = tl.load(tops + row), tl.load(sums + row)
    count = tl.load(counts + row)
    shift, log_sum_was = tl.load(shifts + row), tl.load(lse + row)
    number, largest, total, squares = 0.0, 0.0, 0.0, 0.0
    if PROPOSED:
        top, others, variance, number, largest, total, squares = correct(
            row, count, top, others, shift, logits + row * stride, columns, values, most, hidden, weight, width,
            bias, softcap, logit_scale, HAS_BIAS, SOFTCAP, LOWEST, PER_NAT, FARTHEST, E, BD,
        )  # fmt: skip
    else:
        change, variance = reread(
            row, count, top, shift, logits + row * stride, columns, values, most, hidden, weight, width,
            bias, softcap, logit_scale, HAS_BIAS, SOFTCAP, EXACT, EXACT or NEED_DX, LOWEST, PER_NAT, E, BD,
        )  # fmt: skip
        others += tl.where(others + change > 0, change, 0.0)
    z_label, slope_label, z_scores, slope_scores = picked_logits(
        row, label, token, is_token, bias, picked_label, picked_scores, k, n_tokens, softcap, logit_scale,
        HAS_BIAS, SOFTCAP,
    )  # fmt: skip
    factor, dz_label, dz_scores, _kappa, log_sum, _share = finish(
        row, top, others, label, z_label, token, is_token, z_scores, value, k, n_tokens,
        ce, score, score_target, nll, lse, expected, mass, probs, VOCAB,
    )  # fmt: skip
    sign = tl.where(logit_scale < 0, -1.0, 1.0)  # of a slope
    for start in range(0, count, E):
        at = row * most + start + tl.arange(0, E)
        here = start + tl.arange(0, E) < count
        entry = tl.load(values + at, mask=here, other=0.0)
        if PROPOSED:
            entry = sign * tl.exp(entry - top)
        tl.store(values + at, entry * factor, mask=here)
    if PROPOSED:
        by = tl.exp(tl.minimum(tl.maximum(log_sum_was - log_sum, -FARTHEST), FARTHEST))
        tl.store(weights + 4 * row, number)
        tl.store(weights + 4 * row + 1, largest * by)
        tl.store(weights + 4 * row + 2, total * by)
        tl.store(weights + 4 * row + 3, tl.minimum(squares * by * by, 1e30))
    is_used = tl.load(used + row) != 0
    own = is_used & (label >= 0) & (tl.sum((is_token & (token == label)).to(tl.int32), 0) == 0)
    end = row * most + count
    tl.store(columns + end + k, token.to(tl.int32), mask=is_token & is_used)
    tl.store(values + end + k, dz_scores * slope_scores, mask=is_token & is_used)
    end += n_tokens
    tl.store(columns + end + k, tl.zeros((K,), tl.int32) + label.to(tl.int32), mask=(k == 0) & own)
    tl.store(values + end + k, tl.zeros((K,), tl.float32) + dz_label * slope_label, mask=(k == 0) & own)
    count += tl.where(is_used, n_tokens + own.to(tl.int32), 0)
    tl.store(counts + row, count)
    tl.debug_barrier()
    if NEED_DX:
        tl.store(norm + row, sum_of_rows(row, count, columns, values, most, weight, width, dx, E, BD))
        # a row that nothing uses may hold anything, and has no variance
        tl.store(spread + row, tl.where(variance > 0, variance * factor * factor, 0.0))


def sampled_rows(
    logits: Tensor,
    picked: Picked,
    terms: RowTerms,
    stats: RowStats,
    a: Arguments,
    x: Tensor,
    begins: Tensor,
    reference: Tensor,
    eps: float,
    lists: Lists,
    dx: Tensor,
    spread: Tensor,
    norm: Tensor,
    factor: Tensor | None,
    weights: Tensor,
) -> None:
    """``sampled.sampled_rows`` on CUDA: the same arguments and results. Overwrites entries of ``logits``."""
    if factor is not None:  # of int8 products, which are not for CUDA: only the interpreter comes here
        logits = (logits * factor[:, None]).to(logits.dtype)
    n, n_vocab = logits.shape
    most, n_tokens = lists.columns.shape[1], len(a.score_token_ids)
    per_row = torch.empty(3, n, dtype=torch.float32, device=logits.device)
    shared = (
        logits if a.bias is None else a.bias, *picked,
        terms.labels, terms.ce, terms.score, terms.score_target, terms.used,
        a.score_token_ids, a.score_values, n_tokens,
        *stats,
        1.0 if a.softcap is None else a.softcap, a.logit_scale,
    )  # fmt: skip
    constants = {"HAS_BIAS": a.bias is not None, "SOFTCAP": a.softcap is not None, "VOCAB": a.vocab}
    constants |= {
        "PROPOSED": len(weights) > 0,
        "LOWEST": LOWEST,
        "PER_NAT": PER_NAT,
        "K": triton.next_power_of_2(n_tokens),
    }
    with on_device(logits):
        draw_kernel[(programs(n, logits.device),)](
            logits, n, n_vocab, logits.stride(0), *shared,
            begins, reference, eps, lists.columns, lists.counts, most, most - n_tokens - 1, *per_row,
            MAY_BE_LONG=most <= n_vocab, OVER=OVER, EXTRA=EXTRA, STEPS=STEPS,
            BLOCK=BLOCK_BYTES // logits.element_size(), SCAN=SCAN, **constants, **LAUNCH, **UNFUSED,
        )  # fmt: skip
        settle_kernel[(n,)](
            logits, logits.stride(0), x, a.weight, x.shape[1], *shared,
            *lists, most, *per_row, dx, spread, norm, weights,
            EXACT=logits.dtype != torch.float32, NEED_DX=len(dx) > 0, FARTHEST=FARTHEST, **constants, **SETTLE,
        )  # fmt: skip

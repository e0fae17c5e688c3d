"""The row pass as one Triton kernel: a program a row, statistics, loss and dZ of cross-entropy and score rows alike.

Algorithm: ``rows.py`` says it. The entries of label and score tokens are overwritten with -inf first, which takes them
out; pass 1 reads the row and keeps (max, sum) online; pass 2 reads it again and overwrites it with dZ; the label's and
the score tokens' entries follow, from their own float32 logits.

Numerics: float32 throughout; logits and dZ are rounded to their dtype when stored. ``log1p`` and ``tanh`` are written
out since libdevice's are not to be had in the interpreter. No atomics, no order of programs: deterministic.

Cost: 2 reads and 1 write of the logits (1 read without gradient), one exponential per logit and pass. The grid is a
program per multiprocessor, so that the rows between their two passes stay in the L2 cache (132 rows of
128256 bfloat16 logits are 34 MB of an H100's 50 MB), and a block keeps 16 KB of loads in flight on each. Bound by
memory: 4 to 6 bytes a logit, 1.4 to 2.1 ps on an H100 [calculated]. Applies to any n, V and K; offsets are 64 bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tract_fast.loss.rows import Picked
from tract_fast.loss.terms import Arguments, RowStats, RowTerms
from tract_fast.loss.tuning import on_device

BLOCK_BYTES = 2**14  # of a row that are read at a time
# ptxas is told of 128 registers, or takes 64 and spills; with those one program fills a multiprocessor. Not tuned: half
# the warps or twice the block spill in some variant, and timing a kernel that works in place would time its copies.
LAUNCH = {"num_warps": 16, "maxnreg": 128}


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1]: the first terms of its series where 1 + x would round x away."""
    return tl.where(x < 1e-3, x * (1.0 - x * (0.5 - x * (1.0 / 3.0))), tl.log(1.0 + x))


@triton.jit
def transformed(z, softcap, logit_scale, SOFTCAP: tl.constexpr):
    """(logits after scale and cap, their derivative with respect to the raw ones), of raw logits with their bias."""
    z = z * logit_scale
    slope = tl.zeros_like(z) + logit_scale
    if SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(z) / softcap)
        t = (1.0 - e) / (1.0 + e)
        z = tl.where(z < 0, -t, t) * softcap
        slope = logit_scale * 4.0 * e / ((1.0 + e) * (1.0 + e))
    return z, slope


@triton.jit
def load_block(start_of_row, cols, n_vocab, bias, softcap, logit_scale, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """(z, slope) of a block of columns; -inf where the buffer holds it (taken out) and beyond the row."""
    here = cols < n_vocab
    raw = tl.load(start_of_row + cols, mask=here, other=float("-inf")).to(tl.float32)
    z = raw
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=here, other=0.0).to(tl.float32)
    z, slope = transformed(z, softcap, logit_scale, SOFTCAP)
    return tl.where(raw == float("-inf"), raw, z), slope


@triton.jit
def row_sums(
    start_of_row, n_vocab, bias, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 1: (largest logit, sum of exponentials relative to it), the lowest float and 0 where all are taken out."""
    top, others = -3.4028234663852886e38, 0.0
    for start in range(0, n_vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _ = load_block(start_of_row, cols, n_vocab, bias, softcap, logit_scale, HAS_BIAS, SOFTCAP)
        new_top = tl.maximum(top, tl.max(z, 0))
        others = others * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    return top, others


@triton.jit
def take_out(start_of_row, label, token, is_token, k):
    """-inf where label and score tokens stand. Other threads of this program read there next: hence the barrier."""
    nothing = tl.full(token.shape, float("-inf"), tl.float32).to(start_of_row.dtype.element_ty)
    tl.store(start_of_row + tl.maximum(label, 0) + k, nothing, (k == 0) & (label >= 0))
    tl.store(start_of_row + token, nothing, is_token)
    tl.debug_barrier()


@triton.jit
def picked_logits(
    row, label, token, is_token, bias, picked_label, picked_scores, k, n_tokens, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The label's capped logit (-inf without one) and its derivative, and those of the score tokens (K,)."""
    z_label = tl.load(picked_label + row)
    z_scores = tl.load(picked_scores + row * n_tokens + k, mask=is_token, other=0.0)
    if HAS_BIAS:
        z_label += tl.load(bias + tl.maximum(label, 0)).to(tl.float32)
        z_scores += tl.load(bias + token, mask=is_token, other=0.0).to(tl.float32)
    z_label, slope_label = transformed(z_label, softcap, logit_scale, SOFTCAP)
    z_scores, slope_scores = transformed(z_scores, softcap, logit_scale, SOFTCAP)
    z_label = tl.where(label >= 0, z_label, float("-inf"))
    z_scores = tl.where(is_token & (token == label), z_label, tl.where(is_token, z_scores, float("-inf")))
    return z_label, slope_label, z_scores, slope_scores


@triton.jit
def finish(
    row, top, others, label, z_label, token, is_token, z_scores, value, k, n_tokens,
    ce, score, score_target, nll, lse, expected, mass, probs, VOCAB: tl.constexpr,
):  # fmt: skip
    """``rows.finish``: stores the statistics; (factor, dz at the label, dz at the score tokens, kappa, log-sum-exp, the
    probability of all other columns)."""
    is_label = is_token & (token == label)
    highest = tl.maximum(tl.maximum(top, z_label), tl.max(z_scores, 0))
    e_label = tl.exp(z_label - highest)
    e_scores = tl.exp(z_scores - highest)
    e_others = others * tl.exp(top - highest)
    rest = e_others + tl.sum(tl.where(is_label, 0.0, e_scores), 0)
    total = rest + e_label
    ratio = tl.log(rest) + (highest - z_label)
    softplus = tl.maximum(ratio, 0.0) + log1p(tl.exp(-tl.abs(ratio)))
    p_scores = e_scores / total
    if VOCAB:
        q = p_scores
    else:
        e_among = tl.exp(z_scores - tl.max(z_scores, 0))
        q = e_among / tl.sum(e_among, 0)
    y_hat = tl.sum(q * value, 0)
    log_sum = highest + tl.log(total)
    tl.store(nll + row, tl.where(label >= 0, softplus, 0.0))
    tl.store(lse + row, log_sum)
    tl.store(expected + row, y_hat)
    tl.store(mass + row, tl.sum(p_scores, 0))
    tl.store(probs + row * n_tokens + k, q, mask=is_token)

    a = tl.load(ce + row)
    g = 2.0 * (y_hat * tl.load(score + row) - tl.load(score_target + row))
    dz_label = -a * rest / total
    dz_scores = tl.where(is_label, dz_label, a * p_scores) + g * q * (value - y_hat)
    kappa = a
    if VOCAB:
        kappa -= g * y_hat
        dz_label -= g * y_hat * e_label / total
    return kappa * tl.exp(top - highest) / total, dz_label, dz_scores, kappa, log_sum, e_others / total


@triton.jit(do_not_specialize=["n_rows", "n_tokens"])  # a binary for every N would pause training
def row_kernel(
    logits, n_rows, n_vocab, stride,
    bias, picked_label, picked_scores,
    labels, ce, score, score_target, used,
    ids, values, n_tokens,
    nll, lse, expected, mass, probs,
    softcap, logit_scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, VOCAB: tl.constexpr, GRADIENT: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = logits.dtype.element_ty
    k = tl.arange(0, K)
    is_token = k < n_tokens
    token = tl.load(ids + k, mask=is_token, other=0)
    value = tl.load(values + k, mask=is_token, other=0.0)
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        start_of_row = logits + row * stride
        label = tl.load(labels + row)
        is_used = tl.load(used + row) != 0
        take_out(start_of_row, label, token, is_token, k)
        top, others = row_sums(start_of_row, n_vocab, bias, softcap, logit_scale, HAS_BIAS, SOFTCAP, BLOCK)

        z_label, slope_label, z_scores, slope_scores = picked_logits(
            row, label, token, is_token, bias, picked_label, picked_scores, k, n_tokens, softcap, logit_scale,
            HAS_BIAS, SOFTCAP,
        )  # fmt: skip
        factor, dz_label, dz_scores, _kappa, _log_sum, _share = finish(
            row, top, others, label, z_label, token, is_token, z_scores, value, k, n_tokens,
            ce, score, score_target, nll, lse, expected, mass, probs, VOCAB,
        )  # fmt: skip

        if GRADIENT:
            for start in range(0, n_vocab, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                z, slope = load_block(start_of_row, cols, n_vocab, bias, softcap, logit_scale, HAS_BIAS, SOFTCAP)
                dz = tl.where(is_used & (z != float("-inf")), factor * tl.exp(z - top) * slope, 0.0)
                tl.store(start_of_row + cols, dz.to(dtype), mask=cols < n_vocab)
            tl.debug_barrier()
            if (label >= 0) & is_used:
                tl.store(start_of_row + label, (dz_label * slope_label).to(dtype))
            tl.debug_barrier()
            tl.store(start_of_row + token, (dz_scores * slope_scores).to(dtype), is_token & is_used)


def row_pass(logits: Tensor, picked: Picked, terms: RowTerms, stats: RowStats, a: Arguments, *, gradient: bool) -> None:
    """``rows.row_pass`` on CUDA: the same arguments and results."""
    n, n_vocab = logits.shape
    with on_device(logits):
        row_kernel[(programs(n, logits.device),)](
            logits, n, n_vocab, logits.stride(0),
            logits if a.bias is None else a.bias, *picked,
            terms.labels, terms.ce, terms.score, terms.score_target, terms.used,
            a.score_token_ids, a.score_values, len(a.score_token_ids),
            *stats,
            1.0 if a.softcap is None else a.softcap, a.logit_scale,
            HAS_BIAS=a.bias is not None, SOFTCAP=a.softcap is not None, VOCAB=a.vocab, GRADIENT=gradient,
            K=triton.next_power_of_2(len(a.score_token_ids)), BLOCK=BLOCK_BYTES // logits.element_size(), **LAUNCH,
        )  # fmt: skip


def programs(n_rows: int, device: torch.device) -> int:
    if device.type != "cuda":
        return min(n_rows, 2)  # the interpreter: still more rows than programs
    return min(n_rows, torch.cuda.get_device_properties(device).multi_processor_count)

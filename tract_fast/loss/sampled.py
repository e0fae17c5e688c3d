"""The sampled gradient: the loss exact, its gradient drawn at random around the exact one, with one GEMM for three.

Per chunk: ``mm`` into a reused buffer -> statistics, and per row a short list of (column, value) whose expectation is
dZ -> dX from the listed rows of W. Backward makes dW and db of the lists, times the upstream gradient: every row of dW
is written once, no float32 copy of it exists, and a frozen W costs nothing. ``docs/sampled-gradient.md`` derives the
draw; ``triton_sampled.py`` and ``triton_weight.py`` compute it on CUDA, ``csrc/sampled.h`` on the CPU, and this module
tells it plainly in PyTorch, for elsewhere (there the lists become dense again and GEMMs follow, so nothing is saved).

The lists are a function of the logits and the seed. Row i of a call starts at a hash of (seed, i); a row whose list
might not fit raises its threshold, so that none is ever cut and no size waits for the device.

With a ``proposal`` the logits are a product in 8 bits (``proposal.py``), which only says what to list: listed logits
are computed again exactly, and the sum of exponentials is corrected by them, certain columns one by one and the rest by
the ratio of the sample's exact sum to its proposed one.

Cost: 2 N V D FLOP, two reads of the logits (a third of rows with a large coefficient), and about 4 D FLOP per listed
entry (93 a row at eps = 2^-10 on real rationales, where V = 49152). Memory: C V logits, and N (K + 3 + 1.07 / eps)
places of 8 bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tract_fast.loss import native, proposal
from tract_fast.loss.choice import runs_triton
from tract_fast.loss.chunked import beside_zeros, input_gradients, logits_buffer, read, scaled
from tract_fast.loss.plan import plan_chunks
from tract_fast.loss.rows import Picked, finish, transform, transform_picked
from tract_fast.loss.terms import (
    OP_SCHEMA,
    Arguments,
    RowStats,
    RowTerms,
    new_scalar,
    new_stats,
    row_terms,
    total_loss,
)

EPS = 2.0**-10  # adds 7e-5 to the variance of the cross-entropy's gradient (real rationales; docs/sampled-gradient.md)
EXTRA, OVER, STEPS = 3, 1.07, 256  # csrc/sampled.h
ONE = 2**31
LOWEST, PER_NAT = -21.487562, 12102203.0  # -31 ln 2, 2^23 / ln 2
BLOCK = 2**22  # elements at a time, in PyTorch

OWN = ", float eps, Tensor seed, Tensor? codes, Tensor? scales"  # the last two: of QuantizedWeight, or None
N_OWN = 4  # arguments
SCHEMA = (
    OP_SCHEMA.partition(") -> (")[0] + f"{OWN}) -> ({', '.join(['Tensor'] * 14)})"
)  # loss, RowStats, unit, dx, Lists, the variance that the draw adds, how good the proposal was: two numbers


class Lists(NamedTuple):
    """A row's entries of dZ in units of ``unit``, label and score tokens last."""

    columns: Tensor
    """(N, most) int32"""
    values: Tensor
    """(N, most) float32"""
    counts: Tensor
    """(N,) int32: entries of each row"""

    def rows(self, start: int, stop: int) -> Lists:
        return Lists(*(x[start:stop] for x in self))


@torch.library.custom_op("tract_fast::sampled_loss", mutates_args=(), schema=SCHEMA)
def sampled_loss(*args) -> tuple[Tensor, ...]:
    """(loss, *RowStats, unit, dx, *Lists, added, largest, effective) of ``Arguments``, eps, seed and the codes and
    scales of a ``QuantizedWeight`` or None, at least one row.

    ``dx`` is in units of ``unit``, empty where it is not needed. ``added`` estimates the draw's variance, summed
    over dX, as a share of the squared norm of dX; ``largest`` and ``effective`` are of ``SampledTractLoss``.
    """
    *args, eps, seed, codes, scales = args
    a = Arguments(*args)
    quantized = None if codes is None else proposal.QuantizedWeight(codes, scales)
    a = a._replace(hidden=a.hidden.contiguous(), weight=a.weight.contiguous())
    n, n_vocab = len(a.hidden), len(a.weight)
    step = rows_at_once(a)
    terms, stats = row_terms(a), new_stats(a)
    dx, lists = _new_dx(a), _new_lists(a, eps)
    spread, norm = (a.hidden.new_zeros(n, dtype=torch.float32) for _ in range(2))
    weights = a.hidden.new_zeros(0 if quantized is None else n, 4, dtype=torch.float32)
    begins, reference = starts(seed, n, a.hidden.device), reference_of(terms)
    logits = None if quantized else logits_buffer(a.hidden, min(step, n), n_vocab)
    make, _ = kernels_for(a.hidden)
    with torch.autocast(a.hidden.device.type, enabled=False):
        for i in range(0, n, step):
            j = min(i + step, n)
            x, part, factor = a.hidden[i:j], terms.rows(i, j), None
            if quantized:
                chunk, factor = proposal.logits_of(x, quantized, n_vocab)
            else:
                chunk = torch.mm(beside_zeros(x), a.weight.t(), out=logits[: j - i])
            picked = native.pick(x, part.labels, a)
            out = (lists.rows(i, j), dx[i:j], spread[i:j], norm[i:j], factor, weights[i:j])
            make(chunk, picked, part, stats.rows(i, j), a, x, begins[i:j], reference, eps, *out)
            chunk = None  # or two proposals would be there at once
        loss = total_loss(stats, a)
    added = spread.sum() / norm.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return loss, *stats, terms.unit, dx, *lists, added, *proposal.quality(weights)


@sampled_loss.register_fake
def _(*args):
    *args, eps, _, _, _ = args
    a = Arguments(*args)
    own = (new_scalar(a) for _ in range(3))
    return new_scalar(a), *new_stats(a), new_scalar(a), _new_dx(a), *_new_lists(a, eps), *own


def kernels_for(hidden: Tensor):
    """(sampled_rows, sampled_weight) of the kernels that run."""
    kind = language(hidden.device.type, hidden.dtype)
    if kind == "Triton":
        from tract_fast.loss import triton_sampled, triton_weight

        return triton_sampled.sampled_rows, triton_weight.sampled_weight
    return (native.sampled_rows, native.sampled_weight) if kind == "C++" else (sampled_rows, sampled_weight)


def language(device_type: str, dtype: torch.dtype) -> str:
    """What the kernels are written in that run: Triton where it does, C++ on other CPUs, PyTorch elsewhere."""
    if runs_triton(device_type):
        return "Triton"
    return "C++" if device_type == "cpu" and native.runs(dtype) else "PyTorch"


def rows_at_once(a: Arguments, device_type: str | None = None) -> int:
    """Rows of a chunk, on a device of that type or that of ``a``."""
    device_type = device_type or a.hidden.device.type
    sizes = {"logit_bytes": a.hidden.element_size(), "trained_weight": False, "device": device_type}
    return plan_chunks(a.hidden.shape[0], a.weight.shape[0], a.hidden.shape[1], budget=a.budget, **sizes).rows


def _new_dx(a: Arguments) -> Tensor:
    n, width = a.hidden.shape
    return a.hidden.new_empty(n if a.need_dx else 0, width)


def _new_lists(a: Arguments, eps: float) -> Lists:
    n = a.hidden.shape[0]
    most = list_length(a.weight.shape[0], a.score_token_ids.shape[0], eps)
    empty = a.hidden.new_empty
    return Lists(empty(n, most, dtype=torch.int32), empty(n, most, dtype=torch.float32), empty(n, dtype=torch.int32))


def list_length(n_vocab: int, n_tokens: int, eps: float) -> int:
    """Places of a list, which every row fits into at threshold ``eps`` or at a higher one."""
    return min(n_vocab + 1, n_tokens + EXTRA + math.ceil(OVER / eps))


def starts(seed: Tensor, n: int, device: torch.device) -> Tensor:
    """(n,) int64 in [0, 2^31): where the running sum of each row starts, splitmix64 of (seed, row)."""
    # the seed is on the CPU: as a number it reaches the device without a copy that would wait for it
    z = torch.arange(1, n + 1, device=device) * -0x61C8864680B583EB + int(seed)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (z ^ ((z >> 31) & (2**33 - 1))) & (ONE - 1)


def reference_of(terms: RowTerms) -> Tensor:
    """(): the coefficient that ``eps`` is meant for, the mean of the rows' cross-entropy weights; without any, of their
    score weights. A row with a larger one gets a smaller threshold, or it would dominate the error."""
    ce, score = terms.ce.abs(), terms.score.abs()
    means = [x.sum() / (x > 0).sum().clamp(min=1) for x in (ce, score)]
    return torch.where(means[0] > 0, *means).float()


def proposals(a: Tensor) -> Tensor:
    """2^31 times the probability with which a column is listed, int64, of ``z - shift`` float32: ``csrc/sampled.h``."""
    steps = (a.clamp(min=LOWEST, max=-0.0) * PER_NAT).to(torch.int32).clamp(max=-1)
    return (steps + (158 << 23)).view(torch.float32).to(torch.int64)


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
    """Write ``stats`` and ``lists`` of raw ``logits`` (n, V), and ``dx`` with its ``spread`` and ``norm`` where it has
    rows. ``native.sampled_rows`` is the same in C++, and overwrites entries of ``logits``.

    Where ``weights`` (n, 4) has rows, the logits times the row's ``factor`` are a proposal; written there: the number
    of entries listed at random, and the largest, the sum and the sum of squares of their p / p~."""
    picked, slopes = transform_picked(picked, terms.labels, a)
    proposed = len(weights) > 0
    exact = logits.dtype == torch.float32 and not proposed
    weight = a.weight.float() if len(dx) or not exact else a.weight
    squares = (weight**2).sum(1) if len(dx) else None
    step = max(1, BLOCK // logits.shape[1])
    for i in range(0, len(logits), step):
        j = min(i + step, len(logits))
        part, own = terms.rows(i, j), lists.rows(i, j)
        raw = logits[i:j].float() if factor is None else logits[i:j].float() * factor[i:j, None]
        z, slope = transform(raw, a.bias, a)
        taken = taken_out(z, part.labels, a)
        apart, mine = z.masked_fill(taken, float("-inf")), (picked.rows(i, j), part, stats.rows(i, j), a)
        top = apart.amax(1).clamp(min=torch.finfo(z.dtype).min)
        others = (apart - top[:, None]).exp().sum(1)
        at = finish(top, others, *mine)
        lse = stats.lse[i:j].clone()
        # a row without gradient is drawn for its statistics
        size = at.kappa.abs().double() if not proposed else at.kappa.abs().double().clamp(min=torch.finfo(z.dtype).tiny)
        chosen, ratio = draw(z, taken, size, at.others, lse, part, begins[i:j], reference, eps, a, own)
        if not exact:  # the listed ones again, from what 8 or 16 bits hold of hidden and weight
            drawn_on = z
            z, slope = transform(torch.where(chosen, x[i:j].float() @ weight.t(), 0.0), a.bias, a)
            at = finish(*proposal.corrected(top, others, z, drawn_on, chosen, ratio, proposed), *mine)
        if proposed:
            weights[i:j] = proposal.weights_of(
                z - stats.lse[i:j, None] - (drawn_on - lse[:, None]), chosen & (ratio > 1)
            )
        values = at.kappa[:, None] * torch.exp(z - stats.lse[i:j, None]) * slope * ratio
        values = torch.where(chosen, values, 0.0)
        if len(dx):
            spread[i:j] = (values**2 * (1 - 1 / ratio) * squares).sum(1)
        _append(own, chosen, values, at.label * slopes.label[i:j], at.scores * slopes.scores[i:j], part, a)
        if len(dx):
            found = densified(own, logits.shape[1]) @ weight
            norm[i:j] = (found**2).sum(1)
            dx[i:j] = found


def taken_out(z: Tensor, labels: Tensor, a: Arguments) -> Tensor:
    """(n, V) bool: the columns of label and score tokens."""
    taken = torch.zeros_like(z, dtype=torch.bool)
    taken[:, a.score_token_ids] = True
    column = labels.clamp(min=0)[:, None]
    return taken.scatter_(1, column, taken.gather(1, column) | (labels >= 0)[:, None])


def draw(
    z: Tensor,
    taken: Tensor,
    size: Tensor,
    others: Tensor,
    lse: Tensor,
    terms: RowTerms,
    begins: Tensor,
    reference: Tensor,
    eps: float,
    a: Arguments,
    lists: Lists,
) -> tuple[Tensor, Tensor]:
    """((n, V) bool: listed, (n, V): the factor that makes up for not being listed always) of rows whose coefficients
    have the ``size`` (n,) float64; none where it is 0."""
    most = lists.columns.shape[1]
    room = most - len(a.score_token_ids) - 1
    e = eps * (reference / size).clamp(max=1.0)
    draws = terms.used & (size > 0) & (others > 0) & size.isfinite() & lse.isfinite()
    kept, f = proposed(z, taken, e, lse)
    if most <= z.shape[1]:  # the threshold depends on the row alone, not on the draw
        sure = OVER * others.double() / (room - (EXTRA - 1))
        too_long = (e < sure) & (kept.sum(1) + (f.sum(1) >> 31) + 1 > room)
        kept, f = proposed(z, taken, torch.where(too_long, sure, e), lse)
    after = f.cumsum(1) + begins[:, None]
    chosen = kept | ((after >> 31) != ((after - f) >> 31))
    chosen &= ~taken & draws[:, None]
    # more than the bound only where float32 does not resolve the logits (of 1e5 and more): such a row has no draw
    chosen &= (chosen.sum(1) <= room)[:, None]
    return chosen, torch.where(kept, 1.0, ONE / f.clamp(min=1).float())


def proposed(z: Tensor, taken: Tensor, e: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """((n, V) bool: listed for certain at thresholds ``e`` (n,), (n, V) int64: ``proposals`` of the others)."""
    shift = (((lse.double() + e.log()) * STEPS).round() / STEPS).float()[:, None]
    distance = z - shift
    kept = (distance >= 0) & ~taken
    return kept, proposals(distance).masked_fill_(kept | taken | z.isneginf(), 0)


def _append(
    lists: Lists, chosen: Tensor, values: Tensor, label: Tensor, scores: Tensor, terms: RowTerms, a: Arguments
) -> None:
    """Write the entries that are ``chosen``, then those of score tokens and label, into ``lists``."""
    n, k = scores.shape
    count = chosen.sum(1, keepdim=True)
    most = lists.columns.shape[1]
    columns = lists.columns.new_zeros(n, most + 1)
    entries = lists.values.new_zeros(n, most + 1)
    place = torch.where(chosen, chosen.cumsum(1) - 1, most)  # what is not listed goes to a place beyond
    columns.scatter_(1, place, torch.arange(chosen.shape[1], device=place.device).expand_as(place).to(torch.int32))
    entries.scatter_(1, place, values)
    is_token = (a.score_token_ids == terms.labels[:, None]).any(1)
    has_own = terms.used & (terms.labels >= 0) & ~is_token
    tail = torch.cat([a.score_token_ids.expand(n, k), terms.labels[:, None]], 1)
    wanted = torch.cat([terms.used[:, None].expand(n, k), has_own[:, None]], 1)
    place = torch.where(wanted, count + torch.arange(k + 1, device=place.device), most)
    columns.scatter_(1, place, tail.to(torch.int32))
    entries.scatter_(1, place, torch.cat([scores, label[:, None]], 1))
    lists.columns.copy_(columns[:, :most])
    lists.values.copy_(entries[:, :most])
    lists.counts.copy_(count[:, 0] + wanted.sum(1))


def densified(lists: Lists, n_vocab: int) -> Tensor:
    """(n, V) float32: dZ as the lists have it."""
    there = torch.arange(lists.columns.shape[1], device=lists.counts.device) < lists.counts[:, None]
    columns = lists.columns.masked_fill(~there, 0).long()
    dense = lists.values.new_zeros(len(columns), n_vocab)
    return dense.scatter_add_(1, columns, lists.values.masked_fill(~there, 0.0))


def _remember(ctx, inputs, output) -> None:
    a = Arguments(*inputs[:-N_OWN])
    unit, dx, *lists = output[6:11]
    if not (a.need_dw or a.need_db):
        lists = [x.new_empty(0, *x.shape[1:]) for x in lists]  # x[:0] would hold the memory of x
    hidden = a.hidden if a.need_dw else a.hidden.new_empty(0, a.hidden.shape[1])
    ctx.save_for_backward(hidden, unit, dx, *lists)
    ctx.n_vocab, ctx.needs = a.weight.shape[0], (a.need_dw, a.need_db)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss: Tensor | None, *others) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    return input_gradients(ctx, sampled_backward(grad_loss, *ctx.saved_tensors, ctx.n_vocab, *ctx.needs))


@torch.library.custom_op("tract_fast::sampled_backward", mutates_args=())
def sampled_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    unit: Tensor,
    dx: Tensor,
    columns: Tensor,
    values: Tensor,
    counts: Tensor,
    n_vocab: int,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) of the loss, from what forward left, times the upstream gradient. Nothing saved is changed."""
    scale, lists = grad_loss * unit, Lists(columns, values, counts)
    dw = native.scratch(dx, n_vocab, dx.shape[1]) if need_dw else dx.new_empty(0, dx.shape[1])
    db = dx.new_empty(n_vocab if need_db else 0)
    with torch.autocast(dx.device.type, enabled=False):
        if need_dw or need_db:
            x = hidden.contiguous() if need_dw else hidden.new_zeros(len(counts), 0)
            _, products = kernels_for(dx)
            products(lists, x, scale, dw, db, n_vocab)
        return scaled(dx, scale, dx.dtype), dw, db


@sampled_backward.register_fake
def _(grad_loss, hidden, unit, dx, columns, values, counts, n_vocab, need_dw, need_db):
    width = dx.shape[1]
    dw = dx.new_empty(n_vocab if need_dw else 0, width)
    return torch.empty_like(dx), dw, dx.new_empty(n_vocab if need_db else 0)


def sampled_weight(lists: Lists, x: Tensor, scale: Tensor, dw: Tensor, db: Tensor, n_vocab: int) -> None:
    """Write dW and db, where they are not empty, of lists and X, times ``scale``."""
    x = read(x, lists.counts > 0)  # every used row has entries
    total = x.new_zeros(n_vocab, x.shape[1], dtype=torch.float32)
    sum_of = x.new_zeros(n_vocab, dtype=torch.float32)
    step = max(1, BLOCK // n_vocab)
    for i in range(0, len(lists.counts), step):
        dense = densified(lists.rows(i, i + step), n_vocab)
        sum_of += dense.sum(0)
        if len(dw):
            total.addmm_(dense.t(), x[i : i + step].float())
    if len(dw):
        dw.copy_(total * scale)
    if len(db):
        db.copy_(sum_of * scale)


sampled_loss.register_autograd(_backward, setup_context=_remember)

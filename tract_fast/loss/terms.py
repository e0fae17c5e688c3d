"""What every fast implementation needs of the targets: one coefficient set per row, and the results put together again.

A row may carry a cross-entropy term, any number of score terms, both or neither. All score terms of a row share its
expected score, so their sum over b of ``c_b (y_hat - y*_b)^2`` has the derivative ``2 (y_hat sum c_b - sum c_b y*_b)``:
two numbers per row say all that the gradient needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tract_fast.loss.reference import IGNORE_INDEX, TractLoss

SCORE_OVER_CE = 4096.0  # score coefficients may exceed the unit by this factor: float16 still holds them


class Arguments(NamedTuple):
    """What every custom op takes, in order: the arguments of ``linear_tract_loss``, checked, none missing."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    score_rows: Tensor
    score_targets: Tensor
    score_token_ids: Tensor
    score_values: Tensor
    row_weights: Tensor
    score_weights: Tensor
    softcap: float | None
    logit_scale: float
    vocab: bool
    budget: int | None
    need_dx: bool
    need_dw: bool
    need_db: bool


OP_SCHEMA = (  # of Arguments; the results are the loss, RowStats, and five tensors of the op's own for backward
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor score_rows, Tensor score_targets, "
    "Tensor score_token_ids, Tensor score_values, Tensor row_weights, Tensor score_weights, float? softcap, "
    "float logit_scale, bool vocab, int? budget, bool need_dx, bool need_dw, bool need_db) -> "
    f"({', '.join(['Tensor'] * 11)})"
)


def op_arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: dict[str, Tensor], **options
) -> Arguments:
    """Arguments from those of ``linear_tract_loss``; ``options`` are softcap, logit_scale, vocab and budget.

    Casts as autocast asks, and clamps what rows and columns are found by: an unchecked index must not read outside a
    buffer. Kernels walk over score values and bias without strides.
    """
    dtype = compute_dtype(hidden)
    heads = [x if x is None else x.to(dtype) for x in (hidden, weight, bias)]
    hidden, weight, bias = heads
    clamped = targets | {
        "score_rows": targets["score_rows"].clamp(0, hidden.shape[0] - 1),
        "score_token_ids": targets["score_token_ids"].clamp(0, weight.shape[0] - 1),
        "score_values": targets["score_values"].contiguous(),
    }
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads]
    return Arguments(
        hidden=hidden,
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        **clamped,
        **options,
        **dict(zip(("need_dx", "need_dw", "need_db"), needs, strict=True)),
    )


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """That of ``hidden``, or the one of autocast inside its region (which leaves float64 alone)."""
    device_type = hidden.device.type
    cast = autocasts(device_type) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if cast else hidden.dtype


def autocasts(device_type: str) -> bool:
    """Whether this is inside an autocast region of such devices."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class RowTerms(NamedTuple):
    """Per row, on the device of the hidden states, float32 where not said otherwise; coefficients in units of ``unit``.

    A gradient times 1/N can underflow in 16 bit. So dZ is kept relative to ``unit``, a power of two near the largest
    coefficient: multiplying it back is exact.
    """

    labels: Tensor
    """(N,) int64; -1 where the row carries no cross-entropy."""
    ce: Tensor
    """(N,): row weight / unit, 0 without a label."""
    score: Tensor
    """(N,): sum of the row's score weights / unit."""
    score_target: Tensor
    """(N,): sum of the row's score weights times their targets / unit."""
    used: Tensor
    """(N,) bool: the row has a label or a score; the others are read as zero."""
    unit: Tensor
    """(): a power of two."""

    def rows(self, start: int, stop: int) -> RowTerms:
        return RowTerms(*(x[start:stop] for x in self[:-1]), self.unit)


def row_terms(a: Arguments) -> RowTerms:
    """Gather the terms by row; at least one row."""
    has_label = a.labels != IGNORE_INDEX
    ce = a.row_weights.masked_fill(~has_label, 0.0)
    zeros = torch.zeros_like(a.row_weights)
    score = zeros.index_put((a.score_rows,), a.score_weights, accumulate=True)
    score_target = zeros.index_put((a.score_rows,), a.score_weights * a.score_targets, accumulate=True)
    largest = a.score_values.abs().max()
    # of any score gradient, after the scale
    bound = 2 * largest * (largest * score.abs() + score_target.abs()) * max(1.0, abs(a.logit_scale))
    coefficient = torch.maximum(ce.abs(), bound / SCORE_OVER_CE).max()
    unit = torch.where(coefficient > 0, torch.exp2(torch.ceil(torch.log2(coefficient))), 1.0)
    return RowTerms(
        labels=column_labels(a.labels, len(a.weight)),
        ce=ce / unit,
        score=score / unit,
        score_target=score_target / unit,
        used=used_rows(a.labels, a.score_rows),
        unit=unit,
    )


def column_labels(labels: Tensor, n_vocab: int) -> Tensor:
    """Labels as columns, clamped into the vocabulary; -1 where there is none."""
    return labels.clamp(0, n_vocab - 1).masked_fill(labels == IGNORE_INDEX, -1)


def used_rows(labels: Tensor, score_rows: Tensor) -> Tensor:
    """(N,) bool: the row has a label or a score."""
    return (labels != IGNORE_INDEX).index_fill(0, score_rows, True)


class RowStats(NamedTuple):
    """What a row pass writes, float32; the last three are defined in rows with a score only."""

    nll: Tensor
    """(N,): 0 without a label."""
    lse: Tensor
    """(N,): log-sum-exp over the vocabulary."""
    expected: Tensor
    """(N,)"""
    mass: Tensor
    """(N,)"""
    probs: Tensor
    """(N, K)"""

    def rows(self, start: int, stop: int) -> RowStats:
        return RowStats(*(x[start:stop] for x in self))


def new_scalar(a: Arguments) -> Tensor:
    return a.hidden.new_empty((), dtype=torch.float32)


def new_stats(a: Arguments) -> RowStats:
    n, k = a.hidden.shape[0], a.score_token_ids.shape[0]
    return RowStats(*(a.hidden.new_empty(shape, dtype=torch.float32) for shape in [(n,)] * 4 + [(n, k)]))


def total_loss(stats: RowStats, a: Arguments) -> Tensor:
    """(): the loss, from the statistics."""
    error = stats.expected[a.score_rows] - a.score_targets
    return (a.row_weights * stats.nll).sum() + (a.score_weights * error.square()).sum()


def result(loss: Tensor, stats: RowStats, score_rows: Tensor) -> TractLoss:
    """What the caller gets: per-row statistics read at the score rows."""
    nll, _, expected, mass, probs = (x.detach() for x in stats)
    return TractLoss(loss, nll, expected[score_rows], mass[score_rows], probs[score_rows])

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


def row_terms(
    n_vocab: int,
    labels: Tensor,
    score_rows: Tensor,
    score_targets: Tensor,
    score_values: Tensor,
    row_weights: Tensor,
    score_weights: Tensor,
) -> RowTerms:
    """Gather the terms by row. Arguments as in ``linear_tract_loss``, weights given, at least one row."""
    has_label = labels != IGNORE_INDEX
    ce = row_weights.masked_fill(~has_label, 0.0)
    zeros = torch.zeros_like(row_weights)
    score = zeros.index_put((score_rows,), score_weights, accumulate=True)
    score_target = zeros.index_put((score_rows,), score_weights * score_targets, accumulate=True)
    largest = score_values.abs().max()
    bound = 2 * largest * (largest * score.abs() + score_target.abs())  # of any score gradient
    coefficient = torch.maximum(ce.abs(), bound / SCORE_OVER_CE).max()
    unit = torch.where(coefficient > 0, torch.exp2(torch.ceil(torch.log2(coefficient))), 1.0)
    return RowTerms(
        labels=column_labels(labels, n_vocab),
        ce=ce / unit,
        score=score / unit,
        score_target=score_target / unit,
        used=used_rows(labels, score_rows),
        unit=unit,
    )


def column_labels(labels: Tensor, n_vocab: int) -> Tensor:
    """Labels as columns, clamped into the vocabulary; -1 where there is none."""
    return labels.clamp(0, n_vocab - 1).masked_fill(labels == IGNORE_INDEX, -1)


def used_rows(labels: Tensor, score_rows: Tensor) -> Tensor:
    """(N,) bool: the row has a label or a score."""
    return (labels != IGNORE_INDEX).index_fill(0, score_rows, True)


def op_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    score_rows: Tensor,
    score_targets: Tensor,
    score_token_ids: Tensor,
    score_values: Tensor,
    *,
    bias: Tensor | None,
    row_weights: Tensor | None,
    score_weights: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    normalize: str,
    memory_budget: int | None,
) -> tuple:
    """The positional arguments of the custom ops, which all take the same, from those of ``linear_tract_loss``,
    checked.

    Casts as autocast asks, makes the means that None stands for, and clamps what rows and columns are found by: an
    unchecked index must not read outside a buffer. The last three say for which of hidden, weight and bias a gradient
    will be asked.
    """
    heads = [hidden, weight, bias]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        heads = [x if x is None else x.to(dtype) for x in heads]
    n, n_scores, has_label = len(hidden), len(score_rows), labels != IGNORE_INDEX
    if row_weights is None:
        row_weights = has_label.float() / has_label.sum().clamp(min=1)
    if score_weights is None:
        score_weights = torch.full((n_scores,), 1 / max(n_scores, 1), device=hidden.device)
    return (
        *heads,
        labels,
        score_rows.clamp(0, n - 1),
        score_targets,
        score_token_ids.clamp(0, len(weight) - 1),
        score_values,
        row_weights,
        score_weights,
        softcap,
        logit_scale,
        normalize == "vocab",
        memory_budget,
        *(torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads),
    )


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


def new_stats(hidden: Tensor, n_tokens: int) -> RowStats:
    n = len(hidden)
    return RowStats(*(hidden.new_zeros(*shape, dtype=torch.float32) for shape in [(n,)] * 4 + [(n, n_tokens)]))


def total_loss(
    stats: RowStats, row_weights: Tensor, score_rows: Tensor, score_targets: Tensor, score_weights: Tensor
) -> Tensor:
    """(): the loss, from the statistics."""
    error = stats.expected[score_rows] - score_targets
    return (row_weights * stats.nll).sum() + (score_weights * error.square()).sum()


def result(loss: Tensor, stats: RowStats, score_rows: Tensor) -> TractLoss:
    """What the caller gets: per-row statistics read at the score rows."""
    nll, _, expected, mass, probs = (x.detach() for x in stats)
    return TractLoss(loss, nll, expected[score_rows], mass[score_rows], probs[score_rows])

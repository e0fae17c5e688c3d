"""The row pass in PyTorch: statistics of a chunk of logits, and its gradient in place. What the Triton kernel
in ``triton_rows.py`` does on CUDA and the C++ one in ``csrc/`` on the CPU, told plainly; it runs where neither can.

Per row, with y the label and T the score tokens (none of either is allowed)::

    rest  = sum over j != y of exp(z_j - z_y)            nll = log(1 + rest)
    kappa = ce - g y_hat  (vocab)  or  ce  (scores)      g = 2 (y_hat score - score_target)
    dz_j  = kappa p_j,  and at j = y:  -ce (1 - p_y) - [vocab] g p_y y_hat,  and at t_k in T:  + g q_k (v_k - y_hat)

The label stays out of the sum, so that neither a small nll nor ``1 - p_y`` is the difference of two large numbers: with
a probability near 1 in bfloat16, ``p_y - 1`` would be zero or noise. Label and score tokens, which are all that nll and
y_hat need besides the sum, come in float32 (``pick``) and take the place of their rounded logits everywhere, so that
probabilities add up to 1. Then ``dz`` goes through the soft-cap and scale.

Cost: about ten passes over blocks of rows that fit a cache, in float32; ``BLOCK`` bounds the memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tract_fast.loss.terms import Arguments, RowStats, RowTerms

BLOCK = 2**20  # logits at a time: 4 MiB in float32
PICK_BLOCK_CUDA = 2**23  # entries of hidden states at a time, where a launch costs more than a cache miss


class Picked(NamedTuple):
    """Raw logits that are needed one by one, (n,) and (n, K) float32, not rounded to 16 bit like the others."""

    label: Tensor
    scores: Tensor

    def rows(self, start: int, stop: int) -> Picked:
        return Picked(self.label[start:stop], self.scores[start:stop])


def pick(hidden: Tensor, labels: Tensor, a: Arguments) -> Picked:
    """The logits of the labels (some column's where there is none) and of the score tokens: n D (K + 1) products."""
    of_tokens = a.weight[a.score_token_ids].float().t()  # (D, K)
    label = hidden.new_empty(len(hidden), dtype=torch.float32)
    scores = hidden.new_empty(len(hidden), len(a.score_token_ids), dtype=torch.float32)
    block = PICK_BLOCK_CUDA if hidden.is_cuda else BLOCK
    step = max(1, block // max(1, hidden.shape[1]))
    for i in range(0, len(hidden), step):
        exact = hidden[i : i + step].float()
        label[i : i + step] = (exact * a.weight[labels[i : i + step].clamp(min=0)].float()).sum(1)
        scores[i : i + step] = exact @ of_tokens
    return Picked(label, scores)


def row_pass(logits: Tensor, picked: Picked, terms: RowTerms, stats: RowStats, a: Arguments, *, gradient: bool) -> None:
    """Write ``stats`` of raw ``logits`` (n, V) ``hidden @ weight.T``; with ``gradient`` turn them into dZ, in place.

    dZ is the gradient with respect to the raw logits, in units of ``terms.unit``; rows that are not used get zeros.
    """
    step = max(1, BLOCK // logits.shape[1])
    picked, slopes = transform_picked(picked, terms.labels, a)
    for i in range(0, len(logits), step):
        j = min(i + step, len(logits))
        part = terms.rows(i, j)
        z, slope = transform(logits[i:j].float(), a.bias, a)
        dz = rows(z, slope, picked.rows(i, j), slopes.rows(i, j), part, stats.rows(i, j), a, gradient)
        if gradient:
            logits[i:j] = dz.masked_fill_(~part.used[:, None], 0.0)


def transform(z: Tensor, bias: Tensor | None, a: Arguments) -> tuple[Tensor, Tensor | float]:
    """(capped logits, derivative with respect to the raw ones)."""
    if bias is not None:
        z = z + bias
    slope = a.logit_scale
    if a.logit_scale != 1.0:
        z = z * a.logit_scale
    if a.softcap is not None:
        t = torch.tanh(z / a.softcap)
        z, slope = a.softcap * t, a.logit_scale * (1 - t * t)
    return z, slope


def transform_picked(picked: Picked, labels: Tensor, a: Arguments) -> tuple[Picked, Picked]:
    """The picked logits after bias, scale and cap, and their derivatives with respect to the raw ones."""
    biases = (None, None) if a.bias is None else (a.bias[labels.clamp(min=0)], a.bias[a.score_token_ids])
    z, slope = zip(*(transform(z, bias, a) for z, bias in zip(picked, biases, strict=True)), strict=True)
    whole = (s if isinstance(s, Tensor) else torch.full_like(x, s) for s, x in zip(slope, z, strict=True))
    return Picked(*z), Picked(*whole)


def rows(
    z: Tensor,
    slope: Tensor | float,
    picked: Picked,
    slopes: Picked,
    terms: RowTerms,
    stats: RowStats,
    a: Arguments,
    gradient: bool,
) -> Tensor | None:
    """Statistics and the gradient with respect to the raw logits, from the capped ones ``z`` (n, V) float32, which it
    overwrites; ``slope`` and ``slopes`` are derivatives of ``z`` and of ``picked``."""
    has_label = (terms.labels >= 0)[:, None]
    column = terms.labels.clamp(min=0)[:, None]  # (n, 1); rows without a label get back what stood there
    z.scatter_(1, column, z.gather(1, column).masked_fill(has_label, float("-inf")))
    z[:, a.score_token_ids] = float("-inf")
    top = z.amax(1).clamp(min=torch.finfo(z.dtype).min)
    others = z.sub_(top[:, None]).exp_().sum(1)
    at = finish(top, others, picked, terms, stats, a)
    if not gradient:
        return None
    dz = z.mul_(at.factor[:, None])
    dz = dz.mul_(slope) if isinstance(slope, Tensor) or slope != 1.0 else dz
    dz.scatter_(1, column, torch.where(has_label, (at.label * slopes.label)[:, None], dz.gather(1, column)))
    dz[:, a.score_token_ids] = at.scores * slopes.scores
    return dz


class Coefficients(NamedTuple):
    """dZ of a row before soft-cap and scale: ``factor * exp(z - top)``, and these at the label and the score tokens."""

    factor: Tensor
    """(n,)"""
    label: Tensor
    """(n,)"""
    scores: Tensor
    """(n, K); right also where a score token is the label"""
    kappa: Tensor
    """(n,): dZ of all other columns is ``kappa`` times their probability"""
    others: Tensor
    """(n,): that of all other columns together"""


def finish(top: Tensor, others: Tensor, picked: Picked, terms: RowTerms, stats: RowStats, a: Arguments) -> Coefficients:
    """Write ``stats`` from the capped logits that were picked and, over all others, the largest logit ``top`` and the
    sum ``others`` of ``exp(z - top)``, both (n,); return what dZ is made of."""
    has_label = terms.labels >= 0
    is_label = a.score_token_ids == terms.labels[:, None]  # (n, K)
    z_label = picked.label.masked_fill(~has_label, float("-inf"))
    z_scores = torch.where(is_label, z_label[:, None], picked.scores)
    highest = torch.maximum(torch.maximum(top, z_label), z_scores.amax(1))
    e_others, e_label, e_scores = (
        others * torch.exp(top - highest),
        torch.exp(z_label - highest),
        torch.exp(z_scores - highest[:, None]),
    )
    rest = e_others + e_scores.masked_fill(is_label, 0.0).sum(1)  # all but the label
    total = rest + e_label
    nll = torch.logaddexp(torch.log(rest) + (highest - z_label), torch.zeros_like(top)).masked_fill(~has_label, 0.0)
    p_scores = e_scores / total[:, None]
    q = p_scores if a.vocab else z_scores.softmax(1)
    expected = q @ a.score_values
    for out, value in zip(stats, (nll, highest + torch.log(total), expected, p_scores.sum(1), q), strict=True):
        out.copy_(value)

    g = 2 * (expected * terms.score - terms.score_target)
    kappa, label = terms.ce, -terms.ce * rest / total
    scores = torch.where(is_label, label[:, None], terms.ce[:, None] * p_scores)
    scores += g[:, None] * q * (a.score_values - expected[:, None])
    if a.vocab:
        kappa, label = kappa - g * expected, label - g * expected * e_label / total
    return Coefficients(kappa * torch.exp(top - highest) / total, label, scores, kappa, e_others / total)

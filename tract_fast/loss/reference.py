"""The TRACT loss in plain PyTorch: the definition that every other implementation is tested against.

Shapes: N rows (positions whose next token is trained on), D width, V vocabulary, B sequences, K score tokens.

Precision. ``hidden``, ``weight`` and ``bias`` are converted to float32 *before* the GEMM (float64 where they are
float64), and everything after it stays there, inside autocast regions too: the only rounding that 16-bit inputs add is
that of the gradients handed back in their dtype. That is what makes this a yardstick, and also what an eager bfloat16
trainer does *not* do: there the GEMM writes bfloat16 logits, and rounding those alone costs about 1% of the gradient.
Tests compare three things on the same bfloat16 inputs: this function in float64 on exact copies of them (the truth),
an implementation under test, and eager (``F.linear`` in bfloat16, ``.float()``, ``F.cross_entropy``); the error of an
implementation is bounded by a fraction or a small multiple of eager's. On float32 inputs the GEMM follows
``torch.set_float32_matmul_precision``: leave it at "highest" where this function is the yardstick. A backward pass
started inside an autocast region is cast by autocast, as for any PyTorch code: leave the region first.

Nothing here waits for the device: no ``.item()``, no ``nonzero``, no boolean indexing.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # the label of a row that carries no cross-entropy


class TractLoss(NamedTuple):
    """What ``linear_tract_loss`` returns, in float32 (float64 for float64 inputs). Only ``loss`` is differentiable."""

    loss: Tensor
    """(): sum of row weight * nll plus sum of score weight * (expected_score - score_target)^2."""
    nll: Tensor
    """(N,): negative log-likelihood of each label, unweighted; 0 where the label is -100."""
    expected_score: Tensor
    """(B,): the score as a number, sum over k of score_probs * score_values (the RAIL predictor)."""
    score_mass: Tensor
    """(B,): probability that the softmax over the vocabulary gives the score tokens together."""
    score_probs: Tensor
    """(B, K): probability of each score token, under the normalisation that was asked for."""


class SampledTractLoss(NamedTuple):
    """What ``linear_tract_loss`` returns where it sampled the gradient: ``TractLoss`` and what is known of the draw."""

    loss: Tensor
    nll: Tensor
    expected_score: Tensor
    score_mass: Tensor
    score_probs: Tensor
    entries: Tensor
    """(N,) int32: how many entries of dZ each row's list has."""
    added_variance: Tensor
    """(): an estimate of the variance that drawing adds to dX over the rows, as a share of the squared norm of dX; 0
    where hidden is frozen."""
    largest_weight: Tensor
    """(): of the entries listed at random, the largest probability in units of the one it was drawn with; 1 without a
    proposal."""
    effective_share: Tensor
    """(): (sum of those weights)^2 / (their number times the sum of their squares), over all rows: the share of the
    draws that as good a sample without a proposal would need; 1 without one."""


def reference_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) int64
    score_rows: Tensor,  # (B,) int64
    score_targets: Tensor,  # (B,)
    score_token_ids: Tensor,  # (K,) int64
    score_values: Tensor,  # (K,)
    *,
    bias: Tensor | None,  # (V,)
    row_weights: Tensor,  # (N,)
    score_weights: Tensor,  # (B,)
    softcap: float | None,
    logit_scale: float,
    normalize: str,
) -> TractLoss:
    """The loss of ``linear_tract_loss`` by autograd; arguments as there, already checked, weights given.

    It holds several N x V tensors. Indices out of range, which an unchecked caller may pass, are clamped into it.
    """
    device_type = hidden.device.type
    has_autocast = torch.amp.is_autocast_available(device_type)  # not on "meta", where there are only shapes
    with torch.autocast(device_type, enabled=False) if has_autocast else nullcontext():
        has_label = labels != IGNORE_INDEX  # (N,)
        score_rows = score_rows.clamp(0, max(len(hidden) - 1, 0))
        score_token_ids = score_token_ids.clamp(0, len(weight) - 1)
        used = has_label.index_fill(0, score_rows, True)  # (N,)
        logits = capped_logits(hidden, weight, bias, used, softcap, logit_scale)  # (N, V)

        nll = label_nll(logits, labels, has_label)  # (N,)
        score_logits = logits[score_rows]  # (B, V)
        # not softmax(-1): float32's over a large vocabulary sums to 1 only within 2e-5 on the CPU
        among_all = score_logits.logsumexp(-1, keepdim=True)
        vocab_probs = torch.exp(score_logits[:, score_token_ids] - among_all)  # (B, K)
        score_probs = vocab_probs if normalize == "vocab" else score_logits[:, score_token_ids].softmax(-1)
        expected = score_probs @ score_values.to(logits.dtype)  # (B,)

        squared_error = (expected - score_targets.to(expected.dtype)).square()
        loss = (row_weights.to(nll.dtype) * nll).sum() + (score_weights.to(nll.dtype) * squared_error).sum()
    return TractLoss(loss, nll.detach(), expected.detach(), vocab_probs.detach().sum(-1), score_probs.detach())


def capped_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, used: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """(N, V) ``softcap(logit_scale * (hidden @ weight.T + bias))`` in float32, or float64 for float64 inputs.

    Rows that are not ``used`` are read as zero, so that infinities in them reach neither the loss nor, as 0 * inf, the
    gradient of the weight.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.to(dtype).masked_fill(~used[:, None], 0.0)
    logits = logit_scale * F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def label_nll(logits: Tensor, labels: Tensor, has_label: Tensor) -> Tensor:
    """(N,) ``lse(z) - z[label]``, exactly 0 with no gradient in rows without a label.

    Computed as ``log(1 + sum over j != label of exp(z_j - z[label]))``. The difference of two large numbers would lose
    a small loss (float32 logits near 1e4 are 1e-3 apart) and round ``p[label] - 1`` in its gradient to zero; here the
    gradient of the label's logit is minus the sum of the other probabilities.
    """
    labels = labels.clamp(0, logits.shape[1] - 1)[:, None]
    margins = logits - logits.gather(1, labels)  # (N, V)
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels
    # the lowest finite number, not -inf: a row masked throughout (no label, or V = 1) has a gradient of 0, not NaN
    others = margins.masked_fill(is_label | ~has_label[:, None], torch.finfo(logits.dtype).min).logsumexp(1)
    return torch.logaddexp(others, torch.zeros_like(others))

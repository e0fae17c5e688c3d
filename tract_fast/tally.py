"""What the micro-batches of a step add up to, over all ranks, and the record in ``metrics.jsonl`` that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tract_fast.data import batch as batches
from tract_fast.data.prompt import Encoded
from tract_fast.loss import SampledTractLoss, TractLoss
from tract_fast.loss.proposal import beyond_limit
from tract_fast.recipe import Recipe

# Of a micro-batch: loss, negative log-likelihoods, squared and absolute score errors, score masses, tokens, entries of
# a sampled gradient, its added variance times the rows, whether the weights of a proposal are beyond the limit. Of a
# rank: whether it has got a signal, or knows of a checkpoint that was not written.
OF_MICRO_BATCH = ("loss", "nll", "squared", "absolute", "mass", "tokens", "entries", "added", "beyond")
OF_RANK = ("flops", "stopping", "unsaved")
NAMES = (*OF_MICRO_BATCH, *OF_RANK)


def of_micro_batch(out: TractLoss | SampledTractLoss, batch: batches.Batch) -> tuple[Tensor, Tensor]:
    """(float64 sums named ``OF_MICRO_BATCH``, (2,) the largest weight of a proposal and minus its effective share, of
    which the largest are wanted), on the device."""
    error = out.expected_score - batch.score_targets
    none = error.new_zeros(())
    parts = [out.loss.detach(), out.nll.sum(), error.square().sum(), error.abs().sum(), out.score_mass.sum()]
    parts.append(none + (batch.input_ids.shape[1] if len(batch.score_rows) else 0))  # an empty one is a stand-in
    largest, share = none + 1, none + 1
    if isinstance(out, SampledTractLoss):
        largest, share = out.largest_weight, out.effective_share
        parts += [out.entries.sum(), out.added_variance * len(out.nll), beyond_limit(largest, share)]
    else:
        parts += [none] * 3
    return torch.stack([p.double() for p in parts]), torch.stack([largest, -share]).double()


def record(found: dict[str, float], recipe: Recipe, examples: Sequence[Encoded], lr: float) -> dict[str, Any]:
    """The part of a step's record that its sums over all ranks and its ``examples``, those of all ranks, make up, with
    its learning rate."""
    rows = sum(len(e.ids) - e.prompt_len for e in examples)
    sampled = recipe.loss.gradient == "sampled"
    drawn = {"entries": found["entries"] / rows, "added_variance": found["added"] / rows} if sampled else {}
    if recipe.loss.proposal != "none":
        drawn |= {"largest_weight": found["largest"], "effective_share": -found["smallest"]}
    return {
        "loss": found["loss"],
        "ce": found["nll"] / sum(batches.ce_tokens(e, recipe.loss.score_ce) for e in examples),
        "mse": found["squared"] / len(examples),
        "score_mass": found["mass"] / len(examples),
        "score_mae": found["absolute"] / len(examples),
        "lr": lr,
        "grad_norm": found["grad_norm"],
        "tokens": int(found["tokens"]),
        "logical_tokens": sum(len(e.ids) for e in examples),
        "rows": rows,
        "samples": len(examples),
        **drawn,
    }

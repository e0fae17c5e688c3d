"""How good are the scores: teacher-forced evaluation on held-out examples, and its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from tract_fast.data import batch as batches
from tract_fast.data.prompt import Encoded
from tract_fast.model import TractModel
from tract_fast.recipe import Recipe
from tract_fast.shard import Ranks, all_sum, reshard


def agreement(predicted: np.ndarray, label: np.ndarray) -> dict[str, float | None]:
    """Pearson, Spearman, RMSE and MAE of predicted against true scores, both (n,).

    A correlation of fewer than two points or with a constant is undefined: None.
    """
    error = predicted - label
    out: dict[str, float | None] = {"pearson": None, "spearman": None}
    if len(label) > 1 and np.ptp(predicted) > 0 and np.ptp(label) > 0:
        out["pearson"] = float(stats.pearsonr(predicted, label).statistic)
        out["spearman"] = float(stats.spearmanr(predicted, label).statistic)
    out["rmse"] = math.sqrt(float(np.mean(error**2)))
    out["mae"] = float(np.mean(np.abs(error)))
    return out


@torch.no_grad()
def teacher_forced(model: TractModel, examples: Sequence[Encoded], recipe: Recipe, ranks: Ranks) -> dict:
    """Metrics on given rationales: the expected score after each, against that example's own score.

    Returns pearson, spearman, rmse, mae, ce (mean over tokens, natural log), score_mass (mean vocabulary probability
    on the score tokens) and n; None where a value is undefined or not finite. Every rank must call it; the
    micro-batches are the same at every step.
    """
    score_ce = recipe.loss.score_ce
    norm = batches.normalizer(examples, ce_weight=1.0, regression_weight=1.0, score_ce=score_ce, ce_reduction="token")
    lengths = [len(e.ids) for e in examples]
    mine = batches.pack(lengths, max_tokens=recipe.train.max_tokens, world=ranks.world)[ranks.rank]
    found = torch.zeros(len(examples), 2, dtype=torch.float64, device=ranks.device)  # expected score, score mass
    ce_sum = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    was_training = model.training
    model.eval()
    for chosen in mine:
        batch = batches.collate([examples[i] for i in chosen], norm, score_ce=score_ce).to(ranks.device)
        out = model(batch)
        rows = torch.tensor(chosen, dtype=torch.int64, device=ranks.device)
        found[rows] = torch.stack([out.expected_score, out.score_mass], dim=1).double()
        ce_sum += out.nll.double().sum()
    model.train(was_training)
    reshard(model)
    return _metrics(all_sum(found).cpu(), all_sum(ce_sum).item(), examples, score_ce)


def _metrics(found: Tensor, ce_sum: float, examples: Sequence[Encoded], score_ce: bool) -> dict:
    expected, mass = found.T.numpy()
    tokens = sum(batches.ce_tokens(e, score_ce) for e in examples)
    metrics = agreement(expected, np.array([e.score for e in examples])) | {
        "ce": ce_sum / tokens,
        "score_mass": float(mass.mean()),
        "n": len(examples),
    }
    return {key: value if value is not None and math.isfinite(value) else None for key, value in metrics.items()}

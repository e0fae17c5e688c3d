"""How far predicted scores agree with true ones, and how sure that is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 1000

Measure = Callable[[np.ndarray, np.ndarray], float]


def _pearson(predicted: np.ndarray, label: np.ndarray) -> float:
    return np.corrcoef(predicted, label)[0, 1]  # scipy's adds a p-value and takes four times as long


def _root_mean_square(predicted: np.ndarray, label: np.ndarray) -> float:
    return math.sqrt(np.mean((predicted - label) ** 2))


MEASURES: dict[str, Measure] = {
    "pearson": _pearson,
    "spearman": lambda predicted, label: _pearson(stats.rankdata(predicted), stats.rankdata(label)),
    "kendall": lambda predicted, label: stats.kendalltau(predicted, label).statistic,  # tau-b
    "rmse": _root_mean_square,
    "mae": lambda predicted, label: float(np.mean(np.abs(predicted - label))),
}
ERRORS = ("rmse", "mae")


def measure(name: str, predicted: np.ndarray, label: np.ndarray) -> float | None:
    """One of MEASURES of predicted against true scores, both (n,).

    A correlation of fewer than two points or with a constant is undefined, an error of none too: None.
    """
    if name in ERRORS:
        defined = len(label) > 0
    else:
        defined = len(label) > 1 and np.ptp(predicted) > 0 and np.ptp(label) > 0
    return float(MEASURES[name](predicted, label)) if defined else None


def agreement(predicted: np.ndarray, label: np.ndarray) -> dict[str, float | None]:
    """All MEASURES of predicted against true scores, both (n,); None where one is undefined."""
    return {name: measure(name, predicted, label) for name in MEASURES}


def with_intervals(
    predicted: Sequence[float], label: Sequence[float], question: Sequence[str], *, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """``{measure: {"value", "low", "high"}}`` with 95% intervals, None where undefined.

    Whole questions are drawn with replacement (judgements on one question share its answer), bias-corrected and
    accelerated (BCa; Efron 1987), 1000 resamples, the level raised for few questions (``level``). In a simulation
    (``tests/coverage.py``) such intervals held the true Pearson r, RMSE and MAE in 91 to 92% with 16 questions of 4
    judgements, in 93 to 97% with 40 and 80. With fewer than two questions there is no interval.
    """
    predicted, label = np.asarray(predicted, float), np.asarray(label, float)
    _, number = np.unique(np.array(question, dtype=str), return_inverse=True)
    members = [np.flatnonzero(number == q) for q in range(number.max(initial=-1) + 1)]
    found = {}
    for name in MEASURES:
        low, high = interval(name, predicted, label, members, seed=seed) if len(members) > 1 else (None, None)
        found[name] = {"value": measure(name, predicted, label), "low": low, "high": high}
    return found


def level(questions: int) -> float:
    """The bootstrap's level for 95% intervals: resampling ``questions`` units leaves out a factor of n / (n - 1) in the
    variance and takes the normal's quantiles for Student's (Hesterberg 2015, arXiv 1411.5279)."""
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, questions - 1) * math.sqrt(questions / (questions - 1))
    return float(1 - 2 * stats.norm.sf(quantile))


def interval(
    name: str,
    predicted: np.ndarray,
    label: np.ndarray,
    members: list[np.ndarray],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[float | None, float | None]:
    """The 95% interval of one measure; ``members[q]`` are the indices of the judgements on question q."""

    def statistic(drawn: np.ndarray) -> float:
        chosen = np.concatenate([members[q] for q in drawn])
        value = measure(name, predicted[chosen], label[chosen])
        return math.nan if value is None else value

    with warnings.catch_warnings():
        # where resamples are all the same, or a measure is undefined on some: no interval, which is what is returned
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        result = stats.bootstrap(
            (np.arange(len(members)),),
            statistic,
            vectorized=False,
            n_resamples=resamples,
            confidence_level=level(len(members)),
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    ends = result.confidence_interval.low, result.confidence_interval.high
    return tuple(float(end) if math.isfinite(end) else None for end in ends)

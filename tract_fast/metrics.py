"""How far predicted scores agree with true ones, and how sure that is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy  # loads scipy.stats, which takes a second, where it is first asked for

CONFIDENCE = 0.95
RESAMPLES = 1000
UNDEFINED = 0.05  # the share of resamples without a value above which there is no interval
TINY = 1e-9  # an error, or a distance of |r| from 1, that is rounding

Measure = Callable[[np.ndarray, np.ndarray], float]


def _pearson(predicted: np.ndarray, label: np.ndarray) -> float:
    return np.corrcoef(predicted, label)[0, 1]  # scipy's adds a p-value and takes four times as long


def _root_mean_square(predicted: np.ndarray, label: np.ndarray) -> float:
    return math.sqrt(np.mean((predicted - label) ** 2))


MEASURES: dict[str, Measure] = {
    "pearson": _pearson,
    "spearman": lambda predicted, label: _pearson(scipy.stats.rankdata(predicted), scipy.stats.rankdata(label)),
    "kendall": lambda predicted, label: scipy.stats.kendalltau(predicted, label).statistic,  # tau-b
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

    Bootstrap over whole questions, since judgements on one question share its answer: Student's t with the standard
    error of 1000 resamples, on the scale on which a measure varies evenly (``interval``). How often such intervals held
    the true value in simulations: docs/results.md (``tests/coverage.py``). With fewer than two questions there is none.
    """
    predicted, label = np.asarray(predicted, float), np.asarray(label, float)
    members = questions_of(question)
    drawn = resamples(members, seed=seed)
    found = {}
    for name in MEASURES:
        low, high = interval(name, predicted, label, drawn, len(members))
        found[name] = {"value": measure(name, predicted, label), "low": low, "high": high}
    return found


def paired(
    first: Sequence[float], second: Sequence[float], label: Sequence[float], question: Sequence[str], *, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """``{measure: {"first", "second", "difference", "low", "high", "p"}}`` of two judges on the same prompts.

    ``difference`` is second minus first, with its 95% interval and the two-sided p of none: both judges are resampled
    together, by whole questions, and the difference over its standard error is taken for Student's t.
    """
    first, second, label = (np.asarray(x, float) for x in (first, second, label))
    members = questions_of(question)
    drawn = resamples(members, seed=seed)

    def difference(name: str, chosen: np.ndarray) -> float | None:
        a, b = (measure(name, x[chosen], label[chosen]) for x in (first, second))
        return None if a is None or b is None else b - a

    found = {}
    for name in MEASURES:
        value = difference(name, np.arange(len(label)))
        error = standard_error(functools.partial(difference, name), drawn, len(members))
        row = {"first": measure(name, first, label), "second": measure(name, second, label), "difference": value}
        row |= {"low": None, "high": None, "p": None}
        if value is not None and error:
            half = quantile(len(members)) * error
            p = 2 * scipy.stats.t.sf(abs(value) / error, len(members) - 1)
            row |= {"low": value - half, "high": value + half, "p": float(p)}
        found[name] = row
    return found


def questions_of(question: Sequence[str]) -> list[np.ndarray]:
    """The indices of each question's judgements."""
    members: dict[str, list[int]] = {}
    for i, text in enumerate(question):
        members.setdefault(text, []).append(i)
    return [np.array(found) for found in members.values()]


def quantile(questions: int) -> float:
    """Of Student's t, for a two-sided interval of CONFIDENCE over so many questions."""
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, questions - 1))


def resamples(members: Sequence[np.ndarray], *, seed: int, count: int = RESAMPLES) -> list[np.ndarray]:
    """Indices of ``count`` resamples: as many questions as there are, drawn whole and with replacement."""
    if not members:
        return []
    drawn = np.random.default_rng(seed).integers(len(members), size=(count, len(members)))
    return [np.concatenate([members[q] for q in row]) for row in drawn]


def standard_error(
    statistic: Callable[[np.ndarray], float | None], drawn: Sequence[np.ndarray], questions: int
) -> float | None:
    """The bootstrap's standard error of ``statistic(indices)``.

    A bootstrap of n units has (n - 1) / n of the variance, which the result makes up for (Hesterberg 2015, arXiv
    1411.5279, section 4). None with fewer than two questions, and where the statistic has no value on more than
    ``UNDEFINED`` of the resamples.
    """
    found = [value for value in map(statistic, drawn) if value is not None]
    if questions < 2 or len(found) < (1 - UNDEFINED) * len(drawn):
        return None
    return float(np.std(found, ddof=1)) * math.sqrt(questions / (questions - 1))


def interval(
    name: str, predicted: np.ndarray, label: np.ndarray, drawn: Sequence[np.ndarray], questions: int
) -> tuple[float | None, float | None]:
    """The 95% interval of one measure over so many ``questions``; ``drawn`` are the indices of each resample.

    Correlations are taken as artanh r (Fisher 1921) and errors as logarithms, so that an interval stays within what
    the measure can be. The standard error is carried to that scale by its slope at the value: resamples without any
    error are ordinary ones, and their logarithms are not. Student's t makes up for few questions. (None, None) for a
    value at the end of its range, or where the bootstrap has no standard error.
    """
    value = measure(name, predicted, label)
    error = standard_error(lambda chosen: measure(name, predicted[chosen], label[chosen]), drawn, questions)
    if value is None or error is None:
        return None, None
    half = quantile(questions) * error
    if name in ERRORS:
        return (None, None) if value < TINY else (value * math.exp(-half / value), value * math.exp(half / value))
    if 1 - abs(value) < TINY:
        return None, None
    middle, half = math.atanh(value), half / (1 - value**2)
    return math.tanh(middle - half), math.tanh(middle + half)

"""What else can be read from the same judgements: other scores, reliability, calibration after the fact.

The judge's score is the expected score as it was trained (RAIL; TRACT, arXiv 2503.04381). Beside it: the expectation
among the labels alone, the likeliest label, the median. Calibration after the fact is a map of expected scores fitted
on other judgements than those it is applied to; it mends errors (RMSE, MAE), and not correlation.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from tract_fast.errors import UserError
from tract_fast.judging import PREDICTIONS, SETTINGS, draws, read_predictions
from tract_fast.metrics import with_intervals

BINS = 5  # of a reliability diagram: fifths of the predictions


def readings(records: Sequence[dict[str, Any]], values: Sequence[float]) -> dict[str, Any]:
    """Metrics of each way to read the draws' distributions over ``values``, averaged over a prompt's draws."""
    scale = np.array(values)
    order = np.argsort(scale)
    found: dict[str, list[float]] = {"renormalised": [], "mode": [], "median": []}
    for record in records:
        probs = np.array([draw["distribution"] for draw in draws(record)])  # (draws, labels)
        mass = probs.sum(axis=1, keepdims=True)
        probs = np.where(mass > 0, probs, 1 / len(scale)) / np.where(mass > 0, mass, 1)  # of none, as likely each
        middle = (probs[:, order].cumsum(axis=1) >= 0.5).argmax(axis=1)
        found["renormalised"].append(float((probs @ scale).mean()))
        found["mode"].append(float(scale[probs.argmax(axis=1)].mean()))
        found["median"].append(float(scale[order][middle].mean()))
    label, question = ([record[name] for record in records] for name in ("label", "question"))
    return {name: with_intervals(predicted, label, question) for name, predicted in found.items()}


def reliability(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean true score of judgements with about the same expected score, and how far both spread.

    ``bins``: fifths of the judgements by expected score, ``{"n", "expected_score", "label"}`` (means). ``spread``:
    standard deviations; a judge whose scores spread less than the labels hedges.
    """
    predicted = np.array([record["expected_score"] for record in records])
    label = np.array([record["label"] for record in records])
    parts = [part for part in np.array_split(np.argsort(predicted, kind="stable"), BINS) if len(part)]
    means = [
        {"n": len(p), "expected_score": float(predicted[p].mean()), "label": float(label[p].mean())} for p in parts
    ]
    return {"bins": means, "spread": {"expected_score": float(predicted.std()), "label": float(label.std())}}


def calibration_data(fitted_on: Path, questions: Collection[str], made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The predictions of another evaluation, to fit a map to. ``made``: settings that both must share.

    Raises UserError where that folder holds no predictions, some on the same ``questions`` (a map fitted to what it is
    measured on says nothing), or those of another judge or after other rationales.
    """
    name, path = f"calibrate = {fitted_on}", fitted_on / SETTINGS
    other = list(read_predictions(fitted_on / PREDICTIONS).values())
    if len(other) < 2 or not path.exists():
        raise UserError(f"{name}: it needs the folder of another evaluation, with {PREDICTIONS} and {SETTINGS}")
    shared = set(questions) & {r["question"] for r in other}
    if shared:
        raise UserError(f"{name}: {len(shared)} questions are in this evaluation, too: fit on others")
    was = json.loads(path.read_text(encoding="utf-8"))
    for key, value in made.items():
        if was.get(key) != value:
            raise UserError(f"{name} has {key} = {was.get(key)}, and this evaluation {value}: such scores differ")
    return other


def calibrated(records: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of expected scores after an affine and an isotonic map that are fitted to ``other`` judgements.

    The intervals are of the measure on these ``records``: they take the maps as given.
    """
    x, y = (np.array([r[name] for r in other]) for name in ("expected_score", "label"))
    predicted = np.array([r["expected_score"] for r in records])
    label, question = ([r[name] for r in records] for name in ("label", "question"))
    maps = {"affine": _affine, "isotonic": _isotonic}
    found = {name: with_intervals(fit(x, y, predicted), label, question) for name, fit in maps.items()}
    return {"n": len(other), **found}


def _affine(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    slope = np.cov(x, y, bias=True)[0, 1] / variance if (variance := x.var()) > 0 else 0.0
    return y.mean() + slope * (new - x.mean())


def _isotonic(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    places, index = np.unique(x, return_inverse=True)
    count = np.bincount(index)
    fit = scipy.optimize.isotonic_regression(np.bincount(index, weights=y) / count, weights=count)
    return np.interp(new, places, fit.x)

"""How often the 95% intervals of ``metrics`` hold the true value, by simulation.

    python -m tests.coverage [--trials N] [--questions Q ...] [--resamples R] [--populations P ...]

Four populations. "even": questions of four judgements, true scores 1 to 5, errors that are normal, one that a question
shares and one of each judgement. "single": one judgement a question. "whole": predictions that are whole scores, right
most of the time. "outliers": every tenth question far off as a whole. The true value is that of a million judgements.
Prints a table.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np

from tract_fast import metrics

POPULATIONS = ("even", "single", "whole", "outliers")


def draw(kind: str, questions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true scores (questions, each)."""
    shape = questions, 1 if kind == "single" else 4
    label = rng.choice(np.arange(1.0, 6.0), p=[0.05, 0.1, 0.2, 0.4, 0.25], size=shape)
    if kind == "whole":
        return (label + rng.choice([-1, 0, 1, 2], p=[0.1, 0.75, 0.1, 0.05], size=shape)).clip(1, 5), label
    shared, own = rng.normal(0, 0.5, (questions, 1)), rng.normal(0, 0.8, shape)
    if kind == "outliers":
        shared = np.where(rng.random((questions, 1)) < 0.1, -2.5, shared)
    return (0.6 * label + 1.2 + shared + own).clip(1, 5), label


@functools.cache
def true_value(name: str, kind: str) -> float:
    return metrics.measure(name, *(x.ravel() for x in draw(kind, 250_000, np.random.default_rng(99))))


def coverage(name: str, kind: str, *, trials: int, questions: int, resamples: int) -> float:
    """The share of ``trials`` intervals that hold the true value; where there is no interval it does not."""
    held = 0
    for trial in range(trials):
        predicted, label = draw(kind, questions, np.random.default_rng([trial, 5]))
        members = np.split(np.arange(label.size), questions)
        drawn = metrics.resamples(members, seed=trial, count=resamples)
        low, high = metrics.interval(name, predicted.ravel(), label.ravel(), drawn, questions)
        held += low is not None and low <= true_value(name, kind) <= high
    return held / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--questions", type=int, nargs="+", default=[10, 16, 40, 80])
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--populations", nargs="+", default=POPULATIONS)
    parser.add_argument("--measures", nargs="+", default=list(metrics.MEASURES))
    args = parser.parse_args()
    for kind in args.populations:
        for questions in args.questions:
            options = {"trials": args.trials, "questions": questions, "resamples": args.resamples}
            shares = [f"{name} {coverage(name, kind, **options):.1%}" for name in args.measures]
            print(f"{kind}, {questions} questions: {', '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()

"""How often the 95% intervals of ``metrics`` hold the true value, by simulation.

    python -m tests.coverage [--trials N] [--questions Q ...] [--resamples R]

Judgements come in questions: true scores 1 to 5, an error that a question's four judgements share and one of each. The
true value is that of a million judgements. Prints a table.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np

from tract_fast import metrics

EACH = 4  # judgements of a question


def draw(questions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true scores of ``questions`` questions."""
    label = rng.choice(np.arange(1.0, 6.0), p=[0.05, 0.1, 0.2, 0.4, 0.25], size=(questions, EACH))
    shared, own = rng.normal(0, 0.5, (questions, 1)), rng.normal(0, 0.8, (questions, EACH))
    return (0.6 * label + 1.2 + shared + own).clip(1, 5).ravel(), label.ravel()


@functools.cache
def true_value(name: str) -> float:
    return metrics.measure(name, *draw(250_000, np.random.default_rng(99)))


def coverage(name: str, *, trials: int, questions: int, resamples: int) -> float:
    """The share of ``trials`` intervals that hold the true value."""
    held = 0
    members = [np.arange(EACH * q, EACH * (q + 1)) for q in range(questions)]
    for trial in range(trials):
        predicted, label = draw(questions, np.random.default_rng([trial, 5]))
        low, high = metrics.interval(name, predicted, label, members, seed=trial, resamples=resamples)
        held += low <= true_value(name) <= high
    return held / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--questions", type=int, nargs="+", default=[10, 16, 40, 80])
    parser.add_argument("--resamples", type=int, default=200)
    args = parser.parse_args()
    for questions in args.questions:
        for name in metrics.MEASURES:
            share = coverage(name, trials=args.trials, questions=questions, resamples=args.resamples)
            print(f"{questions} questions of {EACH}: {name:8} {share:.1%} of {args.trials}", flush=True)


if __name__ == "__main__":
    main()

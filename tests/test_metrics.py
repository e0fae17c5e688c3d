"""Agreement of predicted and true scores: scipy's numbers, and intervals that cover what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from tract_fast import metrics
from tract_fast.metrics import MEASURES, agreement, with_intervals

SCORES = st.lists(st.tuples(st.integers(10, 50), st.integers(1, 5)), min_size=3, max_size=30)


@given(SCORES)
def test_measures_are_those_of_scipy(pairs):
    predicted, label = np.array(pairs, dtype=float).T
    found = agreement(predicted / 10, label)
    constant = np.ptp(predicted) == 0 or np.ptp(label) == 0
    for name, of in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        assert found[name] == (None if constant else pytest.approx(of(predicted / 10, label)[0], abs=1e-12))
    error = predicted / 10 - label
    assert found["rmse"] == pytest.approx(math.sqrt((error**2).mean()))
    assert found["mae"] == pytest.approx(np.abs(error).mean())


def test_nothing_is_claimed_where_nothing_is_defined():
    assert set(agreement(np.array([]), np.array([])).values()) == {None}
    one = agreement(np.array([2.0]), np.array([3.0]))
    assert (one["pearson"], one["kendall"], one["mae"]) == (None, None, 1.0)
    found = with_intervals([], [], [])
    assert found == {name: {"value": None, "low": None, "high": None} for name in MEASURES}
    same_question = with_intervals([1.0, 2.0, 4.0], [1, 3, 5], ["q"] * 3)
    assert same_question["pearson"]["value"] > 0.9
    assert same_question["pearson"]["low"] is None


def test_interval_of_a_perfect_judge_is_no_error():
    found = with_intervals([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4], list("abcd"))
    assert found["mae"] == {"value": 0.0, "low": None, "high": None}  # every resample is the same


def test_intervals_hold_the_value_and_are_the_same_each_time():
    rng = np.random.default_rng(0)
    label = rng.integers(1, 6, 60).astype(float)
    predicted = label + rng.normal(size=60)
    question = [f"q{i // 3}" for i in range(60)]
    found = with_intervals(predicted, label, question)
    assert found == with_intervals(predicted, label, question)
    for each in found.values():
        assert each["low"] < each["value"] < each["high"]
    assert found != with_intervals(predicted, label, question, seed=1)


def test_questions_are_drawn_whole():
    """Judgements that repeat their question say nothing new: the interval is that of the questions."""
    rng = np.random.default_rng(1)
    label = rng.integers(1, 6, 40).astype(float)
    predicted = label + rng.normal(size=40)
    once = with_intervals(predicted, label, [str(i) for i in range(40)])
    repeated = with_intervals(
        np.repeat(predicted, 5), np.repeat(label, 5), [str(i) for i in range(40) for _ in range(5)]
    )
    apart = with_intervals(np.repeat(predicted, 5), np.repeat(label, 5), [str(i) for i in range(200)])
    width = lambda found: found["mae"]["high"] - found["mae"]["low"]  # noqa: E731
    assert width(repeated) == pytest.approx(width(once), rel=0.05)
    assert width(apart) < 0.6 * width(once)


def test_interval_is_students_t_on_the_scale_where_the_measure_varies_evenly():
    """Errors that are independent draws: the mean's standard error is known. Four, so that all corrections show."""
    size = np.array([0.5, 1.0, 1.2, 0.8])
    found = with_intervals(size, np.zeros(4), list("abcd"))["mae"]
    assert math.sqrt(found["low"] * found["high"]) == pytest.approx(found["value"])  # symmetric as logarithms
    half = stats.t.ppf(0.975, 3) * size.std(ddof=1) / math.sqrt(4) / size.mean()  # of log(mean)
    assert math.log(found["high"] / found["low"]) / 2 == pytest.approx(half, rel=0.06)  # of 1000 resamples
    rng = np.random.default_rng(2)
    label = np.arange(12.0)
    found = with_intervals(label + rng.normal(0, 2, 12), label, [str(i) for i in range(12)])["pearson"]
    middle = (math.atanh(found["low"]) + math.atanh(found["high"])) / 2
    assert math.tanh(middle) == pytest.approx(found["value"])
    assert -1 < found["low"] < found["high"] < 1


@pytest.mark.parametrize(("questions", "each", "mistakes"), [(60, 1, 1), (60, 1, 4), (200, 1, 3), (10, 5, 2)])
def test_resamples_without_a_mistake_are_ordinary(questions, each, mistakes):
    """A judge that is nearly always right: a third of the resamples lack its one mistake."""
    label = np.tile([1.0, 2.0, 3.0, 4.0, 5.0], questions * each // 5)
    predicted = label.copy()
    predicted[:: len(label) // mistakes][:mistakes] = 6 - label[:: len(label) // mistakes][:mistakes]
    predicted[0] = 4.0
    found = with_intervals(predicted, label, [f"q{i // each}" for i in range(len(label))])
    for name in ("pearson", "kendall", "rmse", "mae"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert found["pearson"]["low"] > 0
    assert found["pearson"]["high"] - found["pearson"]["low"] < 0.8
    assert found["mae"]["high"] < 20 * found["mae"]["value"]


def test_where_the_measure_is_often_undefined_there_is_no_interval():
    """Four of five predictions are the same: a third of the resamples are constant."""
    found = with_intervals([2, 2, 2, 2, 3], [1, 2, 3, 2, 4], list("abcde"))
    assert found["pearson"]["value"] > 0
    assert found["pearson"]["low"] is None
    assert found["mae"]["low"] < found["mae"]["value"]


def test_questions_are_told_apart_by_their_whole_text():
    members = metrics.questions_of(["a", "a\0", "b" * 100_000, "a"])
    assert [m.tolist() for m in members] == [[0, 3], [1], [2]]


@pytest.mark.parametrize("name", ["pearson", "mae"])
def test_intervals_cover_about_as_often_as_they_say(name, questions=40, trials=500):
    """40 questions of 4 judgements, errors shared within a question. More of it: ``python -m tests.coverage``."""
    from tests.coverage import coverage

    share = coverage(name, "even", trials=trials, questions=questions, resamples=200)
    assert 0.93 <= share <= 0.97

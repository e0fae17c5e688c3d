"""``compare``: a paired difference, and refusal of what cannot be paired."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tract_fast import cli, compare, metrics
from tract_fast.errors import UserError
from tract_fast.metrics import measure, paired


def write(folder: Path, scores, labels, first: int = 0) -> Path:
    folder.mkdir()
    with (folder / "predictions.jsonl").open("w") as file:
        for i, (score, label) in enumerate(zip(scores, labels, strict=True), first):
            record = {"id": f"p{i}", "question": f"q{i // 2}", "label": label, "expected_score": score}
            file.write(json.dumps(record) + "\n")
    return folder


def test_difference_of_means_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    label = rng.integers(1, 6, 30).astype(float)
    a, b = label + rng.normal(0.8, 0.5, 30), label + rng.normal(0.5, 0.5, 30)
    found = paired(a, b, label, [str(i) for i in range(30)])["mae"]
    error_a, error_b = np.abs(a - label), np.abs(b - label)
    assert found["difference"] == pytest.approx((error_b - error_a).mean())
    test = stats.ttest_rel(error_b, error_a)
    assert found["p"] == pytest.approx(test.pvalue, rel=0.3)
    low, high = test.confidence_interval(0.95)
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_pairing_takes_out_what_both_share():
    rng = np.random.default_rng(1)
    label = rng.integers(1, 6, 40).astype(float)
    noise = rng.normal(0, 1, 40)
    a, b = label + noise, label + 0.8 * noise
    found = paired(a, b, label, [str(i) for i in range(40)])
    assert found["pearson"]["difference"] == pytest.approx(measure("pearson", b, label) - measure("pearson", a, label))
    assert found["pearson"]["low"] > 0
    assert found["rmse"]["high"] < 0
    assert found["rmse"]["p"] < 0.01


def test_p_is_uniform_where_there_is_no_difference(monkeypatch):
    monkeypatch.setattr(metrics, "MEASURES", {"mae": metrics.MEASURES["mae"]})  # the others take minutes
    ps = []
    for trial in range(100):
        rng = np.random.default_rng(trial)
        label = rng.normal(size=30)
        a, b = label + rng.normal(size=30), label + rng.normal(size=30)
        ps.append(paired(a, b, label, [str(i // 2) for i in range(30)], seed=trial)["mae"]["p"])
    assert stats.kstest(ps, "uniform").pvalue > 0.001


def test_nothing_is_claimed_where_nothing_is_defined():
    same = paired([1.0, 2.0], [1.0, 2.0], [1, 2], ["a", "b"])
    assert same["mae"] == {"first": 0, "second": 0, "difference": 0, "low": None, "high": None, "p": None}
    constant = paired([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], [1, 2, 3], list("abc"))
    assert constant["pearson"]["difference"] is None
    assert constant["pearson"]["second"] == pytest.approx(1)
    one = paired([1.0, 2.0], [1.5, 2.0], [1, 2], ["a", "a"])
    assert one["mae"]["difference"] == pytest.approx(0.25)
    assert one["mae"]["p"] is None


def test_folders_of_other_judgements_are_refused(tmp_path):
    labels = [1, 2, 3, 4, 5, 1]
    a = write(tmp_path / "a", [1, 2, 3, 4, 4, 2], labels)
    with pytest.raises(UserError, match=r"2 differ, such as p0"):
        compare.run(a, write(tmp_path / "b", [1, 2, 3, 4, 4, 2], labels, first=1))
    with pytest.raises(UserError, match=r"1 differ, such as p5"):
        compare.run(a, write(tmp_path / "c", [1, 2, 3, 4, 4, 2], [*labels[:5], 2]))
    d = write(tmp_path / "d", [1, 2, 3, 4, 4, 2], labels)
    (a / "settings.json").write_text('{"rationales": "generated"}')
    (d / "settings.json").write_text('{"rationales": "given"}')
    with pytest.raises(UserError, match=r"a has generated rationales and .*d given: only like"):
        compare.run(a, d)
    with pytest.raises(UserError, match=r"nothing holds no predictions.jsonl"):
        compare.run(a, tmp_path / "nothing")


def test_command(tmp_path, capsys):
    rng = np.random.default_rng(3)
    labels = rng.integers(1, 6, 20).tolist()
    a = write(tmp_path / "a", (np.array(labels) + rng.normal(size=20)).tolist(), labels)
    b = write(tmp_path / "b", (np.array(labels) + rng.normal(size=20) / 3).tolist(), labels)
    assert cli.main(["compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    found = compare.run(a, b)["kendall"]
    assert f"{found['difference']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" in shown
    assert math.isfinite(found["p"])
    assert cli.main(["compare", str(a)]) == 2
    assert "compare needs two evaluations" in capsys.readouterr().err

"""Other readings of a distribution, reliability, and calibration that is never fitted to what it is measured on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tract_fast import cli
from tract_fast.errors import UserError
from tract_fast.metrics import with_intervals
from tract_fast.readings import calibrated, calibration_data, readings, reliability

VALUES = (1.0, 2.0, 3.0)


def record(id: str, label: float, *distributions: list[float], question: str = "", score: float = 2.0) -> dict:
    own = {"distribution": distributions[0]} if len(distributions) == 1 else {}
    drawn = {"draws": [{"distribution": d} for d in distributions]} if len(distributions) > 1 else {}
    return {"id": id, "label": label, "question": question or id, "expected_score": score, **own, **drawn}


def test_readings_by_hand():
    records = [
        record("a", 1, [0.5, 0.1, 0.4]),  # mode 1, median 1, mean 1.9
        record("b", 3, [0.1, 0.2, 0.2]),  # of mass .5: mean 2.2; mode: the first of two; median 2
        record("c", 2, [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]),
    ]
    found = readings(records, VALUES)
    for name, scores in (("renormalised", [1.9, 2.2, 2.5]), ("mode", [1, 2, 2.5]), ("median", [1, 2, 2.5])):
        for measure, expected in with_intervals(scores, [1, 3, 2], ["a", "b", "c"]).items():
            assert found[name][measure] == pytest.approx(expected)


def test_readings_of_labels_in_another_order():
    found = readings([record("a", 1, [0.3, 0.2, 0.5]), record("b", 1, [0.3, 0.2, 0.5])], (3.0, 1.0, 2.0))
    assert found["median"]["mae"]["value"] == 1.0  # 1: .2, 2: .7
    assert found["renormalised"]["mae"]["value"] == pytest.approx(1.1)


def test_reliability_is_of_fifths():
    records = [record(str(i), i % 2, [1, 0, 0], score=float(i)) for i in range(12)]
    found = reliability(records)
    assert [part["n"] for part in found["bins"]] == [3, 3, 2, 2, 2]
    assert found["bins"][0] == {"n": 3, "expected_score": 1.0, "label": pytest.approx(1 / 3)}
    assert found["spread"]["label"] == 0.5
    assert [part["n"] for part in reliability(records[:2])["bins"]] == [1, 1]


def write(folder: Path, records: list[dict]) -> Path:
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_calibration_mends_what_it_can():
    rng = np.random.default_rng(0)
    label = rng.integers(1, 6, 80).astype(float)
    score = 2.5 + 0.3 * label + rng.normal(0, 0.1, 80)  # too narrow and off
    records = [record(str(i), label[i], [1, 0, 0], question=f"q{i}", score=score[i]) for i in range(80)]
    found = calibrated(records[40:], records[:40])
    before = with_intervals(score[40:], label[40:], [f"q{i}" for i in range(40, 80)])
    assert found["n"] == 40
    for name in ("affine", "isotonic"):
        assert found[name]["rmse"]["value"] < 0.5 < before["rmse"]["value"]
    assert found["affine"]["pearson"]["value"] == pytest.approx(before["pearson"]["value"])
    slope, at_zero = np.polyfit(score[:40], label[:40], 1)
    expected = with_intervals(slope * score[40:] + at_zero, label[40:], [f"q{i}" for i in range(40, 80)])
    assert found["affine"]["rmse"]["value"] == pytest.approx(expected["rmse"]["value"])


def test_isotonic_map_is_the_pooled_means():
    fitted = [(1.0, 2), (2.0, 1), (2.0, 3), (3.0, 4)]  # at 1: 2, at 2: 2
    other = [record(f"o{i}", y, [1, 0, 0], question=f"o{i}", score=x) for i, (x, y) in enumerate(fitted)]
    new = [record("a", 2.0, [1, 0, 0], score=0.0), record("b", 3.0, [1, 0, 0], score=2.5)]
    assert calibrated(new, other)["isotonic"]["mae"]["value"] == pytest.approx(0.0)


def test_calibration_with_constant_scores_is_the_mean_label():
    other = [record(f"o{i}", i, [1, 0, 0], question=f"o{i}", score=2.0) for i in range(3)]
    found = calibrated([record("a", 2, [1, 0, 0], score=5.0), record("b", 1, [1, 0, 0], score=1.0)], other)
    assert found["affine"]["mae"]["value"] == pytest.approx(0.5)


def test_calibration_is_not_fitted_to_what_it_is_measured_on(tmp_path):
    records = [record(str(i), i % 3, [1, 0, 0], question=f"q{i}") for i in range(6)]
    other = write(tmp_path / "other", records[:4])
    made = {"judge_fingerprint": "a", "rationales": "given"}
    with pytest.raises(UserError, match=r"it needs the folder of another evaluation"):
        calibration_data(other, ["q9"], made)  # without its settings
    (other / "settings.json").write_text(json.dumps(made | {"batch": 3}))
    assert len(calibration_data(other, ["q9"], made)) == 4
    with pytest.raises(UserError, match=r"calibrate = .*: 1 questions are in this evaluation"):
        calibration_data(other, ["q3", "q4"], made)
    with pytest.raises(UserError, match=r"has rationales = given, and this evaluation generated"):
        calibration_data(other, ["q9"], made | {"rationales": "generated"})
    with pytest.raises(UserError, match=r"it needs the folder of another evaluation"):
        calibration_data(tmp_path, ["q9"], made)


def test_a_distribution_of_nothing_is_even():
    found = readings([record("a", 2, [0.0, 0.0, 0.0]), record("b", 1, [0.0, 0.0, 1.0])], VALUES)
    assert found["renormalised"]["mae"]["value"] == pytest.approx(1.0)  # 2 for 2, 3 for 1
    assert found["median"]["mae"]["value"] == pytest.approx(1.0)


def test_command(trained, tmp_path, capsys):
    data = str(trained.parent / "data.jsonl")
    words = ["evaluate", str(trained), data, "--teacher-forced"]
    assert cli.main([*words, "--holdout", "0.5", "--out", str(tmp_path / "a"), "--limit", "4"]) == 0
    assert cli.main([*words, "--out", str(tmp_path / "b"), "--calibrate", str(tmp_path / "a")]) == 2
    assert "questions are in this evaluation" in capsys.readouterr().err
    lines = [json.loads(text) for text in (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()]
    other = write(tmp_path / "c", [line | {"question": "another " + line["question"]} for line in lines])
    (other / "settings.json").write_bytes((tmp_path / "a" / "settings.json").read_bytes())
    assert cli.main([*words, "--out", str(tmp_path / "b"), "--calibrate", str(other)]) == 0
    assert "RAIL, isotonic" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert set(metrics["readings"]) == {"renormalised", "mode", "median"}
    assert metrics["calibrated"]["n"] == 4
    assert sum(part["n"] for part in metrics["bins"]) == metrics["n"]

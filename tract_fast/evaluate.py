"""How good are the scores: a judge on held-out prompts, and, while training, on given rationales.

``tract-fast evaluate``: read -> judge (``judging``) -> ``metrics.json``. Scores after a judge's own rationales are held
against the mean of the annotators, scores after given ones against the score that came with the rationale.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tract_fast.checkpoint import make_folder, replace_file
from tract_fast.data import batch as batches
from tract_fast.data.feedback import Example
from tract_fast.data.prompt import Encoded
from tract_fast.data.tree import Share
from tract_fast.judge import Judge, mean_of_known, prompts_at_once
from tract_fast.judging import Item, Say, Source, draws, judge_all, read_examples, render
from tract_fast.metrics import MEASURES, agreement, with_intervals
from tract_fast.model import TractModel
from tract_fast.readings import calibrated, calibration_data, readings, reliability
from tract_fast.recipe import Recipe, Sampling
from tract_fast.shard import Ranks, all_sum, reshard

METRICS = "metrics.json"


def run(
    model: str,
    source: Source,
    out: Path,
    settings: Sampling,
    *,
    teacher_forced: bool = False,
    batch: int = 16,
    dtype: str = "auto",
    backend: str = "auto",
    calibrate: Path | None = None,
    say: Say = print,
) -> dict:
    """Evaluate a judge (see ``Judge.from_pretrained``) on the source's held-out side; returns what ``metrics.json``
    holds.

    Writes ``metrics.json``, ``scores.png`` and what ``judging.judge_all`` does in ``out``; one that was begun with the
    same settings is gone on with. ``batch`` counts sequences; ``calibrate`` is the folder of another evaluation (see
    ``readings.calibration_data``). Raises UserError before any generation where data, model or settings cannot work, or
    ``out`` holds another evaluation.
    """
    prompts_at_once(batch, 1 if teacher_forced else settings.n)
    make_folder(out, "--out")
    with closing(Judge.from_pretrained(model, backend=backend, dtype=dtype, say=say)) as judge:
        rationales = "none" if not judge.writes else "given" if teacher_forced else "generated"
        generated = rationales == "generated"
        if not generated:
            settings = replace(settings, n=1)
        rationale = "keep" if rationales == "given" else "drop"
        examples, left_out = read_examples(judge, source, held_out=True, rationale=rationale, say=say)
        if rationales == "given":
            items = [Item(e.id, e.prompt, e.rationale, e.score, e.question) for e in examples]
        else:
            items = by_prompt(examples)
        new_tokens = settings.max_new_tokens if generated else 0
        items = render(judge, items[: source.limit], new_tokens, skip=source.skip, left_out=left_out, say=say)
        made = {"judge_fingerprint": judge.fingerprint(), "rationales": rationales}
        other = calibration_data(calibrate, {item.question for item in items}, made) if calibrate else None
        decoded = "what the sample says" if generated else "the likeliest label"
        say(f"rationales: {rationales}, {settings.n} a prompt; decoded is {decoded}")
        records, job = judge_all(judge, items, settings, out, batch=batch, rationales=rationales, say=say)
        metrics = summary(records) | {"readings": readings(records, judge.scale.values), **reliability(records)}
        if other:
            metrics["calibrated"] = {"fitted_on": str(calibrate), **calibrated(records, other)}
        metrics |= {"left_out": left_out, "model": model, **asdict(source), **job}
        replace_file(out / METRICS, json.dumps(metrics, indent=2, allow_nan=False) + "\n")
        from tract_fast.report import plot_scores  # matplotlib, which training's evaluations do without

        plot_scores({"expected score": records}, out / "scores.png")
        return metrics


def by_prompt(examples: Sequence[Example]) -> list[Item]:
    """One item per prompt, in order of first appearance, its label the mean of the scores that the prompt has.

    Its id is that of its first example; of a benchmark's judgements 7#1, 7#2, ... it is 7.
    """
    groups: dict[str, list[Example]] = {}
    for e in examples:
        groups.setdefault(e.prompt, []).append(e)
    first = [group[0].id for group in groups.values()]
    short = [_common_name(group) or group[0].id for group in groups.values()]
    taken = Counter([*short, *(e.id for e in examples)])
    return [
        Item(name if taken[name] == 1 else id, prompt, "", statistics.fmean(e.score for e in group), group[0].question)
        for name, id, (prompt, group) in zip(short, first, groups.items(), strict=True)
    ]


def _common_name(group: Sequence[Example]) -> str | None:
    """What stands before the number in the ids of one record's judgements."""
    names = {e.id.rpartition("#")[0] for e in group}
    return names.pop() if len(names) == 1 and len(group) > 1 else None


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of all predictions; of those with a score sentence alone; and of the first draw of several.

    ``decoded`` is over the prompts with a decoded score, whose number is its ``n``.
    """
    everything = [draw for record in records for draw in draws(record)]
    complete = [kept for record in records if (kept := _mean(record, lambda draw: draw["complete"]))]
    out = _scores(records) | {
        "draws": len(everything),
        "no_score_sentence": sum(not draw["complete"] for draw in everything),
        "score_mass": statistics.fmean(draw["score_mass"] for draw in everything),
        "complete_only": _scores(complete),
    }
    if len(everything) > len(records):
        firsts = [_mean(record | {"draws": record["draws"][:1]}, lambda draw: True) for record in records]
        out["first_draw"] = _scores(firsts)
    return out


def _mean(record: dict[str, Any], keep: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The record with the mean scores of the draws that ``keep`` holds for; None without any."""
    kept = [draw for draw in draws(record) if keep(draw)]
    if not kept:
        return None
    return record | {
        "expected_score": statistics.fmean(draw["expected_score"] for draw in kept),
        "decoded_score": mean_of_known(draw["decoded_score"] for draw in kept),
    }


def _scores(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def against(key: str) -> dict[str, Any]:
        chosen = [r for r in records if r[key] is not None]
        columns = ([r[name] for r in chosen] for name in (key, "label", "question"))
        return with_intervals(*columns)

    decoded = sum(r["decoded_score"] is not None for r in records)
    return {
        "n": len(records),
        "rail": against("expected_score"),
        "decoded": against("decoded_score") | {"n": decoded},
    }


def table(metrics: dict[str, Any]) -> Table:
    """RAIL and decoded, all prompts and those with a score sentence, each value with its interval."""
    complete = metrics["complete_only"]
    shown = Table(title=f"{metrics['n']} prompts, {metrics['draws']} rationales", title_justify="left")
    shown.add_column("")
    columns = [("RAIL", metrics["rail"]), (f"decoded (n = {metrics['decoded']['n']})", metrics["decoded"])]
    if metrics["no_score_sentence"] and complete["n"]:
        columns += [(f"RAIL, complete (n = {complete['n']})", complete["rail"])]
    for name, _ in columns:
        shown.add_column(name, justify="right")
    for name in MEASURES:
        shown.add_row(name, *(bounded(found[name]) for _, found in columns))
    return shown


def other_readings(metrics: dict[str, Any]) -> Table:
    """What else the same rationales say: other readings of their distributions, and calibrated scores."""
    shown = Table(title="The same judgements, read otherwise", title_justify="left")
    names = ("pearson", "rmse", "mae")
    for name in ("", *names):
        shown.add_column(name, justify="right" if name else "left")
    rows = dict(metrics["readings"])
    if "calibrated" in metrics:
        rows |= {f"RAIL, {name}": metrics["calibrated"][name] for name in ("affine", "isotonic")}
    for title, found in rows.items():
        shown.add_row(title, *(bounded(found[name]) for name in names))
    return shown


def bounded(found: dict[str, float | None]) -> str:
    """``.812 [.700, .901]``, a value and its 95% interval."""
    if found["value"] is None:
        return "undefined"
    ends = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:.3f}{ends}"


def show(metrics: dict[str, Any], out: Path) -> None:
    """Print what ``evaluate`` found and where it is."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(metrics))
    console.print(other_readings(metrics))
    if metrics["rationales"] == "generated":
        missing = f"{metrics['no_score_sentence']} of {metrics['draws']} rationales never reached the score sentence"
        console.print(f"{missing}; there it was forced after what was written")
    mass, spread = metrics["score_mass"], metrics["spread"]
    console.print(f"95% intervals: bootstrap over questions; score mass {mass:.3f}; computed in {metrics['dtype']}")
    console.print(
        f"standard deviation of expected scores {spread['expected_score']:.3f}, of true {spread['label']:.3f}"
    )
    console.print(f"written: {out}", markup=False)


@torch.no_grad()
def held_out_metrics(
    model: TractModel,
    examples: Sequence[Encoded],
    recipe: Recipe,
    ranks: Ranks,
    share: Share | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict | None:
    """Metrics on given rationales: the expected score after each, against that example's own score.

    Returns pearson, spearman, rmse, mae, ce (mean over tokens, natural log), score_mass (mean vocabulary probability
    on the score tokens) and n; None where a value is undefined or not finite. Every rank must call it; the
    micro-batches are the same at every step. ``share``: what is shared, as in training. ``stopping`` is asked before
    each micro-batch, must say the same on all ranks, and ends the evaluation without a result.
    """
    score_ce = recipe.loss.score_ce
    norm = batches.normalizer(examples, ce_weight=1.0, regression_weight=1.0, score_ce=score_ce, ce_reduction="token")
    groups = batches.prompt_groups(examples).of.tolist() if share else None
    mine = batches.pack_examples(examples, recipe.train.max_tokens, ranks.world, groups)[ranks.rank]
    found = torch.zeros(len(examples), 2, dtype=torch.float64, device=ranks.device)  # expected score, score mass
    ce_sum = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    was_training = model.training
    model.eval()
    abandoned = False
    for chosen in mine:
        if abandoned := stopping():
            break
        part = [examples[i] for i in chosen]
        batch = batches.collate(part, norm, score_ce=score_ce, share=share).to(ranks.device)
        out = model(batch)
        rows = torch.tensor(chosen, dtype=torch.int64, device=ranks.device)
        found[rows] = torch.stack([out.expected_score, out.score_mass], dim=1).double()
        ce_sum += out.nll.double().sum()
    model.train(was_training)
    reshard(model)
    if abandoned:
        return None
    return _metrics(all_sum(found).cpu(), all_sum(ce_sum).item(), examples, score_ce)


def _metrics(found: Tensor, ce_sum: float, examples: Sequence[Encoded], score_ce: bool) -> dict:
    expected, mass = found.T.numpy()
    tokens = sum(batches.ce_tokens(e, score_ce) for e in examples)
    metrics = agreement(expected, np.array([e.score for e in examples])) | {
        "ce": ce_sum / tokens,
        "score_mass": float(mass.mean()),
        "n": len(examples),
    }
    return {key: value if value is not None and math.isfinite(value) else None for key, value in metrics.items()}

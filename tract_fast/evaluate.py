"""How good are the scores: a judge on held-out prompts, and, while training, on given rationales.

``tract-fast evaluate``: read -> render -> batches of fixed membership -> a line of ``predictions.jsonl`` per prompt ->
``metrics.json``. A batch is done when all its lines are there; stopped and started again, the rest is computed, with
the same numbers. Scores after a judge's own rationales are held against the mean of the annotators, scores after given
ones against the score that came with the rationale.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tract_fast import __version__
from tract_fast.checkpoint import make_folder, replace_file
from tract_fast.data import batch as batches, feedback, prompt as prompts
from tract_fast.data.feedback import Example
from tract_fast.data.prompt import Encoded
from tract_fast.errors import UserError
from tract_fast.judge import Judge, Judgement, mean_of_known
from tract_fast.metrics import MEASURES, agreement, with_intervals
from tract_fast.model import TractModel
from tract_fast.recipe import Generate, Recipe
from tract_fast.report import plot_scores
from tract_fast.shard import Ranks, all_sum, reshard

PREDICTIONS, METRICS, SETTINGS = "predictions.jsonl", "metrics.json", "evaluation.json"


@dataclass(frozen=True)
class Item:
    """What is judged: a prompt and the true score; the rationale is given when teacher-forced."""

    id: str
    prompt: str
    rationale: str
    label: float
    question: str
    ids: list[int] = field(default_factory=list, compare=False, repr=False)  # of the rendered prompt
    length: int = 0  # of prompt and given rationale, in tokens


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which records of which data are evaluated."""

    data: str
    """File (.jsonl, .json, .parquet), package:NAME/FILE inside an installed Python package, or hub name (:split)."""
    holdout: float = 0.0
    """Only the share of questions that training held out by data.holdout; 0 takes all."""
    split_seed: int = 42
    """The train.seed of that training."""
    limit: int | None = None
    """Only the first so many prompts."""
    skip: bool = False
    """Leave out and list broken records and prompts too long for the model, instead of stopping at the first."""


def run(
    model: str,
    source: Source,
    out: Path,
    settings: Generate,
    *,
    teacher_forced: bool = False,
    batch: int = 16,
    dtype: str = "auto",
    say: Callable[[str], None] = print,
) -> dict:
    """Evaluate a judge (see ``Judge.from_pretrained``) and return what ``metrics.json`` holds.

    Writes ``predictions.jsonl``, ``metrics.json``, ``scores.png`` and ``evaluation.json`` (the settings) in ``out``;
    one that was begun with the same settings is gone on with. ``batch`` counts sequences. Raises UserError before any
    generation where data, model or settings cannot work, or ``out`` holds another evaluation.
    """
    if batch < 1:
        raise UserError(f"batch = {batch}: must be above 0")
    if source.limit is not None and source.limit < 1:
        raise UserError(f"limit = {source.limit}: must be above 0")
    make_folder(out, "--out")
    judge = Judge.from_pretrained(model, dtype=dtype, say=say)
    forced = teacher_forced or not judge.writes
    if forced:
        settings = replace(settings, n=1)
    items, left_out = read_items(judge, source, settings, teacher_forced=forced, say=say)
    if forced:
        mode = "teacher-forced" if judge.writes else "without rationales"
        say(f"mode: {mode}; decoded is the likeliest label")
    else:
        say(f"mode: {settings.n} generated rationale{'s' * (settings.n > 1)} a prompt; decoded is what the sample says")
    job = _job(judge, items, settings, batch, "given" if forced else "generated")
    _claim(out, job)
    found = _predict(judge, items, settings, out / PREDICTIONS, batch=batch, forced=forced, say=say)
    records = [found[item.id] for item in items]
    replace_file(out / PREDICTIONS, "".join(_line(record) for record in records))
    metrics = summary(records) | {"left_out": left_out, "model": model, "data": source.data, **job}
    replace_file(out / METRICS, json.dumps(metrics, indent=2) + "\n")
    plot_scores({"expected score": records}, out / "scores.png")
    return metrics


def read_items(
    judge: Judge, source: Source, settings: Generate, *, teacher_forced: bool, say: Callable[[str], None]
) -> tuple[list[Item], list[dict[str, str]]]:
    """What is to be judged, in the order of the data, and what is left out and why. Raises UserError."""
    rationale = "keep" if teacher_forced and judge.writes else "drop"
    loaded = feedback.read_examples(
        source.data,
        labels=judge.scale.labels,
        values=judge.scale.values,
        rationale=rationale,
        on_error="skip" if source.skip else "fail",
    )
    left_out = [{"where": s.where, "why": s.why} for s in loaded.skipped]
    for note in loaded.notes:
        say(f"data: {note}")
    examples = loaded.examples
    if source.holdout:
        examples = feedback.split_by_question(examples, source.holdout, source.split_seed)[1]
    items = [Item(e.id, e.prompt, e.rationale, e.score, e.question) for e in examples]
    items = (items if teacher_forced else by_prompt(examples))[: source.limit]
    kept = []
    rationales = prompts.tokenize(judge.tokenizer, [item.rationale for item in items])
    for item, ids, tail in zip(items, judge.render([item.prompt for item in items]), rationales, strict=True):
        item = replace(item, ids=ids, length=len(ids) + len(tail))
        why = judge.obstacle(item.prompt, item.length, 0 if teacher_forced else settings.max_new_tokens)
        if why and not source.skip:
            raise UserError(f"{item.id}: {why}; lower max_new_tokens, or leave such prompts out with --skip")
        if why:
            left_out.append({"where": item.id, "why": why})
        else:
            kept.append(item)
    if not kept:
        raise UserError(f"{source.data}: no prompt is left to judge")
    for token, count in prompts.control_tokens(judge.tokenizer, examples).items():
        say(f"warning: {count} prompts hold the text {token!r}, which the tokenizer reads as a control token")
    if left_out:
        say(f"data: {len(left_out)} left out, first {left_out[0]['where']}: {left_out[0]['why']}")
    say(f"data: {len(kept)} prompts on {len({item.question for item in kept})} questions")
    return kept, left_out


def by_prompt(examples: Sequence[Example]) -> list[Item]:
    """One item per prompt, in order of first appearance, its label the mean of the scores that the prompt has."""
    groups: dict[str, list[Example]] = {}
    for e in examples:
        groups.setdefault(e.prompt, []).append(e)
    items = []
    for prompt, group in groups.items():
        names = {e.id.rpartition("#")[0] for e in group}  # a benchmark's record 7 is judgements 7#1, 7#2, ...
        name = names.pop() if len(names) == 1 and len(group) > 1 else ""
        label = statistics.fmean(e.score for e in group)
        items.append(Item(name or group[0].id, prompt, "", label, group[0].question))
    return items


def _job(judge: Judge, items: Sequence[Item], settings: Generate, batch: int, rationales: str) -> dict[str, Any]:
    """Everything that decides the numbers."""
    data = hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()[:16]
    return {
        "rationales": rationales,
        "generate": asdict(settings) if rationales == "generated" else None,
        "batch": batch,
        "dtype": judge.dtype,
        "normalize": judge.about.normalize,
        "judge_fingerprint": judge.fingerprint(),
        "data_fingerprint": data,
        "tract-fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": judge.device.type,
    }


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Refuse an ``out`` that holds an evaluation with other settings."""
    path = out / SETTINGS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else job
    other = [key for key in job if before.get(key) != job[key]]
    if other:
        key = other[0]
        raise UserError(
            f"{out} holds an evaluation with {key} = {before.get(key)}, and this one has {job[key]}: give another --out"
        )
    replace_file(path, json.dumps(job, indent=2) + "\n")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a ``predictions.jsonl`` by id; one that a killed run left half written is the last, and left out."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.removesuffix("\n").split("\n") if text else []  # a rationale may hold what splitlines() splits at
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found[record["id"]] = record
        except (json.JSONDecodeError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"{path}:{number} is no prediction: remove the file and evaluate again") from None
    return found


def _predict(
    judge: Judge,
    items: Sequence[Item],
    settings: Generate,
    path: Path,
    *,
    batch: int,
    forced: bool,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The prediction of every item by id. Those that ``path`` holds are taken; others are added to it, batchwise."""
    found = read_predictions(path)
    replace_file(path, "".join(map(_line, found.values())))  # without a torn line
    # prompts of about the same length together, the longest first: what does not fit into memory shows at once
    order = sorted(range(len(items)), key=lambda i: (-items[i].length, i))
    step = max(1, batch // settings.n)
    plan = [order[i : i + step] for i in range(0, len(order), step)]
    todo = [chosen for chosen in plan if not all(items[i].id in found for i in chosen)]
    done = len(items) - sum(map(len, todo))
    if done:
        say(f"{path} holds {done} of {len(items)} predictions: going on")
    begin, written = time.perf_counter(), 0
    with path.open("a", encoding="utf-8") as file:
        for chosen in todo:
            texts, tokens = [items[i].prompt for i in chosen], [items[i].ids for i in chosen]
            if forced:
                judgements = judge.given(tokens, [items[i].rationale for i in chosen])
            else:
                judgements = judge.judge(texts, tokens, settings)
            new = {items[i].id: prediction(items[i], j) for i, j in zip(chosen, judgements, strict=True)}
            file.write("".join(map(_line, new.values())))
            file.flush()
            found |= new
            done += len(new)
            written += sum(d.tokens for j in judgements for d in j.draws)
            speed = f", {written / (time.perf_counter() - begin):.0f} tokens/s written" if written else ""
            say(f"judged {done} of {len(items)}{speed}")
    return found


def prediction(item: Item, judgement: Judgement) -> dict[str, Any]:
    """A line of ``predictions.jsonl``; ``draws`` only where there are several."""
    first = judgement.draws[0]
    own = {"complete": first.complete, "tokens": first.tokens}
    if len(judgement.draws) > 1:
        own = {"draws": [asdict(d) for d in judgement.draws]}
    return {
        "id": item.id,
        "question": item.question,
        "label": item.label,
        "expected_score": judgement.score,
        "decoded_score": judgement.decoded_score,
        "score_mass": judgement.score_mass,
        "distribution": list(judgement.distribution),
        "rationale": judgement.rationale,
        **own,
    }


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of all predictions; of those with a score sentence alone; and of the first draw of several.

    ``decoded`` is over the prompts with a decoded score, whose number is its ``n``.
    """
    draws = [draw for record in records for draw in record.get("draws", [record])]
    complete = [kept for record in records if (kept := _mean(record, lambda draw: draw["complete"]))]
    out = _scores(records) | {
        "draws": len(draws),
        "no_score_sentence": sum(not draw["complete"] for draw in draws),
        "score_mass": statistics.fmean(draw["score_mass"] for draw in draws),
        "complete_only": _scores(complete),
    }
    if len(draws) > len(records):
        firsts = [_mean(record | {"draws": record["draws"][:1]}, lambda draw: True) for record in records]
        out["first_draw"] = _scores(firsts)
    return out


def _mean(record: dict[str, Any], keep: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The record with the mean scores of the draws that ``keep`` holds for; None without any."""
    draws = [draw for draw in record.get("draws", [record]) if keep(draw)]
    if not draws:
        return None
    return record | {
        "expected_score": statistics.fmean(draw["expected_score"] for draw in draws),
        "decoded_score": mean_of_known(draw["decoded_score"] for draw in draws),
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
        shown.add_row(name, *(interval(found[name]) for _, found in columns))
    return shown


def interval(found: dict[str, float | None]) -> str:
    """``.812 [.700, .901]``, a value and its 95% interval."""
    if found["value"] is None:
        return "undefined"
    ends = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:.3f}{ends}"


def show(metrics: dict[str, Any], out: Path) -> None:
    """Print what ``evaluate`` found and where it is."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(metrics))
    if metrics["rationales"] == "generated":
        missing = f"{metrics['no_score_sentence']} of {metrics['draws']} rationales never reached the score sentence"
        console.print(f"{missing}; there it was forced after what was written")
    mass = metrics["score_mass"]
    console.print(f"95% intervals: bootstrap over questions; score mass {mass:.3f}; computed in {metrics['dtype']}")
    console.print(f"written: {out}", markup=False)


@torch.no_grad()
def teacher_forced(model: TractModel, examples: Sequence[Encoded], recipe: Recipe, ranks: Ranks) -> dict:
    """Metrics on given rationales: the expected score after each, against that example's own score.

    Returns pearson, spearman, rmse, mae, ce (mean over tokens, natural log), score_mass (mean vocabulary probability
    on the score tokens) and n; None where a value is undefined or not finite. Every rank must call it; the
    micro-batches are the same at every step.
    """
    score_ce = recipe.loss.score_ce
    norm = batches.normalizer(examples, ce_weight=1.0, regression_weight=1.0, score_ce=score_ce, ce_reduction="token")
    lengths = [len(e.ids) for e in examples]
    mine = batches.pack(lengths, max_tokens=recipe.train.max_tokens, world=ranks.world)[ranks.rank]
    found = torch.zeros(len(examples), 2, dtype=torch.float64, device=ranks.device)  # expected score, score mass
    ce_sum = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    was_training = model.training
    model.eval()
    for chosen in mine:
        batch = batches.collate([examples[i] for i in chosen], norm, score_ce=score_ce).to(ranks.device)
        out = model(batch)
        rows = torch.tensor(chosen, dtype=torch.int64, device=ranks.device)
        found[rows] = torch.stack([out.expected_score, out.score_mass], dim=1).double()
        ce_sum += out.nll.double().sum()
    model.train(was_training)
    reshard(model)
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

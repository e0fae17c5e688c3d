"""Rationales for the second stage: a judge writes them for its training prompts, and the true scores are attached.

``tract-fast generate``: read -> judge (``judging``) -> health of what was written -> ``rationales.jsonl``, data that
``train`` reads. A judge's own score is not trained on; it is kept in ``predictions.jsonl`` and says how far the
rationale leads to the true one. The authors (TRACT, arXiv 2503.04381) leave out nothing; what ``drop`` names is left
out and counted, and so are empty rationales, from which nothing can be learnt.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from tract_fast.checkpoint import make_folder, replace_file
from tract_fast.data.feedback import Example, as_record
from tract_fast.errors import UserError
from tract_fast.judge import Judge
from tract_fast.judging import Item, Say, Source, draws, judge_all, line, read_examples, render
from tract_fast.metrics import agreement
from tract_fast.recipe import Fault, Generate

RATIONALES, HEALTH = "rationales.jsonl", "health.json"
NGRAM = 4  # words
REPEATED = 0.5  # share of a rationale's n-grams that came before in it, from which it counts as repeated
ODD_LENGTH = 4  # times the annotated median, or one part in so many
FAR = 0.25  # of the scale, between own and true score: one point of 1 to 5


@dataclass(frozen=True)
class Written:
    """One rationale, with what is known of it."""

    item: Item
    number: int
    text: str
    words: int
    repeated: float  # share of its n-grams that came before in it
    expected_score: float
    complete: bool
    tokens: int


def run(
    model: str, source: Source, out: Path, settings: Generate, *, dtype: str = "auto", say: Say = print
) -> dict[str, Any]:
    """Have a judge (see ``Judge.from_pretrained``) write ``settings.n`` rationales for each training example of
    ``source``; returns what ``health.json`` holds.

    Writes ``rationales.jsonl`` (one record a rationale: id, prompt, rationale, score, question, weight),
    ``health.json`` and what ``judging.judge_all`` does in ``out``; one that was begun with the same settings is gone on
    with. An example whose prompt others have, too, gets draws of its own. Raises UserError before any generation where
    data, model or settings cannot work, or ``out`` holds another generation.
    """
    make_folder(out, "--out")
    with closing(Judge.from_pretrained(model, backend=settings.backend, dtype=dtype, say=say)) as judge:
        if not judge.writes:
            raise UserError(f"{model} was trained without rationales (data.rationale: drop) and writes none")
        examples, left_out = read_examples(judge, source, held_out=False, rationale="optional", say=say)
        annotated = [len(e.rationale.split()) for e in examples if e.rationale]
        items = items_of(examples[: source.limit], settings.n)
        items = render(judge, items, settings.max_new_tokens, skip=source.skip, left_out=left_out, say=say)
        records, job = judge_all(judge, items, settings, out, batch=settings.batch, rationales="generated", say=say)
        found = [one for item, record in zip(items, records, strict=True) for one in written(item, record)]
        span = max(judge.scale.values) - min(judge.scale.values)
        usual = statistics.median(annotated) if annotated else None
        faults = [list(faults_of(one, usual, span, settings.max_new_tokens)) for one in found]
        kept = [one for one, own in zip(found, faults, strict=True) if not {"empty", *settings.drop} & set(own)]
        labels = dict(zip(judge.scale.values, judge.scale.labels, strict=True))
        replace_file(out / RATIONALES, "".join(line(as_record(example(one, settings.n), labels)) for one in kept))
        health = health_of(found, faults, annotated) | {"kept": len(kept), "dropped_for": ["empty", *settings.drop]}
        health |= {"left_out": left_out, "model": model, "data": source.data, **job}
        replace_file(out / HEALTH, json.dumps(health, indent=2) + "\n")
        if not kept:
            raise UserError(f"none of {len(found)} rationales is left: see {out / HEALTH}")
        return health


def items_of(examples: Sequence[Example], n: int) -> list[Item]:
    """An item per example, its draws after those of the examples before it with the same prompt."""
    seen: dict[str, int] = {}
    items = []
    for e in examples:
        first = seen.get(e.prompt, 0)
        seen[e.prompt] = first + n
        items.append(Item(e.id, e.prompt, "", e.score, e.question, first, e.weight))
    return items


def written(item: Item, record: dict[str, Any]) -> Iterator[Written]:
    """The rationales of one prediction."""
    for number, draw in enumerate(draws(record)):
        words = draw["rationale"].split()
        rest = (draw[name] for name in ("expected_score", "complete", "tokens"))
        yield Written(item, number, draw["rationale"], len(words), repeated(words), *rest)


def example(one: Written, n: int) -> Example:
    """What is trained on: the rationale with the true score."""
    item = one.item
    id = f"{item.id}/{one.number}" if n > 1 else item.id
    return Example(id, item.prompt, one.text, item.label, item.question, item.weight)


def faults_of(one: Written, usual: float | None, span: float, most: int) -> Iterator[str]:
    """What is the matter with a rationale, by the names of ``generate.drop``, and "empty".

    ``usual``: the median of the annotated lengths in words, if there are any; ``span``: of the scale; ``most``: tokens.
    """
    if not one.words:
        yield "empty"
    if not one.complete:
        yield "no_score"
    if not one.complete and one.tokens >= most:
        yield "truncated"
    if one.repeated > REPEATED:
        yield "repeated"
    if usual is not None and not usual / ODD_LENGTH <= one.words <= usual * ODD_LENGTH:
        yield "length"
    if abs(one.expected_score - one.item.label) > FAR * span:
        yield "disagree"


def repeated(words: Sequence[str]) -> float:
    """The share of a text's n-grams of NGRAM words that came before in it."""
    grams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def health_of(found: Sequence[Written], faults: Sequence[Sequence[str]], annotated: Sequence[int]) -> dict[str, Any]:
    """How the rationales are: faults counted, lengths in words beside the annotated, own scores against the true."""
    columns = ([one.expected_score for one in found], [one.item.label for one in found])
    return {
        "n": len(found),
        "faults": {name: sum(name in own for own in faults) for name in ("empty", *get_args(Fault))},
        "words": quartiles([one.words for one in found]),
        "words_annotated": quartiles(annotated),
        "repeated_mean": statistics.fmean(one.repeated for one in found),
        "agreement": agreement(*map(np.array, columns)),
    }


def quartiles(values: Sequence[int]) -> list[float] | None:
    """The 25th, 50th and 75th percentile; None without values."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else None


def show(health: dict[str, Any], out: Path) -> None:
    """Print what ``generate`` wrote and how it is."""
    rows = Table(title=f"{health['n']} rationales", title_justify="left", show_header=False)
    for name, count in health["faults"].items():
        rows.add_row(f"{name}, left out" if name in health["dropped_for"] else name, f"{count}")
    for name in ("words", "words_annotated"):
        if health[name]:
            rows.add_row(f"{name}: quartiles", ", ".join(f"{value:g}" for value in health[name]))
    for name, found in health["agreement"].items():
        rows.add_row(f"own score: {name}", "undefined" if found is None else f"{found:.3f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(rows)
    console.print(f"written: {health['kept']} records, {out / RATIONALES}", markup=False)

"""A judge over a whole data set: what ``evaluate`` and ``generate`` share.

Read -> render -> batches of fixed membership -> a line of ``predictions.jsonl`` per prompt. A batch is done when all
its lines are there; stopped and started again, the rest is computed, with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from tract_fast import __version__
from tract_fast.checkpoint import locked, replace_file
from tract_fast.data import feedback, prompt as prompts
from tract_fast.data.feedback import Example
from tract_fast.errors import UserError
from tract_fast.judge import Judge, Judgement
from tract_fast.recipe import Sampling, sampling_of
from tract_fast.threads import as_done

PREDICTIONS, SETTINGS = "predictions.jsonl", "settings.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """What is judged: a prompt and the true score; the rationale is given when teacher-forced."""

    id: str
    prompt: str
    rationale: str
    label: float
    question: str
    first: int = 0  # number of the first draw: other items with the same prompt have those before it
    weight: float = 1.0
    ids: list[int] = field(default_factory=list, compare=False, repr=False)  # of the rendered prompt
    length: int = 0  # of prompt and given rationale, in tokens


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which records of which data are judged."""

    data: str
    """File (.jsonl, .json, .parquet), package:NAME/FILE inside an installed Python package, or hub name (:split)."""
    holdout: float = 0.0
    """The data.holdout of a training: the share of questions that it held out for evaluation; 0 takes all."""
    split_seed: int = 42
    """The train.seed of that training."""
    limit: int | None = None
    """Only the first so many prompts."""
    skip: bool = False
    """Leave out and list broken records and prompts too long for the model, instead of stopping at the first."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit = {self.limit}: must be 0 (all) or more")


def read_examples(
    judge: Judge, source: Source, *, held_out: bool, rationale: str, say: Say
) -> tuple[list[Example], list[dict[str, str]]]:
    """One side of the source's split, and what was left out and why. ``rationale`` as in ``feedback``. UserError."""
    loaded = feedback.read_examples(
        source.data,
        labels=judge.scale.labels,
        values=judge.scale.values,
        rationale=rationale,
        on_error="skip" if source.skip else "fail",
    )
    for note in loaded.notes:
        say(f"data: {note}")
    examples = loaded.examples
    if source.holdout:
        examples = feedback.split_by_question(examples, source.holdout, source.split_seed, loaded.questions)[held_out]
    for token, count in prompts.control_tokens(judge.tokenizer, (e.prompt for e in examples)).items():
        say(f"warning: {count} prompts hold the text {token!r}, which the tokenizer reads as a control token")
    return examples, [{"where": s.where, "why": s.why} for s in loaded.skipped]


def render(
    judge: Judge, items: Sequence[Item], new_tokens: int, *, skip: bool, left_out: list[dict[str, str]], say: Say
) -> list[Item]:
    """The ``items`` as tokens, without those that the judge has no room for: they are added to ``left_out`` with
    ``skip``, and raise UserError without. An item's rationale counts as given, ``new_tokens`` as to come."""
    kept = []
    rationales = prompts.tokenize(judge.tokenizer, [item.rationale for item in items])
    for item, ids, tail in zip(items, judge.render([item.prompt for item in items]), rationales, strict=True):
        item = replace(item, ids=ids, length=len(ids) + len(tail))
        why = judge.obstacle(item.prompt, item.length, new_tokens)
        if item.rationale and not why and (found := prompts.control_tokens(judge.tokenizer, [item.rationale])):
            why = f"its rationale holds the text {next(iter(found))!r}, which is a control token"
        if why and not skip:
            lower = "lower max_new_tokens, or " if new_tokens else ""
            raise UserError(
                f"{item.id}: {why}; {lower}leave such records out (--skip; data.on_error: skip in a recipe)"
            )
        if why:
            left_out.append({"where": item.id, "why": why})
        else:
            kept.append(item)
    if left_out:
        say(f"data: {len(left_out)} left out, first {left_out[0]['where']}: {left_out[0]['why']}")
    if not kept:
        raise UserError("no prompt is left to judge")
    say(f"data: {len(kept)} prompts on {len({item.question for item in kept})} questions")
    return kept


def judge_all(
    judge: Judge, items: Sequence[Item], settings: Sampling, out: Path, *, batch: int, rationales: str, say: Say
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The prediction of every item, in their order, and all that decides the numbers.

    Writes ``predictions.jsonl`` and ``settings.json`` in ``out``; what is there already, by the same settings, is
    gone on with. ``batch`` counts sequences; ``rationales``: "generated", "given" (those of the items) or "none".
    Raises UserError where ``out`` holds predictions by other settings, or another process writes there.
    """
    with locked(out, "--out"):
        return _judge_all(judge, items, settings, out, batch=batch, rationales=rationales, say=say)


def _judge_all(
    judge: Judge, items: Sequence[Item], settings: Sampling, out: Path, *, batch: int, rationales: str, say: Say
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    job = _job(judge, items, settings, batch, rationales)
    _claim(out, job)
    found = _predict(judge, items, settings, out / PREDICTIONS, batch=batch, rationales=rationales, say=say)
    records = [found[item.id] for item in items]
    replace_file(out / PREDICTIONS, "".join(map(line, records)))
    return records, job


def _job(judge: Judge, items: Sequence[Item], settings: Sampling, batch: int, rationales: str) -> dict[str, Any]:
    """Everything that decides the numbers."""
    data = hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()[:16]
    return {
        "rationales": rationales,
        "generate": asdict(sampling_of(settings)) if rationales == "generated" else None,
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
    """Refuse an ``out`` with predictions by other settings."""
    path, predictions, another = out / SETTINGS, out / PREDICTIONS, "give another --out"
    if predictions.exists() and predictions.stat().st_size:
        if not path.exists():
            raise UserError(f"{out} holds {PREDICTIONS} without the settings they were made with: {another}")
        try:
            other = list(differences(json.loads(path.read_text(encoding="utf-8")), job))
        except (ValueError, AttributeError):
            raise UserError(f"{path} is damaged: {another}") from None
        for key, was, now in other:
            raise UserError(f"{out} holds predictions with {key} = {was}, and these have {now}: {another}")
    replace_file(path, json.dumps(job, indent=2) + "\n")


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, before, now) of the settings that are not the same; one inside another is named alone."""
    for key, value in now.items():
        was = before.get(key)
        if isinstance(value, dict) and isinstance(was, dict):
            yield from differences(was, value)
        elif value != was:
            yield key, was, value


def line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a ``predictions.jsonl`` by id; one that a killed run left half written is the last, and left out."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.removesuffix("\n").split("\n") if text else []  # a rationale may hold what splitlines() splits at
    found = {}
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text)
            found[record["id"]] = record
        except (json.JSONDecodeError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"{path}:{number} is no prediction: remove the file and start again") from None
    return found


def _predict(
    judge: Judge, items: Sequence[Item], settings: Sampling, path: Path, *, batch: int, rationales: str, say: Say
) -> dict[str, dict[str, Any]]:
    """The prediction of every item by id. Those that ``path`` holds are taken; others are added to it, batchwise."""
    found = read_predictions(path)
    replace_file(path, "".join(map(line, found.values())))  # without a torn line
    # prompts of about the same length together, the longest first: what does not fit into memory shows at once; items
    # with one prompt one after another, so that it is computed once
    longest: dict[tuple[int, ...], int] = {}
    for item in items:
        longest[tuple(item.ids)] = max(item.length, longest.get(tuple(item.ids), 0))
    turn = {ids: (-length, number) for number, (ids, length) in enumerate(longest.items())}
    order = sorted(range(len(items)), key=lambda i: (*turn[tuple(items[i].ids)], i))
    step, at_once = judge.calls(batch, settings.n)
    plan = [[items[i] for i in order[at : at + step]] for at in range(0, len(order), step)]
    todo = [chosen for chosen in plan if not all(item.id in found for item in chosen)]
    done = len(items) - sum(map(len, todo))
    if done:
        say(f"{path} holds {done} of {len(items)} predictions: going on")

    def work(chosen: Sequence[Item]) -> list[Judgement]:
        ids = [item.ids for item in chosen]
        if rationales != "generated":
            return judge.given(ids, [item.rationale for item in chosen])
        return judge.judge([item.prompt for item in chosen], ids, settings, [item.first for item in chosen])

    begin, written, told = time.perf_counter(), 0, done
    with path.open("a", encoding="utf-8") as file:
        for chosen, judgements in as_done(work, todo, at_once):
            new = {item.id: prediction(item, j) for item, j in zip(chosen, judgements, strict=True)}
            file.write("".join(map(line, new.values())))
            file.flush()
            found |= new
            done += len(new)
            written += sum(d.tokens for j in judgements for d in j.draws)
            if done - told >= step * at_once or done == len(items):
                told = done
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


def draws(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The draws of a prediction: each with rationale, expected_score, decoded_score, score_mass, complete, tokens."""
    return record.get("draws", [record])

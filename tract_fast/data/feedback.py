"""Judgements from files and data sets: a prompt, a rationale and a score each, whatever the format they come in.

Formats, told apart by their fields:

- plain: ``prompt, rationale, score`` and, if wanted, ``weight, id, question``;
- Feedback Collection: ``output`` ("... So the overall score is 4. [RESULT] 4") with ``instruction`` (the whole prompt)
  or the ``orig_...`` parts that fill the template;
- benchmarks (Vicuna, MT-Bench, FLASK, Feedback Bench): ``instruction, gpt4_score, gpt4_feedback``, the last two lists;
  one example per pair.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tract_fast.data.prompt import PARTS, fill_template
from tract_fast.data.records import EXAMPLE, Record, Skipped, read_records
from tract_fast.errors import UserError

RESULT = re.compile(r"\[RESULT\][\s:]*(\S+)")
SENTENCE = r"\b(?i:so|therefore|thus|hence),? the overall score is"
# possessive: else the article of "is a 4" would count as a score until the 4 is written
SCORE_SENTENCE = re.compile(SENTENCE + r"\s+(?:an? )?+(\S+)")
VERDICT = re.compile(rf"So the overall|{SENTENCE}")
IN_RESULT, IN_SENTENCE = "[RESULT]", "the score sentence"
AROUND_SCORE = "()[]{}\"'*`.,;:!"  # what may stand around a score in a judge's output
PLAIN = ("prompt", "rationale", "score", "weight", "id", "question")
RESPONSE_HEADING = "###Response to evaluate"


@dataclass(frozen=True, slots=True)
class Example:
    """One judgement. ``score`` is a value of the scale, or a mean of annotators between two of them.

    ``where`` is its place in a file, for messages; ``rationale`` is empty when rationales are dropped. ``question`` is
    what a split must keep together; ``weight`` is relative to the other examples.
    """

    id: str
    prompt: str
    rationale: str
    score: float
    question: str
    weight: float = 1.0
    where: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Examples in file order, the records that are not among them and why, and facts worth telling."""

    examples: list[Example]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    questions: frozenset[str] = frozenset()
    """Of the examples and of records that lack nothing but a rationale: the same however rationales are read."""


class _Broken(ValueError):
    """What is wrong with one record."""

    question: str | None = None  # where nothing but the rationale is


def read_examples(
    source: str, *, labels: Sequence[str], values: Sequence[float], rationale: str, on_error: str
) -> Loaded:
    """Read ``source``: a .json, .jsonl or .parquet file, ``package:NAME/path``, or a hub data set ``name[:split]``.

    The rationale is the text before its verdict ("So the overall ...", "[RESULT]") with "keep", and with "optional" for
    those records that have one; with "drop" it is not needed and left empty. A record that is not JSON or UTF-8, lacks
    a field, has one twice or of another type, or whose score is not on the scale is broken: "fail" raises at the first,
    "skip" leaves it out and lists it.
    Raises UserError, too, when nothing can be read or no example is left.
    """
    scale = dict(zip(labels, map(float, values), strict=True))
    examples: list[Example] = []
    skipped: list[Skipped] = []
    ids: set[str] = set()
    questions: set[str] = set()
    unknown: Counter[str] = Counter()
    for record in read_records(source):
        unknown.update(_unknown_fields(record))
        for where, item in _convert(record, scale, rationale):
            if item.question is not None:
                questions.add(item.question)
            if isinstance(item, _Broken):
                skipped.append(Skipped(where, str(item)))
            elif item.id in ids:
                skipped.append(Skipped(where, f"its id {item.id!r} is that of a record before it"))
            else:
                ids.add(item.id)
                examples.append(item)
    if skipped and (on_error == "fail" or not examples):
        more = f" (and {len(skipped) - 1} more broken records)" if len(skipped) > 1 else ""
        way_out = "data.on_error: skip leaves such records out" if examples else "no record can be used"
        raise UserError(f"{skipped[0].where}: {skipped[0].why}{more}; {way_out}")
    if not examples:
        raise UserError(f"{source} has no records")
    notes = _notes(examples, scale, unknown)
    return Loaded(examples=examples, skipped=skipped, notes=notes, questions=frozenset(questions))


def split_by_question(
    examples: Sequence[Example], share: float, seed: int, questions: Collection[str] | None = None
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, whole questions on one side, at least one on each side when ``share`` > 0.

    Which questions are held out depends on ``questions`` (those of the examples, if None) and on ``seed``, not on their
    order in the file. A part of a file is split as all of it with ``Loaded.questions``. Raises UserError when ``share``
    is not in [0, 1) or there is only one question.
    """
    if not 0 <= share < 1:
        raise UserError(f"data.holdout = {share}: write a share of the questions from 0 to less than 1")
    questions = {e.question for e in examples} if questions is None else questions
    questions = sorted(questions, key=lambda q: hashlib.sha256(f"{seed} {q}".encode()).digest())
    if share == 0:
        return list(examples), []
    if len(questions) < 2:
        raise UserError(
            f"data.holdout = {share}: a split needs two questions, and all examples are on one; set it to 0"
        )
    count = min(max(1, round(share * len(questions))), len(questions) - 1)
    held = set(questions[:count])
    return [e for e in examples if e.question not in held], [e for e in examples if e.question in held]


def as_record(e: Example, labels: Mapping[float, str]) -> dict[str, Any]:
    """An example in the plain form. ``labels``: what is written for each value of the scale."""
    record = {"id": e.id, "question": e.question, "prompt": e.prompt, "rationale": e.rationale}
    return record | {"score": labels.get(e.score, e.score), "weight": e.weight}


def question_overlap(train: Sequence[Example], evaluation: Sequence[Example]) -> int:
    """How many questions are in both."""
    return len({e.question for e in train} & {e.question for e in evaluation})


def _convert(
    record: Record | Skipped, scale: dict[str, float], rationale: str
) -> Iterator[tuple[str, Example | _Broken]]:
    """(where, example) of all that one record holds; in place of an example, what is wrong with it."""
    if isinstance(record, Skipped):
        yield record.where, _Broken(record.why)
        return
    try:
        drafts = _drafts(record, scale, rationale)
    except _Broken as broken:
        yield record.where, broken
        return
    for where, fields in drafts:
        try:
            yield where, _example(where, fields, scale, rationale)
        except _Broken as broken:
            yield where, broken


def _drafts(record: Record, scale: dict[str, float], rationale: str) -> list[tuple[str, dict[str, Any]]]:
    """The record as plain ones: (where, fields). A field that is null counts as missing (tables fill gaps with it)."""
    fields = {key: value for key, value in record.fields.items() if value is not None}
    if "gpt4_score" in fields:
        return list(_benchmark(record.where, fields, scale, rationale))
    if "output" in fields and ("instruction" in fields or "orig_instruction" in fields):
        return [(record.where, _collection(fields, scale))]
    if "prompt" in fields:
        return [(record.where, fields)]
    names = ", ".join(list(map(str, fields))[:8]) or "none"
    raise _Broken(f"its fields ({names}) are of no known format: write {EXAMPLE}")


def _unknown_fields(record: Record | Skipped) -> list[str]:
    """Fields of a plain record that nothing reads: one may be a misspelt name."""
    if isinstance(record, Skipped) or "prompt" not in record.fields or "gpt4_score" in record.fields:
        return []
    return [str(name) for name in record.fields if name not in PLAIN]


def _benchmark(
    where: str, fields: dict[str, Any], scale: dict[str, float], rationale: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    scores = fields["gpt4_score"]
    if not isinstance(scores, list) or not scores:
        raise _Broken(f'the field "gpt4_score" is {scores!r:.40}, not a list of scores')
    ignored = rationale == "drop" or (rationale == "optional" and "gpt4_feedback" not in fields)
    feedbacks = [None] * len(scores) if ignored else fields.get("gpt4_feedback")
    if not isinstance(feedbacks, list) or len(feedbacks) != len(scores):
        broken = _Broken(
            f'the field "gpt4_feedback" must be a list of {len(scores)} texts, as many as gpt4_score has scores'
        )
        broken.question = _question(fields, _text(fields, "instruction"))
        raise broken
    for number, (score, feedback) in enumerate(zip(scores, feedbacks, strict=True), 1):
        # What a judge wrote is a label, even where the file has it as a number.
        score = _as_label(score) if _as_label(score) in scale else score
        draft = {"prompt": fields.get("instruction"), "rationale": feedback, "score": score}
        if "id" in fields:
            draft["id"] = f"{_name(fields, 'id')}#{number}"
        yield f"{where}#{number}", {k: v for k, v in draft.items() if v is not None} | _extras(fields)


def _collection(fields: dict[str, Any], scale: dict[str, float]) -> dict[str, Any]:
    output = _text(fields, "output")
    if "instruction" in fields:
        prompt = _text(fields, "instruction")
    else:
        prompt = fill_template({part: _text(fields, part) for part in PARTS})
    found = _scores_written(output, scale)
    if not found and (written := SCORE_SENTENCE.findall(output)):
        found = {IN_SENTENCE: written[-1].strip(AROUND_SCORE)}  # not on the scale, which is told below
    if not found:
        raise _Broken(f"output has no score: neither '[RESULT] n' nor 'So the overall score is n' ({output[-40:]!r})")
    if len(set(found.values())) > 1:
        raise _Broken("output has two scores: " + " and ".join(f"{v} in {k}" for k, v in found.items()))
    own = {"id": fields["id"]} if "id" in fields else {}
    return {"prompt": prompt, "rationale": output, "score": next(iter(found.values()))} | own | _extras(fields)


def _scores_written(output: str, labels: Collection[str]) -> dict[str, str]:
    """The last score in each of the two forms that judges write, by the form's name. "[RESULT]" may hold no label."""
    found = {}
    for name, pattern in ((IN_RESULT, RESULT), (IN_SENTENCE, SCORE_SENTENCE)):
        matches = pattern.findall(output)
        if matches:
            label = matches[-1] if matches[-1] in labels else matches[-1].strip(AROUND_SCORE)
            if label in labels or name == IN_RESULT:
                found[name] = label
    return found


def read_label(output: str, labels: Collection[str]) -> str | None:
    """The label that a judge's output ends with, in the score sentence or after "[RESULT]"; None where it has none."""
    found = _scores_written(output, labels)
    label = found.get(IN_SENTENCE, found.get(IN_RESULT))
    return label if label in labels else None


def _extras(fields: dict[str, Any]) -> dict[str, Any]:
    """What any record may carry."""
    return {name: fields[name] for name in ("weight", "question") if name in fields}


def _example(where: str, fields: dict[str, Any], scale: dict[str, float], rationale: str) -> Example:
    prompt = _text(fields, "prompt")
    question = _question(fields, prompt)
    weight = fields.get("weight", 1.0)
    if not _is_number(weight) or not weight > 0:
        raise _Broken(f"weight = {weight!r}: write a number above 0")
    name = _name(fields, "id") if "id" in fields else where
    score = _score(fields.get("score"), scale)
    try:
        text = _rationale(fields, rationale)
    except _Broken as broken:
        broken.question = question
        raise
    return Example(
        id=name,
        where=where,
        prompt=prompt,
        rationale=text,
        score=score,
        question=question,
        weight=float(weight),
    )


def _question(fields: dict[str, Any], prompt: str) -> str:
    if "question" in fields:
        return _name(fields, "question")
    return prompt.partition(RESPONSE_HEADING)[0].strip() or prompt


def _rationale(fields: dict[str, Any], mode: str) -> str:
    if mode == "drop" or (mode == "optional" and "rationale" not in fields):
        return ""
    if "rationale" not in fields:
        raise _Broken('the field "rationale" is missing (data.rationale: drop and evaluate do without)')
    text = cut_rationale(_text(fields, "rationale"))
    if not text:
        raise _Broken("the rationale is empty")
    return text


def has_score(text: str) -> bool:
    """Whether a judge's output reaches a score, on the scale or not: in the score sentence, or after "[RESULT]"."""
    return bool(SCORE_SENTENCE.search(text) or RESULT.search(text))


def cut_rationale(text: str) -> str:
    """The reasoning before the first verdict ("So the overall", "therefore, the overall score is"), else "[RESULT]"."""
    before, *verdict = VERDICT.split(text, maxsplit=1)
    return (before if verdict else text.partition("[RESULT]")[0]).strip()


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise _Broken(f'the field "{name}" is missing')
    text = fields[name]
    if not isinstance(text, str):
        raise _Broken(f'the field "{name}" is {text!r:.40}, not a text')
    if not text.strip():
        raise _Broken(f'the field "{name}" is empty')
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _Broken(f'the field "{name}" holds half a character ({text[error.start]!r})') from None
    return text


def _name(fields: dict[str, Any], name: str) -> str:
    """An id or a question: a text, or a whole number."""
    value = fields[name]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(fields, name)


def _score(raw: Any, scale: dict[str, float]) -> float:
    """The value of a label, a value itself, or a number between two values."""
    if raw is None:
        raise _Broken('the field "score" is missing')
    ends = min(scale.values()), max(scale.values())
    if isinstance(raw, str) and raw.strip() in scale:
        return scale[raw.strip()]
    if _is_number(raw) and ends[0] <= raw <= ends[1]:
        if scale.get(_as_label(raw), raw) != raw:
            raise _Broken(f'score = {raw} is a label and another label\'s value: write the label as a text, "{raw}"')
        return float(raw)
    raise _Broken(
        f"score = {raw!r:.40} is not on the scale: write one of the labels {', '.join(scale)} as a text, or a number "
        f"from {ends[0]:g} to {ends[1]:g} (score.labels, score.values)"
    )


def _as_label(raw: Any) -> Any:
    """A whole number as the label it may be: tables hold 4 as 4.0."""
    return str(int(raw)) if _is_number(raw) and raw == int(raw) else raw


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _notes(examples: list[Example], scale: dict[str, float], unknown: Counter[str]) -> list[str]:
    notes = []
    between = sum(e.score not in scale.values() for e in examples)
    if between:
        notes.append(
            f"{between} of {len(examples)} scores lie between two labels: the squared error takes them as they are, "
            "the text has the nearest label"
        )
    if unknown:
        names = ", ".join(f"{name} ({count})" for name, count in unknown.most_common(8))
        notes.append(f"fields that nothing reads: {names}; those that are read are {', '.join(PLAIN)}")
    return notes

"""``tract-fast score``: JSON Lines in, a judgement a line out, as they come.

A line has ``prompt`` (or ``instruction``), or the parts of the judge's prompt template; ``id`` is handed on. Lines are
judged ``batch`` sequences at a time and answered in their order; one that cannot be judged is answered with ``error``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import IO, Any

from tract_fast.data.records import Record, Skipped, parse_lines
from tract_fast.errors import UserError
from tract_fast.judge import Judge, Judgement, prompts_at_once
from tract_fast.recipe import Sampling

WHOLE_PROMPT = ("prompt", "instruction")


def run(judge: Judge, lines: Iterable[bytes], name: str, out: IO[str], settings: Sampling, batch: int) -> int:
    """Judge every line and write the answers to ``out``; returns how many could not be judged."""
    failed = 0
    records_left, step = parse_lines(lines, name), prompts_at_once(batch, settings.n)
    while records := list(islice(records_left, step)):
        for answer in answers(judge, records, settings):
            failed += "error" in answer
            out.write(json.dumps(answer, allow_nan=False) + "\n")  # ASCII: an id may hold half a character
        out.flush()
    return failed


def answers(judge: Judge, records: Sequence[Record | Skipped], settings: Sampling) -> Iterator[dict[str, Any]]:
    """One answer per record, in order; those that can be judged go through the model together."""
    read = [_read(judge, record, settings) for record in records]
    good = [r for r in read if not isinstance(r, UserError)]
    found = iter(judge.judge(*zip(*good, strict=True), settings) if good else [])
    for record, prompt in zip(records, read, strict=True):
        yield _name(record) | ({"error": str(prompt)} if isinstance(prompt, UserError) else _answer(next(found)))


def _read(judge: Judge, record: Record | Skipped, settings: Sampling) -> tuple[str, list[int]] | UserError:
    """The prompt that a record holds and its tokens, or what is wrong with it."""
    if isinstance(record, Skipped):
        return UserError(record.why)
    whole = [record.fields[name] for name in WHOLE_PROMPT if record.fields.get(name) is not None]
    try:
        text = whole[0] if whole else judge.prompt(**record.fields)
        if not isinstance(text, str):
            raise UserError(f"the prompt is {text!r:.40}, not a text")
        (ids,) = judge.render([text])
        if why := judge.trap(text) or judge.obstacle(text, len(ids), judge.new_tokens(settings)):
            raise UserError(why)
    except UserError as error:
        return error
    return text, ids


def _name(record: Record | Skipped) -> dict[str, Any]:
    """A record's id as it came, or its line where it has none that JSON can hold."""
    with contextlib.suppress(ValueError):  # infinity
        if isinstance(record, Record) and "id" in record.fields:
            json.dumps(record.fields["id"], allow_nan=False)
            return {"id": record.fields["id"]}
    return {"line": int(record.where.rpartition(":")[2])}


def _answer(judgement: Judgement) -> dict[str, Any]:
    fields = asdict(judgement)
    draws = fields.pop("draws")
    return fields | ({"draws": draws} if len(draws) > 1 else {"complete": draws[0]["complete"]})

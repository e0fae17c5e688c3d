"""``tract.json``, which makes a folder with a model a judge: what its scores are and where they are read.

``export`` writes it (``checkpoint.describe``). It may come from a stranger: every field is checked, none is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tract_fast.data import prompt as prompts
from tract_fast.data.scores import SENTENCE, ScoreScale
from tract_fast.errors import UserError
from tract_fast.model import DTYPES
from tract_fast.recipe import Score

DESCRIPTION = "tract.json"
FORMAT = 1
OF_A_RUN = ("checkpoints", "left_out.jsonl", "steps.json")


@dataclass(frozen=True)
class Description:
    """What ``tract.json`` says; the defaults are for a model that is no judge yet."""

    labels: tuple[str, ...] = Score.labels
    values: tuple[float, ...] = Score.values
    token_ids: tuple[int, ...] | None = None
    prefix_ids: tuple[int, ...] | None = None
    normalize: str = "scores"
    rationale: str = "keep"
    chat_template_kwargs: Mapping[str, Any] | None = None
    prompt_template: str | None = None
    base_model: str | None = None
    dtype: str = "bfloat16"


def judge_folder(path: str) -> Path | None:
    """The folder with ``tract.json`` that ``path`` means: itself, or what ``export`` put into it; None without one.

    Raises UserError where the path is that of a run.
    """
    folder = Path(path).expanduser()
    for place in (folder, folder / "merged", folder / "judge", folder / "judge" / "merged"):
        if (place / DESCRIPTION).is_file():
            return place
    if any((folder / name).exists() for name in OF_A_RUN):
        raise UserError(f"{path} is a run without a judge: tract-fast export {path} writes it, once a step is saved")
    return None


def read_description(path: Path) -> Description:
    """A judge's ``tract.json``. Raises UserError where a field is missing, of another type, or of another version."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}, which this version reads: export the judge again")
    kinds = {  # type, and that of the members of a list
        "labels": (list, str),
        "values": (list, int | float),
        "token_ids": (list, int),
        "prefix_ids": (list, int),
        "normalize": (str, None),
        "rationale": (str, None),
        "chat_template_kwargs": (dict, None),
        "prompt_template": (str | None, None),
        "base_model": (str, None),
        "dtype": (str, None),
    }
    for name, (kind, member) in kinds.items():
        value = fields.get(name, ...)
        if not isinstance(value, kind) or (member and not all(isinstance(x, member) for x in value)):
            raise UserError(f"{path}: {name} is missing or not of its type: export the judge again")
    choices = {
        "normalize": ("scores", "vocab"),
        "rationale": ("keep", "drop"),
        "dtype": tuple(DTYPES),
        "score_sentence": (SENTENCE,),
    }
    for name, allowed in choices.items():
        if fields.get(name) not in allowed:
            raise UserError(f"{path}: {name} = {fields.get(name)!r}: must be {' or '.join(map(repr, allowed))}")
    template = fields["prompt_template"]
    if template is not None and template != prompts.TEMPLATE:
        raise UserError(f"{path}: prompt_template is none that this version fills: write null and give whole prompts")
    return Description(**{name: tuple(fields[name]) if kinds[name][0] is list else fields[name] for name in kinds})


def check_tokens(path: Path, about: Description, scale: ScoreScale) -> None:
    """Hold the tokens that ``tract.json`` names against those found with the tokenizer beside it."""
    for name in ("token_ids", "prefix_ids"):
        named, found = getattr(about, name), getattr(scale, name)
        if named != found:
            raise UserError(f"{path}: {name} = {list(named)}, but the tokenizer beside it gives {list(found)}")

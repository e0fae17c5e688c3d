"""Judges for tests: a random one, and a run that has learnt to write in the form that judges write in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_lm
from tests.tiny_runs import tiny_recipe
from tract_fast import checkpoint, train
from tract_fast.data.scores import find_scale
from tract_fast.description import Description
from tract_fast.judge import Judge


def random_judge(family: str = "llama", attention: str = "eager", **about) -> Judge:
    tokenizer = tiny_tokenizer()
    found = replace(Description(), **about)
    scale = find_scale(tokenizer, found.labels, found.values, rationale=found.rationale)
    lm = tiny_lm(family, vocabulary=len(tokenizer) + 3)
    lm.set_attn_implementation(attention)
    return Judge(lm, tokenizer, scale, found)


def trained_run(folder: Path) -> Path:
    """A run of a tiny model that has learnt to end its rationales with the score sentence, exported."""
    recipe = tiny_recipe(folder, train__max_steps=90, train__lr=1e-2, train__batch=8, data__holdout=0.25)
    assert train.run(recipe) == 0
    checkpoint.export(Path(recipe.run.dir))
    return Path(recipe.run.dir)

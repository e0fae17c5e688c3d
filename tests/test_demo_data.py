"""The demo's data and recipe: what they claim of themselves."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from recipes import make_demo_data
from tract_fast import demo, recipe as recipes
from tract_fast.data.feedback import Example, read_examples, split_by_question

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tract_fast" / "data" / "demo.jsonl"
TONES = list(make_demo_data.CLOSINGS)


@pytest.fixture(scope="module")
def recipe() -> recipes.Recipe:
    return recipes.load(demo.recipe_file(), [])


@pytest.fixture(scope="module")
def examples(recipe: recipes.Recipe) -> list[Example]:
    """As a run reads them, by the recipe's own name for the file."""
    score = recipe.score
    loaded = read_examples(
        recipe.data.train, labels=score.labels, values=score.values, rationale="keep", on_error="fail"
    )
    return loaded.examples


def generator(*arguments: str | Path) -> int:
    command = [sys.executable, ROOT / "recipes" / "make_demo_data.py", *arguments]
    return subprocess.run(command, check=False, capture_output=True).returncode


def test_file_is_what_the_generator_writes(tmp_path: Path):
    assert generator(DATA, "--check") == 0
    copy = tmp_path / "demo.jsonl"
    assert generator(copy) == 0 and copy.read_bytes() == DATA.read_bytes()
    copy.write_bytes(DATA.read_bytes().replace(b"depot in Leeds", b"depot in York", 1))
    assert generator(copy, "--check") == 1


def test_scores_are_balanced_on_both_sides_of_the_split(recipe: recipes.Recipe, examples: list[Example]):
    train, held_out = split_by_question(examples, recipe.data.holdout, recipe.train.seed)
    assert len(train) >= 240 and len(held_out) >= 48
    for side in (train, held_out):
        assert len(set(Counter(e.score for e in side).values())) == 1
    assert not {e.question for e in train} & {e.question for e in held_out}
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}


def test_ids_and_prompts_are_distinct(examples: list[Example]):
    assert len({e.id for e in examples}) == len({e.prompt for e in examples}) == len(examples)


def test_score_follows_from_the_rationale_and_the_rationale_from_the_reply(examples: list[Example]):
    for e in examples:
        reply = e.prompt.split("\nShop: ")[1].split("\n")[0]
        _, closing, end = e.rationale.split('"')
        assert reply.rstrip(".").endswith(closing)
        assert end == f" are {TONES[int(e.score) - 1]}."


def test_a_closing_has_one_tone():
    everything = [closing for closings in make_demo_data.CLOSINGS.values() for closing in closings]
    assert len(set(everything)) == len(everything)


def test_recipe_is_found_beside_an_installed_package_and_in_a_checkout():
    assert demo.recipe_file().is_file()
    assert demo.recipe_file().read_bytes() == (ROOT / "recipes" / "demo.yaml").read_bytes()

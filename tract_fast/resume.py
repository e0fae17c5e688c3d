"""Where a run goes on from, and what it may change then: settings that leave its result as it is but to rounding."""

from __future__ import annotations

from pathlib import Path

from tract_fast import checkpoint, recipe as recipes
from tract_fast.errors import UserError
from tract_fast.recipe import Recipe

# where and how long a run goes; changed without a word
FREE = (
    "train.max_steps",
    "train.epochs",
    "checkpoint.",
    "shard.",
    "generate.",
    "stage2.",
    "evaluate.",
    "run.",
)
# how the same numbers are computed (see ``obstacle``); told where a run goes on
SAME_RESULT = (
    "train.max_tokens",
    "train.activation_checkpointing",
    "train.compile",
    "train.trackers",
    "loss.implementation",
    "loss.proposal",  # other draws of the same gradient
    "model.attention",
    "model.liger",
    "model.lean",
)


def resume_point(recipe: Recipe) -> Path | None:
    """The checkpoint to go on from, or None. Raises UserError where it belongs to another recipe."""
    run_dir = Path(recipe.run.dir)
    found = checkpoint.latest(run_dir)
    if found is None:
        return None
    if recipe.run.resume == "never":
        raise UserError(f"run.resume = never, and run.dir = {run_dir} holds {found.name}: choose another run.dir")
    odd = refused(recipes.load(run_dir / "recipe.yaml", []), recipe)
    if odd:
        details = "; ".join(odd)
        raise UserError(f"run.dir = {run_dir} holds {found.name} of another recipe ({details}): choose another run.dir")
    done, steps = checkpoint.progress(found).step, recipe.train.max_steps
    if steps is not None and steps < done:
        raise UserError(f"train.max_steps = {steps}: run.dir = {run_dir} has {done} steps; write {done} or more")
    return found


def refused(before: Recipe, now: Recipe) -> list[str]:
    """What differs and would give another result than the run that was begun, a phrase each."""
    return [
        f"{told}{f', and {why}' if why else ''}"
        for key, told in differences(before, now).items()
        if (why := obstacle(key, before, now)) is not None
    ]


def announced(before: Recipe, now: Recipe) -> list[str]:
    """What differs, gives the same result to rounding and is told, a phrase each."""
    return [
        told
        for key, told in differences(before, now).items()
        if key in SAME_RESULT and obstacle(key, before, now) is None
    ]


def differences(before: Recipe, now: Recipe) -> dict[str, str]:
    """Settings that differ, each with a phrase that says how."""
    old, new = (recipes.flatten(recipes.as_dict(recipe)) for recipe in (before, now))
    return {key: f"{key} was {old[key]}, is {new[key]}" for key in new if old[key] != new[key]}


def obstacle(key: str, before: Recipe, now: Recipe) -> str | None:
    """Why a run cannot go on with another value of a setting ("": it is part of what is computed); None: it can.

    Dropout that a model has by itself is not looked for here: it draws other numbers then, as it does with another
    number of ranks.
    """
    dropout = bool(now.lora.rank and now.lora.dropout)
    if key == "train.max_tokens" and now.loss.gradient == "sampled":
        return "a sampled gradient is drawn by micro-batch"  # its seeds are numbered by their calls
    if key == "train.max_tokens" and dropout:
        return "dropout is drawn by micro-batch"
    if key == "train.compile" and dropout:
        return "compiled dropout draws other numbers"
    if key == "model.attention" and any(r.model.attention.startswith("flash_attention") for r in (before, now)):
        return "flash_attention shares no prompts, which changes the order of the data"
    return None if key in SAME_RESULT or key.startswith(FREE) else ""

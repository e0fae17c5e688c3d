"""Whether a run shares prompts, why not if not, and what it saves.

Sharing is exact where a token's hidden state depends on the tokens before it and its position alone; what breaks that
is named here. Which tokens are shared is decided in ``data/tree.py``, which sequences meet in ``data/batch.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tract_fast.attention import DOCUMENTS, VARLEN
from tract_fast.data import batch as batches
from tract_fast.data.prompt import Encoded
from tract_fast.data.tree import Share
from tract_fast.recipe import Recipe
from tract_fast.sections import Train

PLANNED_STEPS = 200  # at most so many steps of the first epoch are planned to tell the saving
DROPOUT = ("dropout", "pdrop", "dropout_rate", "dropout_prob", "layerdrop")  # how configurations' names of it end


@dataclass(frozen=True)
class Sharing:
    """What a run shares."""

    line: str
    """To print: what is saved, or why nothing is."""
    share: Share | None = None
    groups: np.ndarray | None = None
    """(examples,) int64, the prompt group of each training example; None where nothing is shared."""


def choose_sharing(recipe: Recipe, config, attention_name: str, examples: Sequence[Encoded], world: int) -> Sharing:
    """What this run shares. Whole prompts wherever that is exact; heads of prompts with one variable-length call alone:
    what follows a head takes attention with a mask from SDPA, which costs more than the head does (measured: see
    ``docs/shared-prompts.md``)."""
    why = "data.share_prompts" if recipe.data.share_prompts == "off" else obstacle(recipe, config, attention_name)
    if why:
        return Sharing(f"shared prompts: off ({why})")
    share: Share = "heads" if attention_name == VARLEN else "prompts"
    groups = batches.prompt_groups(examples)
    logical, computed = epoch_tokens(recipe.train, examples, groups, share, world)
    if computed == logical:
        return Sharing("shared prompts: off (no two sequences of a micro-batch have a beginning to share)")
    prompts = groups.max() + 1
    by_prompt = "; shuffled by prompt" if recipe.train.shuffle and prompts < len(examples) else ""
    line = (
        f"shared prompts: tokens {count(logical)} -> {count(computed)} an epoch, {logical / computed:.2f}x fewer; "
        f"{prompts} prompts of {len(examples)} examples{by_prompt}"
    )
    return Sharing(line, share, groups)


def obstacle(recipe: Recipe, config, attention_name: str) -> str | None:
    """What makes sharing inexact or impossible for this model and recipe, if anything. ``load_config`` has refused
    layers that attend in chunks or keep a state, which no packing suits."""
    if attention_name not in (VARLEN, DOCUMENTS):
        return f"model.attention = {attention_name} takes no keys but those of its own tokens"
    if recipe.lora.rank and recipe.lora.dropout:
        return f"lora.dropout = {recipe.lora.dropout}: all rationales of a prompt would share its mask"
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if name.endswith(DROPOUT) and not name.startswith("classifier") and isinstance(value, float) and value > 0:
            return f"the model has {name} = {value}: all rationales of a prompt would share its mask"
        if name.startswith(("mamba_", "ssm_")) or name == "state_size":
            return f"the model has {name}: its layers keep a state, which only the last token before has"
    if getattr(text, "output_router_logits", False):
        return "the model's auxiliary loss counts tokens: output_router_logits is true"
    kinds = set(_rope_types(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}))
    if odd := kinds & {"dynamic", "longrope"}:
        return f"the model's RoPE is {odd.pop()}: its angles depend on what else is in the micro-batch"
    return None


def _rope_types(parameters: dict) -> Iterator[str]:
    """Of one kind of layers, or of each (Gemma 3)."""
    for key, value in parameters.items():
        if isinstance(value, dict):
            yield from _rope_types(value)
        elif key in ("rope_type", "type"):
            yield value


def plan_step(
    train: Train, examples: Sequence[Encoded], groups: np.ndarray | None, step: int, world: int
) -> tuple[list[Encoded], list[list[list[int]]]]:
    """``batches.plan_step`` as a recipe's section says."""
    return batches.plan_step(
        examples,
        batch=train.batch,
        max_tokens=train.max_tokens,
        seed=train.seed,
        step=step,
        shuffle=train.shuffle,
        world=world,
        groups=groups,
    )


def epoch_tokens(
    train: Train, examples: Sequence[Encoded], groups: np.ndarray, share: Share, world: int
) -> tuple[int, int]:
    """Tokens of an epoch: (with each prompt counted for each of its sequences, computed), from its first steps."""
    steps = batches.steps_per_epoch(len(examples), train.batch)
    logical = computed = 0
    for step in range(min(steps, PLANNED_STEPS)):
        members, packed = plan_step(train, examples, groups, step, world)
        logical += sum(len(e.ids) for e in members)
        computed += sum(
            batches.layout_of([members[i] for i in micro], share=share).tokens for rank in packed for micro in rank
        )
    whole = sum(len(e.ids) for e in examples)
    return whole, round(computed * whole / logical)


def count(tokens: int) -> str:
    """``412345`` -> ``412k``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= 10 * size:
            return f"{tokens / size:.0f}{unit}"
    return str(tokens)

"""Whether a run shares prompts, why not if not, and what it saves.

Sharing is exact where a token's hidden state depends on the tokens before it and its position alone; what breaks that
is named here. Which tokens are shared is decided in ``data/tree.py``, which sequences meet in ``data/batch.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tract_fast.attention import VARLEN
from tract_fast.data import batch as batches
from tract_fast.data.prompt import Encoded
from tract_fast.data.tree import Share
from tract_fast.recipe import Recipe
from tract_fast.sections import Train

PLANNED_STEPS = 200  # at most so many steps of the first epoch are planned to tell the saving
# how configurations' names end of what is drawn at random in training
DRAWN = ("dropout", "pdrop", "dropout_rate", "dropout_prob", "layerdrop", "jitter_noise", "jitter_eps")


@dataclass(frozen=True)
class Sharing:
    """What a run shares."""

    line: str
    """To print: what is saved, or why nothing is."""
    share: Share | None = None
    groups: batches.Groups | None = None
    """The prompts of the training examples, by which those are shuffled; None: they are shuffled one by one."""


def choose_sharing(recipe: Recipe, config, attention_name: str, examples: Sequence[Encoded], world: int) -> Sharing:
    """What this run shares. Whole prompts wherever that is exact; heads of prompts with one variable-length call alone:
    what follows a head takes attention with a mask from SDPA, which costs more than the head does (measured: see
    ``docs/shared-prompts.md``)."""
    why = "data.share_prompts" if recipe.data.share_prompts == "off" else obstacle(recipe, config)
    if why:
        return Sharing(f"shared prompts: off ({why})")
    share: Share = "heads" if attention_name == VARLEN else "prompts"
    groups = batches.prompt_groups(examples)
    by_prompt = "; shuffled by prompt" if recipe.train.shuffle and len(groups) < len(examples) else ""
    logical, computed = epoch_tokens(recipe.train, examples, Sharing("", share, groups), world)
    if computed == logical:
        nothing = "no two sequences of a micro-batch have a beginning to share"
        return Sharing(f"shared prompts: off ({nothing}){by_prompt}", None, groups)
    line = (
        f"shared prompts: tokens {count(logical)} -> {count(computed)} an epoch, {logical / computed:.2f}x fewer; "
        f"{len(groups)} prompts of {len(examples)} examples{by_prompt}"
    )
    return Sharing(line, share, groups)


def obstacle(recipe: Recipe, config) -> str | None:
    """What makes sharing inexact or impossible for this model and recipe, if anything.

    It decides the order of the data, which must not change where a run goes on: it knows neither the machine nor the
    number of ranks. ``load_config`` has refused layers that attend in chunks or keep a state, which no packing suits;
    a model that draws random numbers under another name is found by ``selfcheck.packing``.
    """
    if recipe.model.attention.startswith("flash_attention"):
        return f"model.attention = {recipe.model.attention} takes no keys but those of its own tokens"
    if recipe.lora.rank and recipe.lora.dropout:
        return f"lora.dropout = {recipe.lora.dropout}: all rationales of a prompt would share its mask"
    text = config.get_text_config()
    if text.model_type == "phimoe":
        return "phimoe draws its experts at random in training: all rationales of a prompt would share the draw"
    for name, value in _settings(text.to_dict()):
        if name.endswith(DRAWN) and not name.startswith("classifier") and isinstance(value, float) and value > 0:
            return f"the model has {name} = {value}: all rationales of a prompt would share what it draws"
        if name.startswith(("mamba_", "ssm_")) or name == "state_size":
            return f"the model has {name}: its layers keep a state, which only the last token before has"
        if name == "rope_type" and value in ("dynamic", "longrope"):
            return f"the model's RoPE is {value}: its angles depend on what else is in the micro-batch"
    if getattr(text, "output_router_logits", False):
        return "the model's auxiliary loss counts tokens: output_router_logits is true"
    return None


def _settings(config: dict) -> Iterator[tuple[str, object]]:
    """Names and values of a configuration and of the parts inside it."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _settings(value)
        else:
            yield str(name), value


def plan_step(
    train: Train, examples: Sequence[Encoded], sharing: Sharing, step: int, world: int
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
        groups=sharing.groups,
        share=sharing.share,
    )


def epoch_tokens(train: Train, examples: Sequence[Encoded], sharing: Sharing, world: int) -> tuple[int, int]:
    """Tokens of an epoch: (with each prompt counted for each of its sequences, computed), from its first steps."""
    steps = batches.steps_per_epoch(len(examples), train.batch)
    logical = computed = 0
    for step in range(min(steps, PLANNED_STEPS)):
        members, packed = plan_step(train, examples, sharing, step, world)
        logical += sum(len(e.ids) for e in members)
        parts = ([members[i] for i in micro] for rank in packed for micro in rank)
        computed += sum(batches.layout_of(part, share=sharing.share).tokens for part in parts)
    whole = sum(len(e.ids) for e in examples)
    return whole, round(computed * whole / logical)


def count(tokens: int) -> str:
    """``412345`` -> ``412k``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= 10 * size:
            return f"{tokens / size:.0f}{unit}"
    return str(tokens)

"""What fits: a GPU's memory, and the largest micro-batch that it holds."""

from __future__ import annotations

from dataclasses import replace

import torch

from tract_fast import estimate
from tract_fast.estimate import Memory, Target
from tract_fast.prepare import Prepared
from tract_fast.recipe import Recipe

MULTIPLE = 256  # tokens that train.max_tokens is rounded down to


def room(target: Target) -> int | None:
    """Bytes of memory of one GPU; None where that is not known."""
    if target.device.type == "cuda" and target.here:
        return torch.cuda.get_device_properties(target.device).total_memory
    return int(target.gpu.memory) if target.gpu and target.gpu.memory else None


def largest(recipe: Recipe, data: Prepared, target: Target, limit: int, found: Memory) -> tuple[int | None, bool]:
    """(the largest train.max_tokens whose memory is at most ``limit``, whether a step has no more tokens than that).

    A multiple of MULTIPLE, or the longest example; None where that does not fit. ``found``: memory as the recipe is.
    """
    longest = longest_of(data)

    def fits(tokens: int) -> bool:
        if tokens == recipe.train.max_tokens:
            return found.total <= limit
        return estimate.needed(with_tokens(recipe, tokens), data, target).total <= limit

    low, high = -(-longest // MULTIPLE), -(-most_tokens(recipe, data, target) // MULTIPLE)
    high = max(low, high)
    if fits(high * MULTIPLE):
        return high * MULTIPLE, True
    if not fits(low * MULTIPLE):
        return (longest if fits(longest) else None), False
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * MULTIPLE) else (low, middle)
    return low * MULTIPLE, False


def most_tokens(recipe: Recipe, data: Prepared, target: Target) -> int:
    """Tokens of the fullest step of a rank, what is shared counted each time: with as many in a micro-batch, each rank
    has one."""
    whole = replace(recipe, train=replace(recipe.train, max_tokens=sum(len(e.ids) for e in data.train)))
    step = estimate.plan(whole, data.train, target.world, estimate.sharing_of(whole, data, target))
    return max(sum(len(e.ids) for e in micro.examples) for ranks in step.packed for rank in ranks for micro in rank)


def between(recipe: Recipe, data: Prepared, target: Target, limit: int, now: int, least: int) -> int:
    """A train.max_tokens that fits where that of the recipe, which takes ``now`` bytes, does not: found by one step
    traced instead of ``largest``'s many, on the line to the longest example, by itself, with ``least`` bytes. The
    longest example's length where nothing above it is known to fit."""
    longest, most = longest_of(data), recipe.train.max_tokens
    if not least <= limit < now:
        return longest
    tokens = int(longest + (most - longest) * (limit - least) / (now - least)) // MULTIPLE * MULTIPLE
    fits = tokens > longest and estimate.needed(with_tokens(recipe, tokens), data, target).total <= limit
    return tokens if fits else longest


def longest_of(data: Prepared) -> int:
    """Tokens of the longest example, held out or not: what train.max_tokens is at least."""
    return max(len(e.ids) for e in [*data.train, *data.held_out])


def with_tokens(recipe: Recipe, tokens: int) -> Recipe:
    """``recipe`` with another train.max_tokens."""
    return replace(recipe, train=replace(recipe.train, max_tokens=tokens))

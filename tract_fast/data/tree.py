"""Sequences that begin alike, laid out so that what they share is there once.

The sequences of a micro-batch form a tree: a path from the root to a leaf is one sequence, a node (segment) is a run of
tokens that all sequences below it have in the same places. Each segment is laid out once; its tokens attend to the
tokens of the segments above it and, causally, to its own. With several rationales after one prompt the prompt is a
segment and so is each rationale; with prompts from one template their common head is one as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Share = Literal["prompts", "heads"]  # whole prompts alone, or parts of them, too
PAYS = 16  # a head is shared if it is at least one part in so many of the longest sequence below it


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each sequence are. Legend: T tokens laid out, L of a sequence."""

    segments: list[tuple[int, int, int]]
    """In order of their tokens: (sequence, start, end), the tokens ``start`` to ``end`` of that sequence."""
    places: list[np.ndarray]
    """(L,) int64 of each sequence: the places of its tokens among the T."""

    @property
    def tokens(self) -> int:
        """T, the tokens that are computed."""
        return sum(end - start for _, start, end in self.segments)

    @property
    def shares(self) -> bool:
        """Whether any token serves two sequences."""
        return self.tokens < sum(map(len, self.places))

    def keys(self) -> list[np.ndarray]:
        """Of each segment the places of its keys: all that comes before it in its sequences, then its own."""
        return [self.places[i][:end] for i, _, end in self.segments]


def lay_out(sequences: Sequence[np.ndarray], prompt_lens: Sequence[int], share: Share | None) -> Layout:
    """The layout of ``sequences``, (L,) integers each; ``share`` None: nothing is shared.

    A whole prompt that two sequences have is always shared, and with it what they have in common after it. A part of
    one is with "heads", where it is at least 1/PAYS of the longest sequence that has it.
    """
    places = [np.empty(len(s), dtype=np.int64) for s in sequences]
    segments: list[tuple[int, int, int]] = []
    every = list(range(len(sequences)))
    tokens = 0
    together = [every] if share and every else [[i] for i in reversed(every)]
    todo = [(members, 0) for members in together]
    while todo:
        members, start = todo.pop()  # the first ``start`` tokens of all of them are laid out
        end = _common_prefix([sequences[i] for i in members])
        alone = len(members) == 1
        if alone or _pays(members, start, end, sequences, prompt_lens, share):
            for i in members:
                places[i][start:end] = np.arange(tokens, tokens + end - start)
            segments.append((members[0], start, end))
            tokens += end - start
            members, start = [i for i in members if len(sequences[i]) > end], end
        parts: dict[tuple[int, int], list[int]] = {}  # by the token at which they part; one that ends there is alone
        for i in members:
            over = len(sequences[i]) == end
            parts.setdefault((-1, i) if over else (int(sequences[i][end]), -1), []).append(i)
        todo += [(part, start) for part in reversed(parts.values())]
    return Layout(segments, places)


def _pays(
    members: list[int],
    start: int,
    end: int,
    sequences: Sequence[np.ndarray],
    prompt_lens: Sequence[int],
    share: Share,
) -> bool:
    whole_prompt = end >= min(prompt_lens[i] for i in members)
    long = share == "heads" and PAYS * (end - start) >= max(len(sequences[i]) for i in members)
    return end > start and (whole_prompt or long)


def _common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """How many tokens at the start all of them have."""
    first = sequences[0]
    end = min(map(len, sequences))
    for other in sequences[1:]:
        differ = first[:end] != other[:end]
        end = int(differ.argmax()) if differ.any() else end
    return end

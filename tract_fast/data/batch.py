"""Which sequences form step s, how they are packed, and what a micro-batch holds.

The plan of a step is a pure function of (lengths, seed, step, world): every rank computes the plan of all ranks, so the
global token and sequence counts are known without communication, and resuming is arithmetic. A batch is counted in
sequences (the unit of the paper's batch size); its sequences are packed, without padding, into micro-batches of at most
``max_tokens`` tokens. With shared prompts (``groups`` given) sequences that have the same prompt stay together and the
prompt is there once a micro-batch (``data/tree.py``).

Shapes: T tokens of a micro-batch, S its sequences, A its segments (runs of tokens that attend together; without shared
prompts the sequences), K their keys, N its rows (positions whose next token is trained on).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tract_fast.data.prompt import Encoded
from tract_fast.data.tree import Layout, Share, lay_out
from tract_fast.errors import UserError

IGNORE = -100
KEYS = 4  # times max_tokens: the most keys of a micro-batch with shared prompts


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """How the sums of one optimizer step become a mean; the counts are of the whole step, over all ranks."""

    ce_weight: float
    regression_weight: float
    per_sequence: bool  # ce_reduction "sequence": mean over sequences of the mean over each sequence's trained tokens
    weighted_tokens: float  # sum over sequences of weight * trained tokens
    weighted_sequences: float  # sum over sequences of weight


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed micro-batch. Query and key lengths are separate because shared prompts make them differ."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, from 0 in every sequence
    cu_seq_lens_q: Tensor  # (A + 1,) int32, cumulative query lengths
    cu_seq_lens_k: Tensor  # (A + 1,) int32, cumulative key lengths
    max_length_q: int
    max_length_k: int
    key_index: Tensor | None  # (K,) int64, index into T of each segment's keys in turn; None: its own tokens
    rows: Tensor  # (N,) int64, index into T; the end of a shared prompt is there once per rationale
    labels: Tensor  # (N,) int64, -100 = no CE
    row_weights: Tensor  # (N,) float32
    score_rows: Tensor  # (S,) int64, index into N
    score_targets: Tensor  # (S,) float32
    score_weights: Tensor  # (S,) float32

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``; from pinned memory, since other copies to CUDA wait."""
        batch = self.pinned() if device.type == "cuda" else self
        return batch._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in host memory that CUDA reads by itself; of one that is there already, itself."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}
        return replace(self, **{name: change(v) for name, v in tensors.items()})


def steps_per_epoch(n: int, batch: int) -> int:
    """Optimizer steps in one pass over ``n`` sequences; the last one may be smaller."""
    return math.ceil(n / batch)


def total_steps(n: int, *, batch: int, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a run: ``max_steps`` if given (over as many epochs as it takes), else those of ``epochs``."""
    return epochs * steps_per_epoch(n, batch) if max_steps is None else max_steps


@dataclass(frozen=True)
class Groups:
    """Examples by prompt."""

    of: np.ndarray
    """(n,) int64, the group of each example; groups are numbered by first appearance."""
    members: np.ndarray
    """(n,) int64, the examples of group 0, then those of group 1, ..., in their order."""
    ends: np.ndarray
    """(groups,) int64, where each group ends in ``members``."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, group: int) -> np.ndarray:
        """The examples of a group."""
        return self.members[self.ends[group - 1] if group else 0 : self.ends[group]]


def prompt_groups(examples: Sequence[Encoded]) -> Groups:
    """Which examples have the same prompt, by token ids."""
    numbers: dict[bytes, int] = {}
    prompts = (np.asarray(e.ids[: e.prompt_len], dtype=np.int32).tobytes() for e in examples)
    return groups_of(np.array([numbers.setdefault(p, len(numbers)) for p in prompts], dtype=np.int64))


def groups_of(numbers: np.ndarray) -> Groups:
    """Groups by the number of each example; numbers start at 0 and leave none out."""
    return Groups(numbers, np.argsort(numbers, kind="stable"), np.bincount(numbers).cumsum())


def step_indices(
    n: int, *, batch: int, seed: int, step: int, shuffle: bool, groups: Groups | None = None
) -> np.ndarray:
    """Indices of the sequences of optimizer step ``step`` (0-based, counted over all epochs), int64.

    With ``groups`` it is those that are shuffled, and the members inside each: siblings come one after another, and
    only where a batch ends between them do they part.
    """
    epoch, position = divmod(step, steps_per_epoch(n, batch))
    start, end = position * batch, min((position + 1) * batch, n)
    random = np.random.default_rng([seed, epoch])
    if not shuffle:
        return np.arange(start, end)
    if groups is None:
        return random.permutation(n)[start:end]
    order = random.permutation(len(groups))
    ends = np.diff(groups.ends, prepend=0)[order].cumsum()  # of each group, in its turn
    first, last = ends.searchsorted(start, side="right"), ends.searchsorted(end)
    members = [np.random.default_rng([seed, epoch, g]).permutation(groups[g]) for g in order[first : last + 1]]
    before = ends[first - 1] if first else 0
    return np.concatenate(members)[start - before : end - before]


def most_documents(lengths: Sequence[int], batch: int, max_tokens: int, *, shared: bool) -> int:
    """At most so many sequences are in a micro-batch; of those that share prompts ``max_tokens`` says little."""
    return batch if shared else min(batch, max_tokens // min(lengths))


def check_fits(lengths: Sequence[int], max_tokens: int) -> None:
    """Raise UserError when a sequence is longer than a micro-batch may be: none is ever cut."""
    if lengths and max(lengths) > max_tokens:
        raise UserError(
            f"train.max_tokens = {max_tokens} is less than the longest example ({max(lengths)} tokens): "
            f"raise train.max_tokens to {max(lengths)} or lower data.max_len"
        )


def pack(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    world: int,
    prompt_lens: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Micro-batches of all ranks: ``result[rank][micro]`` lists positions in ``lengths``.

    Sequences go, longest first, to the emptiest micro-batch that has room (ties: the lowest number), with as few
    micro-batches as hold them all and a multiple of ``world``, so that every rank makes the same number of calls.
    Micro-batches are dealt to ranks in turn; with fewer sequences than ranks some are empty.

    Those of one of the ``groups`` have a prompt (of ``prompt_lens``) in common and go together, at the price of one
    prompt. A group of more than ``max_tokens`` is split, and every group is where that lets the ranks end earlier. Each
    sequence attends to keys of its own, so that a micro-batch has at most KEYS times ``max_tokens`` of those, too.
    Raises UserError when a sequence is longer than ``max_tokens``.
    """
    check_fits(lengths, max_tokens)
    if groups is None:
        return _fill([(length, length, [i]) for i, length in enumerate(lengths)], max_tokens, world)[0]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(int(group), []).append(i)
    most = max(map(len, members.values()), default=1)
    packed = (
        _fill(_units(list(members.values()), lengths, prompt_lens, max_tokens, parts), max_tokens, world)
        for parts in range(1, min(world, most) + 1)
    )
    return min(packed, key=lambda found: found[1])[0]


def _units(
    groups: list[list[int]], lengths: Sequence[int], prompt_lens: Sequence[int], max_tokens: int, parts: int
) -> list[tuple[int, int, list[int]]]:
    """(tokens, keys, members) of what is not taken apart: each group in ``parts`` parts, or more where it must."""
    units: list[tuple[int, int, list[int]]] = []
    for group in groups:
        prompt = prompt_lens[group[0]]
        for part in np.array_split(group, min(parts, len(group))):
            tokens, keys, members = prompt, prompt, []
            for i in part.tolist():
                own = lengths[i] - prompt
                if members and (tokens + own > max_tokens or keys + lengths[i] > KEYS * max_tokens):
                    units.append((tokens, keys, members))
                    tokens, keys, members = prompt, prompt, []
                tokens, keys, members = tokens + own, keys + lengths[i], [*members, i]
            units.append((tokens, keys, members))
    return units


def _fill(units: list[tuple[int, int, list[int]]], max_tokens: int, world: int) -> tuple[list[list[list[int]]], int]:
    """Micro-batches of all ranks as ``pack`` describes, and the tokens of their longest, summed over the calls."""
    largest_first = sorted(range(len(units)), key=lambda u: (-units[u][0], u))
    per_rank = max(1, math.ceil(sum(tokens for tokens, _, _ in units) / max_tokens / world))
    while True:
        bins: list[list[int]] = [[] for _ in range(per_rank * world)]
        loads, seen = [0] * len(bins), [0] * len(bins)  # tokens, keys
        emptiest_first = [(0, number) for number in range(len(bins))]  # a heap of (tokens, number)
        for u in largest_first:
            used, number = emptiest_first[0]
            tokens, keys, members = units[u]
            if used and (used + tokens > max_tokens or seen[number] + keys > KEYS * max_tokens):
                break
            bins[number] += members
            loads[number], seen[number] = used + tokens, seen[number] + keys
            heapq.heapreplace(emptiest_first, (used + tokens, number))
        else:
            ranks = [[sorted(b) for b in bins[rank::world]] for rank in range(world)]
            return ranks, sum(max(loads[i : i + world]) for i in range(0, len(loads), world))
        per_rank += 1


def normalizer(
    examples: Sequence[Encoded], *, ce_weight: float, regression_weight: float, score_ce: bool, ce_reduction: str
) -> Normalizer:
    """The global counts of one step, from all its sequences (on every rank)."""
    return Normalizer(
        ce_weight=ce_weight,
        regression_weight=regression_weight,
        per_sequence=ce_reduction == "sequence",
        weighted_tokens=sum(e.weight * ce_tokens(e, score_ce) for e in examples),
        weighted_sequences=sum(e.weight for e in examples),
    )


def ce_tokens(example: Encoded, score_ce: bool) -> int:
    """Tokens of the example that carry cross-entropy."""
    return len(example.ids) - example.prompt_len - (0 if score_ce else 1)


def plan_step(
    examples: Sequence[Encoded],
    *,
    batch: int,
    max_tokens: int,
    seed: int,
    step: int,
    shuffle: bool,
    world: int,
    groups: Groups | None = None,
    share: Share | None = None,
) -> tuple[list[Encoded], list[list[list[int]]]]:
    """The sequences of one optimizer step and, per rank, its micro-batches as indices into them (see ``pack``).

    ``groups`` of all examples: shuffle those (``prompt_groups``); ``share``: and compute their prompts once.
    """
    order = {"batch": batch, "seed": seed, "step": step, "shuffle": shuffle}
    indices = step_indices(len(examples), **order, groups=groups)
    chosen = [examples[i] for i in indices]
    return chosen, pack_examples(chosen, max_tokens, world, groups.of[indices] if groups and share else None)


def pack_examples(
    examples: Sequence[Encoded], max_tokens: int, world: int, groups: Sequence[int] | None
) -> list[list[list[int]]]:
    """``pack`` of encoded examples."""
    prompt_lens = [e.prompt_len for e in examples]
    lengths = [len(e.ids) for e in examples]
    return pack(lengths, max_tokens=max_tokens, world=world, prompt_lens=prompt_lens, groups=groups)


def layout_of(examples: Sequence[Encoded], *, share: Share | None) -> Layout:
    """How the examples of a micro-batch are laid out."""
    return lay_out([np.asarray(e.ids) for e in examples], [e.prompt_len for e in examples], share)


def attention_fields(sequences: Sequence[np.ndarray], layout: Layout) -> dict[str, Tensor | int | None]:
    """What the backbone needs of a micro-batch, by the names of ``Batch``."""
    cat = lambda parts: torch.from_numpy(np.concatenate(parts).astype(np.int64))  # noqa: E731
    cumulative = lambda lengths: torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)  # noqa: E731
    queries = [end - start for _, start, end in layout.segments]
    keys = [end for _, _, end in layout.segments]
    return {
        "input_ids": cat([sequences[i][start:end] for i, start, end in layout.segments])[None],
        "position_ids": cat([np.arange(start, end) for _, start, end in layout.segments])[None],
        "cu_seq_lens_q": cumulative(queries),
        "cu_seq_lens_k": cumulative(keys),
        "max_length_q": max(queries),
        "max_length_k": max(keys),
        "key_index": cat(layout.keys()) if layout.shares else None,
    }


def collate(examples: Sequence[Encoded], norm: Normalizer, *, score_ce: bool, share: Share | None = None) -> Batch:
    """Pack ``examples`` into one Batch and give each row its weight. ``share``: what is there once.

    With no examples the batch is one token that nothing is trained on, so that a rank without work still takes part in
    every collective call.
    """
    ids = [np.asarray(e.ids) for e in examples]
    layout = layout_of(examples, share=share)
    rows, labels, row_weights, score_rows = [], [], [], []
    n_rows = 0
    for e, places in zip(examples, layout.places, strict=True):
        n_target = len(e.ids) - e.prompt_len
        rows.append(places[e.prompt_len - 1 : -1])
        target = np.array(e.ids[e.prompt_len :], dtype=np.int64)
        if not score_ce:
            target[-2] = IGNORE
        labels.append(target)
        if norm.per_sequence:
            each = norm.ce_weight * e.weight / (ce_tokens(e, score_ce) * norm.weighted_sequences)
        else:
            each = norm.ce_weight * e.weight / norm.weighted_tokens
        row_weights.append(np.full(n_target, each, dtype=np.float32))
        score_rows.append(n_rows + n_target - 2)  # the row that predicts the score token, the last but one
        n_rows += n_target
    cat = lambda parts, dtype: torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype))  # noqa: E731
    weight = norm.regression_weight / norm.weighted_sequences if examples else 0.0
    if not examples:
        ids = [np.zeros(1, dtype=np.int64)]
        layout = lay_out(ids, [1], None)
    return Batch(
        **attention_fields(ids, layout),
        rows=cat(rows, np.int64),
        labels=cat(labels, np.int64),
        row_weights=cat(row_weights, np.float32),
        score_rows=torch.tensor(score_rows, dtype=torch.int64),
        score_targets=torch.tensor([e.score for e in examples], dtype=torch.float32),
        score_weights=torch.tensor([weight * e.weight for e in examples], dtype=torch.float32),
    )

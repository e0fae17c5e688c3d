"""Which sequences form step s, how they are packed, and what a micro-batch holds.

The plan of a step is a pure function of (lengths, seed, step, world): every rank computes the plan of all ranks, so the
global token and sequence counts are known without communication, and resuming is arithmetic. A batch is counted in
sequences (the unit of the paper's batch size); its sequences are packed, without padding, into micro-batches of at most
``max_tokens`` tokens.

Shapes: T tokens of a micro-batch, S its sequences (documents), N its rows (positions whose next token is trained on).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tract_fast.data.prompt import Encoded
from tract_fast.errors import UserError

IGNORE = -100


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
    position_ids: Tensor  # (1, T) int64, from 0 in every document
    cu_seq_lens_q: Tensor  # (S + 1,) int32, cumulative query lengths
    cu_seq_lens_k: Tensor  # (S + 1,) int32, cumulative key lengths
    max_length_q: int
    max_length_k: int
    rows: Tensor  # (N,) int64, index into T
    labels: Tensor  # (N,) int64, -100 = no CE
    row_weights: Tensor  # (N,) float32
    score_rows: Tensor  # (S,) int64, index into N
    score_targets: Tensor  # (S,) float32
    score_weights: Tensor  # (S,) float32

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``; from pinned memory, since other copies to CUDA wait."""
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}
        if device.type == "cuda":
            tensors = {name: v.pin_memory() for name, v in tensors.items()}
        return replace(self, **{name: v.to(device, non_blocking=True) for name, v in tensors.items()})


def steps_per_epoch(n: int, batch: int) -> int:
    """Optimizer steps in one pass over ``n`` sequences; the last one may be smaller."""
    return math.ceil(n / batch)


def total_steps(n: int, *, batch: int, epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a run: ``max_steps`` if given (over as many epochs as it takes), else those of ``epochs``."""
    return epochs * steps_per_epoch(n, batch) if max_steps is None else max_steps


def step_indices(n: int, *, batch: int, seed: int, step: int, shuffle: bool) -> np.ndarray:
    """Indices of the sequences of optimizer step ``step`` (0-based, counted over all epochs), int64."""
    epoch, position = divmod(step, steps_per_epoch(n, batch))
    order = np.random.default_rng([seed, epoch]).permutation(n) if shuffle else np.arange(n)
    return order[position * batch : (position + 1) * batch]


def check_fits(lengths: Sequence[int], max_tokens: int) -> None:
    """Raise UserError when a sequence is longer than a micro-batch may be: none is ever cut."""
    if lengths and max(lengths) > max_tokens:
        raise UserError(
            f"train.max_tokens = {max_tokens} is less than the longest example ({max(lengths)} tokens): "
            f"raise train.max_tokens to {max(lengths)} or lower data.max_len"
        )


def pack(lengths: Sequence[int], *, max_tokens: int, world: int) -> list[list[list[int]]]:
    """Micro-batches of all ranks: ``result[rank][micro]`` lists positions in ``lengths``.

    Sequences go, longest first, to the emptiest micro-batch that has room (ties: the lowest number), with as few
    micro-batches as hold them all and a multiple of ``world``, so that every rank makes the same number of calls.
    Micro-batches are dealt to ranks in turn; with fewer sequences than ranks some are empty.
    Raises UserError when a sequence is longer than ``max_tokens``.
    """
    check_fits(lengths, max_tokens)
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = max(1, math.ceil(sum(lengths) / max_tokens / world))
    while True:
        bins: list[list[int]] = [[] for _ in range(per_rank * world)]
        emptiest_first = [(0, number) for number in range(len(bins))]  # a heap of (tokens, number)
        for i in longest_first:
            used, number = emptiest_first[0]
            if used + lengths[i] > max_tokens:
                break
            bins[number].append(i)
            heapq.heapreplace(emptiest_first, (used + lengths[i], number))
        else:
            return [[sorted(b) for b in bins[rank::world]] for rank in range(world)]
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
    examples: Sequence[Encoded], *, batch: int, max_tokens: int, seed: int, step: int, shuffle: bool, world: int
) -> tuple[list[Encoded], list[list[list[int]]]]:
    """The sequences of one optimizer step and, per rank, its micro-batches as indices into them (see ``pack``)."""
    chosen = [examples[i] for i in step_indices(len(examples), batch=batch, seed=seed, step=step, shuffle=shuffle)]
    return chosen, pack([len(e.ids) for e in chosen], max_tokens=max_tokens, world=world)


def collate(examples: Sequence[Encoded], norm: Normalizer, *, score_ce: bool) -> Batch:
    """Pack ``examples`` into one Batch and give each row its weight.

    With no examples the batch is one token that nothing is trained on, so that a rank without work still takes part in
    every collective call.
    """
    ids, positions, rows, labels, row_weights, score_rows = [], [], [], [], [], []
    start = n_rows = 0
    for e in examples:
        length, n_target = len(e.ids), len(e.ids) - e.prompt_len
        ids.append(np.asarray(e.ids, dtype=np.int64))
        positions.append(np.arange(length))
        rows.append(start + np.arange(e.prompt_len - 1, length - 1))
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
        start, n_rows = start + length, n_rows + n_target
    if not examples:
        ids, positions = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
    lengths = [len(x) for x in ids]
    cu = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    cat = lambda parts, dtype: torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype))  # noqa: E731
    share = norm.regression_weight / norm.weighted_sequences if examples else 0.0
    return Batch(
        input_ids=cat(ids, np.int64)[None],
        position_ids=cat(positions, np.int64)[None],
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        rows=cat(rows, np.int64),
        labels=cat(labels, np.int64),
        row_weights=cat(row_weights, np.float32),
        score_rows=torch.tensor(score_rows, dtype=torch.int64),
        score_targets=torch.tensor([e.score for e in examples], dtype=torch.float32),
        score_weights=torch.tensor([share * e.weight for e in examples], dtype=torch.float32),
    )

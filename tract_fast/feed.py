"""The micro-batches of a run's steps: while a step computes, a thread plans and packs those of the next.

What a step holds is a pure function of (recipe, data, step, rank), so making it ahead changes nothing but who waits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from tract_fast.data.batch import Batch, Normalizer, collate, normalizer
from tract_fast.data.prompt import Encoded
from tract_fast.perf import Work
from tract_fast.recipe import Loss, Recipe
from tract_fast.shard import Ranks
from tract_fast.sharing import Sharing, plan_step


@dataclass(frozen=True)
class Step:
    """One optimizer step as this rank computes it."""

    examples: list[Encoded]
    """Of all ranks."""
    micro_batches: list[Batch]
    """This rank's, on the CPU; in pinned memory where they go to CUDA."""
    flops: int
    """Operations of this rank (``perf.Work.flops``); 0 where they are not known."""


class Feed:
    """Steps of a run, the next one always under way. ``take`` is called by one thread."""

    def __init__(
        self, recipe: Recipe, examples: list[Encoded], sharing: Sharing, ranks: Ranks, work: Work | None, total: int
    ):
        self.recipe, self.examples, self.sharing, self.ranks = recipe, examples, sharing, ranks
        self.work, self.total = work, total
        self.ahead: tuple[int, Future[Step]] | None = None  # the step that is being made, and it

    def take(self, step: int) -> Step:
        """0-based step ``step``; that after it is begun. Raises what making it raised."""
        at, future = self.ahead or (None, None)
        found = future.result() if at == step else self._make(step)
        self.ahead = None
        if step + 1 < self.total:
            self.ahead = step + 1, Future()
            # no daemon, which ends a process that leaves meanwhile by abort: ``threads.leave`` does not wait for it
            threading.Thread(target=self._fulfil, args=self.ahead, name="feed").start()
        return found

    def _fulfil(self, step: int, future: Future[Step]) -> None:
        try:
            if self.ranks.device.type == "cuda":  # a thread of its own has the first GPU for its own
                torch.cuda.set_device(self.ranks.device)
            future.set_result(self._make(step))
        except BaseException as error:  # of a thread: raised by the step that takes it
            future.set_exception(error)

    def _make(self, step: int) -> Step:
        loss, world = self.recipe.loss, self.ranks.world
        examples, packed = plan_step(self.recipe.train, self.examples, self.sharing, step, world)
        norm = normalizer_of(loss, examples)
        made, flops = [], 0
        for chosen in packed[self.ranks.rank]:
            members = [examples[i] for i in chosen]
            batch = collate(members, norm, score_ce=loss.score_ce, share=self.sharing.share)
            if self.work and chosen:  # an empty one is a stand-in
                flops += self.work.flops(*segments(batch), len(batch.rows))
            made.append(batch.pinned() if self.ranks.device.type == "cuda" else batch)
        return Step(examples, made, flops)


def normalizer_of(loss: Loss, examples: Sequence[Encoded]) -> Normalizer:
    """The counts of a step that has these sequences over all ranks, as a recipe's section says."""
    return normalizer(
        examples,
        ce_weight=loss.ce_weight,
        regression_weight=loss.regression_weight,
        score_ce=loss.score_ce,
        ce_reduction=loss.ce_reduction,
    )


def segments(batch: Batch) -> tuple[list[int], list[int]]:
    """(queries, keys) of each segment of a micro-batch that is on the CPU."""
    return batch.cu_seq_lens_q.diff().tolist(), batch.cu_seq_lens_k.diff().tolist()

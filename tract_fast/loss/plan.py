"""How the chunked loss splits its work: a pure function of sizes, with the reasoning that gives its numbers.

Let C be rows per chunk, with logits of s bytes (2 or 4), W of V x D, and a budget of M bytes for the logits buffer.

- *Rows from the budget, not from V / D.* A chunk's buffer is ``s C V`` bytes, so ``C = M / (s V)``. The three GEMMs
of a chunk re-read W twice and, with several chunks, read and write a float32 accumulator of dW: ``8 V D`` bytes beside
  ``2 C V D`` FLOP. On an H100 (about 700 TFLOP/s, 3 TB/s) that traffic takes ``1000 / C`` of the GEMM's time: as long
  as
  the GEMM itself at C = 1000, hidden behind it from C = 4000 on. Chunks of 64 rows, which ``V / D`` gives, spend many
  times the GEMM's time on it (all of this is calculated, not measured). So a budget too small for ``MIN_ROWS`` rows is
  gone over.
- *One chunk where that is also smaller.* The float32 accumulator is ``4 V D`` bytes: as much as the logits of
  ``4 D / s`` rows. So with W trained, several chunks need ``s C V + 4 V D`` bytes and one needs ``s N V``: for
  ``N <= C + 4 D / s`` one chunk is smaller, faster, and more exact (dW leaves the GEMM's own float32 accumulator once).
- *dW of the only chunk waits for backward* (``defer``): its GEMM then takes the upstream gradient on the way, and a
  loss without backward never computes it. With several chunks dZ of the last one could wait as well; it would hold the
  buffer for longer and save no work, so dW is complete after forward there.
- Chunks are equal in size up to rounding to ``ROW_MULTIPLE`` rows, so that no GEMM is left with a few rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_BUDGET = {"cuda": 2**30, "cpu": 2**28}  # bytes of logits; other devices as "cuda"
MIN_ROWS = {"cuda": 1024, "cpu": 128}  # below it GEMMs starve (calculated, not measured)
ROW_MULTIPLE = 128
ACCUMULATOR_BYTES = 4  # of an entry of dW in float32, which only several chunks need
BLOCK_BUDGET = 2**27  # bytes of dZ in the fused backward
MIN_TILES = 8  # of a block there, in columns


@dataclass(frozen=True)
class ChunkPlan:
    """How the rows of one call are cut."""

    rows: int
    """Rows per chunk; the last one may have fewer."""
    defer: bool
    """dW is computed in backward from the dZ that the only chunk leaves in its buffer."""


def plan_chunks(
    n_rows: int,
    n_vocab: int,
    width: int,
    *,
    logit_bytes: int,
    trained_weight: bool,
    budget: int | None = None,
    device: str = "cuda",
) -> ChunkPlan:
    """Cut ``n_rows`` (at least one) rows of ``n_vocab`` logits into chunks of about ``budget`` bytes.

    None is the device's default. ``logit_bytes`` is the size of one logit, ``trained_weight`` whether dW is needed.
    See this module for the rule.
    """
    fit = rows_within(n_vocab, logit_bytes=logit_bytes, budget=budget, device=device)
    free = ACCUMULATOR_BYTES * width // logit_bytes if trained_weight else 0
    if n_rows <= fit + free:
        return ChunkPlan(rows=n_rows, defer=trained_weight)
    count = math.ceil(n_rows / fit)
    return ChunkPlan(rows=min(round_up(math.ceil(n_rows / count), ROW_MULTIPLE), fit), defer=False)


def rows_within(n_vocab: int, *, logit_bytes: int, budget: int | None, device: str) -> int:
    """Rows of logits that the budget holds, or the least that GEMMs need."""
    key = device if device in DEFAULT_BUDGET else "cuda"
    return max((DEFAULT_BUDGET[key] if budget is None else budget) // (logit_bytes * n_vocab), MIN_ROWS[key])


def plan_columns(n_rows: int, n_vocab: int, *, logit_bytes: int, multiple: int, budget: int | None = None) -> int:
    """Columns of the vocabulary whose dZ the fused backward holds at a time, a multiple of a tile's.

    The same reasoning with rows and columns changed about: dX in float32 is read and written once per block, so blocks
    of 4096 columns hide it; dW needs no accumulator since a block has all rows.
    """
    fit = (BLOCK_BUDGET if budget is None else budget) // (logit_bytes * n_rows)
    return min(round_up(n_vocab, multiple), max(fit // multiple, MIN_TILES) * multiple)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple

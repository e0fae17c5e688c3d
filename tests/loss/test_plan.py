"""How the loss cuts its work: within the budget, every row once, one chunk where that is smaller."""

from __future__ import annotations

from hypothesis import given, strategies as st

from tract_fast.loss.plan import DEFAULT_BUDGET, MIN_ROWS, ROW_MULTIPLE, plan_chunks, plan_columns

SIZES = {
    "n_rows": st.integers(1, 40_000),
    "n_vocab": st.integers(1, 300_000),
    "width": st.integers(1, 8192),
    "logit_bytes": st.sampled_from([2, 4]),
    "trained_weight": st.booleans(),
    "budget": st.none() | st.integers(1, 2**33),
    "device": st.sampled_from(["cuda", "cpu"]),
}


@given(**{name: s for name, s in SIZES.items()})
def test_chunks(n_rows, n_vocab, width, logit_bytes, trained_weight, budget, device):
    plan = plan_chunks(
        n_rows,
        n_vocab,
        width,
        logit_bytes=logit_bytes,
        trained_weight=trained_weight,
        budget=budget,
        device=device,
    )
    allowed = DEFAULT_BUDGET[device] if budget is None else budget
    buffer = logit_bytes * plan.rows * n_vocab
    least = logit_bytes * MIN_ROWS[device] * n_vocab
    if plan.rows < n_rows:
        assert not plan.defer and buffer <= max(allowed, least)
        assert plan.rows > MIN_ROWS[device] / 2, "equal chunks of more rows than that"
    else:
        assert plan.rows == n_rows and plan.defer == trained_weight
        accumulator = 4 * n_vocab * width if trained_weight else 0
        assert buffer <= max(allowed, least) + accumulator, "one chunk is no larger than several with their accumulator"
    count = -(-n_rows // plan.rows)
    last = n_rows - (count - 1) * plan.rows
    assert 0 < last <= plan.rows
    if count > 1:
        assert plan.rows - last <= max(ROW_MULTIPLE * count, plan.rows // 2 + ROW_MULTIPLE), "chunks are about equal"


def test_the_sizes_of_the_design():
    """Llama-3.1-8B at 8192 rows is one chunk with W trained; a frozen head is cut by the budget alone."""
    one = plan_chunks(8192, 128_256, 4096, logit_bytes=2, trained_weight=True)
    assert (one.rows, one.defer) == (8192, True)
    frozen = plan_chunks(16_384, 128_256, 4096, logit_bytes=2, trained_weight=False)
    assert frozen.rows * 128_256 * 2 <= 2**30 < (frozen.rows + ROW_MULTIPLE) * 128_256 * 2 and not frozen.defer


@given(
    n_rows=st.integers(1, 40_000),
    n_vocab=st.integers(1, 300_000),
    multiple=st.sampled_from([32, 64, 128]),
    budget=st.none() | st.integers(1, 2**33),
)
def test_columns_are_whole_tiles(n_rows, n_vocab, multiple, budget):
    columns = plan_columns(n_rows, n_vocab, logit_bytes=2, multiple=multiple, budget=budget)
    assert columns > 0 and columns % multiple == 0 and columns < n_vocab + multiple

"""The step plan: every sequence once an epoch, packed within the limit, for every rank; and the Batch it fills."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tract_fast.data.batch import collate, normalizer, pack, step_indices, steps_per_epoch
from tract_fast.data.prompt import Encoded
from tract_fast.errors import UserError


def encoded(prompt: int, target: int, *, score=3.0, weight=1.0, name="e", start=0) -> Encoded:
    ids = tuple(range(start, start + prompt + target))
    return Encoded(ids=ids, prompt_len=prompt, label_index=0, score=score, weight=weight, id=name, question="q")


@given(n=st.integers(1, 50), batch=st.integers(1, 12), seed=st.integers(0, 5), shuffle=st.booleans())
def test_every_sequence_once_an_epoch(n, batch, seed, shuffle):
    steps = steps_per_epoch(n, batch)
    for epoch in range(2):
        seen = [
            i
            for s in range(epoch * steps, (epoch + 1) * steps)
            for i in step_indices(n, batch=batch, seed=seed, step=s, shuffle=shuffle)
        ]
        assert sorted(seen) == list(range(n))
        if not shuffle:
            assert seen == list(range(n))


def test_epochs_and_seeds_differ():
    order = lambda seed, step: list(step_indices(40, batch=40, seed=seed, step=step, shuffle=True))  # noqa: E731
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 100), max_size=20), world=st.integers(1, 5), room=st.integers(0, 200))
def test_pack(lengths, world, room):
    max_tokens = max([*lengths, 1]) + room
    ranks = pack(lengths, max_tokens=max_tokens, world=world)
    assert len(ranks) == world
    assert len({len(micro) for micro in ranks}) == 1, "every rank makes the same number of calls"
    flat = [i for rank in ranks for micro in rank for i in micro]
    assert sorted(flat) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in micro) for rank in ranks for micro in rank]
    assert max(loads) <= max_tokens
    # not wasteful: longest-first needs at most twice the fewest possible, plus the round-up to all ranks
    fewest = max(1, math.ceil(sum(lengths) / max_tokens))
    assert len(loads) <= 2 * fewest + world


def test_pack_shares_work_between_ranks():
    """Eight sequences that would fit one micro-batch still go to all four ranks."""
    loads = [sum(10 for _ in micro) for rank in pack([10] * 8, max_tokens=1000, world=4) for micro in rank]
    assert loads == [20, 20, 20, 20]


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(UserError, match=r"train.max_tokens = 10 is less than the longest example \(11 tokens\)"):
        pack([3, 11], max_tokens=10, world=1)


def test_collate():
    """Row positions, labels, weights and score rows of two documents, by hand."""
    examples = [encoded(3, 4, score=4.5, name="a"), encoded(2, 3, score=1.0, weight=2.0, name="b", start=100)]
    norm = normalizer(examples, ce_weight=0.5, regression_weight=3.0, score_ce=False, ce_reduction="token")
    assert (norm.weighted_tokens, norm.weighted_sequences) == (1 * 3 + 2 * 2, 3)
    b = collate(examples, norm, score_ce=False)
    assert b.input_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 100, 101, 102, 103, 104]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]]
    assert b.cu_seq_lens_q.tolist() == b.cu_seq_lens_k.tolist() == [0, 7, 12]
    assert (b.cu_seq_lens_q.dtype, b.max_length_q, b.max_length_k) == (torch.int32, 7, 7)
    assert b.rows.tolist() == [2, 3, 4, 5, 8, 9, 10]
    assert b.labels.tolist() == [3, 4, -100, 6, 102, -100, 104]
    assert b.score_rows.tolist() == [2, 5], "the rows that predict the score tokens 5 and 103"
    assert b.score_targets.tolist() == [4.5, 1.0]
    torch.testing.assert_close(b.row_weights, torch.tensor([0.5 / 7] * 4 + [1.0 / 7] * 3))
    torch.testing.assert_close(b.score_weights, torch.tensor([1.0, 2.0]))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(3, 8), st.floats(0.1, 4)), min_size=1, max_size=6),
    reduction=st.sampled_from(["token", "sequence"]),
    score_ce=st.booleans(),
    cut=st.integers(0, 6),
)
def test_weights_sum_to_one(sizes, reduction, score_ce, cut):
    """However a step is split into micro-batches, CE weights of trained rows and score weights each sum to one."""
    examples = [encoded(p, t, weight=w) for p, t, w in sizes]
    norm = normalizer(examples, ce_weight=1.0, regression_weight=1.0, score_ce=score_ce, ce_reduction=reduction)
    parts = [collate(part, norm, score_ce=score_ce) for part in (examples[:cut], examples[cut:])]
    trained = sum(b.row_weights[b.labels != -100].sum().item() for b in parts)
    assert trained == pytest.approx(1.0, rel=1e-5)
    assert sum(b.score_weights.sum().item() for b in parts) == pytest.approx(1.0, rel=1e-5)
    if reduction == "sequence" and len({w for *_, w in sizes}) == 1:
        per_sequence = [collate([e], norm, score_ce=score_ce) for e in examples]
        sums = [b.row_weights[b.labels != -100].sum().item() for b in per_sequence]
        np.testing.assert_allclose(sums, 1 / len(examples), rtol=1e-5)


def test_empty_micro_batch():
    """A rank without work runs one token that nothing is trained on."""
    norm = normalizer([encoded(2, 3)], ce_weight=1, regression_weight=1, score_ce=True, ce_reduction="token")
    b = collate([], norm, score_ce=True)
    assert b.input_ids.tolist() == [[0]] and b.cu_seq_lens_q.tolist() == [0, 1]
    assert len(b.rows) == len(b.score_rows) == 0
    assert b.labels.dtype == torch.int64 and b.row_weights.dtype == b.score_targets.dtype == torch.float32

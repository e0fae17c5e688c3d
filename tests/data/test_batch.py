"""The step plan: every sequence once an epoch, packed within the limit, for every rank; and the Batch it fills."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tract_fast.data.batch import (
    KEYS,
    collate,
    groups_of,
    layout_of,
    most_documents,
    normalizer,
    pack,
    pack_examples,
    prompt_groups,
    step_indices,
    steps_per_epoch,
)
from tract_fast.data.prompt import Encoded
from tract_fast.errors import UserError


def encoded(prompt: int, target: int, *, score=3.0, weight=1.0, name="e", start=0) -> Encoded:
    ids = tuple(range(start, start + prompt + target))
    return Encoded(ids=ids, prompt_len=prompt, label_index=0, score=score, weight=weight, id=name, question="q")


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    room=st.integers(60, 200),
    world=st.integers(1, 3),
)
def test_most_documents_bounds_every_micro_batch(lengths, room, world):
    most = most_documents(lengths, len(lengths), room, shared=False)
    for rank in pack(lengths, max_tokens=room, world=world):
        assert all(len(micro) <= most for micro in rank)


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


def of_groups(sizes):
    """Examples of groups: (prompt length, [target lengths]); no two prompts and no two targets begin alike."""
    found = []
    for g, (prompt, targets) in enumerate(sizes):
        for target in targets:
            start = 1000 * (len(found) + len(sizes))
            ids = (*range(1000 * g, 1000 * g + prompt), *range(start, start + target))
            found.append(replace(encoded(prompt, target), ids=ids))
    return found


GROUPS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(3, 20), min_size=1, max_size=6)), min_size=1, max_size=6
)


def test_prompt_groups_go_by_token_ids():
    assert prompt_groups(of_groups([(3, [4, 5]), (2, [3]), (3, [9, 3])])).of.tolist() == [0, 0, 1, 2, 2]
    assert prompt_groups([encoded(3, 4), encoded(4, 4), encoded(3, 9)]).of.tolist() == [0, 1, 0]


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=9), batch=st.integers(1, 7), seed=st.integers(0, 5))
def test_siblings_meet_and_every_sequence_comes_once(sizes, batch, seed):
    """Shuffled by group: an epoch holds every sequence once, a group's members follow one another, in varied order."""
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    n, steps = len(groups), steps_per_epoch(len(groups), batch)
    options = {"batch": batch, "seed": seed, "shuffle": True, "groups": groups_of(groups)}
    for epoch in range(2):
        order = [i for s in range(epoch * steps, (epoch + 1) * steps) for i in step_indices(n, step=s, **options)]
        assert sorted(order) == list(range(n))
        changes = sum(groups[a] != groups[b] for a, b in itertools.pairwise(order))
        assert changes == len(sizes) - 1


def test_siblings_come_in_another_order_each_epoch():
    order = lambda seed, step: step_indices(  # noqa: E731
        12, batch=12, seed=seed, step=step, shuffle=True, groups=groups_of(np.zeros(12, dtype=np.int64))
    ).tolist()
    assert order(0, 0) == order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_groups_of_one_are_shuffled_as_sequences_are():
    options = {"batch": 7, "seed": 3, "step": 4, "shuffle": True}
    alone = step_indices(20, groups=groups_of(np.arange(20)), **options)
    assert alone.tolist() == step_indices(20, **options).tolist()


@settings(max_examples=200)
@given(sizes=GROUPS, world=st.integers(1, 4), room=st.integers(0, 150))
def test_packing_groups(sizes, world, room):
    """Every sequence once; no micro-batch computes more than its limit; as many calls on every rank."""
    examples = of_groups(sizes)
    max_tokens = max(len(e.ids) for e in examples) + room
    ranks = pack_examples(examples, max_tokens, world, prompt_groups(examples).of)
    assert sorted(i for rank in ranks for micro in rank for i in micro) == list(range(len(examples)))
    assert len({len(rank) for rank in ranks}) == 1
    loads = [layout_of([examples[i] for i in m], share="heads").tokens for rank in ranks for m in rank]
    assert max(loads) <= max_tokens


def test_one_rank_splits_a_group_only_where_it_must():
    examples = of_groups([(20, [10] * 8), (10, [10, 10])])
    groups = prompt_groups(examples).of
    ((whole,),) = pack_examples(examples, 1000, 1, groups)
    assert layout_of([examples[i] for i in whole], share="heads").tokens == 100 + 30
    (parts,) = pack_examples(examples, 70, 1, groups)
    tokens = [layout_of([examples[i] for i in part], share="heads").tokens for part in parts]
    assert sorted(tokens) == [30, 50, 70], "the prompt of the long group twice"


def test_ranks_share_a_group_where_that_ends_earlier():
    """One prompt with eight rationales on four ranks: each computes the prompt, and none waits for one with all."""
    examples = of_groups([(100, [50] * 8)])
    ranks = pack_examples(examples, 1000, 4, prompt_groups(examples).of)
    assert [len(micro) for rank in ranks for micro in rank] == [2, 2, 2, 2]
    examples = of_groups([(1000, [10] * 2), (1000, [10] * 2)])
    ranks = pack_examples(examples, 3000, 2, prompt_groups(examples).of)
    assert [micro for rank in ranks for micro in rank] == [[0, 1], [2, 3]], "nothing is gained by a split"
    # one call in which a rank computes 300 tokens, not two of 250 and 210
    examples = of_groups([(200, [10]), (200, [50, 50])])
    assert pack_examples(examples, 300, 2, prompt_groups(examples).of) == [[[1, 2]], [[0]]]


def test_keys_are_bounded_too():
    """A prompt of 1000 tokens with 200 short rationales is 3000 tokens, and 203 000 keys."""
    examples = of_groups([(1000, [10] * 200)])
    (micro_batches,) = pack_examples(examples, 4000, 1, prompt_groups(examples).of)
    keys = [sum(map(len, layout_of([examples[i] for i in m], share="prompts").keys())) for m in micro_batches]
    assert max(keys) <= KEYS * 4000 and len(keys) <= 2 * sum(keys) / (KEYS * 4000)
    assert sorted(i for m in micro_batches for i in m) == list(range(200))


def test_collate_shared():
    """A prompt of 3 with targets of 4 and 3: the prompt's last position predicts the first token of both."""
    examples = [encoded(3, 4), Encoded((0, 1, 2, 30, 31, 32), 3, 0, 2.0, 2.0, "b", "q"), encoded(2, 3, start=100)]
    norm = normalizer(examples, ce_weight=1, regression_weight=1, score_ce=True, ce_reduction="token")
    b = collate(examples, norm, score_ce=True, share="heads")
    assert b.input_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 30, 31, 32, 100, 101, 102, 103, 104]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 0, 1, 2, 3, 4]]
    assert b.cu_seq_lens_q.tolist() == [0, 3, 7, 10, 15] and b.cu_seq_lens_k.tolist() == [0, 3, 10, 16, 21]
    assert (b.max_length_q, b.max_length_k) == (5, 7)
    keys = [0, 1, 2, *range(7), 0, 1, 2, 7, 8, 9, *range(10, 15)]
    assert b.key_index.tolist() == keys
    assert b.rows.tolist() == [2, 3, 4, 5, 2, 7, 8, 11, 12, 13]
    assert b.labels.tolist() == [3, 4, 5, 6, 30, 31, 32, 102, 103, 104]
    assert b.score_rows.tolist() == [2, 5, 8] and b.score_targets.tolist() == [3.0, 2.0, 3.0]
    assert collate(examples, norm, score_ce=True).key_index is None
    assert collate([], norm, score_ce=True, share="heads").input_ids.tolist() == [[0]]

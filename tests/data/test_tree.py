"""The layout of sequences that begin alike: every token where it belongs, once, with its whole past as keys."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tract_fast.data import tree
from tract_fast.data.tree import lay_out

# few different tokens, so that sequences begin alike in many ways; the first numbers are prompt lengths
SEQUENCES = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.integers(0, 1), min_size=4, max_size=12)), min_size=1, max_size=9
)


def arrays(drawn):
    return [np.array(ids) for _, ids in drawn], [prompt for prompt, _ in drawn]


@settings(max_examples=300)
@given(drawn=SEQUENCES, pays=st.sampled_from([1, 4, 16, 10**9]), share=st.sampled_from([None, "prompts", "heads"]))
def test_every_token_has_its_place_and_its_past(drawn, pays, share):
    sequences, prompt_lens = arrays(drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "PAYS", pays)
        layout = lay_out(sequences, prompt_lens, share)
    laid = np.concatenate([sequences[i][start:end] for i, start, end in layout.segments])
    position = np.concatenate([np.arange(start, end) for _, start, end in layout.segments])
    assert len(laid) == layout.tokens and all(end > start for _, start, end in layout.segments)
    for ids, places in zip(sequences, layout.places, strict=True):
        np.testing.assert_array_equal(laid[places], ids)
        np.testing.assert_array_equal(position[places], np.arange(len(ids)))
        assert (np.diff(places) > 0).all(), "what comes before a token is laid out before it"
    assert set(range(layout.tokens)) == {p for places in layout.places for p in places.tolist()}
    at = 0
    for (i, start, end), keys in zip(layout.segments, layout.keys(), strict=True):
        np.testing.assert_array_equal(keys[start:], np.arange(at, at + end - start), "queries are the last keys")
        np.testing.assert_array_equal(laid[keys], sequences[i][:end])
        at += end - start
    assert layout.shares is (layout.tokens < sum(map(len, sequences)))
    assert share or not layout.shares


@settings(max_examples=200)
@given(drawn=SEQUENCES)
def test_all_that_can_be_shared_is_a_trie(drawn):
    """Where every token pays, there are as many tokens as different beginnings."""
    sequences, prompt_lens = arrays(drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "PAYS", 10**9)
        tokens = lay_out(sequences, prompt_lens, "heads").tokens
    different = {tuple(ids[: n + 1]) for ids in sequences for n in range(len(ids))}
    ends_twice = len(sequences) - len({tuple(ids) for ids in sequences})
    # of two that end at once where nothing else is shared with them, each has its own last token
    assert len(different) <= tokens <= len(different) + ends_twice


@settings(max_examples=200)
@given(drawn=SEQUENCES, share=st.sampled_from(["prompts", "heads"]))
def test_a_whole_prompt_is_there_once(drawn, share):
    """A micro-batch never holds more than each prompt once and each rationale: what packing counts on."""
    sequences, prompt_lens = arrays(drawn)
    prompts = {tuple(ids[:n]) for ids, n in zip(sequences, prompt_lens, strict=True)}
    rest = sum(len(ids) - n for ids, n in zip(sequences, prompt_lens, strict=True))
    assert lay_out(sequences, prompt_lens, share).tokens <= sum(map(len, prompts)) + rest


def test_a_part_of_a_prompt_is_shared_where_it_pays():
    def tokens(common, length, share="heads"):
        first = np.arange(length)
        second = np.concatenate([np.arange(common), 1000 + np.arange(length - common)])
        return lay_out([first, second], [length - 2, length - 2], share).tokens

    assert tokens(common=10, length=160) == 310
    assert tokens(common=9, length=160) == 320
    assert tokens(common=158, length=160) == 162
    assert tokens(common=157, length=160, share="prompts") == 320, "not a whole prompt"
    assert tokens(common=158, length=160, share="prompts") == 162
    # below a shared head only what more is shared counts: 40 of all, 8 more of two, of 160
    first, second, third = (np.arange(160) + 1000 * i for i in range(3))
    second[:48], third[:40] = first[:48], first[:40]
    assert lay_out([first, second, third], [158] * 3, "heads").tokens == 3 * 160 - 2 * 40
    second[48:50] = first[48:50]
    assert lay_out([first, second, third], [158] * 3, "heads").tokens == 3 * 160 - 2 * 40 - 10


def test_three_levels_in_order():
    """A template's head, two prompts, three rationales: depth first, so that a prompt's rationales follow it."""
    head = [1] * 10
    sequences = [np.array(head + rest) for rest in ([2, 2, 3, 4], [5, 6, 7], [2, 2, 8, 9, 9])]
    layout = lay_out(sequences, [12, 11, 12], "heads")
    assert layout.segments == [(0, 0, 10), (0, 10, 12), (0, 12, 14), (2, 12, 15), (1, 10, 13)]
    assert layout.places[2].tolist() == [*range(12), 14, 15, 16]
    alone = lay_out(sequences, [12, 11, 12], "prompts").segments
    assert alone == [(0, 0, 12), (0, 12, 14), (2, 12, 15), (1, 0, 13)]
    assert lay_out(sequences, [12, 11, 12], None).segments == [(0, 0, 14), (1, 0, 13), (2, 0, 15)]


def test_the_same_sequence_twice():
    layout = lay_out([np.arange(6), np.arange(6)], [4, 4], "prompts")
    assert layout.segments == [(0, 0, 6)] and layout.shares
    assert layout.places[0].tolist() == layout.places[1].tolist() == list(range(6))

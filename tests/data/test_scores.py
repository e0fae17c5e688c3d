"""The score tokens are found in context, whatever side the tokenizer puts the space on, or refused by name."""

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import smollm2_tokenizer, tiny_bos_tokenizer, tiny_metaspace_tokenizer, tiny_tokenizer
from tract_fast.data.scores import SENTENCE, ScoreScale, find_scale
from tract_fast.errors import UserError

DIGITS, LETTERS = ("1", "2", "3", "4", "5"), ("A", "B", "C", "D", "E", "F")
TOKENIZERS = [tiny_tokenizer, tiny_bos_tokenizer, tiny_metaspace_tokenizer, smollm2_tokenizer]


@pytest.mark.parametrize("rationale", ["keep", "drop"])
@pytest.mark.parametrize("labels", [DIGITS, LETTERS, ("1", "9"), ("0", "2", "4")])
@pytest.mark.parametrize("make", TOKENIZERS)
def test_pieces_are_the_text(make, labels, rationale):
    """Rationale, prefix, score token: the same tokens as the text tokenized whole, for every label."""
    tokenizer = make()
    scale = find_scale(tokenizer, labels, range(len(labels)), rationale=rationale)
    assert scale.labels == labels and scale.values == tuple(map(float, range(len(labels))))
    assert len(set(scale.token_ids)) == len(labels) and scale.eos_id == tokenizer.eos_token_id
    before = "Clear, and it has 3 examples." if rationale == "keep" else ""
    before_ids = tokenizer.encode(before, add_special_tokens=False) if before else []
    for label, token in zip(labels, scale.token_ids, strict=True):
        text = f"{before} {SENTENCE}{label}" if before else f"{SENTENCE}{label}"
        assert [*before_ids, *scale.prefix_ids, token] == tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode([token]).strip() == label


@pytest.mark.parametrize("make", [tiny_tokenizer, smollm2_tokenizer])
def test_side_of_the_space(make):
    """ " 4" is a space and a digit, " A" one token: the common prefix ends after the space or before it."""
    tokenizer = make()
    digits = find_scale(tokenizer, DIGITS, range(5), rationale="keep")
    letters = find_scale(tokenizer, LETTERS, range(6), rationale="keep")
    assert tokenizer.decode(list(digits.prefix_ids)) == " So the overall score is "
    assert tokenizer.decode(list(letters.prefix_ids)) == " So the overall score is"
    assert [tokenizer.decode([i]) for i in digits.token_ids] == list(DIGITS)
    assert [tokenizer.decode([i]) for i in letters.token_ids] == [f" {label}" for label in LETTERS]


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("labels", [[str(i) for i in range(1, 11)], ["1", "10"]])
def test_label_of_two_tokens_is_refused_with_its_tokens(make, labels):
    with pytest.raises(UserError, match=r"score.labels: '10' is 2 tokens \('1' '0'\) after 'So the overall score is'"):
        find_scale(make(), labels, range(len(labels)), rationale="keep")


def test_labels_on_both_sides_of_the_space_are_refused():
    with pytest.raises(UserError, match=r"score.labels: '1' is 2 tokens \(' ' '1'\)"):
        find_scale(tiny_tokenizer(), ["A", "1"], [0, 1], rationale="keep")


@pytest.mark.parametrize(("labels", "values"), [(["1"], [1]), (["1", "1"], [1, 2]), (["1", "2"], [1]), ([], [])])
def test_labels_and_values_must_match(labels, values):
    with pytest.raises(UserError, match=r"score.labels = .*, score.values = .*: write two or more different labels"):
        find_scale(tiny_tokenizer(), labels, values, rationale="keep")


def test_eos():
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match=r"<\|im_end\|> ends the text and cannot be a score"):
        find_scale(tokenizer, ["<|im_end|>", "<|im_start|>"], [0, 1], rationale="keep")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        find_scale(tokenizer, DIGITS, range(5), rationale="keep")


def odd_tokenizer(*, normalizer=None, use_regex=True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    text = ["rubric. So the overall score is 1 2 3 4 5"] * 9
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_tokenizers_that_join_or_change_the_sentence_are_refused():
    with pytest.raises(UserError, match="the tokenizer joins the end of a rationale"):
        find_scale(odd_tokenizer(use_regex=False), DIGITS, range(5), rationale="keep")
    bracket = odd_tokenizer(normalizer=normalizers.Replace(Regex(r"\) So"), ") is"))
    with pytest.raises(UserError, match=r"in one way after 'he rubric.' and in another after 'and late!\)'"):
        find_scale(bracket, DIGITS, range(5), rationale="keep")


def test_unknown_labels_are_refused():
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "So", "the", "overall", "score", "is", "1", "2"])}
    words_only = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="<unk>", eos_token="</s>")
    assert find_scale(tokenizer, ["1", "2"], [1, 2], rationale="drop").token_ids == (7, 8)
    for labels in (["1", "bad"], ["good", "bad"]):
        with pytest.raises(UserError, match=r"the tokenizer cannot tell them apart \(token ids '.*'bad': 0\)"):
            find_scale(tokenizer, labels, [0, 1], rationale="drop")


def test_nearest():
    scale = ScoreScale(LETTERS[:4], (4.0, 3.0, 1.0, 2.0), (1, 2, 3, 4), (), 0)
    found = {score: scale.labels[scale.nearest(score)] for score in (1, 1.4, 1.5, 1.6, 2.5, 3.5, 3.9, 4)}
    assert found == {1: "C", 1.4: "C", 1.5: "C", 1.6: "D", 2.5: "D", 3.5: "B", 3.9: "A", 4: "A"}, "ties go down"

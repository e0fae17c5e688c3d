"""The score scale: which token stands for each score, found in context with the tokenizer.

A score is read as ``sum_k v_k p(t_k | prompt, rationale)``, so every label must be one token, at one known place. Which
token that is depends on the tokenizer and on what stands before it: SmolLM2 writes " is 4" as " is", " ", "4" but
" is A" as " is", " A". So nothing is assumed: the whole target text is tokenized once per label and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tract_fast.errors import UserError

SENTENCE = "So the overall score is "  # then the label; the end of every target text

# Rationales to find the tokens after: they end in what rationales end in. All must agree on the tokens that follow.
ANCHORS = (
    "The response meets every point of the rubric.",
    "The response meets most points of the rubric",
    'The response only repeats the question: "how?"',
    "The response is hard to read (and late!)",
    "The response names 3 steps of 5",
)


@dataclass(frozen=True)
class ScoreScale:
    """Labels, the number each stands for, and the tokens around them.

    ``token_ids[k]`` is the one token of ``labels[k]``; ``prefix_ids`` are the tokens between the end of the rationale
    and it, the same for every label; ``eos_id`` ends the target.
    """

    labels: tuple[str, ...]
    values: tuple[float, ...]
    token_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    eos_id: int

    def nearest(self, score: float) -> int:
        """Index of the label whose value is nearest to ``score``; of two as near, the lower value."""
        return min(range(len(self.values)), key=lambda k: (abs(self.values[k] - score), self.values[k]))


def find_scale(tokenizer: Any, labels: Sequence[str], values: Sequence[float], *, rationale: str) -> ScoreScale:
    """Find the score tokens in context: after a rationale ("keep") or as the whole reply ("drop").

    Raises UserError when a label is not exactly one token after a common prefix, when two labels share their token,
    when what the tokenizer makes of the score sentence depends on the rationale, and when there is no EOS token.
    """
    labels, values = tuple(labels), tuple(float(v) for v in values)
    if len(labels) != len(values) or len(set(labels)) < max(2, len(labels)):
        raise UserError(
            f"score.labels = {list(labels)}, score.values = {list(values)}: write two or more different "
            "labels and as many values"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "model.path: the tokenizer has no EOS token, so a reply would never end; set eos_token in its files"
        )
    anchors = ANCHORS if rationale == "keep" else ("",)
    prefix_ids, token_ids = _in_context(tokenizer, anchors[0], labels)
    for anchor in anchors[1:]:
        if _in_context(tokenizer, anchor, labels) != (prefix_ids, token_ids):
            raise UserError(
                f"score.labels = {list(labels)}: the tokenizer writes the score sentence in one way after "
                f"{anchors[0][-10:]!r} and in another after {anchor[-10:]!r}; such a tokenizer is not supported"
            )
    if len(set(token_ids)) < len(token_ids) or tokenizer.unk_token_id in token_ids:
        pairs = ", ".join(f"{label!r}: {i}" for label, i in zip(labels, token_ids, strict=True))
        raise UserError(f"score.labels: the tokenizer cannot tell them apart (token ids {pairs}); choose other labels")
    if tokenizer.eos_token_id in token_ids:
        raise UserError(f"score.labels = {list(labels)}: {tokenizer.eos_token} ends the text and cannot be a score")
    return ScoreScale(labels, values, token_ids, prefix_ids, tokenizer.eos_token_id)


def _in_context(tokenizer: Any, anchor: str, labels: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens after ``anchor`` that all labels share, and the one token of each label."""
    before = tokenizer.encode(anchor, add_special_tokens=False) if anchor else []
    sentence = f" {SENTENCE}" if anchor else SENTENCE
    rests = []
    for label in labels:
        whole = tokenizer.encode(f"{anchor}{sentence}{label}", add_special_tokens=False)
        if whole[: len(before)] != before:
            raise UserError(
                f"the tokenizer joins the end of a rationale ({anchor[-10:]!r}) to {sentence!r}; "
                "such a tokenizer is not supported"
            )
        rests.append(whole[len(before) :])
    # At least one token is left for every label: "1" must not become the prefix of "10".
    heads = zip(*(rest[:-1] for rest in rests), strict=False)
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, heads))
    for label, rest in zip(labels, rests, strict=True):
        if len(rest) != shared + 1:
            pieces = " ".join(repr(tokenizer.decode([i])) for i in rest[shared:])
            raise UserError(
                f"score.labels: {label!r} is {len(rest) - shared} tokens ({pieces}) after {sentence.strip()!r}, and a "
                "score must be one; choose labels of one token each, such as 1 to 9 or A to J"
            )
    return tuple(rests[0][:shared]), tuple(rest[shared] for rest in rests)

"""From a recipe to what a run needs before any weight is loaded: tokenizer, score scale, encoded examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tract_fast import quick_gguf
from tract_fast.data import batch as batches, feedback, prompt
from tract_fast.data.prompt import Encoded
from tract_fast.data.scores import ScoreScale, find_scale
from tract_fast.errors import UserError
from tract_fast.head import choose_loss
from tract_fast.model import DTYPES, load_config, load_tokenizer
from tract_fast.recipe import Recipe
from tract_fast.shard import local_device


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """``train`` and ``held_out`` are encoded examples; ``left_out`` names the records that cannot be used and why."""

    tokenizer: Any
    config: Any
    scale: ScoreScale
    train: list[Encoded]
    held_out: list[Encoded]
    left_out: list[dict[str, str]] = field(default_factory=list)
    template: bool = False  # every training prompt is one of the Feedback Collection's

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training examples in order, to tell whether a resumed run sees the same data."""
        return _fingerprint(self.train)

    @property
    def held_out_fingerprint(self) -> str:
        """The same of the held-out examples, to tell whether all ranks evaluate on the same."""
        return _fingerprint(self.held_out)

    def write_left_out(self, path: Path) -> None:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in self.left_out), encoding="utf-8")


def _fingerprint(examples: list[Encoded]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        digest.update(json.dumps([e.id, len(e.ids), e.score, e.weight]).encode())
        digest.update(e.ids.tobytes())
    return digest.hexdigest()[:16]


@quick_gguf.kept()
def prepare(recipe: Recipe, say: Callable[[str], None] = print, device: torch.device | None = None) -> Prepared:
    """Read, split and encode the data; ``say`` receives one line per fact worth knowing. ``device``: of a machine that
    need not be this one; None: what is here. Raises UserError."""
    config = load_config(recipe.model)
    # refuses what cannot run, before any work
    choose_loss(recipe.loss, DTYPES[recipe.model.dtype], device or local_device(), config, here=device is None)
    left_out: list[dict[str, str]] = []
    train, held_out = _read(recipe, say, left_out)
    tokenizer = load_tokenizer(recipe.model)
    scale = find_scale(tokenizer, recipe.score.labels, recipe.score.values, rationale=recipe.data.rationale)
    prompt.check_tokenizer(tokenizer, scale, recipe.data.chat_template_kwargs)
    say(f"score: tokens {_tokens(tokenizer, scale.token_ids)} after {tokenizer.decode(list(scale.prefix_ids))!r}")
    options = {
        "chat_template_kwargs": recipe.data.chat_template_kwargs,
        "max_len": recipe.data.max_len,
        "max_dropped": recipe.data.max_dropped,
        "on_error": recipe.data.on_error,
    }
    encoded = []
    for what, examples in (("train", train), ("held-out", held_out)):
        kept, dropped = prompt.encode(tokenizer, scale, examples, **options)
        left_out += [{"where": skipped.where, "why": skipped.why} for skipped in dropped]
        if dropped:
            first = f"first {dropped[0].where}: {dropped[0].why}"
            say(f"data: {len(dropped)} of {len(examples)} {what} examples left out, {first}")
        encoded.append(kept)
    for token, count in prompt.control_tokens(tokenizer, (e.prompt for e in [*train, *held_out])).items():
        say(f"warning: {count} prompts hold the text {token!r}, which the tokenizer reads as a control token")
    if not encoded[0]:
        raise UserError(f"data.train = {recipe.data.train}: no example is left to train on")
    _check_lengths(recipe, config, encoded[0] + encoded[1])
    if recipe.train.batch > len(encoded[0]):
        say(
            f"warning: train.batch = {recipe.train.batch} is more than the {len(encoded[0])} training examples: every "
            "step has all of them"
        )
    say(f"data: {len(encoded[0])} train and {len(encoded[1])} held-out examples, {_length_summary(encoded[0])}")
    return Prepared(
        tokenizer=tokenizer,
        config=config,
        scale=scale,
        train=encoded[0],
        held_out=encoded[1],
        left_out=left_out,
        template=all(e.prompt.startswith(prompt.TEMPLATE.partition("{")[0]) for e in train),
    )


def _read(recipe: Recipe, say, left_out: list) -> tuple[list, list]:
    """Training and held-out examples: from two files, or from one split by question."""
    data = recipe.data
    options = {
        "labels": recipe.score.labels,
        "values": recipe.score.values,
        "rationale": data.rationale,
        "on_error": data.on_error,
    }

    def read(setting: str, source: str) -> feedback.Loaded:
        try:
            loaded = feedback.read_examples(source, **options)
        except UserError as error:
            raise UserError(f"{setting}: {error}") from error
        left_out.extend({"where": s.where, "why": s.why} for s in loaded.skipped)
        if loaded.skipped:
            first = loaded.skipped[0]
            say(f"data: {len(loaded.skipped)} broken records of {source} skipped, first {first.where}: {first.why}")
        for note in loaded.notes:
            say(f"data: {note}")
        return loaded

    loaded = read("data.train", data.train)
    train, held_out = loaded.examples, []
    if data.eval is not None:
        held_out = read("data.eval", data.eval).examples
    elif data.holdout:
        train, held_out = feedback.split_by_question(train, data.holdout, recipe.train.seed, loaded.questions)
    if data.limit is not None:
        train = train[: data.limit]
    whole = len({e.prompt for e in (*train, *held_out) if e.question == e.prompt}) if held_out else 0
    if whole:
        say(
            f"warning: {whole} prompts have no field question and no heading {feedback.RESPONSE_HEADING!r}: each "
            "counts as a question of its own, so responses to one question may be both trained on and held out"
        )
    shared = feedback.question_overlap(train, held_out)
    if shared:
        say(f"warning: {shared} questions are in both data.train and data.eval: the held-out numbers will flatter")
    return train, held_out


def _check_lengths(recipe: Recipe, config, examples: list[Encoded]) -> None:
    longest = max(len(e.ids) for e in examples)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and longest > context:
        raise UserError(
            f"the longest example has {longest} tokens, the model's context is {context}: lower data.max_len"
        )
    batches.check_fits([longest], recipe.train.max_tokens)


def _tokens(tokenizer, ids) -> str:
    return " ".join(repr(tokenizer.decode([i])) for i in ids)


def _length_summary(examples: list[Encoded]) -> str:
    lengths = sorted(len(e.ids) for e in examples)
    target = sum(len(e.ids) - e.prompt_len for e in examples)
    mean = sum(lengths) / len(lengths)
    return f"{mean:.0f} tokens on average (at most {lengths[-1]}), {target / sum(lengths):.0%} trained on"

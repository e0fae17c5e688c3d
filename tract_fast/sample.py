"""Rationales: sampled in batches by transformers, each from its own seed, with the cache that the score is read from.

The different prompts of a batch are computed once, whatever the number of draws and however often one comes; generation
goes on from that cache. A token is
chosen by inverting the distribution's cumulative sum at a uniform number that depends on (seed, prompt, draw, position)
alone, so a sample is the same wherever its prompt stands in the data. Arithmetic does depend, in the last bits, on what
else is in the batch: the same batches give the same samples.

Legend: B prompts, n draws each, S = B n sequences, P padded prompt length, T generated tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from tract_fast.data.feedback import RESULT, SCORE_SENTENCE
from tract_fast.recipe import Sampling

# a score and what shows that it is whole; the tail of a text is enough to find it in
SCORE_IS_WRITTEN = re.compile(rf"(?:{SCORE_SENTENCE.pattern}|{RESULT.pattern})\s")
TAIL = 32  # tokens
MIN_ROOM = 64  # slots
LIKELIEST = 1024


@dataclass(frozen=True)
class Sampled:
    """What generation leaves: ``tokens[s]`` of sequence s without its end token, and the cache, whose slots are the
    padded prompt (``padding[s]`` of them empty) and then the tokens, the last not always."""

    tokens: list[list[int]]
    cache: Cache
    padding: Tensor  # (S,) int64
    width: int  # P


def sample_key(seed: int, prompt: str, draw: int) -> bytes:
    """32 bytes that name a sample: its random numbers are made of them, wherever it is drawn."""
    return hashlib.sha256(f"{seed} {draw} {prompt}".encode("utf-8", "surrogatepass")).digest()


def uniforms(seed: int, prompt: str, draw: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1), float64, that only these arguments decide."""
    return np.random.default_rng(np.frombuffer(sample_key(seed, prompt, draw), dtype=np.uint32)).random(count)


class RoomyLayer(DynamicLayer):
    """A cache layer with room for tokens to come: its parent copies all it holds at every token, which was 58% of a
    step's time (SmolLM2-135M, 24 sequences of 1200 tokens, float32, two AVX2 cores). Keeps everything, windows or not.
    """

    room: tuple[Tensor, Tensor] | None = None  # (S, heads, slots, width) each; keys and values are views into them

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        ours = self.room is not None and self.keys.data_ptr() == self.room[0].data_ptr()
        if not ours or len(key_states) != len(self.room[0]) or total > self.room[0].shape[-2]:
            slots = total + max(MIN_ROOM, total // 8)
            self.room = tuple(x.new_empty(*x.shape[:2], slots, x.shape[3]) for x in (key_states, value_states))
            if held:
                self.room[0][:, :, :held], self.room[1][:, :, :held] = self.keys, self.values
        self.room[0][:, :, held:total], self.room[1][:, :, held:total] = key_states, value_states
        self.keys, self.values = (x[:, :, :total] for x in self.room)
        return self.keys, self.values


class KeepTopP(LogitsProcessor):
    """Takes out all but the likeliest tokens that together have probability ``top_p``, and those as likely as the last.

    transformers' own sorts the whole vocabulary, half of a step's time on a CPU (V = 49152); here only ``LIKELIEST``
    tokens are sorted, unless they do not suffice.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = scores.softmax(dim=-1)
        likeliest = probs.topk(min(LIKELIEST, probs.shape[1])).values
        if (likeliest.sum(-1) < self.top_p).any():
            likeliest = probs.sort(descending=True).values
        last = (likeliest.cumsum(-1) < self.top_p).sum(-1, keepdim=True).clamp_(max=likeliest.shape[1] - 1)
        return scores.masked_fill(probs < likeliest.gather(1, last), -torch.inf)


class PickByUniform(LogitsProcessor):
    """Leaves one token of each row possible: where the cumulative distribution passes the row's uniform number."""

    def __init__(self, numbers: Tensor, width: int):
        self.numbers, self.width = numbers, width  # (S, T) float64; P

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chances = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        place = self.numbers[:, input_ids.shape[1] - self.width, None] * chances[:, -1:]
        chosen = torch.searchsorted(chances, place, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class StopAtScore(StoppingCriteria):
    """Ends a sequence when its text holds a score and a space after it."""

    def __init__(self, tokenizer, width: int):
        self.tokenizer, self.width = tokenizer, width

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -TAIL:])
        return torch.tensor([bool(SCORE_IS_WRITTEN.search(tail)) for tail in tails], device=input_ids.device)


def cut_at_score(text: str) -> str:
    """A text up to where ``StopAtScore`` would have ended it."""
    found = SCORE_IS_WRITTEN.search(text)
    return text[: found.end()] if found else text


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids (B, L) int64, mask (B, L) int64, 0 at padding). A row is padded with its own first token: what is masked
    must not add a token to those that the repetition penalty counts."""
    width = max(map(len, rows))
    ids = [[row[0]] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions(mask: Tensor) -> Tensor:
    """Positions of unpadded tokens from 0 on; 0 at padding."""
    return (mask.cumsum(-1) - 1).clamp_(min=0)


def take_end_tokens(lm: nn.Module, eos_id: int) -> list[int]:
    """Tokens that end a reply: the judge's, and those that the model's own generation settings name.

    Those settings are emptied: transformers would take from them whatever ours leave open.
    """
    ends = end_tokens(lm.generation_config, eos_id)
    lm.generation_config = GenerationConfig()
    return ends


def end_tokens(settings: GenerationConfig | None, eos_id: int) -> list[int]:
    """Tokens that end a reply: the judge's, and those of a model's own generation settings."""
    own = settings.eos_token_id if settings else None
    return sorted({eos_id, *([own] if isinstance(own, int) else own or [])})


def cache_name(lm: nn.Module) -> str:
    """What a model calls the cache that it is given: it was renamed in transformers 5.24."""
    return "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"


@torch.no_grad()
def prefill(lm: nn.Module, input_ids: Tensor, mask: Tensor) -> Cache:
    """The cache of rows of tokens, (B, L) each, 0 in ``mask`` at padding on the left; L may be 0."""
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    if input_ids.shape[1]:
        own = {"attention_mask": mask, "position_ids": positions(mask), cache_name(lm): cache}
        lm(input_ids=input_ids, use_cache=True, logits_to_keep=1, **own)
    return cache


def different(rows: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """(the different ones of ``rows``, which of them each row is)."""
    numbers: dict[tuple[int, ...], int] = {}
    which = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    return list(numbers), which


def keep_slots(cache: Cache, ends: Tensor, real: Tensor) -> Tensor:
    """Cut ``cache``, in place, to the ``real[s]`` slots of each sequence before slot ``ends[s]``, (S,) int64 both;
    returns the mask of what is left, (S, max(real)) int64.

    They are moved to the end of the cache, so that positions and slots differ by a constant, as layers with a window
    need it.
    """
    most = int(real.max())
    back = torch.arange(most, device=ends.device)
    slots = (ends[:, None] - most + back).clamp_(min=0)  # (S, most)
    for layer in cache.layers:
        for name in ("keys", "values"):
            x = getattr(layer, name)  # (S, heads, slots, width)
            setattr(layer, name, x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])))
    return (back >= (most - real)[:, None]).long()


@torch.no_grad()
def sample(
    lm: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    settings: Sampling,
    ends: list[int],
    firsts: Sequence[int] | None = None,
) -> Sampled:
    """``settings.n`` rationales for each of the ``prompts``, whose rendered tokens are ``ids``, in that order.

    ``firsts`` numbers the first draw of each (None: all 0): with its text and the seed it decides the samples. A
    sequence ends with one of the tokens ``ends``, with its score (``StopAtScore``), or at ``max_new_tokens``.
    """
    device = lm.get_input_embeddings().weight.device
    firsts = firsts or [0] * len(prompts)
    rows, which = different(ids)
    input_ids, mask = left_padded(rows, device)
    width = input_ids.shape[1]
    cache = prefill(lm, input_ids[:, :-1], mask[:, :-1])
    if len(rows) < len(ids) * settings.n:
        which = torch.tensor(which, device=device).repeat_interleave(settings.n)
        cache.batch_select_indices(which)
        input_ids, mask = input_ids[which], mask[which]
    out = lm.generate(
        inputs=input_ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=False,  # PickByUniform has chosen
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
            return_dict_in_generate=True,
        ),
        logits_processor=_processors(prompts, firsts, settings, width, device),
        stopping_criteria=StoppingCriteriaList([StopAtScore(tokenizer, width)]),
        **{cache_name(lm): cache},
    )
    # what is over before the others is filled up with an end token
    rows = out.sequences[:, width:].tolist()
    tokens = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
    return Sampled(tokens, cache, width - mask.sum(-1), width)


def _processors(
    prompts: Sequence[str], firsts: Sequence[int], settings: Sampling, width: int, device: torch.device
) -> LogitsProcessorList:
    chain = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature == 0:
        return chain
    if settings.temperature != 1:
        chain.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_p < 1:
        chain.append(KeepTopP(settings.top_p))
    numbers = [
        uniforms(settings.seed, prompt, first + draw, settings.max_new_tokens)
        for prompt, first in zip(prompts, firsts, strict=True)
        for draw in range(settings.n)
    ]
    chain.append(PickByUniform(torch.from_numpy(np.stack(numbers)).to(device), width))
    return chain

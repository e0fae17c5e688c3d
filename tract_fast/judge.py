"""A trained judge: prompts in; rationale, expected score, distribution out.

A judge writes a rationale; then the score sentence is forced after it and the expected score is read where the label
would stand, from the key-value cache of the generation: the prompt is computed once. Arithmetic is in one precision,
the judge's. Legend: S sequences, K score labels, V vocabulary.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from tract_fast import quick_gguf
from tract_fast.data import prompt as prompts
from tract_fast.data.feedback import cut_rationale, has_score, read_label
from tract_fast.data.scores import ScoreScale
from tract_fast.description import Description
from tract_fast.errors import UserError
from tract_fast.loading import Say, load_weights, open_judge
from tract_fast.recipe import Sampling
from tract_fast.sample import (
    Sampled,
    cache_name,
    different,
    keep_slots,
    left_padded,
    positions,
    prefill,
    sample,
    take_end_tokens,
)
from tract_fast.shard import local_device

FINGERPRINT_ENTRIES = 64  # of each weight


@dataclass(frozen=True)
class Draw:
    """One rationale and the score read after it."""

    rationale: str
    expected_score: float
    distribution: tuple[float, ...]
    """Probability of each label as the judge was trained: among the labels, or in the vocabulary."""
    score_mass: float
    """Vocabulary probability of all score tokens together."""
    decoded_score: float | None
    """The score that the sample itself ends with; teacher-forced, the likeliest label; None where it wrote none."""
    complete: bool
    """The sample reached a score. Where it did not, the score sentence was forced after what there was."""
    tokens: int
    """Tokens generated."""


@dataclass(frozen=True)
class Judgement:
    """A judge's score of one prompt: means over its draws, and the first draw's rationale."""

    score: float
    distribution: tuple[float, ...]
    score_mass: float
    rationale: str
    decoded_score: float | None
    draws: tuple[Draw, ...]

    @classmethod
    def of(cls, draws: Sequence[Draw]) -> Judgement:
        """The mean over one or more draws; decoded scores that do not exist are left out."""
        return cls(
            score=statistics.fmean(d.expected_score for d in draws),
            distribution=tuple(map(statistics.fmean, zip(*(d.distribution for d in draws), strict=True))),
            score_mass=statistics.fmean(d.score_mass for d in draws),
            rationale=draws[0].rationale,
            decoded_score=mean_of_known(d.decoded_score for d in draws),
            draws=tuple(draws),
        )


def parts_of(
    instruction: str | None, response: str | None, reference: str | None, rubric: Mapping[str, str]
) -> dict[str, str | None]:
    """What the Feedback Collection calls the parts of a prompt. Raises UserError where one is missing."""
    given = {"instruction": instruction, "response": response, "reference": reference}
    wanted = ("criteria", "1", "2", "3", "4", "5")
    lacking = [name for name, part in given.items() if part is None]
    lacking += [f"rubric[{key!r}]" for key in wanted if rubric.get(key) is None]
    odd = [key for key in rubric if key not in wanted]
    if lacking or odd:
        told = f"{', '.join(lacking)} is missing" if lacking else f"rubric has {odd[0]!r}"
        raise UserError(
            f"{told}: a rubric is a dict of {', '.join(map(repr, wanted))}, each a text, as are the other parts"
        )
    described = {f"orig_score{k}_description": rubric.get(str(k)) for k in range(1, 6)}
    criteria = {"orig_criteria": rubric.get("criteria")} | described
    return {"orig_instruction": instruction, "orig_response": response, "orig_reference_answer": reference} | criteria


def prompts_at_once(batch: int, n: int) -> int:
    """Prompts of a batch of so many sequences, ``n`` each. Raises UserError where not one fits."""
    if batch < n or batch < 1:
        raise UserError(f"batch = {batch}: must be at least {max(n, 1)}, the rationales of one prompt (n)")
    return batch // n


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of what is not None; None where nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


class Judge:
    """A causal LM with a score scale, as ``export`` writes it, or any instruct model for comparison."""

    def __init__(self, lm: nn.Module, tokenizer, scale: ScoreScale, about: Description):
        self.lm, self.tokenizer, self.scale, self.about = lm.eval(), tokenizer, scale, about
        self.ends = take_end_tokens(lm, scale.eos_id)
        self.device = lm.get_input_embeddings().weight.device
        self.dtype = str(lm.get_input_embeddings().weight.dtype).removeprefix("torch.")
        self.context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    @quick_gguf.kept()
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        backend: str = "auto",
        dtype: str = "auto",
        device: str | torch.device | None = None,
        say: Say = lambda line: None,
    ) -> Judge:
        """A judge from the folder that ``tract-fast export`` wrote (merged, adapter, or both in it).

        Any other instruct model (folder, hub name, ``package:NAME``) is taken as a judge of scores 1 to 5. ``dtype``:
        ``bfloat16``, ``float32``, or ``auto``: what it was trained in, or float32 on a CPU that does not multiply
        bfloat16. ``backend``: where the model runs, ``auto`` (here, by transformers), ``vllm`` (its server is started,
        and ends with ``close()``), or the address of an OpenAI-compatible server that serves this judge (see
        ``served``). ``say`` receives a line per choice made here. No code of the folder runs. Raises UserError where
        the folder is no model, its ``tract.json`` does not belong to its tokenizer, or there is no such server.
        """
        opened = open_judge(str(path), say)
        if backend != "auto":
            from tract_fast.served import served_judge

            return served_judge(opened, backend, dtype=dtype, device=device, say=say)
        return cls(
            load_weights(opened, dtype, torch.device(device) if device else local_device(), say),
            opened.tokenizer,
            opened.scale,
            opened.about,
        )

    def calls(self, batch: int, n: int) -> tuple[int, int]:
        """How to judge many prompts with ``batch`` sequences under way: prompts a call, and calls at once."""
        return prompts_at_once(batch, n), 1

    def close(self) -> None:
        """End what was started for the judge; nothing where its model runs here."""

    def prompt(self, /, **parts: str) -> str:
        """The judge's prompt template filled with ``orig_instruction``, ``orig_response``, ``orig_reference_answer``,
        ``orig_criteria`` and ``orig_score1_description`` to 5. Raises UserError where it was trained on other
        prompts."""
        if self.about.prompt_template is None:
            raise UserError("this judge was trained on prompts that have no template: give whole prompts")
        missing = [name for name in prompts.PARTS if not isinstance(parts.get(name), str)]
        if missing:
            raise UserError(f"the judge's prompt needs {', '.join(missing)}, each a text")
        return prompts.fill_template(parts)

    def render(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt inside the chat template, up to where the reply starts. Raises UserError for a text
        that is no Unicode: JSON can hold half a character."""
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"the prompt holds half a character ({text[error.start]!r})") from None
        rendered = [prompts.render_prompt(self.tokenizer, t, self.about.chat_template_kwargs or {}) for t in texts]
        return prompts.tokenize(self.tokenizer, rendered)

    def room(self, new_tokens: int) -> int | None:
        """Most tokens before a rationale of ``new_tokens`` and the score sentence; None without a limit."""
        return None if self.context is None else self.context - len(self.scale.prefix_ids) - new_tokens

    def obstacle(self, text: str, length: int, new_tokens: int) -> str | None:
        """Why this prompt, of ``length`` tokens when rendered (with a given rationale, if there is one), cannot be
        judged with a rationale of up to ``new_tokens``, if so."""
        if not text.strip():
            return "the prompt is empty"
        room = self.room(new_tokens)
        if room is not None and length > room:
            new = f" with max_new_tokens = {new_tokens}" if new_tokens else ""
            context = f"the model's context of {self.context}{new} has room for {max(0, room)}"
            return f"the prompt has {length} tokens and {context}"
        return None

    def trap(self, text: str) -> str | None:
        """Why a prompt from a stranger must not be judged, if so: what it holds would be read as the dialog's own."""
        found = prompts.control_tokens(self.tokenizer, [text])
        return f"the prompt holds the text {next(iter(found))!r}, which is a control token" if found else None

    @property
    def writes(self) -> bool:
        """Whether the judge writes a rationale before its score."""
        return self.about.rationale == "keep"

    def new_tokens(self, settings: Sampling) -> int:
        """Most tokens that the judge writes."""
        return settings.max_new_tokens if self.writes else 0

    def score(
        self,
        prompt: str | Sequence[str] | None = None,
        n: int = 1,
        *,
        instruction: str | None = None,
        response: str | None = None,
        reference: str | None = None,
        rubric: Mapping[str, str] | None = None,
        batch: int = 16,
        **settings: Any,
    ) -> Judgement | list[Judgement]:
        """Judge one prompt, or a list of them in batches.

        Args:
            prompt: the text that the judge was trained to read, without chat template; one, or a list.
            n: rationales per prompt; the score is the mean over them.
            instruction, response, reference, rubric: instead of ``prompt``, the parts that the judge's prompt template
                puts together; ``rubric`` has "criteria" and what each score "1" to "5" means.
            batch: sequences (prompts times ``n``) generated at a time.
            settings: ``temperature, top_p, repetition_penalty, max_new_tokens, seed`` of ``recipe.Sampling``.

        Raises UserError for parts that are missing or have no template, an empty prompt, one longer than the model's
        context allows, and one that holds a control token: a response could end its turn with it and write its own
        judgement.
        """
        if prompt is not None and any(part is not None for part in (instruction, response, reference, rubric)):
            raise UserError("score takes a prompt or its parts (instruction, response, reference, rubric), not both")
        if prompt is None:
            prompt = self.prompt(**parts_of(instruction, response, reference, rubric or {}))
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        chosen = Sampling(n=n, **settings)
        step = prompts_at_once(batch, n)
        if not texts:
            return []
        ids = self.render(texts)
        for number, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
            if why := self.trap(text) or self.obstacle(text, len(tokens), self.new_tokens(chosen)):
                raise UserError(why if isinstance(prompt, str) else f"prompt {number}: {why}")
        found: list[Judgement] = []
        for i in range(0, len(texts), step):
            found += self.judge(texts[i : i + step], ids[i : i + step], chosen)
        return found[0] if isinstance(prompt, str) else found

    def judge(
        self,
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        settings: Sampling,
        firsts: Sequence[int] | None = None,
    ) -> list[Judgement]:
        """One batch: a judgement for each of ``texts``, rendered as ``ids``. ``firsts`` numbers the first draw of each:
        a text that comes twice is judged by other samples where its number differs; None: all 0."""
        if not self.writes:
            return self.given(ids, [""] * len(ids))
        out = sample(self.lm, self.tokenizer, texts, ids, settings, self.ends, firsts)
        replies = [self.text(tokens) for tokens in out.tokens]
        kept = [self.rationale_tokens(tokens, reply) for tokens, reply in zip(out.tokens, replies, strict=True)]
        log_probs = self._log_probs(after(out, kept, ids, settings.n, self.scale.prefix_ids), out.cache)
        return self.judgements(replies, [len(tokens) for tokens in out.tokens], log_probs, settings.n)

    def judgements(self, replies: Sequence[str], counts: Sequence[int], log_probs: Tensor, n: int) -> list[Judgement]:
        """What was sampled and read: ``n`` replies a prompt, their lengths in tokens, and ``log_probs`` (S, K) of the
        score tokens in the vocabulary after each rationale."""
        probs, mass, expected = self._scores(log_probs)
        draws = [
            Draw(
                rationale=cut_rationale(reply),
                expected_score=expected[s],
                distribution=tuple(probs[s]),
                score_mass=mass[s],
                decoded_score=self._decoded(reply),
                complete=has_score(reply),
                tokens=counts[s],
            )
            for s, reply in enumerate(replies)
        ]
        return [Judgement.of(draws[i : i + n]) for i in range(0, len(draws), n)]

    def given(self, ids: Sequence[Sequence[int]], rationales: Sequence[str]) -> list[Judgement]:
        """One batch, teacher-forced: the score after a given rationale each; decoded is the likeliest label. A prompt
        that comes several times is computed once."""
        tails = prompts.tokenize(self.tokenizer, list(rationales))
        whole = [[*head, *tail, *self.scale.prefix_ids] for head, tail in zip(ids, tails, strict=True)]
        probs, mass, expected = self._scores(self.log_probs_after(whole, [len(head) for head in ids]))
        return [
            Judgement.of(
                [
                    Draw(
                        rationale=rationale,
                        expected_score=expected[s],
                        distribution=tuple(probs[s]),
                        score_mass=mass[s],
                        decoded_score=self.scale.values[max(range(len(probs[s])), key=probs[s].__getitem__)],
                        complete=True,
                        tokens=0,
                    )
                ]
            )
            for s, rationale in enumerate(rationales)
        ]

    def log_probs_after(self, rows: Sequence[Sequence[int]], prompt_lens: Sequence[int]) -> Tensor:
        """(S, K) float64: of the score tokens in the vocabulary, as the next token of each of the ``rows``, which start
        with prompts of so many tokens. Prompts that several have are computed once."""
        heads, which = different([row[:length] for row, length in zip(rows, prompt_lens, strict=True)])
        width = max(1, *(len(row) - length for row, length in zip(rows, prompt_lens, strict=True)))
        cached = [max(0, len(row) - width) for row in rows]  # as many tokens remain of each, if it has as many
        if len(heads) == len(rows) or not any(cached):
            input_ids, mask = left_padded(rows, self.device)
            inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions(mask)}
            return self._log_probs(inputs, None)
        padded, mask = left_padded(heads, self.device)
        cache = prefill(self.lm, padded, mask)
        which, real = (torch.tensor(x, device=self.device) for x in (which, cached))
        cache.batch_select_indices(which)
        held = keep_slots(cache, (mask.shape[1] - mask.sum(-1))[which] + real, real)
        input_ids, mask = left_padded([row[start:] for row, start in zip(rows, cached, strict=True)], self.device)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.cat([held, mask], dim=1),
            "position_ids": real[:, None] + positions(mask),
        }
        return self._log_probs(inputs, cache)

    @torch.no_grad()
    def _log_probs(self, inputs: dict[str, Tensor], cache: Cache | None) -> Tensor:
        """(S, K) float64: of the score tokens in the vocabulary, after the last position of ``inputs``."""
        out = self.lm(**inputs, **{cache_name(self.lm): cache}, use_cache=cache is not None, logits_to_keep=1)
        logits = out.logits[:, -1].double()
        if not logits.isfinite().all():
            raise UserError(
                f"the model's logits are not finite, in {self.dtype}: its weights are broken, or its range is too small"
            )
        return logits[:, list(self.scale.token_ids)] - logits.logsumexp(-1, keepdim=True)

    def _scores(self, log_probs: Tensor) -> tuple[list, list, list]:
        """Score probabilities (S, K), score mass (S,), expected scores (S,) from ``log_probs`` (S, K)."""
        in_vocabulary = log_probs.exp()
        probs = log_probs.softmax(-1) if self.about.normalize == "scores" else in_vocabulary
        expected = probs @ torch.tensor(self.scale.values, dtype=torch.float64, device=probs.device)
        return probs.tolist(), in_vocabulary.sum(-1).tolist(), expected.tolist()

    def rationale_tokens(self, tokens: list[int], reply: str) -> int:
        """How many of a sample's tokens are its rationale: as few as spell it out. What follows is forced anew."""
        rationale = cut_rationale(reply)
        if not rationale:
            return 0
        end = reply.index(rationale) + len(rationale)
        count = len(tokens)
        while self.text(tokens[: count - 1]).startswith(reply[:end]):  # half a character decodes to another one
            count -= 1
        return count

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decoded(self, reply: str) -> float | None:
        label = read_label(reply, self.scale.labels)
        return None if label is None else self.scale.values[self.scale.labels.index(label)]

    def fingerprint(self) -> str:
        """A hash of entries spread over all weights, and of what else decides a score."""
        config = {
            k: v for k, v in self.lm.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
        }
        how = self.lm.config._attn_implementation, self.ends, self.tokenizer.chat_template
        digest = hashlib.sha256(repr((self.scale, self.about, self.dtype, config, how)).encode())
        for name, p in sorted(self.lm.named_parameters()):
            flat = p.detach().flatten()
            step = max(1, len(flat) // FINGERPRINT_ENTRIES)
            digest.update(f"{name} {tuple(p.shape)}".encode() + flat[::step].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def after(
    out: Sampled, kept: Sequence[int], ids: Sequence[Sequence[int]], n: int, forced: Sequence[int]
) -> dict[str, Tensor]:
    """Inputs that go on from ``out.cache``, which is cut to ``kept[s]`` tokens after each prompt, with ``forced``.

    The last token that is kept is computed again, before the forced ones: generation leaves the last one out of the
    cache.
    """
    device = out.padding.device
    length = out.width + torch.tensor(kept, device=device) - 1  # slots to keep, padding included
    real = length - out.padding
    cached = keep_slots(out.cache, length, real)
    last = [t[k - 1] if k else ids[s // n][-1] for s, (t, k) in enumerate(zip(out.tokens, kept, strict=True))]
    tail = torch.tensor([[token, *forced] for token in last], device=device)
    return {
        "input_ids": tail,
        "attention_mask": torch.cat([cached, torch.ones_like(tail)], dim=1),
        "position_ids": real[:, None] + torch.arange(tail.shape[1], device=device),
    }

"""From an example to token ids: template, chat template, target text, and where the score is.

A sequence is the rendered prompt, the rationale, the score sentence, one score token and EOS. Each piece is tokenized
on its own and the ids are joined, because that is how a judge meets them: the prompt is given, the rationale is written
after it, the score sentence is forced after that. The chat template writes whatever BOS there is; encoding adds none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from rich.text import Text

from tract_fast.data.records import Skipped
from tract_fast.data.scores import ANCHORS, SENTENCE, ScoreScale
from tract_fast.errors import UserError

if TYPE_CHECKING:
    from tract_fast.data.feedback import Example

# The prompt of the Feedback Collection and of its benchmarks, letter for letter (arXiv 2310.08491).
TEMPLATE = """###Task Description:
An instruction (might include an Input inside it), a response to evaluate, a reference answer that gets a score of 5, \
and a score rubric representing a evaluation criteria are given.
1. Write a detailed feedback that assess the quality of the response strictly based on the given score rubric, not \
evaluating in general.
2. After writing a feedback, write a score that is an integer between 1 and 5. You should refer to the score rubric.
3. The output format should look as follows: "Feedback: (write a feedback for criteria) [RESULT] (an integer number \
between 1 and 5)"
4. Please do not generate any other opening, closing, and explanations.

###The instruction to evaluate:
{orig_instruction}

###Response to evaluate:
{orig_response}

###Reference Answer (Score 5):
{orig_reference_answer}

###Score Rubrics:
[{orig_criteria}]
Score 1: {orig_score1_description}
Score 2: {orig_score2_description}
Score 3: {orig_score3_description}
Score 4: {orig_score4_description}
Score 5: {orig_score5_description}

###Feedback: """

PARTS = (
    "orig_instruction",
    "orig_response",
    "orig_reference_answer",
    "orig_criteria",
    *(f"orig_score{n}_description" for n in range(1, 6)),
)

# What this module decides itself when it calls the chat template.
RESERVED = (
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
)

CHUNK = 1000  # examples tokenized at a time: lists of Python ints take ten times the memory of what is kept


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One sequence: ``ids`` (L,) int32 is prompt and target; ``ids[-2]`` is the score token, ``ids[-1]`` EOS.

    The target starts at ``prompt_len``. ``label_index`` is the label in the text, ``score`` the number that the squared
    error is taken to.
    """

    ids: np.ndarray | tuple[int, ...]
    prompt_len: int
    label_index: int
    score: float
    weight: float
    id: str
    question: str


def fill_template(parts: Mapping[str, str]) -> str:
    """The Feedback Collection prompt of ``parts`` (the names in PARTS)."""
    return TEMPLATE.format_map(parts)


def render_prompt(tokenizer: Any, prompt: str, chat_template_kwargs: Mapping[str, Any]) -> str:
    """The prompt as one user turn of the tokenizer's chat template, up to where the reply starts.

    Raises UserError when there is no chat template or it fails.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "model.path: the tokenizer has no chat template, so there is no telling how it expects a prompt; take an "
            "instruct model, or put a chat_template.jinja beside its files"
        )
    for name in RESERVED:
        if name in chat_template_kwargs:
            raise UserError(f"data.chat_template_kwargs: {name} is decided by tract_fast; remove it")
    turns = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **dict(chat_template_kwargs)
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"the chat template failed with data.chat_template_kwargs = {dict(chat_template_kwargs)}: {error}"
        ) from error


def encode(
    tokenizer: Any,
    scale: ScoreScale,
    examples: Sequence[Example],
    *,
    chat_template_kwargs: Mapping[str, Any],
    max_len: int,
    max_dropped: float,
    on_error: str,
) -> tuple[list[Encoded], list[Skipped]]:
    """Encode ``examples`` in order; returns those that were encoded and those that were left out.

    Left out are examples of more than ``max_len`` tokens: nothing is ever cut, since the score is at the end. So is,
    with ``on_error`` "skip", a rationale that holds one of the tokenizer's special tokens, such as EOS, which would end
    it there; "fail" raises. Raises UserError, too, when more than the share ``max_dropped`` is too long, and where the
    chat template fails.
    """
    kept: list[Encoded] = []
    left_out: list[Skipped] = []
    too_long: list[int] = []
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        for example, encoded in zip(chunk, _encode_chunk(tokenizer, scale, chunk, chat_template_kwargs), strict=True):
            if isinstance(encoded, str):
                if on_error == "fail":
                    raise UserError(f"{example.where}: {encoded}; data.on_error: skip leaves such records out")
                left_out.append(Skipped(example.where, encoded))
            elif len(encoded.ids) > max_len:
                too_long.append(len(encoded.ids))
                left_out.append(
                    Skipped(example.where, f"{len(encoded.ids)} tokens, more than data.max_len = {max_len}")
                )
            else:
                kept.append(encoded)
    if len(too_long) > max_dropped * len(examples):
        raise UserError(
            f"data.max_len = {max_len}: {len(too_long)} of {len(examples)} examples are longer (the longest has "
            f"{max(too_long)} tokens), and data.max_dropped = {max_dropped} allows a share of "
            f"{max_dropped:.1%}; raise data.max_len, or data.max_dropped to train without them"
        )
    return kept, left_out


def control_tokens(tokenizer: Any, texts: Iterable[str]) -> dict[str, int]:
    """How many of the texts hold each of the tokenizer's special tokens, which it will read as control tokens."""
    texts = set(texts)
    counts = {token: sum(token in text for text in texts) for token in tokenizer.all_special_tokens}
    return {token: count for token, count in counts.items() if count}


def _encode_chunk(
    tokenizer: Any,
    scale: ScoreScale,
    examples: Sequence[Example],
    chat_template_kwargs: Mapping[str, Any],
) -> list[Encoded | str]:
    """Each example encoded, or what is wrong with it."""
    prompts = list(dict.fromkeys(e.prompt for e in examples))  # a prompt often has several judgements
    rendered = [render_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    prompt_ids = dict(zip(prompts, tokenize(tokenizer, rendered), strict=True))
    rationales = tokenize(tokenizer, [e.rationale for e in examples])
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        special.pop(tokenizer.unk_token_id, None)  # any text may hold a character that the tokenizer lacks
    encoded: list[Encoded | str] = []
    for e, rationale_ids in zip(examples, rationales, strict=True):
        found = special.keys() & set(rationale_ids)
        if found:
            encoded.append(f"the rationale holds {special[min(found)]!r}, which is a control token: remove it")
            continue
        label_index = scale.nearest(e.score)
        target = [*rationale_ids, *scale.prefix_ids, scale.token_ids[label_index], scale.eos_id]
        encoded.append(
            Encoded(
                ids=np.array([*prompt_ids[e.prompt], *target], dtype=np.int32),
                prompt_len=len(prompt_ids[e.prompt]),
                label_index=label_index,
                score=e.score,
                weight=e.weight,
                id=e.id,
                question=e.question,
            )
        )
    return encoded


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without any that the tokenizer would add around it."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def check_tokenizer(tokenizer: Any, scale: ScoreScale, chat_template_kwargs: Mapping[str, Any]) -> None:
    """Start-up checks on one prompt. Raises UserError when

    - the chat template leaves the prompt out;
    - the BOS that the template writes is doubled, is not one token, or is joined by one from encoding;
    - prompt and reply, tokenized apart as generation has them, differ from the text tokenized whole.
    """
    prompt = "Is 7 a prime number?"
    rendered = render_prompt(tokenizer, prompt, chat_template_kwargs)
    if prompt not in rendered:
        raise UserError(f"the chat template leaves the prompt out: it makes {rendered[:80]!r} of {prompt!r}")
    (ids,) = tokenize(tokenizer, [rendered])
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos and ids.count(bos_id) < rendered.count(bos):
        raise UserError(f"the tokenizer does not read the BOS {bos!r} of its chat template as one token")
    if bos and ids.count(bos_id) > rendered.count(bos):
        raise UserError(f"the tokenizer adds a BOS {bos!r} to a text even with add_special_tokens=False")
    if bos and ids[:2] == [bos_id, bos_id]:
        raise UserError(f"the rendered prompt starts with the BOS {bos!r} twice: take one out of the chat template")
    for reply in (ANCHORS[0], SENTENCE + scale.labels[0]):
        (reply_ids,) = tokenize(tokenizer, [reply])
        # SentencePiece tokenizers put a space before a text of its own, so a reply starts with one.
        if ids + reply_ids not in tokenize(tokenizer, [rendered + reply, f"{rendered} {reply}"]):
            raise UserError(
                f"the tokenizer joins the end of the chat template ({rendered[-12:]!r}) to the reply's first word: "
                "take the white space at the end of its generation prompt out"
            )


def show(tokenizer: Any, scale: ScoreScale, encoded: Encoded) -> Text:
    """One example token by token: prompt dim, trained tokens green, every other one underlined, the score reversed."""
    ids = [int(i) for i in encoded.ids]
    text = Text(overflow="fold")
    shown = tokenizer.decode(ids[: encoded.prompt_len], clean_up_tokenization_spaces=False)
    text.append(shown, style="dim")
    for position in range(encoded.prompt_len, len(ids)):
        so_far = tokenizer.decode(ids[: position + 1], clean_up_tokenization_spaces=False)
        if so_far.endswith("\N{REPLACEMENT CHARACTER}") and position < len(ids) - 2:
            continue  # a part of a character: shown with the token that completes it
        style = "green underline" if (position - encoded.prompt_len) % 2 else "green"
        text.append(so_far[len(shown) :], style="bold reverse green" if position == len(ids) - 2 else style)
        shown = so_far
    rivals = [label for k, label in enumerate(scale.labels) if k != encoded.label_index]
    text.append(f"\n{encoded.id}: score {encoded.score:g}, ", style="bold")
    text.append(f"label {scale.labels[encoded.label_index]} instead of {', '.join(rivals)}; ", style="bold")
    text.append(f"{encoded.prompt_len} prompt tokens and {len(ids) - encoded.prompt_len} trained on\n", style="bold")
    return text

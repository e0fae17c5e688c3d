"""From example to ids: the template letter for letter, pieces that equal the whole, and the start-up checks."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from tests.tiny import (
    smollm2_tokenizer,
    tiny_bos_tokenizer,
    tiny_metaspace_tokenizer,
    tiny_tokenizer,
    vicuna_eval,
)
from tract_fast.data import prompt as prompts
from tract_fast.data.feedback import Example, read_examples
from tract_fast.data.prompt import check_tokenizer, control_tokens, encode, fill_template, render_prompt, show
from tract_fast.data.records import Skipped
from tract_fast.data.scores import find_scale
from tract_fast.errors import UserError

LABELS, VALUES = ("1", "2", "3", "4", "5"), (1.0, 2.0, 3.0, 4.0, 5.0)
TOKENIZERS = [tiny_tokenizer, tiny_bos_tokenizer, tiny_metaspace_tokenizer, smollm2_tokenizer]
RATIONALE = 'It is kind, but "late" by 12 days: the überraschung ☃ is gone.'


def scale_of(tokenizer, rationale="keep"):
    return find_scale(tokenizer, LABELS, VALUES, rationale=rationale)


def encode_one(tokenizer, scale, example, chat_template_kwargs):
    options = {"max_len": 10_000, "max_dropped": 0.0, "on_error": "fail"}
    (encoded,), _ = encode(tokenizer, scale, [example], chat_template_kwargs=chat_template_kwargs, **options)
    return encoded


def judged(prompt="Is it [b]kind[/b]?\n\n###Feedback: ", rationale=RATIONALE, score=4.0, **more) -> Example:
    return Example(**{"id": "x:1", "question": "q", **more}, prompt=prompt, rationale=rationale, score=score)


def test_template_rebuilds_the_real_prompts():
    parts = [
        r"###The instruction to evaluate:\n(.*?)\n\n###Response to evaluate:\n(.*)\n\n",
        r"###Reference Answer \(Score 5\):\n(.*)\n\n###Score Rubrics:\n\[(.*?)\]\n",
        *(rf"Score {n}: (.*)\n" for n in range(1, 6)),
    ]
    pattern = re.compile("".join(parts), re.DOTALL)
    records = json.loads(vicuna_eval().read_text(encoding="utf-8"))
    for record in records:
        found = pattern.search(record["instruction"]).groups()
        found = [*found[:-1], found[-1].rstrip("\n")]
        assert fill_template(dict(zip(prompts.PARTS, found, strict=True))) == record["instruction"]
    assert len(records) == 320


def test_template_takes_braces_as_they_are():
    assert "{orig_response} {}" in fill_template({part: "{orig_response} {}" for part in prompts.PARTS})


@pytest.mark.parametrize("rationale", ["keep", "drop"])
@pytest.mark.parametrize("make", TOKENIZERS)
def test_pieces_equal_the_whole(make, rationale):
    """What is trained on is the tokenization of the whole text, from its one BOS to the score and EOS."""
    tokenizer = make()
    scale = scale_of(tokenizer, rationale)
    check_tokenizer(tokenizer, scale, {})
    e = judged(rationale=RATIONALE if rationale == "keep" else "", score=3.5, weight=2.0)
    got = encode_one(tokenizer, scale, e, {})
    ids = list(got.ids)
    assert (got.label_index, got.score, got.weight, got.id, got.question) == (2, 3.5, 2.0, "x:1", "q")
    assert ids[-2:] == [scale.token_ids[2], tokenizer.eos_token_id]
    rendered = render_prompt(tokenizer, e.prompt, {})
    space = " " if make is tiny_metaspace_tokenizer else ""
    reply = f"{e.rationale} So the overall score is 3" if rationale == "keep" else "So the overall score is 3"
    assert ids[:-1] == tokenizer.encode(f"{rendered}{space}{reply}", add_special_tokens=False)
    assert ids[: got.prompt_len] == tokenizer.encode(rendered, add_special_tokens=False)
    assert ids[0] == tokenizer.bos_token_id != ids[1]
    assert ids.count(tokenizer.bos_token_id) == rendered.count(tokenizer.bos_token)
    if make is tiny_metaspace_tokenizer:  # its template, too, writes the reply with a space
        turns = [{"role": "user", "content": e.prompt}, {"role": "assistant", "content": reply}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert ids == tokenizer.encode(whole, add_special_tokens=False)


def test_real_prompts_in_the_real_tokenizer():
    tokenizer = smollm2_tokenizer()
    scale = scale_of(tokenizer)
    loaded = read_examples(str(vicuna_eval()), labels=LABELS, values=VALUES, rationale="keep", on_error="fail")
    chosen = loaded.examples[::48]
    kept, dropped = encode(
        tokenizer, scale, chosen, chat_template_kwargs={}, max_len=3000, max_dropped=0.0, on_error="fail"
    )
    assert not dropped and len(kept) == 20
    for example, encoded in zip(chosen, kept, strict=True):
        whole = (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n"
            f"{example.rationale} So the overall score is {example.score:g}<|im_end|>"
        )
        assert list(encoded.ids) == tokenizer.encode(whole, add_special_tokens=False)
        assert list(encoded.ids).count(tokenizer.bos_token_id) == 3, "its BOS opens every turn"
    mean = sum(e.prompt_len for e in kept) / len(kept)
    assert 950 < mean < 1250


def test_many_are_each_alone():
    tokenizer = tiny_tokenizer()
    scale = scale_of(tokenizer)
    examples = [judged(f"Question {i % 3}?", "It is kind. " * (1 + i % 4), 1 + i % 5, id=f"x:{i}") for i in range(25)]
    options = {"chat_template_kwargs": {}, "max_len": 10_000, "max_dropped": 0.0, "on_error": "fail"}
    kept, dropped = encode(tokenizer, scale, examples, **options)
    assert dropped == []
    for got, e in zip(kept, examples, strict=True):
        alone = encode_one(tokenizer, scale, e, {})
        assert got.ids.dtype == np.int32 and np.array_equal(got.ids, alone.ids)
        assert (got.prompt_len, got.label_index, got.id) == (alone.prompt_len, alone.label_index, e.id)
    bare = scale_of(tokenizer, "drop")
    for got in encode(tokenizer, bare, [replace(e, rationale="") for e in examples], **options)[0]:
        assert tokenizer.decode(got.ids[got.prompt_len :]) == f"So the overall score is {got.score:g}<|im_end|>"


def test_chunks_join_without_a_seam(monkeypatch):
    tokenizer = tiny_tokenizer()
    scale = scale_of(tokenizer)
    examples = [judged(f"Question {i}?", score=1 + i % 5, id=f"x:{i}") for i in range(7)]
    options = {"chat_template_kwargs": {}, "max_len": 10_000, "max_dropped": 0.0, "on_error": "fail"}
    whole = encode(tokenizer, scale, examples, **options)[0]
    monkeypatch.setattr(prompts, "CHUNK", 3)
    parts = encode(tokenizer, scale, examples, **options)[0]
    assert [(e.id, e.ids.tolist()) for e in parts] == [(e.id, e.ids.tolist()) for e in whole]


def test_too_long_is_left_out_and_never_cut():
    tokenizer = tiny_tokenizer()
    scale = scale_of(tokenizer)
    examples = [judged("Why?", "It is kind. " * n, id=f"x:{n}", where=f"f:{n}") for n in range(1, 11)]
    lengths = [len(encode_one(tokenizer, scale, e, {}).ids) for e in examples]
    options = {"chat_template_kwargs": {}, "on_error": "fail", "max_len": lengths[7]}
    kept, dropped = encode(tokenizer, scale, examples, max_dropped=0.2, **options)
    assert [len(e.ids) for e in kept] == lengths[:8]
    assert dropped == [
        Skipped(f"f:{n}", f"{lengths[n - 1]} tokens, more than data.max_len = {lengths[7]}") for n in (9, 10)
    ]
    message = (
        rf"^data.max_len = {lengths[7]}: 2 of 10 examples are longer \(the longest has {lengths[9]} tokens\), and "
        r"data.max_dropped = 0.19 allows a share of 19.0%; raise data.max_len"
    )
    with pytest.raises(UserError, match=message):
        encode(tokenizer, scale, examples, max_dropped=0.19, **options)
    assert encode(tokenizer, scale, [], max_dropped=0.0, **options) == ([], [])


@pytest.mark.parametrize("make", TOKENIZERS)
def test_rationale_with_a_control_token(make):
    """It would end the reply, or open a turn, in the middle of the text."""
    tokenizer = make()
    scale = scale_of(tokenizer)
    options = {"chat_template_kwargs": {}, "max_len": 10_000, "max_dropped": 0.0}
    for token in {tokenizer.bos_token, tokenizer.eos_token}:
        examples = [judged(where="f:1"), judged(rationale=f"It is {token} kind.", where="f:2"), judged(where="f:3")]
        with pytest.raises(UserError, match=rf"^f:2: the rationale holds '{re.escape(token)}'.*data.on_error: skip"):
            encode(tokenizer, scale, examples, on_error="fail", **options)
        kept, left_out = encode(tokenizer, scale, examples, on_error="skip", **options)
        assert len(kept) == 2 and [x.where for x in left_out] == ["f:2"]
        assert control_tokens(tokenizer, [f"What is {token}?", "What is it?", f"What is {token}?"]) == {token: 1}


def test_chat_template_kwargs_reach_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ mood }}" + tokenizer.chat_template
    assert render_prompt(tokenizer, "Hi", {"mood": "calm"}).startswith("calm<|im_start|>user\nHi<|im_end|>")
    got = encode_one(tokenizer, scale_of(tokenizer), judged(), {"mood": "terse"})
    assert tokenizer.decode(got.ids).startswith("terse<|im_start|>user")


def test_chat_template_that_cannot_render():
    tokenizer = tiny_tokenizer()
    for name in ("tokenize", "add_generation_prompt", "chat_template", "continue_final_message", "conversation"):
        with pytest.raises(UserError, match=f"data.chat_template_kwargs: {name} is decided by tract_fast; remove it"):
            render_prompt(tokenizer, "Hi", {name: True})
    for template in ("{{ raise_exception('no') }}", "{{ 1 + kind }}", "{% if %}", "{{ x.y.z }}"):
        tokenizer.chat_template = template
        with pytest.raises(
            UserError, match=r"the chat template failed with data.chat_template_kwargs = {'kind': 'b'}: "
        ):
            render_prompt(tokenizer, "Hi", {"kind": "b"})
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        render_prompt(tokenizer, "Hi", {})


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (tiny_bos_tokenizer, lambda t: "{{ bos_token }}" + t, r"starts with the BOS '<\|begin\|>' twice"),
        (tiny_metaspace_tokenizer, lambda t: "{{ bos_token }}" + t, "starts with the BOS '<s>' twice"),
        (tiny_tokenizer, lambda t: t.replace("m['content']", "''"), "leaves the prompt out: it makes"),
        (tiny_tokenizer, lambda t: t.replace("assistant\n", "assistant: "), r"joins the end of .* \('|>assistant: '\)"),
    ],
)
def test_template_that_would_harm_is_refused(make, change, message):
    tokenizer = make()
    scale = scale_of(tokenizer)
    check_tokenizer(tokenizer, scale, {})
    tokenizer.chat_template = change(tokenizer.chat_template)
    with pytest.raises(UserError, match=message):
        check_tokenizer(tokenizer, scale, {})


def test_template_without_bos_stays_without():
    """What generation will do, too: the template decides, and the post-processor's BOS is never asked for."""
    tokenizer = tiny_bos_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    scale = scale_of(tokenizer)
    check_tokenizer(tokenizer, scale, {})
    assert tokenizer.bos_token_id not in encode_one(tokenizer, scale, judged(), {}).ids
    assert tokenizer.encode("Hi")[0] == tokenizer.bos_token_id


def test_tokenizer_that_reads_bos_as_text_or_adds_one_is_refused():
    tokenizer = tiny_bos_tokenizer()
    scale = scale_of(tokenizer)
    tokenizer.split_special_tokens = True
    with pytest.raises(UserError, match=r"does not read the BOS '<\|begin\|>' of its chat template as one token"):
        check_tokenizer(tokenizer, scale, {})

    class Insistent(type(tokenizer)):  # as tokenizers that come with code of their own may be
        def __call__(self, text, add_special_tokens=True, **options):
            return super().__call__(text, add_special_tokens=True, **options)

    tokenizer = tiny_bos_tokenizer()
    tokenizer.__class__ = Insistent
    with pytest.raises(UserError, match=r"adds a BOS '<\|begin\|>' to a text even with add_special_tokens=False"):
        check_tokenizer(tokenizer, scale, {})


@pytest.mark.parametrize("make", TOKENIZERS)
def test_show(make):
    """The text is whole, markup in it is text, and each part has its style."""
    tokenizer = make()
    scale = scale_of(tokenizer)
    got = encode_one(tokenizer, scale, judged(score=4.25), {})
    text = show(tokenizer, scale, got)
    assert text.plain.startswith(tokenizer.decode(got.ids) + "\nx:1: score 4.25, label 4 instead of 1, 2, 3, 5; ")
    assert f"{got.prompt_len} prompt tokens and {len(got.ids) - got.prompt_len} trained on" in text.plain
    spans = [(text.plain[s.start : s.end], str(s.style)) for s in text.spans]
    assert spans[0] == (tokenizer.decode(got.ids[: got.prompt_len]), "dim")
    assert [(piece, style) for piece, style in spans if "reverse" in style] == [("4", "bold reverse green")]
    assert (tokenizer.eos_token, "green") in spans or (tokenizer.eos_token, "green underline") in spans
    assert any("☃" in piece for piece, _ in spans), "a character of several tokens is shown once, whole"
    assert "\N{REPLACEMENT CHARACTER}" not in text.plain
    styles = [style for _, style in spans if style.startswith("green")]
    assert {"green", "green underline"} == set(styles)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(text)
    assert "[b]kind[/b]" in console.export_text()

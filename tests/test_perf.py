"""Operations counted on paper against those that PyTorch's own counter sees."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny_runs import tiny_recipe
from tract_fast import model, perf
from tract_fast.data.batch import collate, normalizer
from tract_fast.prepare import prepare

CPU = torch.device("cpu")


def counted(recipe):
    """(operations of products that PyTorch counts in a step, the model's work, document lengths, rows)."""
    data = prepare(recipe, lambda text: None)
    made = model.build(recipe, data.config, data.tokenizer, data.scale, CPU, lambda text: None)
    made.train()
    examples = data.train[:5]
    norm = normalizer(examples, ce_weight=1.0, regression_weight=1.0, score_ce=True, ce_reduction="token")
    batch = collate(examples, norm, score_ce=True)
    with FlopCounterMode(display=False) as counter:
        made(batch).loss.backward()
    products = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    seen = sum(v for k, v in products.items() if k in ("aten.mm", "aten.addmm"))
    return (
        seen,
        perf.work_of(made.blocks, made.head, data.config),
        [len(e.ids) for e in examples],
        len(batch.rows),
        made,
    )


def without_attention(work):
    return perf.Work(**{**work.__dict__, "windows": ()})


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3"])
def test_full_fine_tuning(tmp_path, family):
    """Every product of weights, and the head on its rows alone, to the last operation."""
    seen, work, lengths, rows, _ = counted(tiny_recipe(tmp_path, family=family, loss__implementation="reference"))
    assert without_attention(work).flops(lengths, lengths, rows) == seen
    assert work.frozen == 0 and work.head_trained


def test_lora_computes_no_gradient_of_frozen_weights(tmp_path):
    """Less what the first layer need not hand on: nothing before it is trained."""
    recipe = tiny_recipe(tmp_path, lora__rank=4, loss__implementation="reference")
    seen, work, lengths, rows, made = counted(recipe)
    attention = made.blocks[0].self_attn
    spared = sum(
        p.numel() for n, p in attention.named_parameters() if n[0] in "qkv" and ("base_layer" in n or "lora_A" in n)
    )
    assert without_attention(work).flops(lengths, lengths, rows) - 2 * sum(lengths) * spared == seen
    assert not work.head_trained and 0 < work.trained < work.frozen
    full = perf.Work(**{**work.__dict__, "trained": work.trained + work.frozen, "frozen": 0, "head_trained": True})
    assert full.flops(lengths, lengths, rows) > 1.3 * work.flops(lengths, lengths, rows)


@pytest.mark.parametrize("window", [None, 1, 4, 9, 12])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (9, 9), (3, 9), (1, 9), (8, 9)])
def test_pairs_of_causal_attention(queries, keys, window):
    ahead = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    mask = (ahead >= 0) & (ahead < (window or keys))
    assert perf.pairs(queries, keys, window) == mask.sum().item()


def test_attention_counts_each_document_by_itself(tmp_path):
    """Two documents of 10 tokens are less work than one of 20, by two products of every pair that does not meet."""
    _, work, *_ = counted(tiny_recipe(tmp_path))
    apart = 20 * 21 // 2 - 2 * (10 * 11 // 2)
    assert work.flops([20], [20], 3) - work.flops([10, 10], [10, 10], 3) == 2 * 12 * 32 * apart  # layers, heads * width
    shared = work.flops([10, 4, 4], [10, 14, 14], 3)  # a prompt of 10 and two rationales of 4
    assert work.flops([14, 14], [14, 14], 3) - shared == work.flops([10], [10], 0), "the prompt is computed once"
    _, windowed, *_ = counted(tiny_recipe(tmp_path, family="mistral"))
    assert windowed.windows == (5, 5)


def test_experts_are_not_counted_wrongly():
    from transformers import MixtralConfig

    from tests.tiny_models import SIZE, random_lm

    lm = random_lm(MixtralConfig(vocab_size=64, num_local_experts=4, **SIZE))
    assert perf.work_of(list(lm.model.layers), lm.lm_head, lm.config) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some GPU", None),
    ],
)
def test_peak_of_a_gpu_goes_by_its_whole_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found, told = perf.peak_flops(torch.device("cuda"), None)
    assert found == (tflops and tflops * 1e12)
    assert name in told and ("set run.peak_tflops" in told) is (tflops is None)


def test_peak():
    assert perf.peak_flops(CPU, None)[0] is None
    assert perf.peak_flops(CPU, 2.5) == (2.5e12, "run.peak_tflops")

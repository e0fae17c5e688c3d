"""Which implementation runs: by device, sizes, gradients and budget, with a reason for each."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tract_fast import linear_tract_loss
from tract_fast.loss.choice import choose

LLAMA = {"n_vocab": 128_256, "width": 4096}


@pytest.fixture(autouse=True)
def a_machine_with_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("options", "expected", "reason"),
    [
        ({"device_type": "cpu", "dtype": torch.float32} | LLAMA, "chunked", "measured"),
        ({"device_type": "cpu", "dtype": torch.float64} | LLAMA, "reference", "float64"),
        ({"device_type": "cuda", "dtype": torch.float64} | LLAMA, "reference", "float64"),
        ({"device_type": "cuda", "dtype": torch.bfloat16} | LLAMA, "chunked", "D = 4096"),
        ({"device_type": "xpu", "dtype": torch.bfloat16} | LLAMA, "chunked", "no triton for xpu"),
        ({"device_type": "cuda", "dtype": torch.bfloat16, "n_vocab": 32_000, "width": 256}, "fused", "below 300"),
        ({"device_type": "cuda", "dtype": torch.bfloat16, "n_vocab": 32_000, "width": 384}, "chunked", "D = 384"),
        ({"device_type": "cuda", "dtype": torch.float32, "n_vocab": 32_000, "width": 256}, "chunked", "D = 256"),
        (
            {"device_type": "cuda", "dtype": torch.bfloat16, "n_vocab": 32_000, "width": 384, "gradient": False},
            "fused",
            "below 430",
        ),
        # 100 MB hold 389 rows of 128256 bfloat16 logits
        ({"device_type": "cuda", "dtype": torch.bfloat16, "n_rows": 500, "budget": 10**8} | LLAMA, "fused", "389 rows"),
        ({"device_type": "cuda", "dtype": torch.bfloat16, "n_rows": 300, "budget": 10**8} | LLAMA, "chunked", "4096"),
        ({"device_type": "cuda", "dtype": torch.bfloat16, "n_rows": 9000, "budget": 2**30} | LLAMA, "chunked", "4096"),
    ],
)
def test_auto(options, expected, reason):
    name, why = choose("auto", **options)
    assert name == expected and reason in why
    assert choose("reference", **options) == ("reference", "asked for")


def test_without_triton_cuda_still_has_chunked(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name, why = choose("auto", device_type="cuda", dtype=torch.bfloat16, **LLAMA)
    assert name == "chunked" and "no triton for cuda" in why
    with pytest.raises(ValueError, match="needs triton, which is not installed"):
        choose("fused", device_type="cuda", dtype=torch.bfloat16, **LLAMA)


def test_the_call_asks_for_what_it_has(monkeypatch):
    """Sizes, dtype, budget and whether anything needs a gradient reach the choice."""
    asked = []

    def note(implementation, **options):
        asked.append(options)
        return "reference", ""

    monkeypatch.setattr("tract_fast.loss.choose", note)
    hidden, weight, ids = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2])
    rest = (torch.tensor([1, 2, 3]), torch.tensor([2]), torch.tensor([1.0]), ids, torch.tensor([1.0, 2.0]))
    linear_tract_loss(hidden, weight, *rest, memory_budget=77)
    linear_tract_loss(hidden.requires_grad_(), weight, *rest)
    with torch.no_grad():
        linear_tract_loss(hidden, weight, *rest)
    assert [a["gradient"] for a in asked] == [False, True, False]
    assert {"device_type": "cpu", "dtype": torch.float32, "n_rows": 3, "n_vocab": 7, "width": 4}.items() <= asked[
        0
    ].items()
    assert [a["budget"] for a in asked] == [77, None, None]

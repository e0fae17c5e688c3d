"""Bad input is refused with the argument's name, what it was and what it must be; good input at the edges is not."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import tract_fast
from tract_fast import linear_tract_loss
from tract_fast.loss import TractLoss
from tract_fast.loss.choice import interprets_triton
from tract_fast.loss.reference import reference_loss

N, V, D, B, K = 4, 7, 3, 2, 3


def arguments(dtype=torch.float32, **changes) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    args = {
        "hidden": torch.randn(N, D, generator=generator).to(dtype),
        "weight": torch.randn(V, D, generator=generator).to(dtype),
        "labels": torch.tensor([1, -100, V - 1, 0]),
        "score_rows": torch.tensor([0, N - 1]),
        "score_targets": torch.tensor([1.0, 2.5]),
        "score_token_ids": torch.tensor([0, 2, V - 1]),
        "score_values": torch.tensor([1.0, 2.0, 3.0]),
        "bias": torch.zeros(V, dtype=dtype),
        "row_weights": torch.tensor([1.0, -1.0, 0.0, 0.5]),
        "score_weights": torch.tensor([-1.0, 0.0]),
    }
    return args | changes


TENSORS = tuple(arguments())
INTEGER = ("labels", "score_rows", "score_token_ids")
REAL = ("score_targets", "score_values", "row_weights", "score_weights")


def refused(name: str, *parts: str, **changes) -> None:
    """The call raises a ValueError that starts with the argument's name and holds the parts."""
    with pytest.raises(ValueError) as error:
        linear_tract_loss(**arguments() | changes)
    message = str(error.value)
    assert message.startswith(name) and not message[len(name)].isidentifier(), message
    for part in (*parts, "must be"):
        assert part in message, message


def test_the_arguments_of_these_tests_are_good():
    for check in (False, True):
        assert linear_tract_loss(**arguments(), check=check).loss.isfinite()


@pytest.mark.parametrize("name", TENSORS)
def test_type(name):
    refused(name, "list", "tensor", **{name: arguments()[name].tolist()})
    if name not in ("bias", "row_weights", "score_weights"):
        refused(name, "NoneType", **{name: None})


SIZES = {
    "hidden": ["(4,)", "(N, D)"],
    "weight": ["(7,)", "(V, D)", "D = 3"],
    "labels": ["(1, 4)", "(N,)", "N = 4"],
    "score_rows": ["(1, 2)", "(B,)"],
    "score_targets": ["(1, 2)", "(B,)", "B = 2"],
    "score_token_ids": ["(1, 3)", "(K,)"],
    "score_values": ["(1, 3)", "(K,)", "K = 3"],
    "bias": ["(1, 7)", "(V,)", "V = 7"],
    "row_weights": ["(1, 4)", "(N,)", "N = 4"],
    "score_weights": ["(1, 2)", "(B,)", "B = 2"],
}


@pytest.mark.parametrize("name", TENSORS)
def test_number_of_dimensions(name):
    tensor = arguments()[name]
    refused(name, *SIZES[name], **{name: tensor[:, 0] if tensor.ndim == 2 else tensor[None]})


@pytest.mark.parametrize("name", ["labels", "score_targets", "score_values", "bias", "row_weights", "score_weights"])
def test_length(name):
    tensor = arguments()[name]
    refused(name, f"({len(tensor) - 1},)", SIZES[name][-1], **{name: tensor[:-1]})


def test_width_of_the_weight():
    refused("weight", "(7, 2)", "D = 3", weight=torch.zeros(V, 2))


def test_sizes_of_zero_that_cannot_work():
    refused("weight", "(0, 3)", "V >= 1", weight=torch.zeros(0, D), bias=None)
    refused("score_token_ids", "(0,)", "K >= 1", score_token_ids=torch.zeros(0).long(), score_values=torch.zeros(0))
    empty = {"hidden": torch.zeros(0, D), "labels": torch.zeros(0).long(), "row_weights": None}
    refused("score_rows", "(2,)", "hidden has no rows", **empty)


@pytest.mark.parametrize("name", TENSORS)
def test_dtype(name):
    if name in INTEGER:
        refused(name, "int32", "int64", **{name: arguments()[name].int()})
    elif name in REAL:
        refused(name, "bfloat16", "float32", **{name: arguments()[name].bfloat16()})
        refused(name, "float64", "float32", **{name: arguments()[name].double()})
    elif name == "hidden":
        refused(name, "int64", "float32 or bfloat16 or float16 or float64", hidden=torch.zeros(N, D).long())
    else:
        refused(name, "bfloat16", "float32", **{name: arguments()[name].bfloat16()})


@pytest.mark.parametrize("name", REAL)
def test_float64_hidden_takes_float32_and_float64_numbers(name):
    args = arguments(torch.float64)
    expected = linear_tract_loss(**args)
    again = linear_tract_loss(**args | {name: args[name].double()})
    assert again.loss.dtype == torch.float64
    torch.testing.assert_close(again.loss, expected.loss)
    with pytest.raises(ValueError, match=rf"^{name} is bfloat16: must be float32 or float64"):
        linear_tract_loss(**args | {name: args[name].bfloat16()})


def test_dtypes_may_differ_only_as_autocast_makes_them():
    mixed = arguments() | {"hidden": torch.zeros(N, D, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"^weight is float32: must be bfloat16"):
        linear_tract_loss(**mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_tract_loss(**mixed).loss.isfinite()
        with pytest.raises(ValueError, match=r"^weight is float16: must be float32 or bfloat16"):
            linear_tract_loss(**mixed | {"weight": mixed["weight"].half()})
        with pytest.raises(ValueError, match=r"^weight is float32: must be float64"):
            linear_tract_loss(**mixed | {"hidden": mixed["hidden"].double()})


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "hidden"])
def test_device(name):
    refused(name, "on meta", "cpu", **{name: arguments()[name].to("meta")})


@pytest.mark.parametrize("name", REAL)
def test_a_gradient_that_nothing_would_compute(name):
    refused(name, "gradient", "detached", **{name: arguments()[name].requires_grad_()})


@pytest.mark.parametrize("value", [V, -1, -99, -101, 2**40])
def test_label_out_of_range(value):
    refused("labels[2]", f"= {value}:", "-100", "0 to V - 1 = 6", labels=torch.tensor([1, -100, value, value]))


@pytest.mark.parametrize("value", [N, -1, -100])
def test_score_row_out_of_range(value):
    refused("score_rows[1]", f"= {value}:", "0 to N - 1 = 3", score_rows=torch.tensor([0, value]))


@pytest.mark.parametrize("value", [V, -1])
def test_score_token_out_of_the_vocabulary(value):
    refused("score_token_ids[0]", f"= {value}:", "0 to V - 1 = 6", score_token_ids=torch.tensor([value, 0, 1]))


def test_score_token_named_twice():
    refused("score_token_ids[2]", "= 5:", "distinct", score_token_ids=torch.tensor([5, 1, 5]))
    refused("score_token_ids[1]", "= 0:", "distinct", score_token_ids=torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_number_that_is_not_finite(name, value):
    tensor = arguments()[name]
    tensor[1] = float(value)
    refused(f"{name}[1]", f"= {value}:", "finite", **{name: tensor})


BAD_OPTIONS = [
    ("softcap", 0.0, "> 0"),
    ("softcap", -30.0, "> 0"),
    ("softcap", float("nan"), "> 0"),
    ("softcap", float("inf"), "> 0"),
    ("softcap", "30", "> 0"),
    ("softcap", True, "> 0"),
    ("softcap", torch.tensor(30.0), "> 0"),
    ("logit_scale", float("nan"), "finite"),
    ("logit_scale", float("-inf"), "finite"),
    ("logit_scale", None, "finite"),
    ("logit_scale", torch.tensor(1.0), "finite"),
    ("normalize", "digits", "'scores' or 'vocab'"),
    ("gradient", "drawn", "'exact' or 'sampled'"),
    ("implementation", "eager", "'auto' or 'reference' or 'chunked' or 'fused'"),
    ("eps", 2**-10, "None"),
    ("memory_budget", 0, "above 0"),
    ("memory_budget", 1e9, "above 0"),
    ("memory_budget", True, "above 0"),
    ("seed", 0, "None"),
]


@pytest.mark.parametrize("name, value, must", BAD_OPTIONS)
def test_option(name, value, must):
    refused(name, repr(value), must, **{name: value})


@pytest.mark.parametrize("check", [False, True])
def test_values_are_checked_on_the_cpu_whatever_is_asked(check):
    refused("labels[2]", check=check, labels=torch.tensor([1, -100, V, 0]))


def moved(args: dict[str, Any], device: str) -> dict[str, Any]:
    """The arguments copied to a device, the head ready for gradients."""
    return {
        name: x.to(device, copy=True).requires_grad_(name in ("hidden", "weight", "bias")) for name, x in args.items()
    }


@pytest.mark.parametrize("normalize", ["scores", "vocab"])
def test_nothing_waits_for_the_device_unless_asked_to(normalize):
    """Tensors on "meta" have no values: an operation that brings one to the host raises."""
    args = moved(arguments(torch.bfloat16), "meta")
    optional = {"row_weights": None, "score_weights": None}
    for changes in ({}, optional):
        out = linear_tract_loss(**args | changes, normalize=normalize, softcap=30.0)
        assert out.score_probs.shape == (B, K) and out.score_probs.is_meta
        assert all(g.is_meta for g in torch.autograd.grad(out.loss, [args[n] for n in ("hidden", "weight", "bias")]))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        linear_tract_loss(**args, check=True)


def test_unchecked_values_out_of_range_are_read_as_the_nearest_in_it():
    options = {"softcap": None, "logit_scale": 1.0, "normalize": "scores"}
    bad = {"labels": [V, -7, 2**40, -100], "score_rows": [-1, 2**40], "score_token_ids": [-5, 2, 2**40]}
    near = {"labels": [V - 1, 0, V - 1, -100], "score_rows": [0, N - 1], "score_token_ids": [0, 2, V - 1]}
    results = [
        reference_loss(**arguments(**{name: torch.tensor(x) for name, x in values.items()}), **options)
        for values in (bad, near)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_numbers_of_the_cpu_without_a_sync():
    results = {}
    for device in ("cpu", "cuda", "cuda"):  # the first call on a device may load libraries, which waits
        args = moved(arguments(), device)
        torch.cuda.set_sync_debug_mode("error" if "cuda" in results else "default")
        try:
            out = linear_tract_loss(**args)
            out.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results[device] = [*out, *(args[name].grad for name in ("hidden", "weight", "bias"))]
    for a, b in zip(results["cuda"], results["cpu"], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_on_cuda_are_checked_when_asked_and_harmless_when_not():
    bad = {"labels": [V, -5, 2**40, 0], "score_rows": [-1, N], "score_token_ids": [-3, V, 2**40]}
    for name, values in bad.items():
        args = moved(arguments(**{name: torch.tensor(values)}), "cuda")
        assert linear_tract_loss(**args).loss.isfinite()
        with pytest.raises(ValueError, match=rf"^{name}\["):
            linear_tract_loss(**args, check=True)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_shapes_dtypes_and_gradients_of_the_contract(dtype):
    args = moved(arguments(dtype), "cpu")
    out = linear_tract_loss(**args)
    out.loss.backward()
    assert isinstance(out, TractLoss) and isinstance(out, tuple)
    assert [tuple(x.shape) for x in out] == [(), (N,), (B,), (B,), (B, K)]
    assert {x.dtype for x in out} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert [x.requires_grad for x in out] == [True, False, False, False, False]
    assert all(args[name].grad.dtype == dtype for name in ("hidden", "weight", "bias"))


def test_no_grad_gives_the_same_numbers_without_a_graph():
    args = moved(arguments(), "cpu")
    with torch.no_grad():
        out = linear_tract_loss(**args)
    assert not out.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(out, linear_tract_loss(**args), strict=True))


@pytest.mark.skipif(interprets_triton(), reason="the interpreter runs fused on the CPU")
def test_what_cannot_run_is_refused():
    refused("implementation", "'fused'", "needs CUDA, and this is cpu", implementation="fused")
    with pytest.raises(ValueError, match=r"^implementation = 'chunked': must be 'reference' for float64"):
        linear_tract_loss(**arguments(torch.float64), implementation="chunked")


def test_the_package_loads_torch_only_when_it_is_used():
    code = "import sys, tract_fast; loaded = lambda: 'torch' in sys.modules; assert not loaded()"
    code += "; tract_fast.linear_tract_loss; assert loaded()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_has_its_names_and_no_other():
    assert tract_fast.__version__ == "0.1.0"
    assert {"__version__", "linear_tract_loss"} <= set(dir(tract_fast))
    with pytest.raises(AttributeError, match="no attribute 'linear_loss'"):
        tract_fast.linear_loss  # noqa: B018

"""The reference loss against the closed formulas of its gradients in numpy, and against autograd's own numerical check.

Shapes: N rows, D width, V vocabulary, B sequences, K score tokens.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

import tract_fast
from tests.loss_problems import (
    INPUTS,
    UPSTREAM,
    assert_close,
    closed_form,
    gradients,
    problem,
    problems,
    rounded,
    tensors,
)

linear_tract_loss = partial(tract_fast.linear_tract_loss, implementation="reference")


def assert_matches(p: dict[str, Any], rel: float, upstream: float, dtype=torch.float64) -> None:
    args = tensors(p, dtype)
    out, grads = gradients(args, upstream)
    values, expected = closed_form(p)
    factor = {"hidden": np.abs(p["weight"]).max(), "weight": np.abs(p["hidden"]).max(initial=0.0), "bias": 1.0}
    for name, value in values.items():
        assert_close(getattr(out, name), value, rel, name, floor=1.0)
    for name, grad in grads.items():
        assert_close(grad, upstream * expected[name], rel, f"gradient of {name}", floor=factor[name] * abs(upstream))


@settings(max_examples=400, derandomize=True)
@given(p=problems(), upstream=UPSTREAM)
def test_values_and_gradients_are_the_closed_formulas(p, upstream):
    assert_matches(p, 1e-9, upstream)


@settings(max_examples=100, derandomize=True)
@given(p=problems(), upstream=UPSTREAM)
def test_float32_is_close_to_the_formulas_and_finite_at_any_size_of_logits(p, upstream):
    p = rounded(p, torch.float32)
    if np.abs(p["weight"]).max() < 300:  # logits of 1e4 carry 1e-3 from the GEMM, which is much of a probability
        assert_matches(p, 2e-4, upstream, torch.float32)
    else:
        out, grads = gradients(tensors(p, torch.float32), upstream)
        assert all(x.isfinite().all() for x in [*out, *grads.values()])


OPTIONS = [
    dict(zip(("normalize", "softcap", "logit_scale", "bias", "weights", "frozen"), choice, strict=True))
    for choice in itertools.product(
        ["scores", "vocab"], [None, 2.0], [1.0, -0.7], [True, False], [True, False], [(), ("hidden",), ("weight",)]
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_gradcheck(options):
    p = problem(n=4, v=5, d=3, k=2, b=3, **{k: v for k, v in options.items() if k != "frozen"})
    p["labels"][:2], p["score_rows"][:] = (3, -100), (1, 3, 3)  # a row without label and one named twice
    args = tensors(p, frozen=options["frozen"])
    free = [name for name in INPUTS if args[name] is not None and args[name].requires_grad]

    def loss(*inputs):
        return -1.7 * linear_tract_loss(**args | dict(zip(free, inputs, strict=True))).loss

    assert torch.autograd.gradcheck(loss, [args[name] for name in free])


@pytest.mark.parametrize("normalize", ["scores", "vocab"])
def test_second_derivatives(normalize):
    args = tensors(problem(n=3, v=4, d=2, k=2, b=2, normalize=normalize, softcap=3.0))
    loss = lambda x, w, b: linear_tract_loss(**args | {"hidden": x, "weight": w, "bias": b}).loss  # noqa: E731
    assert torch.autograd.gradgradcheck(loss, [args[name] for name in INPUTS])


EMPTY = {
    "no rows": problem(n=0),
    "no rows, default weights": problem(n=0, weights=False),
    "no sequences": problem(b=0, ignored=1.0),
    "all ignored": problem(ignored=1.0, b=0, weights=False),
    "vocabulary of one": problem(v=1, k=1, b=0),
    "weights of zero": problem() | {"row_weights": np.zeros(6), "score_weights": np.zeros(3)},
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_learn_is_a_loss_of_zero_connected_to_the_graph(name):
    args = tensors(EMPTY[name], torch.float32)
    with torch.autograd.detect_anomaly(check_nan=True):
        out, grads = gradients(args)
    assert out.loss.item() == 0.0
    for key, grad in grads.items():
        assert grad.shape == args[key].shape and not grad.any(), key


@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan, 1e30])
def test_a_row_that_nothing_uses_may_hold_anything(poison):
    p = problem(n=5, b=2, ignored=0.0)
    p["labels"][2], p["score_rows"] = -100, np.array([0, 4])
    clean, clean_grads = gradients(tensors(p))
    p["hidden"] = p["hidden"].copy()
    p["hidden"][2] = poison
    out, grads = gradients(tensors(p))
    assert out.nll[2].item() == 0.0 and not grads["hidden"][2].any()
    for a, b in zip([*out, *grads.values()], [*clean, *clean_grads.values()], strict=True):
        torch.testing.assert_close(a, b)


def test_infinite_logits_of_a_score_row_without_label_stay_out_of_its_cross_entropy():
    p = problem(n=2, v=6, k=2, b=1, ignored=1.0, weights=False)
    p["score_token_ids"], p["bias"] = np.array([1, 4]), np.array([0.0, 1, np.inf, 0, 2, -np.inf])
    out, grads = gradients(tensors(p))
    assert out.nll.tolist() == [0.0, 0.0]
    assert out.loss.isfinite() and all(g.isfinite().all() for g in grads.values())
    assert grads["hidden"].any()  # the score is still trained


@pytest.mark.parametrize("normalize", ["scores", "vocab"])
def test_a_bias_of_minus_infinity_takes_a_token_out_of_the_vocabulary(normalize):
    p = problem(v=8, ignored=0.0, normalize=normalize)
    p["labels"] %= 7
    p["score_token_ids"] = np.array([0, 2, 5])
    shorter = p | {"weight": p["weight"][:7], "bias": p["bias"][:7]}
    p["bias"] = np.append(p["bias"][:7], -np.inf)
    out, grads = gradients(tensors(p))
    values, expected = closed_form(shorter)
    for name, value in values.items():
        assert_close(getattr(out, name), value, 1e-12, name, floor=1.0)
    assert_close(grads["hidden"], expected["hidden"], 1e-12, "gradient of hidden")
    assert_close(grads["weight"][:7], expected["weight"], 1e-12, "gradient of weight")
    assert not grads["weight"][7].any()


def direct(logits: list[list[float]], **more) -> dict[str, Any]:
    """Arguments whose logits are exactly these: the weight is the identity."""
    z = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    args = {"hidden": z, "weight": torch.eye(z.shape[1]), "labels": torch.zeros(len(z), dtype=torch.int64)}
    args |= {"score_rows": torch.zeros(0).long(), "score_targets": torch.zeros(0), "row_weights": torch.ones(len(z))}
    return args | {"score_token_ids": torch.tensor([0, 1]), "score_values": torch.tensor([1.0, 2.0])} | more


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("gap", [1.0, 8.0, 20.0, 60.0])
def test_a_saturated_softmax_keeps_its_small_loss_and_gradient(gap, offset):
    """-log p and p - 1 formed by subtraction are off by 6e-8, which is all of them from a gap of 17 on."""
    args = direct([[offset + gap, offset, offset - 1]])
    out = linear_tract_loss(**args)
    out.loss.backward()
    small = np.exp(-gap) + np.exp(-gap - 1)
    np.testing.assert_allclose(out.nll.item(), np.log1p(small), rtol=1e-5)
    np.testing.assert_allclose(args["hidden"].grad[0, 0].item(), -small / (1 + small), rtol=1e-5)


def test_a_hopeless_label_costs_the_difference_of_the_logits():
    args = direct([[-1e4, 1e4, 0.0]])
    out = linear_tract_loss(**args)
    out.loss.backward()
    assert out.nll.item() == 2e4
    assert args["hidden"].grad.tolist() == [[-1.0, 1.0, 0.0]]
    exact = direct([[0.0, 21.0, -1e4]])
    exact |= {name: exact[name].detach().double() for name in ("hidden", "weight")}
    assert linear_tract_loss(**exact).nll.item() == pytest.approx(21 + np.log1p(np.exp(-21)), abs=1e-14)


@pytest.mark.parametrize("normalize", ["scores", "vocab"])
def test_a_saturated_score_is_finite(normalize):
    args = direct([[1e4, -1e4, 5.0]], score_rows=torch.tensor([0]), score_targets=torch.zeros(1), normalize=normalize)
    out = linear_tract_loss(**args)
    out.loss.backward()
    assert out.expected_score.item() == 1.0 and out.score_probs.tolist() == [[1.0, 0.0]]
    assert args["hidden"].grad.isfinite().all()


def test_micro_batches_with_global_normalisers_add_up_to_one_batch():
    p = problem(n=9, b=4)
    p["score_rows"] = np.array([0, 3, 5, 8])
    whole, grads = gradients(tensors(p))
    parts = []
    for rows, scores in [(slice(0, 4), slice(0, 2)), (slice(4, 9), slice(2, 4))]:
        part = p | {name: p[name][rows] for name in ("labels", "row_weights", "hidden")}
        part |= {name: p[name][scores] for name in ("score_targets", "score_weights")}
        part["score_rows"] = p["score_rows"][scores] - rows.start
        parts.append(gradients(tensors(part)))
    (first, first_grads), (second, second_grads) = parts
    torch.testing.assert_close(first.loss + second.loss, whole.loss)
    torch.testing.assert_close(torch.cat([first.nll, second.nll]), whole.nll)
    torch.testing.assert_close(torch.cat([first_grads["hidden"], second_grads["hidden"]]), grads["hidden"])
    for name in ("weight", "bias"):
        torch.testing.assert_close(first_grads[name] + second_grads[name], grads[name])


def test_backward_twice_through_a_retained_graph_gives_the_same_again():
    args = tensors(problem())
    out = linear_tract_loss(**args)
    out.loss.backward(retain_graph=True)
    once = {name: args[name].grad.clone() for name in INPUTS}
    out.loss.backward()
    for name in INPUTS:
        assert torch.equal(args[name].grad, 2 * once[name])


def test_frozen_parts_get_no_gradient_and_cost_no_gemm():
    p = problem(n=64, v=128, d=32, bias=False)
    gemm = 2 * 64 * 128 * 32
    for frozen, gemms in [((), 3), (("weight",), 2), (("hidden",), 2)]:
        args = tensors(p, torch.float32, frozen)
        with FlopCounterMode(display=False) as counter:
            gradients(args)
        assert round(counter.get_total_flops() / gemm) == gemms
        for name in ("hidden", "weight"):
            assert (args[name].grad is None) == (name in frozen)
    assert not linear_tract_loss(**tensors(p, frozen=INPUTS)).loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", ["scores", "vocab"])
def test_16_bit_inputs_lose_only_the_rounding_of_their_gradients(dtype, normalize):
    p = rounded(problem(n=64, v=500, d=64, k=5, b=8, spread=3.0, normalize=normalize), dtype)
    p["row_weights"] *= 64  # so that float16 gradients are normal numbers
    out, grads = gradients(tensors(p, dtype))
    values, expected = closed_form(p)
    for name, value in values.items():
        assert_close(getattr(out, name), value, 2e-5, name, floor=1.0)
    half_step = torch.finfo(dtype).eps / 2
    for name, grad in grads.items():
        error = np.abs(grad.double().numpy() - expected[name])
        bound = half_step * np.abs(expected[name]) + 1e-5 * np.abs(expected[name]).max()
        assert (error <= bound).all(), name


def test_eager_bfloat16_is_many_times_further_from_the_truth():
    p = rounded(problem(n=64, v=500, d=64, b=0, ignored=0.0, spread=3.0, bias=False), torch.bfloat16)
    args, eager = tensors(p, torch.bfloat16), tensors(p, torch.bfloat16)
    out, grads = gradients(args)
    logits = F.linear(eager["hidden"], eager["weight"])
    nll = F.cross_entropy(logits.float(), eager["labels"], reduction="none")
    (eager["row_weights"] * nll).sum().backward()
    values, expected = closed_form(p)

    def error(x: torch.Tensor, truth: np.ndarray) -> float:
        return np.linalg.norm(x.detach().double().numpy() - truth) / np.linalg.norm(truth)

    assert error(out.nll, values["nll"]) < error(nll, values["nll"]) / 100
    for name in ("hidden", "weight"):
        assert error(grads[name], expected[name]) < error(eager[name].grad, expected[name]) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_the_precision(dtype):
    p = problem(n=32, v=64, d=32)
    plain, plain_grads = gradients(tensors(p, dtype))
    args = tensors(p, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_tract_loss(**args)
        assert torch.mm(args["hidden"], args["hidden"].T).dtype == torch.bfloat16  # the region is still on
    out.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, out, strict=True))
    assert all(torch.equal(plain_grads[name], args[name].grad) for name in INPUTS)


def test_autocast_brings_16_bit_hidden_states_to_a_float32_weight():
    p = rounded(problem(), torch.bfloat16)
    args = tensors(p, torch.float32) | {"hidden": tensors(p, torch.bfloat16)["hidden"]}
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_tract_loss(**args)
    out.loss.backward()
    assert [args[name].grad.dtype for name in INPUTS] == [torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(out.loss, linear_tract_loss(**tensors(p, torch.float32)).loss)

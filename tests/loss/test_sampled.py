"""The sampled gradient: its expectation is the exact one, its spread is what theory says, its lists fit.

Rows of one problem repeated many times are independent draws: each row of a call starts at a number of its own. So the
mean of a call's rows of dX, and its dW, are means over as many draws.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.loss.test_implementations import assert_as_exact_as_eager
from tests.loss_problems import UPSTREAM, closed_form, gradients, problem, problems, rounded, tensors
from tests.tiny_runs import metrics, tiny_recipe
from tract_fast import linear_tract_loss, loss, train
from tract_fast.loss import TractLoss, native, sampled
from tract_fast.loss.sampled import list_length, proposals, starts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = native.missing() is None
DRAWS = 4096
many_draws = pytest.mark.skipif(INTERPRETED, reason="slow in the interpreter; its lists are those of PyTorch (tested)")
FORMS = {
    "plain": {"bias": False},
    "bias": {"bias": True},
    "vocab": {"normalize": "vocab"},
    "cap": {"softcap": 3.0, "logit_scale": 0.5},
    "negative scale": {"logit_scale": -0.7, "normalize": "vocab"},
}


def use(monkeypatch, name: str) -> None:
    """Compute with the kernels of this name."""
    if name == "native" and not NATIVE:
        pytest.skip("the native kernels are not built")
    if name == "triton" and not INTERPRETED:
        pytest.skip("Triton's kernels run on a CPU in its interpreter: TRITON_INTERPRET=1")
    if name == "triton":
        rows = pytest.importorskip("tract_fast.loss.triton_sampled")
        weight = pytest.importorskip("tract_fast.loss.triton_weight")
        monkeypatch.setattr(rows, "SCAN", 256)  # several blocks a row although the interpreter's vocabularies are small
        monkeypatch.setattr(rows, "BLOCK_BYTES", 1024)
    else:
        rows = weight = {"native": native, "torch": sampled}[name]
    monkeypatch.setattr(sampled, "kernels_for", lambda hidden: (rows.sampled_rows, weight.sampled_weight))


@pytest.fixture(params=["triton"] if INTERPRETED else ["native", "torch"])
def products(request, monkeypatch):
    """Every way to compute it."""
    use(monkeypatch, request.param)


def repeated(n: int, form: dict, *, eps_rows: int = 3, v: int = 300, dtype=torch.float32, seed: int = 1) -> dict:
    """A problem of ``eps_rows`` rows, one of them with a score and no label, ``n`` times over."""
    p = problem(n=eps_rows, v=v, d=8, k=3, b=2, seed=seed, spread=2.0, ignored=0.0, **form)
    p["labels"][0] = -100
    p["score_rows"] = np.array([0, 1])
    p["row_weights"] = np.array([1.0, 0.5, -2.0])[:eps_rows]
    p["score_weights"] = np.array([0.7, -1.1])
    p = rounded(p, dtype)
    many = dict(p)
    for name in ("hidden", "labels", "row_weights"):
        many[name] = np.tile(p[name], (n, 1) if p[name].ndim > 1 else n)
    many["score_rows"] = (p["score_rows"] + eps_rows * np.arange(n)[:, None]).ravel()
    for name in ("score_targets", "score_weights"):
        many[name] = np.tile(p[name], n)
    return many | {"once": p}


def sampled_gradients(p: dict, dtype=torch.float32, upstream: float = 1.0, seed: int | None = 7, **options):
    args = tensors({k: v for k, v in p.items() if k != "once"}, dtype)
    return gradients(args | {"gradient": "sampled", "seed": seed, **options}, upstream, "auto")


def listed(monkeypatch, *args, **options):
    """(results, gradients, columns of every row) of ``sampled_gradients``."""
    kept = []
    monkeypatch.setattr(loss, "sampled_loss", lambda *a: kept.append(sampled.sampled_loss(*a)) or kept[-1])
    out, grads = sampled_gradients(*args, **options)
    columns, _, counts = kept[0][8:11]
    return out, grads, [row[:n] for row, n in zip(columns.tolist(), counts.tolist(), strict=True)]


@many_draws
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_mean_of_many_draws_is_the_exact_gradient(products, form, dtype):
    """Per element: the mean of dX over draws is within its own standard error, as a normal variable would be."""
    n = DRAWS // 4 if dtype == torch.bfloat16 else DRAWS
    p = repeated(n, form, dtype=dtype)
    _, exact = closed_form(p["once"])
    _, found = sampled_gradients(p, dtype, eps=2.0**-4, seed=7)
    dx = found["hidden"].double().numpy().reshape(n, 3, -1)
    mean, error = dx.mean(0), dx.std(0, ddof=1) / math.sqrt(n)
    rounding = np.abs(exact["hidden"]) * (2.0**-8 if dtype == torch.bfloat16 else 1e-5)
    exact_rows = 0 if form.get("normalize") == "vocab" else 1  # a score row without label has nothing to draw
    drawn = slice(exact_rows, None)
    assert (error[drawn] > 0).all()  # nothing exact answers in its place
    z = ((mean - exact["hidden"]) / np.hypot(error, rounding))[drawn]
    assert np.abs(z).max() < 5
    assert (z**2).mean() < 2.2
    if dtype == torch.float32:
        assert (z**2).mean() > 0.25
    for name in ("weight", "bias"):
        if found.get(name) is None:
            continue
        whole = closed_form(p)[1][name]
        miss = np.linalg.norm(found[name].double().numpy() - whole) / np.linalg.norm(whole)
        assert miss < 0.5 / math.sqrt(n) + (2.0**-8 if dtype == torch.bfloat16 else 0.0), name
    single = np.linalg.norm(dx - exact["hidden"], axis=(1, 2)) / np.linalg.norm(exact["hidden"])
    assert np.linalg.norm(mean - exact["hidden"]) / np.linalg.norm(exact["hidden"]) < 6 * single.mean() / math.sqrt(n)


@pytest.mark.skipif(not INTERPRETED, reason="instead of the test above, in the interpreter")
def test_the_mean_of_some_draws_is_nearer_by_their_root(products):
    n = 128
    p = repeated(n, {"normalize": "vocab", "bias": True}, v=40)
    _, exact = closed_form(p["once"])
    _, found = sampled_gradients(p, eps=2.0**-3)
    miss = found["hidden"].double().numpy().reshape(n, 3, -1) - exact["hidden"]
    single = math.sqrt((miss**2).sum() / n)
    assert single > 0.01 * np.linalg.norm(exact["hidden"])  # nothing exact answers in its place
    assert np.linalg.norm(miss.mean(0)) < 2.5 * single / math.sqrt(n)


@many_draws
def test_the_error_falls_as_the_root_of_the_draws(products):
    p = repeated(DRAWS, {})
    _, exact = closed_form(p["once"])
    _, found = sampled_gradients(p, eps=2.0**-4)
    dx = found["hidden"].double().numpy().reshape(DRAWS, 3, -1)
    error = {}
    for size in (16, 256):
        means = dx.reshape(DRAWS // size, size, *dx.shape[1:]).mean(1)
        error[size] = np.sqrt(((means - exact["hidden"]) ** 2).mean())
    assert 3.2 < error[16] / error[256] < 5  # 4, with 16 means of 256 draws


@many_draws
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_variance_that_is_reported_is_that_of_the_draws(products, form):
    p = repeated(DRAWS, form)
    _, exact = closed_form(p["once"])
    out, found = sampled_gradients(p, eps=2.0**-4)
    dx = found["hidden"].double().numpy().reshape(DRAWS, 3, -1)
    actual = ((dx - exact["hidden"]) ** 2).sum() / (dx**2).sum()
    # neighbours exclude each other, which the estimate leaves out: up to a fifth too large here
    assert 0.9 * actual < out.added_variance.item() < 1.3 * actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_and_its_statistics_are_exact(products, dtype):
    """Of 16-bit logits nearer to the truth than the exact implementation's: the largest are computed again."""
    if dtype == torch.float16 and sampled.kernels_for(torch.empty(0))[0] is native.sampled_rows:
        assert sampled.language("cpu", dtype) == "PyTorch"
        pytest.skip("no C++ kernels of float16")
    n, b = (40, 18) if INTERPRETED else (200, 90)
    p = rounded(problem(n=n, v=700, d=16, k=4, b=b, seed=3, spread=2.0, normalize="vocab"), dtype)
    out, _ = sampled_gradients(p, dtype, eps=2.0**-8, seed=1)
    whole = linear_tract_loss(**tensors(p, dtype), implementation="chunked")
    values, _ = closed_form(p)
    for name in ("nll", "expected_score", "score_mass", "score_probs"):
        found, plain = (np.linalg.norm(getattr(x, name).double().numpy() - values[name]) for x in (out, whole))
        assert found <= 3 * plain if dtype == torch.float32 else found < 0.8 * plain, name
    assert out.loss.item() == pytest.approx(values["loss"], rel=1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.skipif(not NATIVE, reason="the native kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=6 if INTERPRETED else 60, derandomize=True)
@given(p=problems(), upstream=UPSTREAM)
def test_without_anything_to_draw_it_is_as_exact_as_eager(dtype, p, upstream):
    """At the smallest eps every column of so small a vocabulary is kept, or weighs nothing."""
    assert_as_exact_as_eager(p, dtype, "auto", upstream, gradient="sampled", eps=2.0**-20, seed=1)


@pytest.mark.parametrize("kind", ["triton"] if INTERPRETED else ["native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("v", [7, 256, 700] if INTERPRETED else [7, 63, 64, 65, 3000])
def test_lists_are_those_of_pytorch(monkeypatch, v, form, dtype, kind):
    p = rounded(problem(n=9, v=v, d=16, k=4, b=4, seed=v, spread=2.0, **form), dtype)
    found = []
    for name in (kind, "torch"):
        use(monkeypatch, name)
        found.append(listed(monkeypatch, p, dtype, eps=2.0**-6, seed=11))
    (out, grads, columns), (other, others, expected) = found
    assert columns == expected
    for name in grads:
        scale = others[name].abs().max().item() or 1.0
        error = (grads[name] - others[name]).abs().max().item()
        assert error <= (2e-2 if dtype == torch.bfloat16 else 1e-4) * scale, name
    assert out.added_variance.item() == pytest.approx(other.added_variance.item(), rel=0.05, abs=1e-12)


@pytest.mark.parametrize("eps", [2.0**-10, 2.0**-5])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
def test_flat_softmaxes_fit_their_lists(products, spread, eps):
    """Nothing is as likely as eps: the list is as long as it can be, and still not cut."""
    v = 1500 if INTERPRETED else 4000
    p = rounded(problem(n=5, v=v, d=8, k=3, b=2, seed=2, spread=spread, ignored=0.0), torch.float32)
    out, found = sampled_gradients(p, eps=eps)
    most = list_length(v, 3, eps)
    assert out.entries.max() <= most
    assert out.entries.max() >= (0.5 if INTERPRETED else 0.85) / eps
    assert found["weight"].isfinite().all()


def test_a_score_row_that_outweighs_the_others_raises_its_threshold_instead_of_cutting(products):
    """Its coefficient asks for a list of thousands; the static bound has room for 50, and the mean stays right."""
    n = 16 if INTERPRETED else 512
    p = repeated(n, {"normalize": "vocab"}, v=2000)
    p["score_weights"] = p["score_weights"] * 1000
    p["once"]["score_weights"] = p["once"]["score_weights"] * 1000
    _, exact = closed_form(p["once"])
    out, found = sampled_gradients(p, eps=2.0**-5)
    assert out.entries.max() <= list_length(2000, 3, 2.0**-5)
    dx = found["hidden"].double().numpy().reshape(n, 3, -1)[:, 0]
    error = dx.std(0, ddof=1) / math.sqrt(n)
    assert (np.abs(dx.mean(0) - exact["hidden"][0]) < 5 * error + 1e-5 * np.abs(exact["hidden"][0])).all()


def test_a_threshold_of_nothing_lists_everything(products):
    """Two scores on one row whose weights cancel: no coefficient to be relative to, and still a gradient."""
    p = problem(n=2, v=60, d=8, k=3, b=2, seed=2, spread=1.0, ignored=1.0, normalize="vocab")
    p |= {"score_rows": np.array([1, 1]), "score_weights": np.array([1.0, -1.0]), "row_weights": None}
    p["score_targets"] = np.array([1.0, 3.0])
    p = rounded(p, torch.float32)
    out, found = sampled_gradients(p, eps=2.0**-10)
    _, exact = closed_form(p)
    assert out.entries[1] == 60
    assert np.linalg.norm(found["hidden"].numpy() - exact["hidden"]) < 1e-5 * np.linalg.norm(exact["hidden"])


@pytest.mark.parametrize("begin", [1, 2, 3, 4, 5])
def test_what_is_taken_out_takes_no_place_in_the_draw(monkeypatch, products, begin):
    """Columns 3 to 6 have the least proposal, 1: the sum passes its end at the ``begin``-th of them."""
    p = problem(n=1, v=8, d=1, k=3, b=1, seed=2, bias=False, ignored=0.0, weights=False)
    p |= {"score_token_ids": np.array([0, 1, 2]), "labels": np.array([7]), "hidden": np.ones((1, 1))}
    p["weight"] = np.array([0.0, 0.0, 0.0, -40.0, -40.0, -40.0, -40.0, 10.0])[:, None]
    monkeypatch.setattr(sampled, "starts", lambda *_: torch.tensor([2**31 - begin]))
    _, _, (columns,) = listed(monkeypatch, p, eps=2.0**-4)
    assert columns == [3, 4, 5, 6][begin - 1 : begin] + [0, 1, 2, 7]


def test_a_larger_coefficient_gets_a_smaller_threshold(products):
    """With equal thresholds the row of weight 8 would have 64 times the variance of the others."""
    p = rounded(problem(n=4, v=2000, d=8, b=0, seed=2, spread=3.0, ignored=0.0, weights=False), torch.float32)
    out, _ = sampled_gradients(p | {"row_weights": np.array([1.0, 1.0, 1.0, 1.0])}, eps=2.0**-9, seed=1)
    other, _ = sampled_gradients(p | {"row_weights": np.array([1.0, 1.0, 1.0, 9.0])}, eps=2.0**-9, seed=1)
    assert other.entries[3] > 1.2 * out.entries[3]
    assert torch.equal(other.entries[:3], out.entries[:3])


def test_results_are_a_function_of_the_seed(products):
    p = rounded(problem(n=6, v=200, d=8, seed=4), torch.float32)
    run = lambda **options: sampled_gradients(p, **options)[1]["weight"]  # noqa: E731
    assert torch.equal(run(seed=1), run(seed=1))
    assert not torch.equal(run(seed=1), run(seed=2))
    torch.manual_seed(3)
    first, second = run(seed=None), run(seed=None)
    torch.manual_seed(3)
    assert torch.equal(first, run(seed=None))
    assert not torch.equal(first, second)


def test_starts_are_uniform_and_differ_by_seed_and_row():
    found = starts(torch.tensor(5), 20000, torch.device("cpu"))
    assert found.min() >= 0
    assert found.max() < 2**31
    assert len(found.unique()) > 19990
    share = torch.histc(found.double() / 2**31, 20, 0, 1) / 20000
    assert (share - 0.05).abs().max() < 5 * math.sqrt(0.05 * 0.95 / 20000)
    assert len(set(found.tolist()) & set(starts(torch.tensor(6), 20000, torch.device("cpu")).tolist())) < 10


def test_proposals_are_never_too_small_nor_too_large():
    """Between the probability and 7% more, one unit of fixed point aside: the bound of a list rests on it."""
    a = -torch.logspace(-6, math.log10(21.4), 100001)
    f, exact = proposals(a).double(), torch.exp(a.double()) * 2**31
    assert ((f >= exact * (1 - 2e-6) - 1) & (f <= exact * 1.0616 + 1)).all()
    assert f.max() < 2**31
    assert f.min() >= 1
    assert proposals(torch.tensor([-50.0, -1e30])).tolist() == [1, 1]


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("weight", "bias"), ("bias",)], ids="+".join)
def test_frozen_parts(products, frozen):
    p = rounded(problem(n=6, v=90, d=5, seed=6), torch.float32)
    args = tensors(p, torch.float32, frozen) | {"gradient": "sampled", "eps": 2.0**-6, "seed": 1}
    _, found = gradients(args, -2.5, "auto")
    _, every = gradients(tensors(p, torch.float32) | {"gradient": "sampled", "eps": 2.0**-6, "seed": 1}, -2.5, "auto")
    for name, grad in found.items():
        assert (grad is None) == (name in frozen)
        if grad is not None:
            torch.testing.assert_close(grad, every[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks_draw_what_one_does(products, dtype):
    n = 132 if INTERPRETED else 300  # 128 rows at least in a chunk
    p = rounded(problem(n=n, v=300, d=8, k=3, b=40, seed=6, spread=2.0), dtype)
    found = []
    for budget in (None, 1):
        out, grads = sampled_gradients(p, dtype, eps=2.0**-5, seed=3, memory_budget=budget)
        found.append((out.entries, grads))
    (entries, grads), (other, others) = found
    assert torch.equal(entries, other)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name])


def test_backward_twice_and_an_upstream_gradient(products):
    p = rounded(problem(n=6, v=90, d=5, seed=6), torch.float32)
    args = tensors(p, torch.float32)
    value = linear_tract_loss(**args, gradient="sampled", seed=1).loss
    once = torch.autograd.grad(value, args["weight"], retain_graph=True)[0]
    again = torch.autograd.grad(-3 * value, args["weight"])[0]
    torch.testing.assert_close(again, -3 * once)


def test_without_a_gradient_there_is_nothing_to_draw(products):
    args = tensors(rounded(problem(seed=1), torch.float32))
    with torch.no_grad():
        out = linear_tract_loss(**args, implementation="reference")
        found = linear_tract_loss(**tensors(rounded(problem(seed=1), torch.float32), torch.float32), gradient="sampled")
    assert isinstance(found, TractLoss)
    torch.testing.assert_close(found.loss, out.loss.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_learn(products, rows):
    p = problem(n=rows, v=9, d=3, b=0, seed=1, ignored=1.0)
    _, found = sampled_gradients(p)
    assert all((grad == 0).all() for grad in found.values())


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_row_that_nothing_uses_may_hold_anything(products, poison):
    p = problem(n=4, v=30, d=5, b=1, seed=3)
    p["labels"][:] = [3, -100, 5, 7]
    p["score_rows"] = np.array([2])
    p["hidden"][1] = poison
    out, found = sampled_gradients(p, eps=0.1)
    assert out.loss.isfinite()
    assert out.added_variance.isfinite()
    assert found["weight"].isfinite().all()
    assert (found["hidden"][1] == 0).all()
    assert out.entries[1] == 0


def test_a_broken_row_breaks_the_loss(products):
    p = problem(n=4, v=30, d=5, b=1, seed=3, ignored=0.0)
    p["hidden"][1] = float("nan")
    out, found = sampled_gradients(p, eps=0.1)
    assert out.loss.isnan()
    assert found["hidden"][1].isnan().all()
    assert found["hidden"][[0, 3]].isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every other column"])
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_any_strides(products, name, layout):
    p = rounded(problem(n=6, v=90, d=6, seed=6), torch.float32)
    if layout == "expanded":
        p[name][:] = p[name][0]
    args = tensors(p, torch.float32) | {"gradient": "sampled", "eps": 2.0**-5, "seed": 1}
    out, plain = gradients(args, 1.0, "auto")
    x = torch.from_numpy(p[name]).float()
    wide = torch.stack([x, x], 2).flatten(1)
    odd = {"transposed": x.t().contiguous().t(), "expanded": x[:1].expand(x.shape), "every other column": wide[:, ::2]}
    args = tensors(p, torch.float32) | {"gradient": "sampled", "eps": 2.0**-5, "seed": 1}
    args[name] = odd[layout].detach().requires_grad_()
    other, found = gradients(args, 1.0, "auto")
    assert torch.equal(out.entries, other.entries)
    for key in found:
        torch.testing.assert_close(found[key], plain[key])


@pytest.mark.parametrize("size", [1e9, 1e20])
def test_logits_that_nothing_resolves_end(products, size):
    """Equal columns, as padding of the vocabulary has them, far above all thresholds: no draw, and no hang."""
    p = problem(n=3, v=3000, d=4, b=0, seed=3, ignored=0.0, weights=False, bias=False)
    p["weight"][:] = 1.0
    p["hidden"][:] = size
    out, _ = sampled_gradients(p, eps=2.0**-5)
    assert out.entries.max() <= list_length(3000, 3, 2.0**-5)


def test_a_coefficient_a_billion_times_the_others_fits(products):
    v = 1500 if INTERPRETED else 20000
    p = problem(n=4, v=v, d=8, k=3, b=2, seed=2, spread=1.0, ignored=0.0, normalize="vocab")
    p["row_weights"] = np.full(4, 1e-12)
    p["score_weights"] = np.ones(2)
    out, found = sampled_gradients(p)
    assert out.entries.max() <= list_length(v, 3, sampled.EPS)
    assert found["weight"].isfinite().all()


def test_huge_logits_fit_their_lists(products):
    """Where float32 does not resolve the logits, a list has what is certain and nothing else."""
    p = problem(n=3, v=3000, d=4, b=0, seed=3, ignored=0.0, weights=False, bias=False)
    p["weight"][:] = 1.0
    p["hidden"][:] = 3e6
    out, found = sampled_gradients(p, eps=2.0**-5)
    assert out.entries.max() <= list_length(3000, 3, 2.0**-5)
    assert found["weight"].isfinite().all()


@pytest.mark.skipif(INTERPRETED or not NATIVE, reason="of the native kernels")
@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_and_number_of_threads_lists_the_same(variant):
    script = (
        "import pytest, torch\n"
        "from tests.loss.test_sampled import FORMS, listed, problem\n"
        "for form in FORMS.values():\n"
        "    found = []\n"
        "    for threads in (1, 2, 3):\n"
        "        torch.set_num_threads(threads)\n"
        "        p = problem(n=40, v=5000, d=24, k=4, b=9, seed=3, spread=2.0, **form)\n"
        "        with pytest.MonkeyPatch.context() as patch:\n"
        "            _, grads, columns = listed(patch, p, seed=2)\n"
        "        found.append([grads[k] for k in ('hidden', 'weight')])\n"
        "    assert all(torch.equal(a, b) for f in found for a, b in zip(f, found[0]))\n"
        "    print(columns)\n"
    )
    root = Path(__file__).parents[2]
    run = lambda name: subprocess.run(  # noqa: E731
        [sys.executable, "-c", script],
        env={**os.environ, "TRACT_FAST_CPU": name},
        capture_output=True,
        text=True,
        cwd=root,
    )
    found = run(variant)
    if "no such variant" in found.stderr:
        pytest.skip(f"this processor has no {variant}")
    assert found.returncode == 0, found.stderr
    assert found.stdout == run("portable").stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
def test_compiled_whole_it_is_bitwise_the_same():
    p = rounded(problem(n=6, v=300, d=8, seed=5), torch.float32)
    compiled = torch.compile(linear_tract_loss, fullgraph=True, backend="aot_eager")
    found = []
    for call in (linear_tract_loss, compiled):
        args = tensors(p, torch.float32)
        out = call(**args, gradient="sampled", seed=3)
        (1.5 * out.loss).backward()
        found.append((out.loss.detach(), args["hidden"].grad, args["weight"].grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"gradient": "exact", "eps": 0.1}, "eps"),
        ({"gradient": "exact", "seed": 1}, "seed"),
        ({"eps": 0.0}, "eps"),
        ({"eps": 2.0}, "eps"),
        ({"eps": "small"}, "eps"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"implementation": "reference"}, "implementation"),
        ({"implementation": "fused"}, "implementation"),
    ],
)
def test_settings_that_cannot_be(options, named):
    args = tensors(problem(), torch.float32)
    with pytest.raises(ValueError, match=f"{named} = "):
        linear_tract_loss(**args, **{"gradient": "sampled"} | options)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
def test_a_run_with_it_repeats_resumes_and_reports(tmp_path):
    """The seed comes from the step: a run that was stopped goes on bit for bit; micro-batches draw on their own."""

    def steps(folder: str, count: int) -> list[dict]:
        settings = {"train__max_steps": count, "train__batch": 8, "train__schedule": "constant", "train__warmup": 0.0}
        settings |= {"loss__gradient": "sampled", "loss__eps": 2.0**-6}
        recipe = tiny_recipe(tmp_path, folder, **settings)
        assert train.run(recipe) == 0
        return [line for line in metrics(recipe.run.dir) if "loss" in line]

    whole = steps("whole", 6)
    assert steps("again", 6) == whole
    assert steps("part", 3) == whole[:3]
    assert steps("part", 6) == whole
    assert all(line["entries"] > 6 and 0 < line["added_variance"] < 1 for line in whole)

"""The row pass in C++ against the one in PyTorch: every variant that runs here, any number of threads, rows of any
stride; what is said where it was not built; and the memory that the loss really takes."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, strategies as st

from tests.loss_problems import closed_form, gradients, problem, problems, rounded, tensors
from tract_fast import linear_tract_loss
from tract_fast.loss import chunked, native, rows
from tract_fast.loss.terms import Arguments, new_stats, op_arguments, row_terms

if os.environ.get("TRACT_FAST_REQUIRE_EXT") != "1" and native.missing():
    pytest.skip(native.missing(), allow_module_level=True)

VARIANTS = []
for name in ("portable", "avx2", "avx512", "avx512bf16"):
    os.environ["TRACT_FAST_CPU"] = name
    try:
        native.missing()
        VARIANTS += [name] * (native.variant() == name)
    except RuntimeError as error:
        assert "no such variant" in str(error)
    del os.environ["TRACT_FAST_CPU"]


def arguments(p: dict, dtype: torch.dtype) -> Arguments:
    args = tensors(rounded(p, dtype), dtype)
    options = {"softcap": args.get("softcap"), "logit_scale": args.get("logit_scale", 1.0)}
    options["vocab"] = args["normalize"] == "vocab"
    names = ("labels", "score_rows", "score_targets", "score_token_ids", "score_values", "row_weights", "score_weights")
    targets = {name: args[name] for name in names}
    for weights, like in (("row_weights", "labels"), ("score_weights", "score_targets")):
        targets[weights] = targets[weights] if targets[weights] is not None else torch.rand(len(targets[like]))
    with torch.no_grad():
        return op_arguments(args["hidden"], args["weight"], args["bias"], targets, **options, budget=None)


def both(a: Arguments, gradient: bool, stride: int = 0) -> list[list[torch.Tensor]]:
    """[dZ, *statistics in rows that have them] of PyTorch and of C++."""
    terms = row_terms(a)
    picked = rows.pick(a.hidden, terms.labels, a)
    found = []
    for row_pass in (rows.row_pass, native.row_pass):
        n, v = len(a.hidden), len(a.weight)
        logits = torch.full((n, v + stride), 7.0, dtype=a.hidden.dtype)
        logits[:, :v] = a.hidden @ a.weight.t()
        stats = new_stats(a)
        row_pass(logits[:, :v], picked, terms, stats, a, gradient=gradient)
        assert (logits[:, v:] == 7.0).all(), "nothing is written beside the row"
        found.append([logits[:, :v] if gradient else logits[:0], *stats])
    return found


def assert_equal(a: Arguments, gradient: bool = True, stride: int = 0) -> None:
    theirs, ours = both(a, gradient, stride)
    eps = torch.finfo(a.hidden.dtype).eps
    # PyTorch's difference of a value and its mean cancels, in units of the largest coefficient
    weight = max([1.0, *row_terms(a).score.abs().tolist()])
    largest = max(1.0, weight * a.score_values.abs().max().item() ** 2)
    for i, (x, y) in enumerate(zip(theirs, ours, strict=True)):
        tolerance = 2 * eps if i == 0 else 2e-6  # dZ is rounded to its dtype
        torch.testing.assert_close(y, x, rtol=max(tolerance, 4e-6), atol=4e-6 * largest, equal_nan=True)


@given(
    problems(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(VARIANTS),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
)
def test_equals_the_pytorch_row_pass(p, dtype, variant, threads, stride, gradient):
    a = arguments(p, dtype)
    assume(len(a.hidden) > 0)
    assume(a.weight.abs().max() <= 100)  # logits of 1e4: rounding decides what exp makes of them
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACT_FAST_CPU", variant)
        torch.set_num_threads(threads)
        try:
            assert_equal(a, gradient, stride)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v", [1, 15, 16, 17, 1023, 1024, 1025, 5000, 262_144])
def test_vocabularies_around_vectors_and_blocks(v, dtype, variant, monkeypatch):
    monkeypatch.setenv("TRACT_FAST_CPU", variant)
    for normalize in ("scores", "vocab"):
        assert_equal(arguments(problem(3, v, 6, min(v, 5), 2, seed=v, normalize=normalize), dtype))


@given(
    problems(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(VARIANTS),
    st.integers(1, 3),
    st.booleans(),
)
def test_picked_logits_are_those_of_float32_sums(p, dtype, variant, threads, apart):
    a = arguments(p, dtype)
    assume(len(a.hidden) > 0)
    labels = row_terms(a).labels
    if apart:  # rows that lie in a wider matrix
        a = a._replace(weight=torch.cat([a.weight, a.weight], 1)[:, : a.weight.shape[1]])
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACT_FAST_CPU", variant)
        torch.set_num_threads(threads)
        try:
            found = native.pick(a.hidden, labels, a)
        finally:
            torch.set_num_threads(before)
    hidden, weight, at = a.hidden.double(), a.weight.double(), labels.clamp(min=0)[:, None]
    z, size = hidden @ weight.t(), hidden.abs() @ weight.abs().t()
    for ours, wanted, largest in (
        (found.label, z.gather(1, at)[:, 0], size.gather(1, at)[:, 0]),
        (found.scores, z[:, a.score_token_ids], size[:, a.score_token_ids]),
    ):
        assert ours.dtype == torch.float32 and ours.shape == wanted.shape
        assert ((ours - wanted).abs() <= 1e-6 * largest + 1e-37).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_memory_has_held_before_is_in_no_gradient(dtype):
    """Kept memory is not cleared: behind the logits of a row it would be read by products of dZ (oneDNN#5717)."""
    v, like = 900, torch.empty(0, dtype=dtype)
    held = [native.scratch(like, 256, chunked.padded(v)).fill_(math.nan) for _ in range(3)]
    del held
    p = rounded(problem(n=256, v=v, d=64, k=5, b=12, spread=4.0), dtype)
    _, grads = gradients(tensors(p, dtype), 1.3, "chunked")
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    buffer = chunked.logits_buffer(like, 256, v)
    behind = buffer.as_strided((256, buffer.stride(0) - v), buffer.stride(), v)
    assert buffer.stride(0) % 64 == 0 and (behind == 0).all()


@pytest.mark.parametrize("where", ["of the next row", "in a wider matrix"])
@pytest.mark.parametrize("options", [{}, {"gradient": "sampled", "eps": 2.0**-4, "seed": 3}], ids=["exact", "sampled"])
@pytest.mark.parametrize("d", [36, 80, 100, 1000])
def test_what_lies_behind_a_row_of_hidden_states_is_in_none_of_its_results(d, options, where):
    """Unused rows may hold anything, and so may what a slice leaves out (oneDNN#5717)."""
    p = rounded(problem(n=64, v=1000, d=d, k=5, b=0, ignored=0.0, weights=False), torch.bfloat16)
    args = tensors(p, torch.bfloat16)
    args["labels"][32] = -100
    found = []
    for value in (0.0, math.nan, math.inf):
        hidden = args["hidden"].detach().clone()
        if where == "of the next row":
            hidden[32] = value
        else:
            hidden = torch.nn.functional.pad(hidden, (0, 24), value=value)[:, :d]
        hidden.requires_grad_()
        out = linear_tract_loss(**args | {"hidden": hidden}, implementation="chunked", **options)
        found.append([out.loss, *torch.autograd.grad(out.loss, [hidden, args["weight"]])])
    for others in found[1:]:
        for wanted, got in zip(found[0], others, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())


def test_a_variant_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("TRACT_FAST_CPU", "abacus")
    with pytest.raises(RuntimeError, match="no such variant"):
        native.variant()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e-42])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 1.0), (None, -1.7), (30.0, 1.0), (30.0, -1.7), (1e6, 1.0)])
def test_values_at_the_edge_are_what_they_are_in_pytorch(value, dtype, softcap, logit_scale):
    p = problem(4, 40, 3, 4, 2, seed=3, normalize="vocab")
    a = arguments(p | {"softcap": softcap, "logit_scale": logit_scale}, dtype)
    terms = row_terms(a)
    picked = rows.pick(a.hidden, terms.labels, a)
    column = next(c for c in range(40) if c not in a.score_token_ids and c not in terms.labels)
    found = []
    for row_pass in (rows.row_pass, native.row_pass):
        logits = a.hidden @ a.weight.t()
        logits[1, column] = value
        stats = new_stats(a)
        row_pass(logits, picked, terms, stats, a, gradient=True)
        found.append([logits, *stats])
    eps = torch.finfo(dtype).eps
    for i, (x, y) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(y, x, rtol=max(2 * eps, 1e-5) if i == 0 else 1e-5, atol=1e-5, equal_nan=True)


def operands() -> dict:
    """What the operator takes: 3 rows, 8 columns, 2 score tokens."""
    float32 = {"picked_label": (3,), "picked_scores": (3, 2), "ce": (3,), "score": (3,), "score_target": (3,)}
    made = {name: torch.zeros(shape) for name, shape in float32.items()}
    made |= {"labels": torch.zeros(3, dtype=torch.int64), "used": torch.ones(3, dtype=torch.bool)}
    made |= {"ids": torch.arange(2), "values": torch.zeros(2), "probs": torch.zeros(3, 2), "logits": torch.zeros(3, 8)}
    made |= {name: torch.zeros(3) for name in ("nll", "lse", "expected", "mass")}
    return made | {"bias": None, "softcap": 0.0, "logit_scale": 1.0, "vocab": True, "gradient": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 9, 1])}, "labels holds 9"),
        ({"labels": torch.tensor([0, -2, 1])}, "labels holds -2"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels must be"),
        ({"ids": torch.tensor([1, 8])}, "ids holds 8"),
        ({"ids": torch.empty(0, dtype=torch.int64)}, "ids must not be empty"),
        ({"nll": torch.zeros(1)}, "a term or statistic must be"),
        ({"nll": torch.zeros(3, dtype=torch.float64)}, "a term or statistic must be"),
        ({"probs": torch.zeros(3, 1)}, "probs must be"),
        ({"values": torch.zeros(2, device="meta")}, "values must be"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, "bias must be"),
        ({"logits": torch.zeros(3, 8, dtype=torch.float64)}, "float32 or bfloat16"),
        ({"logits": torch.zeros(8, 3).t()}, "side by side"),
        ({"logits": torch.zeros(1, 8).expand(3, 8)}, "side by side"),
        ({"used": torch.ones(3)}, "used must be"),
    ],
)
def test_operator_refuses_what_it_would_read_wrongly(change, message):
    torch.ops.tract_fast.row_pass(**operands())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tract_fast.row_pass(**operands() | change)


def test_other_operators_refuse_too():
    with pytest.raises(RuntimeError, match="total must be"):
        torch.ops.tract_fast.add(torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16), False)
    with pytest.raises(RuntimeError, match="total must be"):
        torch.ops.tract_fast.add(torch.zeros(7), torch.zeros(8), False)
    with pytest.raises(RuntimeError, match="by must be"):
        torch.ops.tract_fast.scale(torch.zeros(8), torch.zeros(2), torch.zeros(8))
    with pytest.raises(RuntimeError, match="total must be"):
        torch.ops.tract_fast.scale(torch.zeros(8, 8).t(), torch.zeros(()), torch.zeros(7))
    for rows_, columns in ((2**40, 2**40), (-1, 8)):
        with pytest.raises(RuntimeError, match="is not possible"):
            torch.ops.tract_fast.scratch(torch.zeros(1), rows_, columns)


def test_dw_of_several_chunks_is_summed_in_parts(monkeypatch):
    """Parts of three rows of a 16-bit dW, of which the last is smaller, over three chunks."""
    p = rounded(problem(n=300, v=40, d=5, seed=3), torch.bfloat16)
    found = []
    for elements in (15, chunked.SUMMAND):
        monkeypatch.setattr(chunked, "SUMMAND", elements)
        dirty = [native.scratch(torch.empty(0), 512, 1024).fill_(math.nan) for _ in range(3)]  # what the call will get
        del dirty
        args = tensors(p, torch.bfloat16) | {"memory_budget": 1}
        found.append(gradients(args, -2.5, "chunked")[1]["weight"])
    assert found[0].norm() > 0
    torch.testing.assert_close(found[0], found[1], rtol=2**-7, atol=1e-3)
    _, exact = closed_form(p)
    whole = torch.from_numpy(-2.5 * exact["weight"])
    assert (found[0].double() - whole).norm() < 0.02 * whole.norm()


def test_a_variant_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("TRACT_FAST_CPU", "AVX2")
    with pytest.raises(ValueError, match="TRACT_FAST_CPU = AVX2: must be portable, or avx2"):
        linear_tract_loss(**tensors(problem(seed=1), torch.float32), implementation="chunked")


def test_library_of_another_version_is_told(monkeypatch):
    monkeypatch.setattr(native, "ABI", -1)
    native.missing.cache_clear()
    try:
        assert "are those of another version; install the package again" in native.missing()
    finally:
        native.missing.cache_clear()


def test_without_the_library_pytorch_computes_the_same(monkeypatch, tmp_path):
    args = tensors(problem(9, 50, 6, 4, 3, seed=1), torch.float32)
    expected = linear_tract_loss(**args, implementation="chunked")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    try:
        native.missing.cache_clear()
        with pytest.warns(UserWarning, match="not built; install the package again with a C") as told:
            outs = [linear_tract_loss(**args, implementation="chunked") for _ in range(2)]
        assert len(told) == 1
        (tmp_path / "_native.so").write_text("no library")
        native.missing.cache_clear()
        with pytest.warns(UserWarning, match="do not load"):
            linear_tract_loss(**args, implementation="chunked")
    finally:
        native.missing.cache_clear()
    for ours, theirs in zip(outs[1], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


MEASURE = """
import sys, torch
from pathlib import Path
from tract_fast import linear_tract_loss
from tract_fast.loss import native

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

n, v, d, budget = map(int, sys.argv[1:])
hidden, weight = torch.randn(n, d).requires_grad_(), (torch.randn(v, d) / d**0.5).requires_grad_()
ids = torch.arange(5)
def step(n, budget):
    labels, rows = torch.randint(v, (n,)), torch.tensor([n - 1])
    out = linear_tract_loss(hidden[:n], weight, labels, rows, torch.tensor([3.0]), ids, ids + 1.0,
                            implementation="chunked", memory_budget=budget)
    return torch.autograd.grad(out.loss, (hidden, weight))
step(2, budget)  # libraries and threads are there,
for a, b in ((hidden, weight.t()), (torch.empty(n, v), weight), (torch.empty(n, v).t(), hidden)):
    torch.mm(a.detach(), b.detach())  # and what they keep for products of this size: with MKL tens of MiB
del a, b
native.release()  # or a kept dW would count as there before
Path("/proc/self/clear_refs").write_text("5")
before = peak()
step(n, budget)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
@pytest.mark.parametrize(("n", "chunks"), [(600, "one"), (3000, "several")])
def test_peak_memory_is_the_budget_and_the_gradients(n, chunks):
    """Of the process, measured: 32 MiB of logits, and dW and dX of float32; several chunks keep dW's sum beside it."""
    v, d, budget = 20_000, 256, 2**25
    # on few threads: each has its own scratch memory in the GEMM
    printed = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (n, v, d, budget))], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    dw, dx = 4 * v * d, 4 * n * d
    one = chunks == "one"
    logits = 4 * n * v if one else budget  # one chunk may be as large as budget and sum together
    assert logits <= budget + dw
    allowed = logits + dw * (1 if one else 2) + 4 * dx
    assert int(printed.stdout) <= allowed + 2**23, f"{int(printed.stdout) / 2**20:.0f} MiB of {allowed / 2**20:.0f}"

"""``chunked`` and ``fused`` against the closed formulas, bounded by the error of an eager trainer in the same dtype.

On the CPU ``chunked`` runs its PyTorch row pass here; with ``TRITON_INTERPRET=1`` in the environment (a process of its
own: triton reads it when it is imported) both run their Triton kernels in the interpreter, on small problems. On a GPU
the same tests compile the kernels, and those marked ``gpu`` add real sizes.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.loss_problems import INPUTS, UPSTREAM, closed_form, gradients, problem, problems, rounded, tensors
from tract_fast import linear_tract_loss
from tract_fast.loss import chunked as chunked_module, plan, rows as row_module

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"
IMPLEMENTATIONS = ["chunked", "fused"] if INTERPRETED or CUDA else ["chunked"]
EXAMPLES = 60 if INTERPRETED else 30 if CUDA else 300  # on CUDA new sizes and options compile
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def on_device(args):
    return {
        name: x.detach().to(DEVICE).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in args.items()
    }


@contextmanager
def chunks_of(rows: int):
    """Cut batches of any size: chunks of at most ``rows`` rows, row passes of a few logits at a time, and blocks of one
    tile in the fused backward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MIN_ROWS", dict.fromkeys(plan.MIN_ROWS, rows))
        patch.setattr(plan, "ROW_MULTIPLE", 1)
        patch.setattr(plan, "MIN_TILES", 1)
        patch.setattr(plan, "ACCUMULATOR_BYTES", 0)
        patch.setattr(row_module, "BLOCK", 64)
        if INTERPRETED:
            patch.setattr("tract_fast.loss.triton_rows.BLOCK_BYTES", 64)
        yield {"memory_budget": 1}


def eager(args: dict, upstream: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a trainer without this operator does: logits in the dtype of the head, losses in float32, autograd."""
    x, w, b = (args[name] for name in INPUTS)
    z = F.linear(x, w, b) * args.get("logit_scale", 1.0)
    if args.get("softcap"):
        z = torch.tanh(z / args["softcap"]) * args["softcap"]
    z = z.float()
    labels, c = args["labels"], args["score_weights"]
    nll = F.cross_entropy(z, labels, reduction="none")
    score = z[args["score_rows"]]
    vocab = score.softmax(-1)[:, args["score_token_ids"]]
    probs = vocab if args["normalize"] == "vocab" else score[:, args["score_token_ids"]].softmax(-1)
    expected = probs @ args["score_values"]
    a = args["row_weights"]
    a = (labels != -100).float() / (labels != -100).sum().clamp(min=1) if a is None else a
    c = torch.full_like(expected, 1 / max(1, len(expected))) if c is None else c
    loss = (a * nll).sum() + (c * (expected - args["score_targets"]).square()).sum()
    (loss * upstream).backward()
    results = {"loss": loss, "nll": nll, "expected_score": expected, "score_mass": vocab.sum(-1), "score_probs": probs}
    return results, {name: args[name].grad for name in INPUTS if args[name] is not None and args[name].requires_grad}


def distance(x: torch.Tensor, truth: np.ndarray) -> float:
    return float(np.linalg.norm(x.detach().double().cpu().numpy() - truth))


def beside_eager(
    p: dict, dtype: torch.dtype, implementation: str, upstream: float, *, slack: bool, **options
) -> dict[str, tuple[float, float]]:
    """Errors (norm) against float64 and their bounds: twice eager's, plus, with ``slack``, a rounding of one logit and
    one gradient.

    On a few rows eager's own error is a matter of chance, which the slack allows for; 16-bit logits of thousands are
    several apart, and only finite results can be asked for.
    """
    p = rounded(p, dtype)
    values, truth = closed_form(p)
    out, grads = gradients(on_device(tensors(p, dtype)) | options, upstream, implementation)
    grads = {name: grad for name, grad in grads.items() if grad is not None}
    if dtype != torch.float32 and np.abs(p["weight"]).max(initial=0.0) > 100:
        assert all(x.isfinite().all() for x in [*out[:5], *grads.values()])
        return {}
    eager_out, eager_grads = eager(on_device(tensors(p, dtype)), upstream)
    eps = max(torch.finfo(dtype).eps, 1e-5) * slack
    z = p["hidden"] @ p["weight"].T + (0 if p["bias"] is None else p["bias"])
    one_logit = eps * (1 + (np.abs(z).max(initial=0.0) if dtype != torch.float32 else 0.0))
    floor = {"hidden": np.abs(p["weight"]).max(), "weight": np.abs(p["hidden"]).max(initial=0.0), "bias": 1.0}
    exact = {name: upstream * g for name, g in truth.items()}
    checks = [(name, getattr(out, name), eager_out[name], value, 1.0) for name, value in values.items()]
    checks += [(f"gradient of {n}", g, eager_grads[n], exact[n], floor[n] * abs(upstream)) for n, g in grads.items()]
    return {
        name: (distance(ours, value), 2 * distance(theirs, value) + one_logit * max(scale, np.linalg.norm(value)))
        for name, ours, theirs, value, scale in checks[not slack :]  # the loss, one number, is chance
    }


def assert_as_exact_as_eager(p: dict, dtype: torch.dtype, implementation: str, upstream: float, **options) -> None:
    """Of one problem of any size, so with slack."""
    for name, (error, bound) in beside_eager(p, dtype, implementation, upstream, slack=True, **options).items():
        assert error <= bound or np.isnan(bound), f"{name}: error {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("normalize", ["scores", "vocab"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_rows_need_no_slack(implementation, dtype, normalize):
    """Of several problems together: in one, a single row of a large weight may have most of the error, by chance."""
    n, v, d = (32, 100, 32) if INTERPRETED else (256, 900, 64)
    found = []
    for seed in range(5):
        p = problem(n=n, v=v, d=d, k=5, b=12, spread=4.0, normalize=normalize, seed=seed)
        found.append(beside_eager(p, dtype, implementation, 1.3, slack=False))
    for name in found[0]:
        error, bound = (np.linalg.norm([one[name][i] for one in found]) for i in range(2))
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=EXAMPLES, derandomize=True)
@given(p=problems(), upstream=UPSTREAM, rows=st.sampled_from([1, 2, 4, 100]))
def test_as_exact_as_eager(implementation, dtype, p, upstream, rows):
    if dtype == torch.float16 and np.abs(p["weight"]).max(initial=0.0) > 100:
        p = p | {"weight": p["weight"] / 1e3}  # logits that float16 does not hold are nobody's
    with chunks_of(rows) as options:
        assert_as_exact_as_eager(p, dtype, implementation, upstream, **options)


@pytest.mark.parametrize("normalize", ["scores", "vocab"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vocabulary_of_several_blocks(implementation, normalize):
    """Far more columns than a tile, labels that are score tokens, K of 16, and rows that score twice."""
    p = problem(n=13, v=293, d=21, k=16, b=5, spread=3.0, normalize=normalize, softcap=20.0, logit_scale=1.3)
    p["labels"][p["score_rows"]] = p["score_token_ids"][[3, 0, 15, 7, 3]]
    p["score_rows"][1] = p["score_rows"][0]
    for dtype in DTYPES:
        with chunks_of(4) as options:
            assert_as_exact_as_eager(p, dtype, implementation, -1.7, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_16_bit_results_are_those_of_float32_logits(implementation):
    """Scores are read by users: the logits of score tokens and labels are not rounded to 16 bit on the way."""
    p = rounded(problem(n=24, v=200, d=64, k=5, b=8, spread=4.0, ignored=0.0), torch.bfloat16)
    values, _ = closed_form(p)
    out, _ = gradients(on_device(tensors(p, torch.bfloat16)), implementation=implementation)
    theirs, _ = eager(on_device(tensors(p, torch.bfloat16)), 1.0)
    for name in ("expected_score", "score_probs"):
        assert distance(getattr(out, name), values[name]) < 1e-5 * np.linalg.norm(values[name])
        assert distance(getattr(out, name), values[name]) < distance(theirs[name], values[name]) / 100
    assert distance(out.nll, values["nll"]) < distance(theirs["nll"], values["nll"]) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [1.0, 8.0, 20.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_saturated_softmax_does_not_cancel(implementation, gap, dtype):
    """The gradient of the label is minus what the others have, not a probability minus one."""
    weight = torch.eye(3, dtype=dtype)
    z = torch.tensor([[gap, 0.0, -1.0]], dtype=dtype, requires_grad=True)
    args = {"hidden": z, "weight": weight, "labels": torch.zeros(1).long(), "row_weights": torch.ones(1)}
    args |= {"score_rows": torch.zeros(0).long(), "score_targets": torch.zeros(0)}
    args |= {"score_token_ids": torch.tensor([0, 1]), "score_values": torch.tensor([1.0, 2.0])}
    args = on_device(args)
    out = linear_tract_loss(**args, implementation=implementation)
    out.loss.backward()
    small = np.exp(-gap) + np.exp(-gap - 1)
    assert out.nll.item() == pytest.approx(np.log1p(small), rel=1e-5)
    if dtype != torch.float16 or gap < 16:  # float16 has nothing as small
        step = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert args["hidden"].grad[0, 0].item() == pytest.approx(-small / (1 + small), rel=step)


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float16_gradients_do_not_underflow_on_the_way(implementation, rows):
    """Weights of 1 / N are below what float16 holds of p / N; the upstream gradient brings them back."""
    p = rounded(problem(n=8, v=40, d=16, b=2, ignored=0.0), torch.float16)
    p |= {"row_weights": np.full(8, 2.0**-24), "score_weights": np.full(2, 2.0**-24)}
    _, truth = closed_form(p)
    with chunks_of(rows) as options:
        _, grads = gradients(on_device(tensors(p, torch.float16)) | options, 2.0**24, implementation)
    for name, grad in grads.items():
        assert distance(grad, 2.0**24 * truth[name]) < 2e-3 * np.linalg.norm(2.0**24 * truth[name]), name


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_that_nothing_uses_may_hold_anything(implementation, rows, poison):
    p = problem(n=5, b=2, ignored=0.0)
    p["labels"][2], p["score_rows"] = -100, np.array([0, 4])
    spoilt = p | {"hidden": p["hidden"].copy()}
    spoilt["hidden"][2] = poison
    with chunks_of(rows) as options:
        runs = [
            gradients(on_device(tensors(x, torch.float32)) | options, implementation=implementation)
            for x in (p, spoilt)
        ]
    (clean, clean_grads), (out, grads) = runs
    assert out.nll[2].item() == 0.0 and not grads["hidden"][2].any()
    for a, b in zip([*out, *grads.values()], [*clean, *clean_grads.values()], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("weight", "bias"), INPUTS], ids="+".join)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frozen_parts(implementation, frozen):
    """The same gradients for what is left, and no GEMM for what is frozen: 1 without gradient, 2 or 3 with."""
    p = problem(n=7, v=30, d=6)
    _, whole = gradients(on_device(tensors(p, torch.float32)), implementation=implementation)
    args = on_device(tensors(p, torch.float32, frozen))
    with counted_gemms() as gemms:
        out = linear_tract_loss(**args, implementation=implementation)
        if set(frozen) != set(INPUTS):
            out.loss.backward()
    assert out.loss.requires_grad == (set(frozen) != set(INPUTS))
    for name in INPUTS:
        assert (args[name].grad is None) == (name in frozen)
        if name not in frozen:
            torch.testing.assert_close(args[name].grad, whole[name])
    expected = ("hidden" not in frozen) + ("weight" not in frozen) + (implementation == "chunked")
    assert len(gemms) == expected


@contextmanager
def counted_gemms():
    """The calls of torch's GEMMs inside; those of a few columns (score tokens) are written with ``@``."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mm", "addmm"):
            plain = getattr(torch, name)
            patch.setattr(torch, name, lambda *a, _f=plain, **k: calls.append(_f.__name__) or _f(*a, **k))
        yield calls


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_grad_is_one_gemm_and_the_same_numbers(implementation):
    args = on_device(tensors(problem(n=7, v=30, d=6), torch.float32))
    with torch.no_grad(), counted_gemms() as gemms:
        out = linear_tract_loss(**args, implementation=implementation)
    assert len(gemms) == (implementation == "chunked") and not out.loss.requires_grad
    again = linear_tract_loss(**args, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True)), "deterministic, too"


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_backward_twice_through_a_retained_graph(implementation, rows):
    args = on_device(tensors(problem(n=7), torch.bfloat16))
    with chunks_of(rows) as options:
        out = linear_tract_loss(**args, implementation=implementation, **options)
    out.loss.backward(retain_graph=True)
    once = {name: args[name].grad.clone() for name in INPUTS}
    out.loss.backward()
    assert all(torch.equal(args[name].grad, 2 * once[name]) for name in INPUTS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_results_are_detached(implementation):
    out = linear_tract_loss(**on_device(tensors(problem(), torch.float32)), implementation=implementation)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_whole_it_is_bitwise_the_same(implementation, dtype):
    def run(function):
        args = on_device(tensors(problem(n=7, v=50, d=16, normalize="vocab"), dtype))
        out = function(**args, implementation=implementation)
        (out.loss * 3.0).backward()
        return [*out, *(args[name].grad for name in INPUTS)]

    compiled = torch.compile(linear_tract_loss, fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(run(linear_tract_loss), run(compiled), strict=True))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto", "reference"])
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=str)
@pytest.mark.parametrize("rows", [3, 100])
def test_compiled_once_for_any_number_of_rows(implementation, frozen, rows):
    """Micro-batches have different numbers of rows; a size that the trace fixes would compile for each of them."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_tract_loss, fullgraph=True, backend=counter)
    with chunks_of(rows) as options:
        for n in range(5, 14):
            p = tensors(problem(n=n, v=50, d=16, seed=n, weights=False), torch.float32, frozen=frozen) | options
            args, again = on_device(p), on_device(p)
            compiled(**args, implementation=implementation).loss.backward()
            linear_tract_loss(**again, implementation=implementation).loss.backward()
            for name in INPUTS:
                ours, theirs = args[name].grad, again[name].grad
                assert (ours is None) == (theirs is None) == (name in frozen)
                assert ours is None or torch.equal(ours, theirs) or implementation == "reference"
    assert counter.frame_count <= 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_with_every_size_and_number_dynamic(implementation):
    torch._dynamo.reset()
    compiled = torch.compile(linear_tract_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    args = on_device(tensors(problem(n=7, v=50, d=16), torch.float32))
    for options in ({"softcap": 3.0}, {"logit_scale": 0.5}, {"logit_scale": 0.25}):
        out = compiled(**args | options, implementation=implementation)
        expected = linear_tract_loss(**args | options, implementation=implementation)
        torch.testing.assert_close(out.loss, expected.loss)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "value"), [("labels", 50), ("labels", -7), ("score_rows", 7), ("score_token_ids", -1)]
)
def test_an_index_that_nobody_checked_makes_the_loss_nan(implementation, name, value, monkeypatch):
    """As on CUDA, where checking would wait for the device."""
    monkeypatch.setattr("tract_fast.loss.reads_values", lambda hidden: False)
    args = on_device(tensors(problem(n=7, v=50, d=16, weights=False), torch.float32))
    args[name][1] = value
    out = linear_tract_loss(**args, implementation=implementation)
    out.loss.backward()
    assert out.loss.isnan() and args["weight"].grad.isnan().any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_activation_checkpointing(implementation):
    from torch.utils.checkpoint import checkpoint

    def run(wrap):
        args = on_device(tensors(problem(n=7), torch.float32))
        loss = wrap(lambda x: linear_tract_loss(**args | {"hidden": x}, implementation=implementation).loss, args)
        loss.backward()
        return [args[name].grad for name in INPUTS]

    plain = run(lambda f, args: f(args["hidden"] * 1.0))
    again = run(lambda f, args: checkpoint(lambda x: f(x * 1.0), args["hidden"], use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_computes_in_its_dtype(implementation):
    """Parameters in float32, hidden states in bfloat16, as autocast leaves them: as if both were bfloat16."""
    p = rounded(problem(n=7), torch.bfloat16)
    args = on_device(tensors(p, torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = linear_tract_loss(**args | {"hidden": args["hidden"].bfloat16()}, implementation=implementation)
    out.loss.backward()
    plain, grads = gradients(on_device(tensors(p, torch.bfloat16)), implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    for name in INPUTS:
        assert args[name].grad.dtype == torch.float32 and torch.equal(args[name].grad, grads[name].float())


class Recorder(TorchDispatchMode):
    """The names of all operations that ran inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter reads tensors as it likes")
def test_nothing_inside_waits_for_the_device():
    """No operation that brings a value to the host, inside the custom ops, whatever device they run on."""
    args = on_device(tensors(problem(n=9, normalize="vocab"), torch.bfloat16))
    seen: list[str] = []

    def recorded(function):
        def run(*a):
            with Recorder() as recorder:
                out = function(*a)
            seen.extend(recorder.names)
            return out

        return run

    with pytest.MonkeyPatch.context() as patch:
        for op in (chunked_module.chunked_loss, chunked_module.chunked_backward):
            for device in list(op._backend_fns):
                patch.setitem(op._backend_fns, device, recorded(op._backend_fns[device]))
        linear_tract_loss(**args, implementation="chunked").loss.backward()
    assert len(seen) > 30
    waits = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
    assert not waits & set(seen)


def test_values_out_of_range_are_clamped_when_unchecked():
    """On CUDA values are not checked: what an index may read stays inside the buffers."""
    p = problem(n=4, v=7, d=3, k=3, b=2)
    bad = p | {"labels": np.array([7, -7, 2**40, -100]), "score_rows": np.array([-1, 2**40])}
    bad["score_token_ids"] = np.array([-5, 2, 2**40])
    near = p | {"labels": np.array([6, 0, 6, -100]), "score_rows": np.array([0, 3])}
    near["score_token_ids"] = np.array([0, 2, 6])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tract_fast.loss.reads_values", lambda hidden: False)
        for implementation in IMPLEMENTATIONS:
            (a, _), (b, _) = (
                gradients(on_device(tensors(x, torch.float32)), implementation=implementation) for x in (bad, near)
            )
            assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True)) and a.loss.isnan()


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("implementation", ["chunked", "fused"])
def test_offsets_beyond_32_bit(implementation):
    """N V > 2^31: the last rows give what they give alone."""
    n, v, d = 17_000, 128_256, 64
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, d, generator=generator, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(v, (n,), generator=generator, device="cuda")
    rest = {"score_rows": torch.tensor([n - 1], device="cuda"), "score_targets": torch.ones(1, device="cuda")}
    rest |= {"score_token_ids": torch.arange(5, device="cuda"), "score_values": torch.arange(5.0, device="cuda")}
    options = {"implementation": implementation, "memory_budget": 2**34, "row_weights": torch.ones(n, device="cuda")}
    out = linear_tract_loss(hidden, weight, labels, **rest, **options)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    few = hidden.detach()[-64:].requires_grad_()
    rest["score_rows"] = torch.tensor([63], device="cuda")
    alone = linear_tract_loss(
        few, weight, labels[-64:], **rest, **options | {"row_weights": torch.ones(64, device="cuda")}
    )
    (grad_alone,) = torch.autograd.grad(alone.loss, few)
    torch.testing.assert_close(out.nll[-64:], alone.nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad[-64:], grad_alone, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("implementation", ["chunked", "fused"])
@pytest.mark.parametrize("n, v, d", [(1, 32000, 4096), (777, 49152, 576), (300, 128256, 1024), (100, 50257, 97)])
def test_real_sizes(implementation, n, v, d):
    p = problem(n=n, v=v, d=d, k=5, b=min(n, 8), spread=4.0, bias=False, normalize="vocab")
    for dtype in (torch.bfloat16, torch.float32):
        assert_as_exact_as_eager(p, dtype, implementation, 1.3)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("implementation", ["chunked", "fused"])
def test_no_sync_on_cuda(implementation):
    args = on_device(tensors(problem(n=64, v=500, d=64), torch.bfloat16))
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            linear_tract_loss(**args, implementation=implementation).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not INTERPRETED, reason="needs triton's interpreter, and times nothing")
def test_timing_picks_the_fastest(monkeypatch):
    """With TRACT_FAST_AUTOTUNE=1 every candidate runs; the times here are given, the last candidate's the best."""
    import triton

    from tract_fast.loss import fused, tuning

    tile = lambda rows: triton.Config({"BM": rows, "BN": 32, "BK": 16, "UPCAST": True})  # noqa: E731
    monkeypatch.setattr(fused, "INTERPRETED", (tile(16), tile(32)))
    p = problem(9, 40, 5, 3, 4, seed=8, normalize="vocab")
    args = lambda: on_device(tensors(p, torch.float32))  # noqa: E731
    expected, expected_grads = gradients(args(), 1.7, "fused")

    launched, ran = [], []
    real = tuning.tuned.__wrapped__

    def timed(kernel, candidates):
        launch = real(kernel, candidates)
        launch._do_bench = lambda call, quantiles: (call(), ran.append(launch), [1.0 / len(ran)] * 3)[-1]
        launched.append(launch)
        return launch

    monkeypatch.setenv("TRACT_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(fused, "tuned", timed)
    out, grads = gradients(args(), 1.7, "fused")
    assert len(launched) == 2
    for launch in launched:
        assert len(launch.configs) == 2 and ran.count(launch) == 2 and launch.best_config is launch.configs[-1]
    for ours, theirs in [*zip(out, expected, strict=True), *((grads[n], g) for n, g in expected_grads.items())]:
        torch.testing.assert_close(ours, theirs)
    monkeypatch.delenv("TRACT_FAST_AUTOTUNE")
    assert len(real(fused.sums_kernel, fused.TILES[2]).configs) == 1

"""What must hold on a GPU: the parts of training there against a CPU's or against the plain definition.

Each test has a device. On CUDA it is marked ``gpu`` and runs where there is one (``make gpu``); the same body runs on
the CPU everywhere, so that none of it is code that nothing exercises.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.loss_problems import problem, tensors
from tests.operators import Called
from tests.ranks import trained_steps
from tests.tiny_models import FAMILIES, tiny_lm
from tests.tiny_runs import metrics, tiny_recipe, write_data
from tract_fast import (
    attention,
    checkpoint,
    elementwise,
    linear_tract_loss,
    model,
    optim,
    selfcheck,
    selftest,
    shard,
    train,
)
from tract_fast.attention import DOCUMENTS, VARLEN
from tract_fast.data.tree import lay_out
from tract_fast.loss import sampled
from tract_fast.model import logit_transform
from tract_fast.prepare import prepare
from tract_fast.sections import Train

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float32, torch.bfloat16]
# relative, of a tiny model's gradients against a CPU's in float32; sums of bfloat16 products are a hundredth off
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2}
WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}


def silent(text: str) -> None:
    pass


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> torch.device:
    """Ranks that start have this device, also the CPU of a machine with GPUs."""
    found = torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
    monkeypatch.setattr(shard, "local_device", lambda local_rank=0: found)
    return found


@contextlib.contextmanager
def waits(device: torch.device):
    """The calls inside that wait for the device, in a list that is whole at the end; on a CPU, which never waits, those
    operators that would on CUDA."""
    found: list[str] = []
    if device.type == "cpu":
        with Called() as called:
            yield found
        found += [op.name() for op in called.operators if op.name() in WAITS]
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str, tolerance: float) -> None:
    """Relative error of each tensor, of one that nearly cancels relative to all of them."""
    names = [name for name in expected if name.startswith(prefix)]
    assert names and found.keys() == expected.keys()
    whole = torch.stack([expected[name].norm() for name in names]).norm()
    for name in names:
        scale = torch.maximum(expected[name].norm(), 1e-2 * whole)
        error = ((found[name].float() - expected[name]).norm() / scale).item()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["chunked", "fused"])
def test_loss_is_that_of_float64(device, implementation, dtype):
    if implementation == "fused" and device.type == "cpu":
        pytest.skip("on a CPU it runs in triton's interpreter only (test_implementations.py)")
    assert "error against float64" in selftest.check_loss(implementation, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_are_around_the_exact_gradient(device, dtype):
    assert "error against exact" in selftest.check_sampled(device, dtype)


@pytest.mark.parametrize("normalize", ["scores", "vocab"])
def test_draws_are_those_of_pytorch_on_a_cpu(device, monkeypatch, normalize):
    """One seed, one list: hidden states and weights are multiples of 1/8, so that the logits are the same to the last
    bit in any order of summation, and only roundings of exp and log can move an entry."""
    p = problem(n=300, v=3000, d=32, k=5, b=20, seed=4, bias=False, ignored=0.1, normalize=normalize)
    p["hidden"], p["weight"] = (np.round(4 * p[name]) / 8 for name in ("hidden", "weight"))
    p["weight"] *= 4

    def drawn(where: str) -> tuple[list[list[int]], dict[str, Tensor]]:
        kept = []
        with monkeypatch.context() as patch:
            patch.setattr("tract_fast.loss.sampled_loss", lambda *a: kept.append(sampled.sampled_loss(*a)) or kept[-1])
            if where == "plain":
                plain = sampled.sampled_rows, sampled.sampled_weight
                patch.setattr(sampled, "kernels_for", lambda hidden: plain)
            args = tensors(p, torch.float32)
            place = device if where == "device" else "cpu"
            args = {k: x.detach().to(place) if isinstance(x, Tensor) else x for k, x in args.items()}
            inputs = {name: args[name].requires_grad_() for name in ("hidden", "weight")}
            out = linear_tract_loss(**args, gradient="sampled", eps=2.0**-6, seed=11)
            grads = torch.autograd.grad(out.loss, list(inputs.values()))
        columns, _, counts = (x.cpu() for x in kept[0][8:11])
        lists = [row[:n] for row, n in zip(columns.tolist(), counts.tolist(), strict=True)]
        return lists, {name: g.cpu() for name, g in zip(inputs, grads, strict=True)}

    (lists, grads), (expected, others) = drawn("device"), drawn("plain")
    same = sum(a == b for a, b in zip(lists, expected, strict=True))
    assert same >= 0.98 * len(lists) and sum(map(len, lists)) > 10 * len(lists)
    assert_near(grads, others, "", 1e-4 if same == len(lists) else 5e-2)


@pytest.mark.parametrize("heads", [(4, 2, 64), (8, 8, 128), (9, 3, 64), (4, 1, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_a_plain_softmax(device, dtype, heads):
    """Queries fewer than keys, with and without a window, output and gradients: what shared prompts rest on."""
    name, _ = attention.resolve_attention("auto", device, dtype, softcap=False)
    assert name == (VARLEN if device.type == "cuda" and dtype == torch.bfloat16 else DOCUMENTS)
    assert "aligns queries" in selfcheck.alignment(name, device, dtype, heads)


@pytest.mark.parametrize("window", [None, 512])
def test_attention_at_real_lengths(device, window):
    """A prompt of a thousand tokens with three rationales, and one without, in bfloat16 against float32."""
    rng = np.random.default_rng(0)
    prompt, other = rng.integers(100, size=1003), rng.integers(100, size=917)
    ids = [np.concatenate([prompt, rng.integers(100, size=n)]) for n in (117, 131, 96)] + [other]
    layout = lay_out(ids, [1003, 1003, 1003, 900], "prompts")
    batch = selfcheck.bare_batch([torch.from_numpy(x).to(device) for x in ids], layout)
    fields = {
        name: getattr(batch, name)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "key_index")
    }
    assert batch.key_index is not None and layout.tokens < sum(map(len, ids))
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, n, layout.tokens, 64) for n in (6, 2, 2)]
    values = [torch.randn(shape, generator=draw).bfloat16() for shape in shapes]
    upstream = torch.randn(1, layout.tokens, 6, 64, generator=draw).bfloat16()

    def results(attend, dtype) -> list[Tensor]:
        qkv = [x.to(device, dtype).requires_grad_() for x in values]
        out, _ = attend(None, *qkv, None, **fields, scaling=0.125, sliding_window=window)
        return [out, *torch.autograd.grad(out, qkv, upstream.to(device, dtype))]

    fast = attention.varlen_attention if device.type == "cuda" else attention.document_attention
    pairs = zip(results(fast, torch.bfloat16), results(attention.document_attention, torch.float32), strict=True)
    for got, want in pairs:
        assert ((got.float() - want).norm() / want.norm()).item() < 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])  # its capped attention needs flash-attn
def test_packed_documents_are_those_alone(device, family, dtype):
    """Through the model, with a shared prompt and windows that are shorter than the documents."""
    attention.register()
    lm = tiny_lm(family).to(device)
    name, _ = attention.resolve_attention("auto", device, dtype, softcap=False)
    assert "each alone" in selfcheck.packing(lm, dtype, name, *logit_transform(lm.config), share=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"family": "llama_tied", "train__batch": 8, "train__max_tokens": 150},
        {"family": "mistral"},
        {"lora__rank": 4},
    ],
    ids=["llama", "tied, several micro-batches", "window", "lora"],
)
def test_steps_are_those_of_a_cpu(device, monkeypatch, tmp_path, change, dtype):
    """Gradients, metrics and weights of two steps against a CPU's in float32 with the definition of the loss."""
    write_data(tmp_path / "data.jsonl", siblings=3)
    change = {**change, "run": "run"}
    found, expected = tmp_path / "found.safetensors", tmp_path / "expected.safetensors"
    trained_steps(tiny_recipe(tmp_path, model__dtype=dtype, **change), found, steps=2)
    monkeypatch.setattr(shard, "local_device", lambda local_rank=0: torch.device("cpu"))
    plain = tiny_recipe(tmp_path, loss__implementation="reference", **change)
    trained_steps(plain, expected, steps=2)
    got, want = load_file(found), load_file(expected)
    tolerance = TOLERANCE[getattr(torch, dtype)]
    assert_near(got, want, "grad.", tolerance)
    # AdamW's first steps are as long as lr where a gradient is nearly 0, too: rounding decides their signs
    assert_near(got, want, "weight.", 2 * tolerance if dtype == "bfloat16" else tolerance)
    torch.testing.assert_close(got["records"], want["records"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("settings", [{"model__dtype": "bfloat16"}, {"lora__rank": 4}], ids=["full", "lora"])
def test_resume_is_bitwise(device, monkeypatch, tmp_path, settings):
    """6 steps = 3 + 3, with deterministic algorithms: without, attention on CUDA adds up gradients in any order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    write_data(tmp_path / "data.jsonl", siblings=3)
    constant = {"train__schedule": "constant", "train__warmup": 0.0, **settings}
    torch.use_deterministic_algorithms(True)  # with warnings alone, flash attention would not be
    try:
        assert train.run(tiny_recipe(tmp_path, "whole", **constant)) == 0
        assert train.run(tiny_recipe(tmp_path, "half", train__max_steps=3, **constant)) == 0
        assert train.run(tiny_recipe(tmp_path, "half", **constant)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    steps = [[line for line in metrics(tmp_path / run) if "loss" in line] for run in ("whole", "half")]
    assert len(steps[0]) == 6 and steps[0] == steps[1]
    whole, half = (checkpoint.trained_weights(checkpoint.latest(tmp_path / run)) for run in ("whole", "half"))
    assert whole and all(torch.equal(value, half[name]) for name, value in whole.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saved_state_is_loaded_bit_for_bit(device, dtype):
    assert "the same to the last bit" in selftest.check_save(dtype)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.soak), CUDA], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_steps_are_those_of_eager(device, tmp_path, dtype):
    write_data(tmp_path / "data.jsonl", siblings=3)
    files = {}
    for compiled in (False, True):
        files[compiled] = tmp_path / f"{compiled}.safetensors"
        trained_steps(tiny_recipe(tmp_path, model__dtype=dtype, train__compile=compiled), files[compiled], steps=2)
    tolerance = TOLERANCE[getattr(torch, dtype)]
    assert_near(load_file(files[True]), load_file(files[False]), "grad.", tolerance)
    assert_near(load_file(files[True]), load_file(files[False]), "weight.", tolerance)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_a_step_waits_once(device, monkeypatch, tmp_path, gradient):
    """Micro-batches are queued without waiting for the device, and the sums of a step come to the host together."""
    monkeypatch.setattr("tract_fast.loss.reads_values", lambda hidden: False)  # as it is on CUDA
    write_data(tmp_path / "data.jsonl", siblings=3)
    settings = {"model__dtype": "bfloat16", "train__batch": 8, "train__max_tokens": 150, "loss__gradient": gradient}
    recipe = tiny_recipe(tmp_path, **settings)
    with shard.start_ranks() as ranks, train.StopSignal() as stop:
        job = train.assemble(recipe, ranks, prepare(recipe, silent), silent)
        assert len(job.feed.take(1).micro_batches) > 1
        train.train_step(job, 0, stop)  # compiles, and loads libraries, which waits
        if device.type == "cuda":
            micro_batches_do_not_wait(job)
        with waits(device) as found:
            train.train_step(job, 1, stop)
    assert len(found) == (1 if device.type == "cuda" else 0), found  # a CPU's tolist calls no operator


def micro_batches_do_not_wait(job: train.Job) -> None:
    """Forward and backward raise where something waits."""
    batches = job.feed.take(1).micro_batches
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            job.model(batch.to(job.ranks.device)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    job.optimizer.zero_grad()


def test_a_wait_is_found(device):
    x = torch.ones(3, device=device)
    with waits(device) as found:
        x.sum().item()
    assert len(found) == 1


def test_liger_is_applied_where_it_runs(device, tmp_path):
    pytest.importorskip("liger_kernel")
    recipe = tiny_recipe(tmp_path)
    data, lines = prepare(recipe, silent), []
    built = model.build(recipe, data.config, data.tokenizer, data.scale, device, lines.append)
    applied = device.type == "cuda"
    assert any(line.startswith("liger: norm, RoPE" if applied else "liger: off") for line in lines)
    norms = {type(m).__name__: m.forward for m in built.modules() if "RMSNorm" in type(m).__name__}
    forwards = {name: getattr(f, "func", f).__qualname__ for name, f in norms.items()}  # ours is a partial
    assert forwards and all(("Liger" in name) == applied for name in forwards.values()), forwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_keeps_less_has_the_same_gradient(device, dtype, offset):
    """Norm, gated product and a layer that has its input computed again, against plain formulas in float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((70, 96), (96,), (192, 96), (96, 96), (70, 96))
    x, scale, wide, down, upstream = (torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes)

    def ours(x, scale, wide, down):
        y = elementwise.rms_norm(x, scale, 1e-5, offset)
        gate, up = (elementwise.linear(y, w) for w in wide.chunk(2))
        return elementwise.linear(elementwise.gated_product(gate, up, "silu"), down)

    def plain(x, scale, wide, down):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (scale + offset)
        gate, up = (y @ w.T for w in wide.chunk(2))
        return (torch.nn.functional.silu(gate) * up) @ down.T

    found = []
    for function, kind in ((ours, dtype), (plain, torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, scale, wide, down)]
        out = function(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(kind))])
    for mine, exact in zip(*found, strict=True):
        assert mine.dtype == dtype
        assert (mine - exact).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * exact.norm()


def test_adamw_is_fused_and_follows_its_formula(device):
    """Two steps against the textbook in float64, weight decay on matrices only."""
    settings = Train(lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in ((5, 3), (7,))]
    grads = [[torch.randn(p.shape, generator=draw) for p in start] for _ in range(2)]
    parameters = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
    optimizer = optim.adamw(parameters, settings)
    assert all(group["fused"] for group in optimizer.param_groups)
    for step in grads:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.to(device)
        optimizer.step()
    for i, p in enumerate(start):
        x, m, v = p.double(), torch.zeros(()), torch.zeros(())
        for t, g in enumerate((step[i].double() for step in grads), 1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            x = x * (1 - 0.1 * (0.3 if p.ndim == 2 else 0.0))
            x = x - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
        torch.testing.assert_close(parameters[i].detach().cpu().double(), x, rtol=1e-5, atol=1e-6)


def test_a_whole_run_on_the_device(device, tmp_path):
    """Training, evaluation, checkpoint and export by the command's own function."""
    recipe = tiny_recipe(tmp_path, model__dtype="bfloat16", lora__rank=4, train__eval_every=3)
    assert train.run(recipe) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval" in line] == [0, 3, 6]
    checkpoint.export(Path(recipe.run.dir))
    assert (tmp_path / "run" / "judge" / "merged" / "model.safetensors").is_file()

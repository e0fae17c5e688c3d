"""RMSNorm and gated MLP that keep less: the same numbers, what they keep, and which modules are exchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tests.tiny_models import FAMILIES, tiny_lm
from tests.tiny_runs import tiny_recipe
from tract_fast import elementwise, lean, model
from tract_fast.data.batch import collate, normalizer
from tract_fast.elementwise import gated_product, rms_norm
from tract_fast.ledger import ACTIVATIONS, Ledger
from tract_fast.loss import native
from tract_fast.prepare import prepare

CPU = torch.device("cpu")
NATIVE = native.missing() is None
DTYPES = [torch.float32, torch.bfloat16]
HIDDEN_ACTS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
EPS = 1e-5


def errors(found, exact, sizes):
    """Relative to the sizes of what was added up."""
    return [((f.double() - e).norm() / s.norm()).item() for f, e, s in zip(found, exact, sizes, strict=True)]


def bound(their_error, dtype):
    """Their error and half, one rounding, and a few of float32's inside."""
    return 1.5 * their_error + torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps


def results(function, inputs, upstream):
    """Value and gradients of ``function`` at ``inputs`` for the gradient ``upstream`` of its value."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def strided(x, how):
    """``x`` with the same values, its elements elsewhere."""
    if how == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.stack([x, x], -1)[..., 0] if how == "spread" else x


def draw(seed, dtype, *shapes):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(2, 1100))
LAYOUTS = st.sampled_from(["contiguous", "transposed", "spread"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theirs", [LlamaRMSNorm, Gemma2RMSNorm])
@given(shape=SHAPES, layout=LAYOUTS, scale=st.sampled_from([1e-2, 1.0, 50.0]), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_norm_is_as_near_as_theirs(dtype, theirs, shape, layout, scale, seed):
    """Value and gradients against float64, in units of what transformers' own module is off in the same precision."""
    offset = float(theirs is Gemma2RMSNorm)
    x, dy, w = draw(seed, dtype, shape, shape, shape[-1:])
    x, dy = strided(x * scale, layout), strided(dy, layout)

    def exact(x, w):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (w + offset)

    def hugging_face(x, w):
        norm = theirs(shape[-1], eps=EPS)
        return torch.func.functional_call(norm, {"weight": w}, x)

    want = results(exact, [x.double(), w.double()], dy.double())
    r = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    sizes = [want[0], dy * r * (w + offset), (dy * x * r).abs().flatten(0, -2).sum(0)]
    ours = errors(results(lambda x, w: rms_norm(x, w, EPS, offset), [x, w], dy), want, sizes)
    for our, their in zip(ours, errors(results(hugging_face, [x, w], dy), want, sizes), strict=True):
        assert our <= bound(their, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", HIDDEN_ACTS)
@given(shape=SHAPES, layout=LAYOUTS, scale=st.sampled_from([1e-2, 1.0, 8.0]), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_gated_product_is_as_near_as_theirs(dtype, activation, shape, layout, scale, seed):
    from transformers.activations import ACT2FN

    gate, up, dy = (strided(x, layout) for x in draw(seed, dtype, shape, shape, shape))
    act = ACT2FN[HIDDEN_ACTS[activation]]
    plain = lambda gate, up: act(gate) * up  # noqa: E731
    inputs = [gate * scale, up]
    want = results(plain, [x.double() for x in inputs], dy.double())
    ours = errors(results(lambda g, u: gated_product(g, u, activation), inputs, dy), want, want)
    for our, their in zip(ours, errors(results(plain, inputs, dy), want, want), strict=True):
        assert our <= bound(their, dtype)


@pytest.mark.skipif(not NATIVE, reason="the native kernels are not built")
@pytest.mark.parametrize("variant", ["portable", ""])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_is_pytorch(monkeypatch, dtype, variant):
    """Both paths to rounding, and each result to the bit however many threads there are."""
    if variant:
        monkeypatch.setenv("TRACT_FAST_CPU", variant)
    x, dy, w = draw(1, dtype, (300, 90), (300, 90), (90,))
    functions = {"norm": (lambda x, w: rms_norm(x, w, EPS, 1.0), [x, w])}
    for name in HIDDEN_ACTS:
        functions[name] = (lambda g, u, name=name: gated_product(g, u, name), [x, dy * 2])
    ours = {name: results(f, inputs, dy) for name, (f, inputs) in functions.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    again = {name: results(f, inputs, dy) for name, (f, inputs) in functions.items()}
    torch.set_num_threads(threads)
    monkeypatch.setattr(native, "runs", lambda dtype: False)
    for name, (f, inputs) in functions.items():
        assert all(map(torch.equal, ours[name], again[name])), name
        plain = results(f, inputs, dy)
        step = torch.finfo(dtype).eps * (0.1 if name == "norm" else 0.5)  # PyTorch rounds the activation, too
        for error in errors(ours[name], [t.double() for t in plain], plain):
            assert error <= step + 8 * torch.finfo(torch.float32).eps, name


def test_nothing_to_compute_and_what_does_not_fit():
    for dtype in [*DTYPES, torch.float64]:
        x, w = torch.empty(0, 4, dtype=dtype), torch.ones(4, dtype=dtype)
        y, dx, dw = results(lambda x, w: rms_norm(x, w, EPS), [x, w], x)
        assert y.shape == dx.shape == (0, 4) and not dw.any()
        assert all(t.shape == (0, 4) for t in results(lambda a, b: gated_product(a, b, "silu"), [x, x], x))
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm(torch.ones(2, 4), torch.ones(3), EPS)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm(torch.ones(2, 4), torch.ones(4).bfloat16(), EPS)
    with pytest.raises(ValueError, match="gate is"):
        gated_product(torch.ones(2, 4), torch.ones(4), "silu")


class Arguments(TorchDispatchMode):
    """The arguments of each call of the norm's backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.tract_fast.rms_norm_backward.default:
            self.seen.append(args)
        return func(*args, **kwargs or {})


@pytest.mark.skipif(not NATIVE, reason="the native kernels are not built")
def test_a_frozen_weight_has_no_gradient_computed():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    with Arguments() as calls:
        rms_norm(x, w, EPS).sum().backward()
        rms_norm(x.detach(), w.requires_grad_(), EPS).sum().backward()
    (*_, dx, dw), (*_, no_dx, other_dw) = calls.seen
    assert dx.shape == x.shape and dw.numel() == 0
    assert no_dx.numel() == 0 and other_dw.shape == w.shape


def norm_and_mlp(family="llama", bias=False, rank=0):
    """A Llama's second norm and its MLP as one function, exchanged, and as they were."""
    torch.manual_seed(0)
    config = LlamaConfig(num_attention_heads=4, hidden_size=24, intermediate_size=40, mlp_bias=bias)
    pair = nn.ModuleDict({"norm": LlamaRMSNorm(24), "mlp": LlamaMLP(config)})
    if rank:
        from peft import LoraConfig, inject_adapter_in_model

        targets = ["gate_proj", "up_proj", "down_proj"]
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=targets, init_lora_weights=False), pair)
    plain = copy.deepcopy(pair)
    pair.get_decoder = lambda: pair
    line = lean.apply(pair, CPU, torch.float32)
    assert "1 RMSNorms and 1 gated MLPs (silu)" in line
    return pair, plain


def run(pair, x):
    return pair["mlp"](pair["norm"](x))


@pytest.mark.parametrize("by", ["C++", "PyTorch"])
@pytest.mark.parametrize(("bias", "rank"), [(False, 0), (True, 0), (False, 3)])
def test_what_is_kept(monkeypatch, by, bias, rank):
    """After forward there are gate, up, a number a row and the result; of adapters what lies between them, too."""
    if by == "PyTorch":
        monkeypatch.setattr(native, "runs", lambda dtype: False)
    elif not NATIVE:
        pytest.skip("the native kernels are not built")
    rows = 50
    kept = {}
    for name, pair in zip(("ours", "theirs"), norm_and_mlp(bias=bias, rank=rank), strict=True):
        pair.to("meta")
        ledger = Ledger()
        ledger.leave_out(pair.parameters())
        with ledger:
            out = run(pair, torch.empty(1, rows, 24, device="meta", requires_grad=True))
            kept[name] = ledger.live[ACTIVATIONS] // 4
        del out
    x, y, inner, between = rows * 24, rows * 24, rows * 40, 3 * rows * rank
    assert kept["ours"] == x + y + 2 * inner + rows + between
    assert kept["theirs"] >= kept["ours"] + 2 * inner - rows * (40 if rank else 0) + x


@pytest.mark.parametrize("how", ["plain", "recomputed", "twice"])
@pytest.mark.parametrize(("bias", "rank"), [(False, 0), (True, 0), (False, 3)])
def test_gradients_of_what_is_computed_again(how, bias, rank):
    """Every gradient, those by activation checkpointing and a second time from the same graph."""
    (x,) = draw(3, torch.float32, (2, 30, 24))
    found = []
    for pair in norm_and_mlp(bias=bias, rank=rank):
        leaf = x.clone().requires_grad_()
        out = checkpoint(run, pair, leaf, use_reentrant=False) if how == "recomputed" else run(pair, leaf)
        trained = [p for p in pair.parameters() if p.requires_grad]
        loss = (out.sin() * 3).sum()
        if how == "twice":
            torch.autograd.grad(loss, [leaf, *trained], retain_graph=True)
        found.append([out, *torch.autograd.grad(loss, [leaf, *trained])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_checkpointing_computes_no_product_that_it_does_not_need():
    """The block is computed again as far as the gated product: its last linear layer is not."""
    from tests.operators import Called

    counts = []
    for pair in norm_and_mlp():
        out = checkpoint(run, pair, torch.randn(7, 24, requires_grad=True), use_reentrant=False)
        with Called() as called:
            out.sum().backward()
        counts.append(called.operators.count(torch.ops.aten.mm.default))
    assert counts[0] == counts[1] == 2 + 6


@pytest.mark.skipif(not NATIVE, reason="the native kernels are not built")
def test_a_norm_is_computed_again_once_for_all_that_read_it():
    from tests.operators import Called

    pair, _ = norm_and_mlp()
    out = run(pair, torch.randn(7, 24, requires_grad=True))
    with Called() as called:
        out.sum().backward()
    names = [f.name().partition("::")[2] for f in called.operators if f.namespace == "tract_fast"]
    assert sorted(names) == ["gated", "gated_backward", "rms_norm", "rms_norm_backward"]


def test_a_copy_computes_with_its_own_weights():
    pair, _ = norm_and_mlp()
    other = copy.deepcopy(pair)
    x = torch.randn(4, 24)
    before = run(pair, x)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not run(other, x).any() and torch.equal(run(pair, x), before)


# which modules


class CentredRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class ClampedRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x).clamp(-3, 3)


class SquareRootRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class Swapped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Dropped(LlamaMLP):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Limited(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=30)) * self.up_proj(x))


class Unbiased(LlamaMLP):
    def forward(self, x):
        return super().forward(x) - (0 if self.down_proj.bias is None else self.down_proj.bias)


OTHERS = [CentredRMSNorm, ClampedRMSNorm, SquareRootRMSNorm, GatedRMSNorm, Swapped, Dropped, Limited, Unbiased]


@pytest.mark.parametrize("kind", [*OTHERS, "relu"])
def test_what_computes_something_else_is_left_alone(kind):
    config = LlamaConfig(
        num_attention_heads=4, hidden_size=24, intermediate_size=40, hidden_act="relu" if kind == "relu" else "silu"
    )
    kind = LlamaMLP if kind == "relu" else kind
    module = kind(24) if issubclass(kind, LlamaRMSNorm) else kind(config)
    lm = nn.ModuleDict({kind.__name__: module})
    lm.get_decoder = lambda: lm
    state = torch.get_rng_state()
    line = lean.apply(lm.eval(), CPU, torch.float32)
    assert "forward" not in vars(module) and not list(lean.exchanged(lm))
    assert line.startswith("nothing to exchange") and f"1 left as they are: {kind.__name__}" in line
    assert "computes something else" in line or "takes more than one argument" in line
    assert torch.equal(torch.get_rng_state(), state) and not module.training


def test_what_another_has_exchanged_is_left_alone():
    lm = tiny_lm()
    norm = lm.get_decoder().norm
    norm.forward = lambda x: x
    line = lean.apply(lm, CPU, torch.float32)
    assert line.startswith("4 RMSNorms and 2 gated MLPs") and "1 left as they are: LlamaRMSNorm is another's" in line
    assert "5 left as they are" in lean.apply(lm, CPU, torch.float32), "a second time changes nothing"


COUNTS = {"qwen3": (9, 2), "gemma2": (9, 2), "gemma3": (13, 2), "cohere": (0, 2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """Every norm and MLP of the families that are tested, and names of parameters as they were."""
    lm = tiny_lm(family)
    names = list(lm.state_dict())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = lm(input_ids=ids, use_cache=False).logits
        lean.apply(lm, CPU, torch.float32)
        torch.testing.assert_close(lm(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    kinds = [kind for _, kind in lean.exchanged(lm)]
    assert (kinds.count("norm"), kinds.count("mlp")) == COUNTS.get(family, (5, 2))
    assert list(lm.state_dict()) == names


def test_generation_is_the_same():
    found = []
    for exchange in (False, True):
        lm = tiny_lm("qwen3")
        if exchange:
            lean.apply(lm, CPU, torch.float32)
        found.append(lm.generate(torch.arange(8)[None], max_new_tokens=12, do_sample=False))
    assert torch.equal(*found)


CHECKPOINTING = ["none", "full", "selective", "2"]


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize(("family", "rank", "dropout"), [("gemma3", 0, 0.0), ("qwen3", 4, 0.0), ("llama", 4, 0.2)])
def test_a_step_has_the_same_gradient(tmp_path, mode, family, rank, dropout):
    """Loss and every gradient with and without, of packed sequences that share prompts."""
    common = {"family": family, "lora__rank": rank, "lora__dropout": dropout, "train__activation_checkpointing": mode}
    found, told = [], []
    for setting in ("auto", "off"):
        recipe = tiny_recipe(tmp_path, model__lean=setting, data__share_prompts="auto", **common)
        data = prepare(recipe, lambda text: None)
        lines = []
        tract = model.build(recipe, data.config, data.tokenizer, data.scale, CPU, lines.append, share=not dropout)
        told += [line for line in lines if line.startswith("lean: ")]
        norm = normalizer(data.train[:6], ce_weight=1, regression_weight=1, score_ce=True, ce_reduction="token")
        torch.manual_seed(5)
        tract.train()
        if rank:
            for name, p in tract.trainable().items():
                if "lora_B" in name:
                    nn.init.normal_(p, std=0.1)
        out = tract(collate(data.train[:6], norm, score_ce=True))
        out.loss.backward()
        found.append([out.loss, *(p.grad for p in tract.trainable().values())])
    assert "gated MLPs" in told[0] and told[1] == "lean: off (model.lean)"
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-7


def test_when_it_is_off():
    assert lean.choose_lean("auto", compiled=False)[0]
    assert lean.choose_lean("off", compiled=False) == (False, "off (model.lean)")
    on, reason = lean.choose_lean("auto", compiled=True)
    assert not on and "train.compile" in reason


def test_a_layer_that_reads_anything_else_keeps_it():
    x = torch.randn(3, 4, requires_grad=True)
    w = torch.randn(5, 4, requires_grad=True)
    double, whole = x * 2, rms_norm(x, torch.ones(4), EPS)
    view, changed, cast = whole[:2], rms_norm(x, torch.ones(4), EPS), rms_norm(x, torch.ones(4), EPS)
    with torch.no_grad():
        changed.mul_(3)
    for read in (double, view, changed):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            out = elementwise.linear(read, w)
        assert read.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in kept}
        grad = torch.randn(out.shape)
        (found,) = torch.autograd.grad(out, w, grad)
        torch.testing.assert_close(found, grad.t() @ read)
    with torch.autocast("cpu", torch.bfloat16):
        assert elementwise.linear(cast, w).dtype == torch.bfloat16


class TwoArguments(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class Drops(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(torch.dropout(hidden_states, 0.5, self.training))


class Deep(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * (2 if hidden_states.ndim > 2 else 1)


@pytest.mark.parametrize("kind", [TwoArguments, Drops, Deep])
def test_what_is_the_same_only_at_first_sight_is_left_alone(kind):
    with pytest.raises(lean.Other):
        lean.known_norm(kind(8).eval())

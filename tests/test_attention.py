"""Packed documents see themselves only, causally, in every family; what cannot work is refused."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.tiny_models import FAMILIES, tiny_lm
from tract_fast import attention, selfcheck
from tract_fast.attention import (
    DOCUMENTS,
    VARLEN,
    document_attention,
    hidden_states,
    resolve_attention,
    varlen_attention,
)
from tract_fast.errors import UserError
from tract_fast.model import logit_transform
from tract_fast.selfcheck import bare_batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family):
    """Against transformers' own eager attention, one document at a time, windows shorter than the documents."""
    attention.register()
    lm = tiny_lm(family)
    documents = [torch.randint(512, (n,)) for n in (17, 1, 9)]
    lm.set_attn_implementation("eager")
    alone = [lm.get_decoder()(input_ids=d[None], use_cache=False).last_hidden_state[0] for d in documents]
    lm.set_attn_implementation(DOCUMENTS)
    packed = hidden_states(lm.get_decoder(), bare_batch(documents))
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    line = selfcheck.packing(lm, torch.float32, DOCUMENTS, *logit_transform(lm.config))
    assert "packed = each alone" in line


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_leak(family):
    """Changing one document leaves the other's hidden states bit for bit as they were."""
    attention.register()
    lm = tiny_lm(family)
    lm.set_attn_implementation(DOCUMENTS)
    first, second = torch.randint(512, (12,)), torch.randint(512, (8,))
    before = hidden_states(lm.get_decoder(), bare_batch([first, second]))
    after = hidden_states(lm.get_decoder(), bare_batch([(first + 1) % 512, second]))
    assert torch.equal(before[12:], after[12:])
    assert not torch.allclose(before[:12], after[:12])


def test_self_check_finds_a_leak():
    """transformers' own SDPA on a packed row without a cache flag is what the check exists for."""
    attention.register()
    lm = tiny_lm("llama")

    def one_document(module, query, key, value, mask, **kwargs):
        return document_attention(
            module,
            query,
            key,
            value,
            mask,
            **kwargs | {n: kwargs[n][[0, -1]] for n in ("cu_seq_lens_q", "cu_seq_lens_k")},
        )

    from transformers import AttentionInterface

    AttentionInterface.register("test_leaks", one_document)
    with pytest.raises(UserError, match=r"packing check.*cannot be trained packed with attention test_leaks"):
        selfcheck.packing(lm, torch.float32, "test_leaks", None, 1.0)


def test_self_check_finds_an_unknown_head():
    """A logit scale or soft-cap that is not accounted for is a different model."""
    attention.register()
    with pytest.raises(UserError, match="packing check"):
        selfcheck.packing(tiny_lm("cohere"), torch.float32, DOCUMENTS, None, 1.0)
    with pytest.raises(UserError, match="packing check"):
        selfcheck.packing(tiny_lm("gemma2"), torch.float32, DOCUMENTS, None, 1.0)


def plain_varlen(has_gqa):
    """What ``torch.nn.attention.varlen.varlen_attn`` promises, one document after another; it runs on CUDA only."""

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        assert window_size[1] == 0, "causal"
        assert enable_gqa is (has_gqa and q.shape[1] != k.shape[1]) and (has_gqa or q.shape[1] == k.shape[1])
        out = []
        for qq, kk, vv in zip(
            q.split(cu_q.diff().tolist()), k.split(cu_k.diff().tolist()), v.split(cu_k.diff().tolist()), strict=True
        ):
            kk, vv = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (kk, vv))
            back = (torch.arange(len(qq)) + len(kk) - len(qq))[:, None] - torch.arange(len(kk))
            visible = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
            z = (torch.einsum("qhd,khd->hqk", qq, kk) * scale).masked_fill(~visible, float("-inf"))
            out.append(torch.einsum("hqk,khd->qhd", z.softmax(-1), vv))
        return torch.cat(out)

    return lambda: (attend, has_gqa)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    window=st.sampled_from([None, 1, 3, 100]),
    cap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("kernel", ["documents", "varlen", "varlen of torch 2.11"])
def test_attention_formula(kernel, lengths, heads, window, cap, seed):
    """Outputs and gradients against the definition in float64, also where queries are fewer than keys.

    ``varlen_attention`` is run with a stand-in for the CUDA kernel: its layout, window and heads are what is tested.
    """
    attend, cap = (document_attention, cap) if kernel == "documents" else (varlen_attention, None)
    torch.manual_seed(seed)
    n_q = [q for q, _ in lengths]
    n_k = [q + more for q, more in lengths]
    q = torch.randn(1, heads[0], sum(n_q), 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, heads[1], sum(n_k), 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    cumulative = lambda ns: torch.tensor([0, *ns]).cumsum(0).int()  # noqa: E731
    lengths = {
        "cu_seq_lens_q": cumulative(n_q),
        "cu_seq_lens_k": cumulative(n_k),
        "max_length_q": max(n_q),
        "max_length_k": max(n_k),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_varlen", plain_varlen(kernel == "varlen"))
        out, _ = attend(None, q, k, v, None, **lengths, scaling=0.3, sliding_window=window, softcap=cap)
    expected = []
    for i, (a, b) in enumerate(zip(n_q, n_k, strict=True)):
        rows, cols = slice(sum(n_q[:i]), sum(n_q[: i + 1])), slice(sum(n_k[:i]), sum(n_k[: i + 1]))
        for t in range(a):
            position = b - a + t
            keys = range(max(0, position - window + 1) if window else 0, position + 1)
            kk = k[0, :, cols][:, list(keys)].repeat_interleave(heads[0] // heads[1], 0)
            vv = v[0, :, cols][:, list(keys)].repeat_interleave(heads[0] // heads[1], 0)
            z = torch.einsum("hd,hkd->hk", q[0, :, rows][:, t], kk) * 0.3
            z = cap * torch.tanh(z / cap) if cap else z
            expected.append(torch.einsum("hk,hkd->hd", z.softmax(-1), vv))
    expected = torch.stack(expected)[None]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_resolve_attention():
    bf16, f32 = torch.bfloat16, torch.float32
    assert resolve_attention("auto", CPU, bf16, False)[0] == DOCUMENTS
    assert resolve_attention("auto", CUDA, bf16, False)[0] == VARLEN
    assert resolve_attention("auto", CUDA, f32, False) == (
        DOCUMENTS,
        "one attention call per document (varlen_attn computes in 16 bits only and model.dtype is float32)",
    )
    assert resolve_attention("auto", CUDA, f32, True)[0] == DOCUMENTS
    assert resolve_attention("sdpa", CUDA, bf16, False)[0] == DOCUMENTS
    assert resolve_attention("flash_attention_2", CUDA, bf16, True)[0] == "flash_attention_2"
    for setting, device, dtype, cap, what in [
        ("varlen", CPU, bf16, False, "runs on CUDA only"),
        ("varlen", CUDA, f32, False, "16 bits"),
        ("varlen", CUDA, bf16, True, "no cap"),
        ("auto", CUDA, bf16, True, "flash_attention_2"),
        ("flash_attention_2", CPU, bf16, False, "needs a CUDA device"),
        ("flash_attention_2", CUDA, f32, False, "16 bits only"),
    ]:
        with pytest.raises(UserError, match=what):
            resolve_attention(setting, device, dtype, cap)


@pytest.mark.parametrize("extra", [{"s_aux": torch.ones(4)}, {"dropout": 0.1}])
def test_refuses_what_it_does_not_compute(extra):
    x = torch.randn(1, 4, 3, 8)
    cu = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(UserError):
        document_attention(
            None, x, x, x, None, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=3, max_length_k=3, **extra
        )


def test_refuses_a_mask():
    x = torch.randn(1, 4, 3, 8)
    cu = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(UserError, match="mask"):
        document_attention(
            None, x, x, x, torch.ones(3, 3), cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=3, max_length_k=3
        )


@settings(max_examples=60)
@given(
    trees=st.lists(
        st.tuples(st.integers(0, 6), st.lists(st.integers(1, 5), min_size=1, max_size=5)), min_size=1, max_size=3
    ),
    wide=st.integers(1, 12),
    window=st.sampled_from([None, 1, 3, 8]),
    cap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 99),
)
def test_siblings_joined(trees, wide, window, cap, seed):
    """Siblings in one call equal one call for each, outputs and gradients, in float64; no more are joined than said."""
    torch.manual_seed(seed)
    lengths, index, at = [], [], 0
    for prompt, rationales in trees:  # a prompt, then what goes on from it; without a prompt they share nothing
        common = torch.arange(at, at + prompt)
        for before, n in [(0, prompt)] * bool(prompt) + [(prompt, n) for n in rationales]:
            lengths.append((n, before + n))
            index.append(torch.cat([common[:before], torch.arange(at, at + n)]))
            at += n
    cumulative = lambda ns: torch.tensor([0, *ns]).cumsum(0).int()  # noqa: E731
    fields = {
        "cu_seq_lens_q": cumulative([q for q, _ in lengths]),
        "cu_seq_lens_k": cumulative([k for _, k in lengths]),
        "max_length_q": max(q for q, _ in lengths),
        "max_length_k": max(k for _, k in lengths),
        "key_index": torch.cat(index),
    }
    q = torch.randn(1, 4, at, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, at, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    upstream = torch.randn(1, at, 4, 8, dtype=torch.float64)

    def results(most):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "WIDE", most)
            out, _ = document_attention(None, q, k, v, None, **fields, scaling=0.3, sliding_window=window, softcap=cap)
        return out, *torch.autograd.grad(out, (q, k, v), upstream)

    for got, want in zip(results(wide), results(0), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    starts = [([n_q], n_k - n_q) for n_q, n_k in lengths]
    joined, keys = attention._join_siblings(starts, fields["key_index"])
    assert all(len(parts) == 1 or (before and sum(parts[:-1]) < attention.WIDE) for parts, before in joined)
    assert len(joined) == sum(bool(p) + (1 if p else len(r)) for p, r in trees), "short ones of a prompt are one call"
    assert len(keys) == sum(before + sum(parts) for parts, before in joined)

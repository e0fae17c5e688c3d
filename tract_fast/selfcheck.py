"""What is tried at the start of a run because nobody documents it: packed documents, shared prompts, alignment.

A small random twin of the model (``weights.small_twin``) is held against transformers' own forward pass, and the
attention's output and gradients against a plain softmax. A difference stops the run, by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tract_fast.attention import DOCUMENTS, VARLEN, document_attention, hidden_states, varlen_attention
from tract_fast.data.batch import Batch, attention_fields
from tract_fast.data.tree import Layout, lay_out
from tract_fast.errors import UserError

OFF = "write data.share_prompts: off"


def heads_of(config) -> tuple[int, int, int]:
    """(attention heads, those of keys and values, dimension of one) of a model's configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, dim


@torch.no_grad()
def packing(
    lm: nn.Module,
    dtype: torch.dtype,
    attention_name: str,
    softcap: float | None,
    logit_scale: float,
    share: bool = False,
    exchange: Callable[[nn.Module], object] = lambda lm: None,
) -> str:
    """Documents packed must give what transformers' own forward pass gives for each alone; returns a line to print.

    Computed in ``dtype``, as training will (some kernels take 16 bits only). Catches documents that see each other,
    attention that ignores something that short documents need, and a head with more between hidden states and logits
    than soft-cap and scale. Two of the three documents begin alike: with ``share`` that is there once, and a model that
    draws random numbers in training is found, too. ``exchange`` puts other kernels into ``lm`` in between: they are
    held against transformers' own, on the device. Raises UserError where they differ.
    """
    device = lm.get_input_embeddings().weight.device
    vocabulary = lm.get_output_embeddings().out_features
    tokens = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(vocabulary, (n,), generator=tokens).to(device)  # noqa: E731
    prompt = draw(11)
    documents = [torch.cat([prompt, draw(6)]), draw(7), torch.cat([prompt, draw(4)])]
    layout = lay_out([d.cpu().numpy() for d in documents], [len(prompt)] * 3, "prompts" if share else None)
    batch = bare_batch(documents, layout)
    was_training = lm.training
    lm.eval()
    with _rounded(lm, dtype):
        lm.set_attn_implementation("eager")
        expected = [lm(input_ids=d[None], use_cache=False).logits[0].float() for d in documents]
        lm.set_attn_implementation(attention_name)
        exchange(lm)
        logits = lm.get_output_embeddings()(hidden_states(lm.get_decoder(), batch)).float()
        if share:
            _refuse_draws(lm, batch)
    lm.train(was_training)
    logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    how = "three documents packed, the prompt of two shared," if share else "three documents packed"
    for places, want in zip(layout.places, expected, strict=True):
        error = ((logits[torch.from_numpy(places).to(device)] - want).norm() / want.norm()).item()
        if not error <= tolerance:
            raise UserError(
                f"packing check: {how} differ from each alone by {error:.1e} (at most {tolerance:.0e}): "
                f"{type(lm).__name__} cannot be trained packed with attention {attention_name}"
                + (f": {OFF}" if share else "")
            )
    return f"packing check: {how} = each alone (relative error {error:.0e})"


def _refuse_draws(lm: nn.Module, batch: Batch) -> None:
    """Raise UserError where the model computes something else in training with another seed."""
    device = batch.input_ids.device
    found = []
    lm.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(hidden_states(lm.get_decoder(), batch))
    if not torch.equal(*found):
        raise UserError(
            f"data.share_prompts = auto: {type(lm).__name__} draws random numbers in training, and all rationales of a "
            f"prompt would share the draw: {OFF}"
        )


@contextlib.contextmanager
def _rounded(lm: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Weights of ``lm`` in ``dtype`` inside, as they were outside."""
    masters = [(p, p.data) for p in lm.parameters()]
    try:
        for p, data in masters:
            p.data = data.to(dtype)
        yield
    finally:
        for p, data in masters:
            p.data = data


def bare_batch(documents: list[Tensor], layout: Layout | None = None) -> Batch:
    """A batch of bare documents on their device, nothing trained on; ``layout`` None: nothing shared."""
    ids = [d.cpu().numpy() for d in documents]
    none = torch.empty(0)
    batch = Batch(
        **attention_fields(ids, layout or lay_out(ids, [1] * len(ids), None)),
        rows=none.long(),
        labels=none.long(),
        row_weights=none,
        score_rows=none.long(),
        score_targets=none,
        score_weights=none,
    )
    return batch.to(documents[0].device)


def alignment(name: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int] = (4, 2, 64)) -> str:
    """Queries fewer than keys must see the keys up to their own place; returns a line to print.

    torch says of ``varlen_attn`` that it is causal, not to which end of the keys it aligns the queries or the window,
    and shared prompts depend on both. ``heads`` as of ``heads_of``: kernels differ by their dimension. Output and
    gradients are held against a plain softmax in float32 on the CPU. Raises UserError where they differ.
    """
    error = max(_error_of_attention(name, device, dtype, heads, window) for window in (None, 16))
    if not error <= (1e-4 if dtype == torch.float32 else 3e-2):
        raise UserError(
            f"data.share_prompts = auto: attention {name} on {device.type} computes something else where queries are "
            f"fewer than keys (relative error {error:.1e}): {OFF}"
        )
    return f"shared prompts check: {name} aligns queries to the end of their keys (relative error {error:.0e})"


@torch.enable_grad()
def _error_of_attention(
    name: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], window: int | None
) -> float:
    """The largest relative error of output and gradients: a prompt of 40 tokens, then 13 and 7 that go on from it."""
    n_heads, n_key_heads, dim = heads
    keys = [torch.arange(40), torch.arange(53), torch.cat([torch.arange(40), torch.arange(53, 60)])]
    fields = {
        "cu_seq_lens_q": torch.tensor([0, 40, 53, 60], dtype=torch.int32, device=device),
        "cu_seq_lens_k": torch.tensor([0, 40, 93, 140], dtype=torch.int32, device=device),
        "max_length_q": 40,
        "max_length_k": 53,
        "key_index": torch.cat(keys).to(device),
    }
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, n, 60, dim) for n in (n_heads, n_key_heads, n_key_heads)]
    qkv = [torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(1, 60, n_heads, dim, generator=draw).to(device, dtype)
    attend = {VARLEN: varlen_attention, DOCUMENTS: document_attention}[name]
    out, _ = attend(None, *qkv, None, **fields, scaling=dim**-0.5, sliding_window=window)
    found = [out, *torch.autograd.grad(out, qkv, upstream)]

    visible = torch.zeros(60, 60, dtype=torch.bool)
    for places in keys:
        ahead = torch.arange(len(places))[:, None] - torch.arange(len(places))
        visible[places[:, None], places] = (ahead >= 0) & (ahead < (window or len(places)))
    q, k, v = (x.detach().cpu().float().requires_grad_() for x in qkv)
    k_each, v_each = (x.repeat_interleave(n_heads // n_key_heads, dim=1) for x in (k, v))
    weights = (q @ k_each.transpose(2, 3) * dim**-0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    out = (weights @ v_each).transpose(1, 2)
    expected = [out, *torch.autograd.grad(out, (q, k, v), upstream.cpu().float())]
    pairs = zip(found, expected, strict=True)
    return max(((got.cpu().float() - want).norm() / want.norm()).item() for got, want in pairs)

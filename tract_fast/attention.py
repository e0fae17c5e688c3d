"""Attention over packed documents, behind transformers' attention interface.

The model is called with one row of T tokens and the cumulative lengths of its documents; every document attends to
itself alone, causally, with queries aligned to the end of its keys. No mask is built: transformers makes none for an
attention name it does not know (DESIGN section 6), and calling with ``use_cache=False`` and no attention mask is what
keeps documents apart.

With shared prompts a document is a segment of ``data/tree.py``, and ``key_index`` names its keys: the tokens before it
in its sequence, wherever they are, and its own. They are gathered, so that one call has all keys of a query and one
softmax over them. (Attending to prompt and rationale in two calls and merging those by their log-sum-exp gives the same
output, but wrong gradients: no backward of these kernels takes a gradient of the log-sum-exp.)

Two functions serve it: ``torch.nn.attention.varlen.varlen_attn`` (one kernel call, CUDA, 16-bit) and a loop over
documents (SDPA, any device and dtype; explicit softmax where the model caps its attention logits). transformers' own
flash-attention names can be asked for and take the same arguments.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tract_fast.data.batch import Batch
from tract_fast.errors import UserError
from tract_fast.gather import gather_rows

VARLEN, DOCUMENTS = "tract_varlen", "tract_documents"
WIDE = 192  # queries from which PyTorch's attention on a CPU takes 64 at a time instead of 32
KERNEL_DTYPES = (torch.bfloat16, torch.float16)  # of varlen_attn and flash-attn


def resolve_attention(setting: str, device: torch.device, dtype: torch.dtype, softcap: bool) -> tuple[str, str]:
    """The attention name for transformers and the reason for it.

    ``setting`` is ``model.attention``; ``softcap`` says whether the model caps its attention logits (Gemma 2), which
    neither ``varlen_attn`` nor SDPA computes. Raises UserError where the setting cannot work.
    """
    if setting == "sdpa":
        return DOCUMENTS, "asked for: one SDPA call per document"
    if setting.startswith("flash_attention"):
        if device.type != "cuda":
            raise UserError(f"model.attention = {setting} needs a CUDA device and this is {device.type}: write auto")
        if dtype not in KERNEL_DTYPES:
            raise UserError(f"model.attention = {setting} computes in 16 bits only: write model.dtype bfloat16 or auto")
        return setting, "asked for"
    obstacle = None
    if device.type != "cuda":
        obstacle = f"varlen_attn runs on CUDA only and this is {device.type}"
    elif dtype not in KERNEL_DTYPES:
        obstacle = f"varlen_attn computes in 16 bits only and model.dtype is {dtype}".replace("torch.", "")
    elif softcap:
        obstacle = "varlen_attn has no cap on attention logits"
    if obstacle is None:
        return VARLEN, "varlen_attn: one kernel call for all documents"
    if setting == "varlen":
        raise UserError(f"model.attention = varlen: {obstacle}: write auto")
    if softcap and device.type == "cuda" and dtype in KERNEL_DTYPES:
        raise UserError(
            "model.attention = auto: this model caps its attention logits, which varlen_attn does not compute: install "
            "flash-attn and write flash_attention_2"
        )
    return DOCUMENTS, f"one attention call per document ({obstacle})"


def register() -> None:
    """Make both functions known to transformers under their names."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionInterface.register(DOCUMENTS, document_attention)


def hidden_states(backbone: torch.nn.Module, batch: Batch) -> Tensor:
    """Last hidden states (T, D) of a packed micro-batch. No cache and no mask: either would mix the documents."""
    out = backbone(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        cu_seq_lens_q=batch.cu_seq_lens_q,
        cu_seq_lens_k=batch.cu_seq_lens_k,
        max_length_q=batch.max_length_q,
        max_length_k=batch.max_length_k,
        use_cache=False,
        **({} if batch.key_index is None else {"key_index": batch.key_index}),
    )
    return out.last_hidden_state[0]


@functools.cache
def _varlen():
    from torch.nn.attention import varlen

    return varlen.varlen_attn, "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, G, T, D), G divides H
    value: Tensor,  # (1, G, T, D)
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    key_index: Tensor | None = None,  # (K,) int64 into T; None: the keys of a document are its own tokens
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused,
) -> tuple[Tensor, None]:
    """All documents in one ``varlen_attn`` call; returns (1, T, H, D)."""
    _refuse(attention_mask, unused)
    attend, has_gqa = _varlen()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    if key_index is not None:
        k, v = gather_rows(k, key_index), gather_rows(v, key_index)  # (K, G, D)
    gqa = {}
    if q.shape[1] != k.shape[1]:
        if has_gqa:
            gqa = {"enable_gqa": True}
        else:  # torch 2.11: heads must match
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    out = attend(
        q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scale=scaling, window_size=window, **gqa
    )
    return out[None], None


@torch.compiler.disable  # a loop over document lengths: nothing to trace, and every packing would be a new graph
def document_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, G, T, D), G divides H
    value: Tensor,  # (1, G, T, D)
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    key_index: Tensor | None = None,  # (K,) int64 into T; None: the keys of a document are its own tokens
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    kernel: Callable[..., Tensor] = scaled_dot_product_attention,
    **unused,
) -> tuple[Tensor, None]:
    """One attention call per document, or per few siblings; returns (1, T, H, D). On CUDA it waits for the lengths."""
    _refuse(attention_mask, unused)
    lengths_q, lengths_k = (cu.diff().tolist() for cu in (cu_seq_lens_q, cu_seq_lens_k))
    calls = [([n_q], n_k - n_q) for n_q, n_k in zip(lengths_q, lengths_k, strict=True)]
    if key_index is not None:
        calls, index = _join_siblings(calls, key_index.cpu())
        index = index.to(key.device)
        key, value = (gather_rows(x[0].transpose(0, 1), index).transpose(0, 1)[None] for x in (key, value))
    queries = query.split([sum(parts) for parts, _ in calls], 2)
    keys, values = (x.split([before + sum(parts) for parts, before in calls], 2) for x in (key, value))
    out = [
        _one_call(q, k, v, *call, scaling, sliding_window, softcap, kernel)
        for q, k, v, call in zip(queries, keys, values, calls, strict=True)
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


def _join_siblings(calls: list[tuple[list[int], int]], key_index: Tensor) -> tuple[list[tuple[list[int], int]], Tensor]:
    """``calls`` with neighbours that attend to the same tokens before their own made one, and the index of all keys.

    Rationales are short, and SDPA on a CPU takes fewer than WIDE queries in narrower blocks: joined, a pair of them
    costs less though each is masked from the other's keys.
    """
    joined: list[tuple[list[int], int]] = []
    index: list[Tensor] = []
    above = key_index[:0]
    at = 0
    for (n_q,), before in calls:
        earlier, own = key_index[at : at + before], key_index[at + before : at + before + n_q]
        at += before + n_q
        if joined and before and sum(joined[-1][0]) < WIDE and torch.equal(earlier, above):
            joined[-1][0].append(n_q)
            index.append(own)
        else:
            joined.append(([n_q], before))
            index += [earlier, own]
            above = earlier
    return joined, torch.cat(index)


def _one_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: list[int],
    before: int,
    scale: float | None,
    window: int | None,
    cap: float | None,
    kernel: Callable[..., Tensor],
) -> Tensor:
    """Attention of siblings with ``parts`` tokens each to the ``before`` tokens before them all and to their own."""
    gqa = q.shape[1] != k.shape[1]
    windowed = window is not None and before + max(parts) > window
    if not cap and not windowed and not before:
        return kernel(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    visible = _visible(parts, before, window if windowed else None, q.device)
    if not cap:
        return kernel(q, k, v, attn_mask=visible, scale=scale, enable_gqa=gqa)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = (q @ k.transpose(2, 3)) * (q.shape[3] ** -0.5 if scale is None else scale)
    logits = (torch.tanh(logits / cap) * cap).masked_fill(~visible, float("-inf"))
    precise = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, dim=-1, dtype=precise).to(v.dtype) @ v


def _visible(parts: list[int], before: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: whether a query of siblings sees a key."""
    own = torch.cat([torch.arange(before, before + n, device=device) for n in parts])
    ahead = own[:, None] - torch.cat([torch.arange(before, device=device), own])
    asks = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(parts)])
    answers = torch.cat([torch.full((before,), -1, device=device), asks])  # -1: whoever asks
    visible = (ahead >= 0) & ((answers < 0) | (answers == asks[:, None]))
    return visible & (ahead < window) if window else visible


def _refuse(attention_mask: Tensor | None, unused: dict) -> None:
    """What neither function computes must stop the run, not change its result."""
    if attention_mask is not None:
        raise UserError("packed documents take no attention mask")
    if unused.get("dropout"):
        raise UserError(
            f"attention dropout {unused['dropout']} is not supported: set attention_dropout to 0 in the config"
        )
    for name in ("s_aux", "position_bias", "indices"):
        if unused.get(name) is not None:
            raise UserError(f"this model's attention needs '{name}', which packed attention does not compute")

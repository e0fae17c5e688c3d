"""The most that a rank holds while it trains on a micro-batch, and when: the real model's step on meta tensors.

Forward, recomputation, loss and backward are the training's own code, operator by operator (``ledger``), so that no
architecture needs a formula. FSDP2, which refuses meta tensors, is entered by ``mimic``; what custom operators hold
inside, by ``loss/footprint``. Not seen: what torch.compile and Liger's kernels change, and a library's own workspaces.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from tract_fast import attention, weights
from tract_fast.attention import DOCUMENTS, VARLEN
from tract_fast.data import batch as batches
from tract_fast.data.batch import Batch
from tract_fast.data.prompt import Encoded
from tract_fast.data.tree import Share
from tract_fast.errors import UserError
from tract_fast.feed import normalizer_of
from tract_fast.ledger import ACTIVATIONS, Ledger
from tract_fast.loss import footprint
from tract_fast.loss.chunked import empty_results
from tract_fast.loss.reference import TractLoss
from tract_fast.mimic import REDUCED, Mimic, Split
from tract_fast.model import DTYPES, TractModel, completed
from tract_fast.prepare import Prepared
from tract_fast.recipe import Recipe
from tract_fast.shard import units

WEIGHTS, STATE = "weights (trained: float32)", "AdamW state (float32)"
LOSS, BACKWARD, REST = "the loss", "computed in backward", "the rest"
ON_META = "tract_documents_on_meta"  # as transformers knows it
CUDA_BLOCK = 512  # bytes that CUDA's allocator rounds up to


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run will be: it need not be here."""

    device: torch.device
    attention: str
    loss: str
    """The implementation of the loss."""
    world: int
    share: Share | None


@dataclass(frozen=True)
class Peak:
    """Bytes of tensors by purpose at the moment when there are most of them."""

    parts: dict[str, int]
    moment: str
    host: int = 0
    """Bytes of host memory, where weights are offloaded."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Untraceable(UserError):
    """A model whose step does not run without values."""


def outline(recipe: Recipe, data: Prepared, place: Place) -> TractModel:
    """The model that a recipe trains, on meta tensors, its parameters in the dtype in which they are stored."""
    from transformers import AttentionInterface

    attention.register()
    kernel = functools.partial(attention.document_attention, kernel=functools.partial(fused, place.device.type))
    AttentionInterface.register(ON_META, kernel)
    stored = DTYPES[recipe.model.dtype] if recipe.lora.rank else torch.float32
    name = ON_META if place.attention == DOCUMENTS else VARLEN  # of flash-attn, which keeps the same
    lm = weights.skeleton(recipe.model, data.config, stored, name)
    return completed(lm, recipe, data.scale, place.device, say=lambda line: None)


def fused(device_type: str, q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """``scaled_dot_product_attention`` by the kernels that a device type has, which keep no attention weights: for meta
    tensors PyTorch itself takes its plain formula."""
    aten = torch.ops.aten
    bias = None if attn_mask is None else q.new_zeros(attn_mask.shape)
    if device_type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)[0]
    if bias is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if bias is not None:
        bias = bias.expand(*q.shape[:2], *bias.shape)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)[0]


def peak(recipe: Recipe, data: Prepared, examples: Sequence[Encoded], place: Place, *, several: bool) -> Peak:
    """The peak of the last micro-batch of a step, ``examples``; ``several``: others came before it in the step. Raises
    Untraceable where an operator of the model needs values, or does not know its arguments without them."""
    model = outline(recipe, data, place)
    stored = {p: p.element_size() for p in model.parameters()}
    dtype = DTYPES[recipe.model.dtype]
    for p in model.parameters():
        p.data = p.data.to(dtype)
    host = recipe.shard.cpu_offload and place.device.type == "cuda"
    split = Split(
        ways=max(1, place.world // recipe.shard.replicate),
        width=dtype.itemsize,
        host=host,
        before=several,
        whole=recipe.lora.rank > 0,
        alone=place.world == 1 and place.device.type == "cpu",
        replicated=recipe.shard.replicate > 1,
    )
    multiple = CUDA_BLOCK if place.device.type == "cuda" else 1
    ledger = Ledger(functools.partial(footprint.inside, device_type=place.device.type), multiple)
    if place.device.type == "cpu":
        ledger.instead[torch.ops.tract_fast.chunked_loss.default] = functools.partial(empty_results, device_type="cpu")
    ledger.leave_out([*model.parameters(), *model.buffers()])
    _hold_state(ledger, stored, split)
    mimic = Mimic(ledger, split, units(model, recipe.shard), stored)
    for p in model.trainable().values():
        p.register_post_accumulate_grad_hook(lambda p: ledger.rename(p.grad, REDUCED))
    _plan_loss(model, place, ledger)
    batch = _on_meta(_collated(recipe, examples, place.share), keep_lengths=place.attention == DOCUMENTS)
    model.train()
    try:
        with ledger:
            out = model(batch)
            ledger.purpose = BACKWARD
            out.loss.backward()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        kind = type(model.lm).__name__
        raise Untraceable(
            f"the memory of {kind} cannot be counted: without values it does not run ({reason})"
        ) from error
    mimic.finish()
    del out
    ledger.moment = "the update of the weights"
    ledger.touch(1, REST)
    on_host = sum(split.shard(p) * (size + (4 + 2 * 4) * p.requires_grad) for p, size in stored.items()) if host else 0
    return Peak({name: size for name, size in ledger.peak.items() if size}, ledger.peak_moment, on_host)


def _hold_state(ledger: Ledger, stored: dict[nn.Parameter, int], split: Split) -> None:
    """Enter what is there from the second step on, before its forward."""
    if split.host:
        return
    for p, size in stored.items():
        ledger.hold((p, "weight"), WEIGHTS, split.shard(p) * size)
        if p.requires_grad:
            ledger.hold((p, "state"), STATE, 2 * 4 * split.shard(p))


def _plan_loss(model: TractModel, place: Place, ledger: Ledger) -> None:
    head = model.head

    def enter(*_) -> None:
        ledger.purpose = LOSS

    def leave(*_) -> None:
        ledger.purpose = ACTIVATIONS

    head.register_forward_pre_hook(enter)
    head.register_forward_hook(leave)
    head.score_token_ids, head.score_values = (b.to("meta") for b in (head.score_token_ids, head.score_values))
    head.options["implementation"] = place.loss
    if place.loss == "fused":  # needs Triton even to be named
        head.forward = functools.partial(_fused, head, ledger)


def _collated(recipe: Recipe, examples: Sequence[Encoded], share: Share | None) -> Batch:
    norm = normalizer_of(recipe.loss, examples)
    return batches.collate(examples, norm, score_ce=recipe.loss.score_ce, share=share)


def _on_meta(batch: Batch, *, keep_lengths: bool) -> Batch:
    """Without values; but those that the host reads in every layer are kept, where it does."""
    kept = ("cu_seq_lens_q", "cu_seq_lens_k", "key_index") if keep_lengths else ()
    tensors = {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return replace(batch, **{name: v.to("meta") for name, v in tensors.items() if name not in kept})


def _fused(head: nn.Linear, ledger: Ledger, hidden: Tensor, batch: Batch) -> TractLoss:
    rows = hidden.index_select(0, batch.rows)
    loss = _FusedLoss.apply(rows, head.weight, ledger)
    return TractLoss(loss, *(loss.detach() for _ in range(4)))


class _FusedLoss(torch.autograd.Function):
    """``fused_loss`` by what it keeps: its arguments."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ledger: Ledger) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.ledger = ledger
        return rows.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = [torch.empty_like(x) if need else None for x, need in zip((rows, weight), needs[:2], strict=True)]
        ctx.ledger.touch(footprint.fused_backward(rows), BACKWARD)
        return *grads, None

"""RMSNorm and the gated product of transformer blocks, keeping little for backward.

``rms_norm`` keeps its input and a number a row, ``gated_product`` its two arguments. What they give is not kept
either by a ``linear`` that reads it: its backward has it computed again, which is cheap, from what the two keep. C++ on
the CPU (``csrc/lean.h``), PyTorch operations elsewhere. D width, I inner width.

Inside activation checkpointing what the two keep goes through its hooks: a block is computed again at the first use, as
far as its gated product. A ``linear``'s own arguments do not: they are parameters, and results of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tract_fast.loss import native
from tract_fast.loss.terms import autocasts

aten = torch.ops.aten
ACTIVATIONS = {  # in the order of csrc/lean.h: (the function, its backward from a gradient and an argument)
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda g, x: aten.gelu_backward(g, x, approximate="tanh")),
}
NUMBER = {name: number for number, name in enumerate(ACTIVATIONS)}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, device_type: str | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + offset)`` over the last dimension, computed in float32 (float64 of
    float64) and rounded once. x (..., D), weight (D) of the same dtype; returns (..., D). ``device_type``: the one that
    tensors on meta stand for. Raises ValueError where the weight does not fit.
    """
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be ({x.shape[-1]},) in {x.dtype}, and is {tuple(weight.shape)} in {weight.dtype}"
        )
    return _RMSNorm.apply(x, weight, eps, offset, _kind(x, device_type))


def gated_product(gate: Tensor, up: Tensor, activation: str, device_type: str | None = None) -> Tensor:
    """``act(gate) * up``, both (..., I) of one dtype; ``activation`` is one of ``ACTIVATIONS``. ``device_type``: the
    one that tensors on meta stand for. Raises ValueError where shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {tuple(gate.shape)} in {gate.dtype}, and up {tuple(up.shape)} in {up.dtype}")
    return _GatedProduct.apply(gate, up, activation, _kind(gate, device_type))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, which does not keep ``x`` where it is a result of ``rms_norm`` or ``gated_product``, untouched (a
    change of ``x.data`` is not seen), outside of autocast, which would make a copy."""
    node = x.grad_fn
    known = hasattr(node, "again") and x._version == node.version
    if not known or not torch.is_grad_enabled() or autocasts(x.device.type):
        return F.linear(x, weight, bias)
    storage = x.untyped_storage()._cdata

    def pack(t: Tensor) -> Tensor | _Again:
        if t.untyped_storage()._cdata != storage:
            return t
        return _Again(node, t.size(), t.stride(), t.storage_offset())

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return F.linear(x, weight, bias)


@dataclass(frozen=True)
class _Again:
    """A view of what a node of the graph has given, to be had from it again."""

    node: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@torch.no_grad()
def _unpack(packed: Tensor | _Again) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.node.again(packed.node).as_strided(packed.size, packed.stride, packed.offset)


def _kept(ctx) -> tuple[Tensor, ...]:
    """``ctx.saved_tensors``, which activation checkpointing gives out once: until ``_let_go``."""
    if ctx.unpacked is None:
        ctx.unpacked = ctx.saved_tensors
    return ctx.unpacked


def _let_go(ctx) -> None:
    ctx.unpacked = ctx.result = None


def _kind(x: Tensor, device_type: str | None) -> str:
    """By what it is computed: ``C++``, ``fused`` (CUDA's own norm) or ``PyTorch``."""
    where = device_type if x.is_meta and device_type else x.device.type
    if where == "cpu" and native.runs(x.dtype):
        return "C++"
    return "fused" if where == "cuda" else "PyTorch"


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float, kind: str) -> Tensor:
        ctx.settings = (eps, offset, kind)
        y, r = _norm(x, weight, *ctx.settings)
        ctx.save_for_backward(x, weight, r)
        _let_go(ctx)
        ctx.again, ctx.version = _norm_again, y._version
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, r = _kept(ctx)
        _, offset, kind = ctx.settings
        _let_go(ctx)
        return *_norm_backward(dy, x, weight, r, offset, kind, ctx.needs_input_grad[:2]), None, None, None


def _norm_again(ctx) -> Tensor:
    """The norm's result, kept from its first use in backward to the norm's own, since several layers read it."""
    if ctx.result is None:
        x, weight, _ = _kept(ctx)
        ctx.result, _ = _norm(x, weight, *ctx.settings)
    return ctx.result


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float, kind: str) -> tuple[Tensor, Tensor]:
    """y (..., D), contiguous, and the reciprocal root mean square (..., 1)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if kind == "C++" or (kind == "fused" and offset == 0.0 and x.is_meta):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        r = x.new_empty((*x.shape[:-1], 1), dtype=wide)
        if kind == "C++":
            torch.ops.tract_fast.rms_norm(x.contiguous(), weight.contiguous(), offset, eps, y, r)
        return y, r
    if kind == "fused" and offset == 0.0:
        return aten._fused_rms_norm(x.contiguous(), weight.shape, weight, eps)
    up = x.to(wide)
    r = torch.rsqrt(up.square().mean(-1, keepdim=True) + eps)
    y = (up * r).mul_(weight.to(wide) + offset).to(x.dtype)
    return y.contiguous(), r


def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, offset: float, kind: str, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    if kind == "fused" and offset == 0.0 and not x.is_meta:
        return aten._fused_rms_norm_backward(dy.contiguous(), x.contiguous(), weight.shape, r, weight, needs)
    if kind == "C++" or (kind == "fused" and offset == 0.0):
        dx = torch.empty_like(x if needs[0] else x.new_empty(0), memory_format=torch.contiguous_format)
        dw = torch.empty_like(weight if needs[1] else weight.new_empty(0), memory_format=torch.contiguous_format)
        if kind == "C++":
            arguments = dy.contiguous(), x.contiguous(), weight.contiguous(), offset, r, dx, dw
            torch.ops.tract_fast.rms_norm_backward(*arguments)
        return dx if needs[0] else None, dw if needs[1] else None
    normed = x.to(r.dtype) * r
    g = dy.to(r.dtype)
    dw = (g * normed).flatten(0, -2).sum(0).to(weight.dtype) if needs[1] else None
    if not needs[0]:
        return None, dw
    g = g * (weight.to(r.dtype) + offset)
    along = (g * normed).mean(-1, keepdim=True)
    return (r * (g - normed * along)).to(x.dtype), dw


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str, kind: str) -> Tensor:
        ctx.settings = (activation, kind)
        ctx.save_for_backward(gate, up)
        _let_go(ctx)
        y = _gated(gate, up, activation, kind)
        ctx.again, ctx.version = _gated_again, y._version
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up = _kept(ctx)
        activation, kind = ctx.settings
        _let_go(ctx)
        if kind == "C++":
            like = torch.contiguous_format
            dgate, dup = torch.empty_like(gate, memory_format=like), torch.empty_like(up, memory_format=like)
            arguments = dy.contiguous(), gate.contiguous(), up.contiguous(), NUMBER[activation], dgate, dup
            torch.ops.tract_fast.gated_backward(*arguments)
            return dgate, dup, None, None
        act, backward = ACTIVATIONS[activation]
        return backward(dy * up, gate), act(gate).mul_(dy), None, None


def _gated_again(ctx) -> Tensor:
    """The product, not kept: one layer reads it."""
    return _gated(*_kept(ctx), *ctx.settings)


def _gated(gate: Tensor, up: Tensor, activation: str, kind: str) -> Tensor:
    if kind == "C++":
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        torch.ops.tract_fast.gated(gate.contiguous(), up.contiguous(), NUMBER[activation], y)
        return y
    return ACTIVATIONS[activation][0](gate.contiguous()).mul_(up)

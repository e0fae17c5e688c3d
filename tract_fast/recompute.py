"""Activation checkpointing: what a backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts


def checkpoint_activations(lm: nn.Module, blocks: Sequence[nn.Module], setting: str) -> None:
    """Recompute activations in backward: of every block (``full``), of every k-th (a number), or only what is cheap to
    recompute in every block (``selective``: products and attention are kept).
    Random numbers are drawn again as they were: a model may draw some whatever the recipe says."""
    if setting == "none":
        return
    options = {"use_reentrant": False, "preserve_rng_state": True}
    if setting == "selective":
        options["context_fn"] = _keep_products
    # renamed in transformers 5.2x; the old name goes in 6
    enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
    enable(options)
    every = int(setting) if setting.isdigit() else 1
    for i, block in enumerate(blocks):
        block.gradient_checkpointing = i % every == 0


def _keep_products():
    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
    ]
    if hasattr(torch.ops, "torch_attn") and hasattr(torch.ops.torch_attn, "_varlen_attn"):
        kept.append(torch.ops.torch_attn._varlen_attn.default)
    return create_selective_checkpoint_contexts(kept)

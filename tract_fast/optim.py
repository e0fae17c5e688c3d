"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from tract_fast.recipe import Train


def adamw(parameters: Iterable[nn.Parameter], train: Train) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only (norms, biases and other vectors are not decayed)."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=train.lr, betas=train.betas, eps=train.eps, fused=True
    )


def learning_rate(step: int, total: int, train: Train) -> float:
    """Learning rate of 0-based step ``step`` of ``total``.

    Linear warm-up over ``warmup * total`` steps, rounded up (the first step already learns), then cosine or linear
    decay that would reach zero one step after the last, or constant.
    """
    warm = math.ceil(train.warmup * total)
    if step < warm:
        return train.lr * (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    match train.schedule:
        case "constant":
            return train.lr
        case "linear":
            return train.lr * (1.0 - progress)
        case _:
            return train.lr * 0.5 * (1.0 + math.cos(math.pi * progress))

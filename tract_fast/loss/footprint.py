"""What the custom ops hold inside while they run, beside their arguments and results: their code, counted.

An operator's results say themselves what they take. Small vectors (of N, of K) are counted together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tract_fast.loss import native, proposal
from tract_fast.loss.chunked import SCALE_BLOCK, SUMMAND, chunks_of, padded
from tract_fast.loss.plan import BLOCK_BUDGET
from tract_fast.loss.rows import BLOCK, PICK_BLOCK_CUDA
from tract_fast.loss.sampled import N_OWN, rows_at_once
from tract_fast.loss.terms import Arguments

VECTORS = 64  # bytes a row: terms and statistics
ROW_PASS = 12  # bytes a logit of a block, where the row pass is PyTorch


def inside(operator: Any, args: tuple, device_type: str) -> int:
    """Bytes that ``operator`` holds inside on a device of that type; 0 for those that are not ours."""
    name = operator.name().partition("::")[2] if operator.namespace == "tract_fast" else ""
    count = {
        "chunked_loss": _chunked,
        "sampled_loss": _sampled,
        "chunked_backward": _chunked_backward,
        "sampled_backward": _sampled_backward,
        "quantize_rows": _quantize_rows,
        "add_rows": _add_rows,
    }.get(name.partition(".")[0])
    return count(args, device_type) if count else 0


def in_kernels(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the passes over logits are kernels, which hold nothing."""
    return device_type == "cuda" or (device_type == "cpu" and native.runs(dtype))


def _chunked(args: tuple, device_type: str) -> int:
    a = Arguments(*args)
    (n, width), n_vocab, size = a.hidden.shape, a.weight.shape[0], a.hidden.element_size()
    plan = chunks_of(a, device_type)
    logits = 0 if plan.defer else plan.rows * padded(n_vocab) * size
    parts = [_pick(min(plan.rows, n), a, device_type), _rows(a, plan.rows, device_type)]
    if a.need_dw and not plan.defer:
        summand = min(SUMMAND, n_vocab * width) * size if device_type == "cpu" and size < 4 else 0
        parts.append(plan.rows * width * size + summand)
    return logits + max(parts) + VECTORS * n


def _sampled(args: tuple, device_type: str) -> int:
    a, codes = Arguments(*args[:-N_OWN]), args[-2]
    n, n_vocab, size = a.hidden.shape[0], a.weight.shape[0], a.hidden.element_size()
    rows = min(rows_at_once(a, device_type), n)
    packed = codes.numel() if codes is not None and codes.dtype == torch.int8 else 0  # as oneDNN has them
    return (
        rows * padded(n_vocab) * size
        + packed
        + max(_pick(rows, a, device_type), _rows(a, rows, device_type))
        + (4 * n_vocab * torch.get_num_threads() if device_type == "cpu" else 0)  # norms of W's rows
        + VECTORS * n
    )


def _quantize_rows(args: tuple, device_type: str) -> int:
    rows, kind = args
    if kind == "int8" and native.takes(rows, device_type):
        return 0
    return 12 * min(rows.numel(), proposal.BLOCK_CUDA if device_type == "cuda" else proposal.BLOCK)


def _pick(rows: int, a: Arguments, device_type: str) -> int:
    """``rows.pick``: rows of W and their product with hidden states, both in float32, and what is converted to it; in
    C++ nothing."""
    if native.takes(a.hidden, device_type) and native.takes(a.weight, device_type):
        return 0
    width, size = a.hidden.shape[1], a.hidden.element_size()
    block = min(rows * width, PICK_BLOCK_CUDA if device_type == "cuda" else BLOCK)
    return block * (8 if size == 4 else 12 + size)


def _rows(a: Arguments, rows: int, device_type: str) -> int:
    if in_kernels(a.hidden.dtype, device_type):
        return 0
    return ROW_PASS * min(rows * a.weight.shape[0], max(BLOCK, a.weight.shape[0]))


def _chunked_backward(args: tuple, device_type: str) -> int:
    _, hidden, labels, _, _, dx, dw, _, dz, dtype = args
    copies = 2 * hidden.numel() * hidden.element_size()  # of the rows, read and scaled: only where dW waited
    largest = max(hidden.numel() if dz.shape[0] else 0, dx.numel(), dw.numel())
    native_pass = device_type == "cpu" and native.runs(dtype)
    return copies + (0 if native_pass else 8 * min(largest, SCALE_BLOCK)) + VECTORS * len(labels)


def _sampled_backward(args: tuple, device_type: str) -> int:
    _, hidden, _, dx, columns, *_ = args
    lists = 8 * columns.numel() if device_type == "cuda" else 0  # sorted by column
    native_pass = device_type == "cpu" and native.runs(dx.dtype)
    return lists + (0 if native_pass else 8 * min(dx.numel(), SCALE_BLOCK)) + VECTORS * len(hidden)


def _add_rows(args: tuple, device_type: str) -> int:
    """The sum in float32, where that is not the result; on CUDA what is added, converted."""
    grad, _, count = args
    if grad.element_size() >= 4:
        return 0
    return 4 * count * grad[0].numel() + (4 * grad.numel() if device_type == "cuda" else 0)


def fused_backward(hidden: Tensor) -> int:
    """Bytes inside ``fused.fused_backward``: dX in float32, a scaled copy of the rows, a block of dZ."""
    return hidden.numel() * (4 + hidden.element_size()) + BLOCK_BUDGET

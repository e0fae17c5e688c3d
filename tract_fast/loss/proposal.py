"""Quantised proposals: the logits of a sampled gradient, cheaply and nearly right, to draw from and to be corrected.

W and the hidden states are rounded to 8 bits, each row with a scale of its own, and multiplied by a library: int8 by
oneDNN on CPUs with VNNI, float8 (e4m3) by ``scaled_mm`` on GPUs from Hopper on. ``sampled.py`` draws its lists
from these logits, computes the listed ones again exactly, and corrects by what it finds: ``docs/sampled-gradient.md``.

A row's scale is its largest magnitude over that of the type. Numerics: |z~ - z| is about 1% of |x| |w| / sqrt(D) with
int8, so what is drawn is drawn on nearly the right probability; outliers in a row of X or W make it worse, and the
weights p / p~ of the draw say how much. A row that is not finite gets a scale of NaN, and logits of NaN.

Cost: 2 N V D operations of 8 bits; a read of W and V (D + 4) bytes for its codes (with int8 twice, as oneDNN wants them
besides), which can be kept for as long as W stays as it is; N (D + 4) bytes for a chunk's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm
from torch.utils.weak import WeakIdKeyDictionary

from tract_fast.loss import native

KINDS = ("int8", "fp8")
LARGEST = {"int8": 127.0, "fp8": 448.0}
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
BLOCK, BLOCK_CUDA = 2**18, 2**24  # elements that are quantised at a time: on a CPU what caches hold, in float32
SMALLEST = 1e-30  # scale: what is divided by it stays finite
ALIGNMENT = 16  # of the width and the vocabulary, for float8 GEMMs

Quantized = tuple[Tensor, Tensor]


# A batch whose weights are beyond these is better drawn without a proposal: an entry of weight w has w times the
# variance that its probability would have, and a share of 1/2 doubles that of the whole draw.
LARGEST_WEIGHT, LEAST_SHARE = 32.0, 0.5


def beyond_limit(largest_weight: Tensor, effective_share: Tensor) -> Tensor:
    """(): whether a batch should be computed again without a proposal, on the device. Of ``SampledTractLoss``."""
    return ~((largest_weight <= LARGEST_WEIGHT) & (effective_share >= LEAST_SHARE))  # a NaN is beyond, too


class QuantizedWeight(NamedTuple):
    """Rows of 8 bits and what each is to be multiplied with."""

    codes: Tensor
    """(V, D) int8 or float8_e4m3fn; of float8 with zeros up to a multiple of 16 rows"""
    scales: Tensor
    """(V,) float32, > 0; NaN where a row was not finite. As many as codes has rows."""

    @property
    def kind(self) -> str:
        return "int8" if self.codes.dtype == torch.int8 else "fp8"


def refusal(kind: str, device: torch.device, dtype: torch.dtype, width: int, *, here: bool = True) -> str | None:
    """Why proposals of this kind ("int8", "fp8") do not run there for hidden states of this dtype and width, and what
    to write instead; None where they do. ``here``: the device is this machine's, whose processor is looked at."""
    needed, other = ("cpu", "fp8") if kind == "int8" else ("cuda", "int8")
    if device.type != needed:
        others = device.type in ("cpu", "cuda") and refusal(other, device, dtype, width, here=here) is None
        instead = f"must be '{other}' or 'none'" if others else "must be 'none' here"
        what = "int8 products are for CPUs" if kind == "int8" else "float8 products are for CUDA"
        return f"{what}, and this is {device.type}: {instead}"
    if kind == "int8":
        if dtype not in (torch.bfloat16, torch.float32):
            return f"int8 proposals are for bfloat16 and float32, not {dtype}: must be 'none'"
        if here and not VNNI:
            return (
                "this CPU has no VNNI (avx512_vnni, avx_vnni), without which int8 is slower than float: must be 'none'"
            )
        return None
    if dtype != torch.bfloat16:
        return f"float8 products write bfloat16, not {dtype}: must be 'none'"
    if width % ALIGNMENT:
        return f"float8 products need a width that is a multiple of {ALIGNMENT}, and this is {width}: must be 'none'"
    if here and not torch.compiler.is_compiling() and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} has no float8 products with a scale per row: must be 'none'"
    return None


def has_vnni() -> bool:
    """Whether this CPU multiplies 8-bit numbers four at a time, and PyTorch has the library that does."""
    found = torch.cpu.get_capabilities()
    there = any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni"))
    return there and torch.backends.mkldnn.is_available()


VNNI = has_vnni()  # asked once: a compiler cannot trace it


@torch.no_grad()
def quantize_weight(weight: Tensor, kind: str) -> QuantizedWeight:
    """``weight`` (V, D) in 8 bits, a row at a time. It is good for as long as ``weight`` does not change; proposals
    of an older W make loss and draw less accurate, which nothing but ``largest_weight`` and ``effective_share`` shows.

    Raises ValueError for another kind, and for what is no matrix of floats."""
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: must be 'int8' or 'fp8'")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {tuple(weight.shape)} of {weight.dtype}: must be a (V, D) matrix of floats")
    codes, scales = quantize_rows(weight, kind)
    if kind == "fp8" and (short := -len(weight) % ALIGNMENT):
        codes = torch.cat([codes.view(torch.uint8), codes.view(torch.uint8).new_zeros(short, weight.shape[1])])
        codes, scales = codes.view(CODES[kind]), torch.cat([scales, scales.new_ones(short)])
    return QuantizedWeight(codes, scales)


@torch.library.custom_op("tract_fast::quantize_rows", mutates_args=())
def quantize_rows(rows: Tensor, kind: str) -> Quantized:
    """(codes, scales (n,) float32) of (n, D) rows: codes times scales is nearest to them."""
    n, width = rows.shape
    codes = torch.empty(n, width, dtype=CODES[kind], device=rows.device)
    scales = torch.empty(n, dtype=torch.float32, device=rows.device)
    if native.quantize(rows, codes, scales):
        return codes, scales
    step = max(1, (BLOCK_CUDA if rows.is_cuda else BLOCK) // max(1, width))
    for i in range(0, n, step):
        exact = rows[i : i + step].float()
        largest = exact.abs().amax(1) if width else exact.new_zeros(len(exact))
        scale = torch.where(largest == 0, 1.0, largest / LARGEST[kind])  # of zeros any will do; a NaN stays
        scale = scale.clamp(min=SMALLEST)
        finite = scale.isfinite()
        scales[i : i + step] = torch.where(finite, scale, torch.nan)
        scaled = exact * torch.where(finite, 1 / scale, 0.0)[:, None]
        scaled = scaled.nan_to_num_(0.0).clamp_(-LARGEST[kind], LARGEST[kind])
        codes[i : i + step] = scaled.round_() if kind == "int8" else scaled
    return codes, scales


@quantize_rows.register_fake
def _(rows: Tensor, kind: str) -> Quantized:
    return rows.new_empty(rows.shape, dtype=CODES[kind]), rows.new_empty(rows.shape[0], dtype=torch.float32)


_packed = WeakIdKeyDictionary()  # codes of W -> the same as oneDNN wants them, for as long as the codes live


def packed(weight: QuantizedWeight, rows: int) -> Tensor:
    """The int8 codes of W as oneDNN wants them, made once: for products with ``rows``, at the first call."""
    found = _packed.get(weight.codes)
    if found is None:
        shape = [rows, weight.codes.shape[1]]
        found = _packed[weight.codes] = torch.ops.onednn.qlinear_prepack(weight.codes, shape)
    return found


def logits_of(rows: Tensor, weight: QuantizedWeight, n_vocab: int) -> tuple[Tensor, Tensor | None]:
    """(raw logits (n, V) of 8-bit products, what each row is still to be multiplied with or None) of hidden states
    (n, D), whose dtype the logits have."""
    codes, scales = quantize_rows(rows, weight.kind)
    if weight.kind == "fp8":
        by_row = ScalingType.RowWise
        of_both = (scales[:, None], by_row, weight.scales[None, :], by_row)
        return scaled_mm(codes, weight.codes.t(), *of_both, output_dtype=rows.dtype)[:, :n_vocab], None
    if VNNI:
        return _by_onednn(codes, weight, rows.dtype), scales
    # without VNNI, where refusal() keeps it from users: tests run it
    return ((codes.float() @ weight.codes.float().t()) * weight.scales).to(rows.dtype), scales


def _by_onednn(codes: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """(n, V) of ``dtype``: codes times W. Of the products in PyTorch this is the one that writes 16 bits instead of 32.
    It takes one scale for all hidden states, so that theirs are left to whoever reads the logits. Those go in without a
    sign, from 0 to 255, as VNNI multiplies them: with signed ones oneDNN 3.12 takes its reference loop."""
    zeros = torch.zeros(len(weight.codes), dtype=torch.int32)
    result = (1.0, 0, dtype, "none", [], "")
    unsigned = codes.view(torch.uint8) ^ 128  # code + 128
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed(weight, len(codes)), weight.scales, zeros, None, *result
    )


def corrected(
    top: Tensor, others: Tensor, z: Tensor, drawn_on: Tensor, chosen: Tensor, ratio: Tensor, proposed: bool
) -> tuple[Tensor, Tensor]:
    """``top`` and ``others`` with the logits of listed columns ``z`` (n, V) instead of those that were drawn on.

    Columns that are listed for certain change one by one. Of the rest a sample is known; where it was drawn on a
    proposal, their sum becomes as much larger as the sample's is, each entry in it times its ``ratio``.
    """
    certain, drawn = chosen & (ratio == 1), chosen & (ratio > 1)
    peak = torch.maximum(top, z.masked_fill(~chosen, float("-inf")).amax(1))
    now = (z - peak[:, None]).exp() * ratio
    before = (drawn_on - top[:, None]).exp() * ratio
    of = lambda values, which: torch.where(which, values, 0.0).sum(1)  # noqa: E731
    rest, by = (others - of(before, certain)).clamp(min=0), torch.exp(top - peak)
    if proposed:
        sample = of(before, drawn)
        by = torch.where(sample > 0, of(now, drawn) / sample, by)
    found = of(now, certain) + rest * by
    return torch.where(found > 0, peak, top), torch.where(found > 0, found, others)


def weights_of(logarithms: Tensor, drawn: Tensor) -> Tensor:
    """(n, 4): how many entries of a row are ``drawn``, and the largest, the sum and the sum of squares of their p / p~.
    Squares end at 1e30."""
    weight = torch.where(drawn, logarithms.exp(), 0.0).clamp(max=1e15)
    return torch.stack([drawn.sum(1).float(), weight.amax(1), weight.sum(1), weight.square().sum(1)], 1)


def quality(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(largest p / p~, effective share of the draws) of all rows' count, largest, sum and sum of squares (n, 4): 1 and
    1 where nothing was drawn on a proposal."""
    if len(weights) == 0:
        return weights.new_ones(()), weights.new_ones(())
    count, _, total, squares = weights.double().sum(0)
    drawn = count > 0
    share = total**2 / (count * squares).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(drawn, weights[:, 1].amax(), 1.0), torch.where(drawn, share, 1.0).float()

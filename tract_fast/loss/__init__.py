"""The TRACT loss as one operator: cross-entropy on the rows, and a squared error of the expected score on some of them.

This module holds the call: checks, dispatch, result. ``reference.py`` holds the definition; ``chunked.py`` and
``fused.py`` compute it without the N x V logits; ``choice.py`` says which one runs. ``terms.py`` is what both need of
the targets, ``rows.py`` the arithmetic of a row, ``triton_rows.py`` and ``native.py`` the same as kernels, ``plan.py``
the sizes of chunks, ``tuning.py`` launch configurations.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from tract_fast.loss import proposal as proposals
from tract_fast.loss.choice import choose
from tract_fast.loss.chunked import chunked_loss
from tract_fast.loss.plan import round_up
from tract_fast.loss.proposal import QuantizedWeight, quantize_weight
from tract_fast.loss.reference import IGNORE_INDEX, SampledTractLoss, TractLoss, reference_loss
from tract_fast.loss.sampled import EPS, sampled_loss
from tract_fast.loss.terms import RowStats, autocasts, compute_dtype, op_arguments, result

__all__ = ["QuantizedWeight", "SampledTractLoss", "TractLoss", "linear_tract_loss", "quantize_weight"]

MIN_EPS = 2.0**-20
HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_tract_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    score_rows: Tensor,
    score_targets: Tensor,
    score_token_ids: Tensor,
    score_values: Tensor,
    *,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    score_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalize: str = "scores",
    gradient: str = "exact",
    eps: float | None = None,
    proposal: str = "none",
    quantized: QuantizedWeight | None = None,
    implementation: str = "auto",
    memory_budget: int | None = None,
    seed: int | None = None,
    check: bool = False,
) -> TractLoss | SampledTractLoss:
    """Regression-aware fine-tuning loss of a language-model head (CoT-RAFT, arXiv 2503.04381), from hidden states.

    With ``z_i = softcap(logit_scale * (hidden_i @ weight.T + bias))``::

        nll_i   = lse(z_i) - z_i[label_i]
        q_b     = softmax of z[score_row_b] over the score tokens, or over the vocabulary, at the score tokens
        y_hat_b = sum_k q_bk * score_values_k
        loss    = sum_i row_weights_i * nll_i + sum_b score_weights_b * (y_hat_b - score_targets_b)^2

    The weights carry every normaliser (token or sequence mean, accumulation, world size, lambda); divided by global
    counts, the losses of micro-batches add up to that of one big batch. N, B and the number of labels may be 0: what
    is empty adds 0, and a loss of nothing stays connected to the graph, with gradients of zero.

    Args:
        hidden: (N, D) float32, bfloat16, float16 or float64; only the rows that are trained on.
        weight: (V, D), dtype of ``hidden``. Its gradient is not computed when it does not require one. Inside an
            autocast region weight, bias and hidden may each be float32 or the autocast dtype.
        labels: (N,) int64; -100 where a row carries no cross-entropy.
        score_rows: (B,) int64; which of the N rows predicts each sequence's score. A row may be named twice.
        score_targets: (B,) float32; any finite number.
        score_token_ids: (K,) int64, distinct, K >= 1.
        score_values: (K,) float32; the number that each score token stands for.
        bias: (V,), dtype of ``weight``.
        row_weights: (N,) float32 of any sign; None is the mean over labels that are not -100.
        score_weights: (B,) float32 of any sign; None is the mean over sequences (lambda = 1).
        softcap: z becomes ``softcap * tanh(z / softcap)``; None is no cap.
        logit_scale: factor of the logits, before the cap.
        normalize: "scores" (softmax over the score tokens) or "vocab" (over the vocabulary).
        gradient: "exact", or "sampled": the loss is exact, and its gradient drawn at random so that the exact one is
            its expectation; one GEMM instead of three on the CPU. See ``sampled.py``.
        eps: of "sampled": columns of a probability below it are kept at random; None is 2^-10.
        proposal: of "sampled": "int8" (CPUs with VNNI) or "fp8" (Hopper and later) draws from logits of 8-bit products
            and corrects by exact ones of what it lists: cheaper, and consistent instead of exact in the loss; "none"
            draws from the logits themselves. See ``proposal.py``.
        quantized: of a proposal: ``quantize_weight(weight, proposal)``, to be used for several calls while ``weight``
            stays as it is; None quantises it in this call.
        seed: of "sampled": the gradient is a function of the other arguments and this number; None takes one from
            torch's CPU generator.
        memory_budget: about how many bytes of logits "chunked" (of dZ "fused") may hold at a time; None is 1 GiB on
            CUDA (128 MiB) and 256 MiB on the CPU. With a trained weight "chunked" takes 4 V D bytes more: as float32
            dW, or as more logits where that makes one chunk do. Up to 1024 rows (128 on the CPU) are held at any
            budget, and 1024 columns of dZ.
        implementation: "reference", "chunked" (a chunk of rows at a time), "fused" (CUDA; no logits in memory, each
            computed twice), or "auto": see ``choice.py``.
        check: check the values of CUDA tensors too, which waits for the device; those of CPU tensors always are, but
            not under torch.compile. An index out of range that is not found so makes the loss NaN.

    Gradients are of first order. Inside torch.compile this is one operator for any N; rows chosen by a boolean mask
    have no size that can be traced, so choose them outside or by their indices.

    Targets, values and weights may also be float64 when ``hidden`` is.

    Returns:
        TractLoss; SampledTractLoss where the gradient was sampled. Gradients flow from ``loss`` into hidden, weight and
        bias.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype, device or value; the message names it.
    """
    check_options(softcap, logit_scale)
    check_choices(normalize, gradient, implementation)
    check_sampling(gradient, implementation, eps, seed)
    check_proposal(gradient, proposal, quantized, hidden, weight)
    check_budget(memory_budget)
    check_head(hidden, weight, bias)
    targets = {
        "labels": labels,
        "score_rows": score_rows,
        "score_targets": score_targets,
        "score_token_ids": score_token_ids,
        "score_values": score_values,
        "row_weights": row_weights,
        "score_weights": score_weights,
    }
    check_targets(hidden, targets)
    targets |= mean_weights(hidden.dtype, targets)
    if check or reads_values(hidden):
        check_values(len(hidden), len(weight), targets)
    else:
        targets |= weights_nan_where_wrong(len(hidden), len(weight), targets)
    options = {"softcap": softcap, "logit_scale": logit_scale}
    name, _ = choose(
        implementation,
        device_type=hidden.device.type,
        dtype=compute_dtype(hidden),
        n_rows=len(hidden),
        n_vocab=len(weight),
        width=hidden.shape[1],
        gradient=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)),
        budget=memory_budget,
    )
    if name == "reference" or len(hidden) == 0:  # without rows there is nothing to chunk or fuse
        return reference_loss(hidden, weight, bias=bias, **options, normalize=normalize, **targets)
    args = op_arguments(hidden, weight, bias, targets, **options, vocab=normalize == "vocab", budget=memory_budget)
    if gradient == "sampled" and (args.need_dx or args.need_dw or args.need_db):
        if proposal != "none" and quantized is None:
            quantized = quantize_weight(args.weight.detach(), proposal)
        of_draw = (EPS if eps is None else float(eps), seed_tensor(seed), *(quantized or (None, None)))
        loss, *rest = sampled_loss(*args, *of_draw)
        found = result(loss, RowStats(*rest[:5]), args.score_rows)
        return SampledTractLoss(*found, *(x.detach() for x in rest[9:]))
    loss, *stats = operator(name)(*args)[:6]
    return result(loss, RowStats(*stats), args.score_rows)


def mean_weights(dtype: torch.dtype, targets: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Weights for those that are None: the mean over labels that are not -100, the mean over sequences."""
    real = torch.promote_types(dtype, torch.float32)
    has_label, scores = targets["labels"] != IGNORE_INDEX, targets["score_targets"]
    found = {}
    if targets["row_weights"] is None:
        found["row_weights"] = has_label.to(real) / has_label.sum().clamp(min=1)
    if targets["score_weights"] is None:
        found["score_weights"] = torch.full_like(scores, 1 / max(len(scores), 1), dtype=real)
    return found


def reads_values(hidden: Tensor) -> bool:
    """Whether values are checked unasked: on the CPU, where that waits for nothing, but tracing has none."""
    return hidden.device.type == "cpu" and not torch.compiler.is_compiling()


def weights_nan_where_wrong(n_rows: int, n_vocab: int, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, NaN where an index that nobody checked is out of range: the loss says so without waiting for the
    device, where a clamped index would train on another token in silence."""
    labels, rows, ids = targets["labels"], targets["score_rows"], targets["score_token_ids"]
    wrong_label = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= n_vocab))
    wrong_token = ((ids < 0) | (ids >= n_vocab)).any()
    return {
        "row_weights": targets["row_weights"].masked_fill(wrong_label | wrong_token, math.nan),
        "score_weights": targets["score_weights"].masked_fill((rows < 0) | (rows >= n_rows), math.nan),
    }


def operator(name: str):
    """The custom op of an implementation. Triton is imported where it is used: CPU installations lack it."""
    if name == "chunked":
        return chunked_loss
    from tract_fast.loss.fused import fused_loss

    return fused_loss


def check_options(softcap: float | None, logit_scale: float) -> None:
    """Raise ValueError for a soft-cap or a logit scale that no logits can have."""
    if softcap is not None and not (is_finite_number(softcap) and softcap > 0):
        raise ValueError(f"softcap = {softcap!r}: must be a finite number > 0, or None for no cap")
    if not is_finite_number(logit_scale):
        raise ValueError(f"logit_scale = {logit_scale!r}: must be a finite number")


def check_choices(normalize: str, gradient: str, implementation: str) -> None:
    """Raise ValueError for a choice that there is not."""
    choices = {
        "normalize": (normalize, ("scores", "vocab")),
        "gradient": (gradient, ("exact", "sampled")),
        "implementation": (implementation, ("auto", "reference", "chunked", "fused")),
    }
    for name, (value, possible) in choices.items():
        if value not in possible:
            raise ValueError(f"{name} = {value!r}: must be {' or '.join(map(repr, possible))}")


def check_sampling(gradient: str, implementation: str, eps: float | None, seed: int | None) -> None:
    """Raise ValueError for settings of the sampled gradient that cannot be, or that nothing would use."""
    if gradient == "exact":
        for name, value in (("eps", eps), ("seed", seed)):
            if value is not None:
                raise ValueError(f"{name} = {value!r}: must be None with gradient = 'exact', which draws nothing")
        return
    if implementation not in ("auto", "chunked"):
        raise ValueError(f"implementation = {implementation!r}: must be 'chunked' or 'auto' with gradient = 'sampled'")
    if eps is not None and not (is_finite_number(eps) and MIN_EPS <= eps <= 1):
        raise ValueError(f"eps = {eps!r}: must be a number from 2^-20 to 1, or None for 2^-10")
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    if seed is not None and not (whole and 0 <= seed < 2**63):
        raise ValueError(f"seed = {seed!r}: must be a whole number from 0 to 2^63 - 1, or None")


def check_proposal(
    gradient: str, proposal: str, quantized: QuantizedWeight | None, hidden: Tensor, weight: Tensor
) -> None:
    """Raise ValueError for a proposal that cannot be made here, that nothing would use, or of another weight."""
    if proposal not in ("none", *proposals.KINDS):
        raise ValueError(f"proposal = {proposal!r}: must be 'none', 'int8' or 'fp8'")
    if quantized is not None and not isinstance(quantized, QuantizedWeight):
        raise ValueError(f"quantized is a {type(quantized).__name__}: must be quantize_weight(weight, kind), or None")
    if proposal == "none":
        if quantized is not None:
            raise ValueError(f"quantized is {quantized.kind} codes of a weight: must be None with proposal = 'none'")
        return
    if gradient != "sampled":
        raise ValueError(f"proposal = {proposal!r}: must be 'none' with gradient = {gradient!r}, which draws nothing")
    # a tensor without storage stands for one of a device that was asked already
    reason = hidden.is_meta or proposals.refusal(proposal, hidden.device, compute_dtype(hidden), hidden.shape[1])
    if isinstance(reason, str):
        raise ValueError(f"proposal = {proposal!r}: {reason}")
    if quantized is None:
        return
    rows, width = quantized.codes.shape
    expected = len(weight) if proposal == "int8" else round_up(len(weight), proposals.ALIGNMENT)
    shapes = quantized.scales.shape == (rows,) and (rows, width) == (expected, weight.shape[1])
    if quantized.kind != proposal or not shapes or quantized.codes.device != weight.device:
        raise ValueError(
            f"quantized is {quantized.kind} codes of a weight of {rows} x {width}, and weight is {len(weight)} x "
            f"{weight.shape[1]}: must be quantize_weight(weight, {proposal!r})"
        )


def seed_tensor(seed: int | None) -> Tensor:
    """() int64 on the CPU: a number of torch's generator where none is given, so that a seeded run repeats."""
    return torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed)


def check_budget(budget: int | None) -> None:
    """Raise ValueError for a memory budget that is no number of bytes."""
    if budget is not None and not (isinstance(budget, int) and not isinstance(budget, bool) and budget > 0):
        raise ValueError(f"memory_budget = {budget!r}: must be a whole number of bytes above 0, or None")


def is_finite_number(value: object) -> bool:
    # a tensor is refused: reading one that lies on a GPU would wait for the device; math.isfinite cannot be traced
    return isinstance(value, Real) and not isinstance(value, bool) and -math.inf < value < math.inf


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError where hidden, weight and bias do not fit together."""
    check_tensor("hidden", hidden, {"N": None, "D": None}, HIDDEN_DTYPES)
    device, dtypes = hidden.device, (hidden.dtype,)
    if autocasts(device.type):
        # autocast casts activations and leaves parameters alone, so the two meet here in different dtypes
        mixed = (torch.float32, torch.get_autocast_dtype(device.type))
        dtypes = mixed if hidden.dtype in mixed else dtypes
    check_tensor("weight", weight, {"V": None, "D": hidden.shape[1]}, dtypes, device)
    if len(weight) == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: must be (V, D) with V >= 1")
    if bias is not None:
        check_tensor("bias", bias, {"V": len(weight)}, dtypes, device)


def check_targets(hidden: Tensor, targets: dict[str, Tensor | None]) -> None:
    """Raise ValueError where a target tensor has a wrong shape, dtype or device, or asks for a gradient."""
    integer, device = (torch.int64,), hidden.device
    real = (torch.float32, torch.float64) if hidden.dtype == torch.float64 else (torch.float32,)
    check_tensor("score_rows", targets["score_rows"], {"B": None}, integer, device)
    check_tensor("score_token_ids", targets["score_token_ids"], {"K": None}, integer, device)
    rows, scores, tokens = {"N": len(hidden)}, {"B": len(targets["score_rows"])}, {"K": len(targets["score_token_ids"])}
    expected = {
        "labels": (rows, integer),
        "score_targets": (scores, real),
        "score_values": (tokens, real),
        "row_weights": (rows, real),
        "score_weights": (scores, real),
    }
    for name, (sizes, dtypes) in expected.items():
        tensor = targets[name]
        if tensor is None and name in ("row_weights", "score_weights"):
            continue
        check_tensor(name, tensor, sizes, dtypes, device)
        if tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, which it would not get: must be detached")
    if tokens["K"] == 0:
        raise ValueError("score_token_ids has shape (0,): must be (K,) with K >= 1")
    if scores["B"] > 0 and rows["N"] == 0:
        raise ValueError(f"score_rows has shape ({scores['B']},): must be (0,), since hidden has no rows")


def check_tensor(
    name: str,
    tensor: Tensor,
    sizes: dict[str, int | None],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless ``tensor`` has these sizes (None: any), one of the dtypes, and the device, if given."""
    letters = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is of type {type(tensor).__name__}: must be a tensor {letters}")
    known = {letter: n for letter, n in sizes.items() if n is not None}
    if tensor.ndim != len(sizes) or any(tensor.shape[list(sizes).index(letter)] != n for letter, n in known.items()):
        suffix = "".join(f" with {letter} = {n}" for letter, n in known.items())
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {letters}{suffix}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {short(tensor.dtype)}: must be {' or '.join(map(short, dtypes))}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {device}, where hidden is")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_values(n_rows: int, n_vocab: int, targets: dict[str, Tensor | None]) -> None:
    """Raise ValueError for an index out of range, a score token named twice or a number that is not finite.

    Waits for the device.
    """
    labels, ids = targets["labels"], targets["score_token_ids"]
    bad_label = ((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= n_vocab)
    refuse("labels", labels, bad_label, f"{IGNORE_INDEX} (no cross-entropy) or 0 to V - 1 = {n_vocab - 1}")
    rows = targets["score_rows"]
    refuse("score_rows", rows, (rows < 0) | (rows >= n_rows), f"0 to N - 1 = {n_rows - 1}")
    refuse("score_token_ids", ids, (ids < 0) | (ids >= n_vocab), f"0 to V - 1 = {n_vocab - 1}")
    sorted_ids, order = ids.sort(stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[order[1:]] = sorted_ids[1:] == sorted_ids[:-1]
    refuse("score_token_ids", ids, repeated, "distinct from the other score tokens")
    for name in ("score_targets", "score_values", "row_weights", "score_weights"):
        if targets[name] is not None:
            refuse(name, targets[name], ~targets[name].isfinite(), "finite")


def refuse(name: str, tensor: Tensor, bad: Tensor, must: str) -> None:
    """Raise ValueError for the first element of the 1-D ``tensor`` that is ``bad``."""
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(f"{name}[{i}] = {tensor[i].item()}: must be {must}")

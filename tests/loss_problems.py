"""Random problems of the loss as numpy arrays, and the closed formulas of their results and gradients in float64.

Shapes: N rows, D width, V vocabulary, B sequences, K score tokens.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

from tract_fast import linear_tract_loss
from tract_fast.loss import TractLoss

INPUTS = ("hidden", "weight", "bias")  # what gradients flow into


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def closed_form(p: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Results and gradients of one problem by the formulas, row by row in float64, without autograd."""
    x, w, labels, t, v = p["hidden"], p["weight"], p["labels"], p["score_token_ids"], p["score_values"]
    n, b = len(x), len(p["score_rows"])
    scale, cap = p.get("logit_scale", 1.0), p.get("softcap")
    z = scale * (x @ w.T + (0 if p.get("bias") is None else p["bias"]))
    chain = np.full_like(z, scale)
    if cap is not None:
        chain = scale / np.cosh(np.clip(z / cap, -300, 300)) ** 2
        z = cap * np.tanh(z / cap)
    a, c = p.get("row_weights"), p.get("score_weights")
    a = np.full(n, 1 / max(1, (labels != -100).sum())) if a is None else a
    c = np.full(b, 1 / max(1, b)) if c is None else c

    dz, nll = np.zeros_like(z), np.zeros(n)
    probs = softmax(z)
    for i in np.flatnonzero(labels != -100):
        y = labels[i]
        nll[i] = np.log1p(np.exp(np.minimum(np.delete(z[i], y) - z[i, y], 700)).sum())
        if nll[i] > 500:  # where exp would overflow the 1 does not matter
            nll[i] = z[i].max() + np.log(np.exp(z[i] - z[i].max()).sum()) - z[i, y]
        dz[i] += a[i] * probs[i]
        dz[i, y] -= a[i]
    q, y_hat, mass = np.zeros((b, len(t))), np.zeros(b), np.zeros(b)
    for s, r in enumerate(p["score_rows"]):
        mass[s] = probs[r, t].sum()
        q[s] = probs[r, t] if p["normalize"] == "vocab" else softmax(z[r, t])
        y_hat[s] = q[s] @ v
        k = 2 * c[s] * (y_hat[s] - p["score_targets"][s])
        if p["normalize"] == "vocab":
            dz[r] -= k * probs[r] * y_hat[s]
            dz[r, t] += k * probs[r, t] * v
        else:
            dz[r, t] += k * q[s] * (v - y_hat[s])
    dz *= chain
    loss = np.asarray((a * nll).sum() + (c * (y_hat - p["score_targets"]) ** 2).sum())
    values = {"loss": loss, "nll": nll, "expected_score": y_hat, "score_mass": mass, "score_probs": q}
    return values, {"hidden": dz @ w, "weight": dz.T @ x, "bias": dz.sum(0)}


def problem(
    n=6, v=11, d=5, k=3, b=3, *, seed=0, spread=1.0, ignored=0.3, bias=True, weights=True, **options
) -> dict[str, Any]:
    """A random problem as numpy arrays; ``spread`` is about the standard deviation of its logits."""
    rng = np.random.default_rng(seed)
    p = {
        "hidden": rng.standard_normal((n, d)),
        "weight": rng.standard_normal((v, d)) * spread / np.sqrt(d),
        "labels": np.where(rng.random(n) < ignored, -100, rng.integers(0, v, n)),
        "score_rows": rng.integers(0, n, b) if n else np.zeros(0, np.int64),
        "score_token_ids": rng.permutation(v)[:k],
        "score_values": rng.standard_normal(k) * 3,
    }
    b = len(p["score_rows"])
    p["score_targets"] = rng.standard_normal(b) * 3
    p["bias"] = rng.standard_normal(v) * spread if bias else None
    p["row_weights"] = rng.integers(-1, 2, n) * rng.random(n) if weights else None
    p["score_weights"] = rng.integers(-1, 2, b) * rng.random(b) if weights else None
    return p | {"normalize": "scores"} | options


def tensors(p: dict[str, Any], dtype=torch.float64, frozen=()) -> dict[str, Any]:
    """The problem's arguments: the head in ``dtype``, targets and weights in float32 (float64 for float64)."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    out = {}
    for name, x in p.items():
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(np.asarray(x))
            x = x.to(dtype if name in INPUTS else real) if x.is_floating_point() else x
            x = x.requires_grad_(name in INPUTS and name not in frozen)
        out[name] = x
    return out


def rounded(p: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same problem with every number representable in ``dtype`` (head) and float32 (targets and weights)."""
    return {
        name: x.detach().double().numpy() if isinstance(x, torch.Tensor) and x.is_floating_point() else p[name]
        for name, x in tensors(p, dtype).items()
    }


def gradients(
    args: dict[str, Any], upstream: float = 1.0, implementation: str = "reference"
) -> tuple[TractLoss, dict[str, torch.Tensor]]:
    """Results, and the gradients of ``upstream`` times the loss, which the tensors of ``args`` also get."""
    out = linear_tract_loss(**{"implementation": implementation} | args)
    (out.loss * upstream).backward()
    return out, {name: args[name].grad for name in INPUTS if args.get(name) is not None}


def assert_close(actual: torch.Tensor, expected: np.ndarray, rel: float, what: str, floor: float = 0.0) -> None:
    """Largest error relative to the largest entry, or ``floor`` where that is larger."""
    assert tuple(actual.shape) == expected.shape, what
    scale = max(np.abs(expected).max(initial=0.0), floor)
    error = np.abs(actual.detach().double().numpy() - expected).max(initial=0.0)
    assert error <= rel * scale, f"{what}: error {error:.3g}, scale {scale:.3g}"


@st.composite
def problems(draw) -> dict[str, Any]:
    v = draw(st.integers(1, 40))
    n = draw(st.integers(0, 9))
    return problem(
        n=n,
        v=v,
        d=draw(st.integers(1, 17)),
        k=draw(st.integers(1, min(v, 16))),
        b=draw(st.integers(0, 4)) if n else 0,  # up to 4 sequences on few rows: rows named twice are common
        seed=draw(st.integers(0, 2**32 - 1)),
        spread=draw(st.sampled_from([0.0, 1.0, 30.0, 1e4])),
        ignored=draw(st.sampled_from([0.0, 0.4, 1.0])),
        bias=draw(st.booleans()),
        weights=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 0.7, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.0625, -1.7])),
        normalize=draw(st.sampled_from(["scores", "vocab"])),
    )


UPSTREAM = st.sampled_from([1.0, -2.5, 1e-3, 300.0])

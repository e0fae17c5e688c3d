"""Quantised proposals: error and time of the loss beside eager, exact and sampled without one.

    python -m benchmarks.proposal recipes/smollm2-vicuna.yaml --data.train PATH/vicuna_eval.json [--rows N] [--rounds N]

Two problems, in bfloat16: hidden states of the recipe's seed model at trained rows of its first examples, and random
ones of the same shape. Errors are against float64 on the same numbers: of the loss in nats, of dX and dW relative in
the norm, root mean square over seeds; of the cross-entropy alone, whose gradient has no few large rows. Times are
medians over rounds in which all take turns, as ratios to one bare bfloat16 GEMM (the logits) of the same rounds;
quantising W is counted once for eight calls, as for the micro-batches of a step. Where no proposal runs, errors are
measured and times are not. Writes proposal.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sampled import Problem, cross_entropy_alone, errors, median_times, ours, products, real_problem
from tract_fast import doctor, host, recipe as recipes
from tract_fast.loss import proposal, quantize_weight
from tract_fast.loss.chunked import logits_buffer
from tract_fast.loss.plan import rows_within

EPS = [2.0**-10, 2.0**-12]
SEEDS = 5
MICRO_BATCHES = 8  # that share a quantised W
BLOCK = 128  # rows of float64 logits at a time


def random_problem(like: Problem, spread: float = 3.0) -> Problem:
    """Hidden states and weights that are normal, logits with a deviation of ``spread``; labels are drawn by them."""
    (n, width), n_vocab = like["hidden"].shape, len(like["weight"])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=g)
    w = torch.randn(n_vocab, width, generator=g) * spread / math.sqrt(width)
    parts = range(0, n, BLOCK)
    labels = [torch.multinomial((x[i : i + BLOCK] @ w.t()).softmax(1), 1, generator=g)[:, 0] for i in parts]
    return like | {"hidden": x.bfloat16(), "weight": w.bfloat16(), "labels": torch.cat(labels)}


def true_loss(p: Problem) -> float:
    """In float64."""
    total, counted = 0.0, p["labels"] >= 0
    for i in range(0, len(p["hidden"]), BLOCK):
        z = p["hidden"][i : i + BLOCK].double() @ p["weight"].double().t()
        total += F.cross_entropy(z, p["labels"][i : i + BLOCK], ignore_index=-100, reduction="sum").item()
    return total / counted.sum().item()


def eager(p: Problem) -> tuple[float, list[Tensor]]:
    """As one writes it: bfloat16 logits, made float32."""
    hidden, weight = (p[name].detach().requires_grad_() for name in ("hidden", "weight"))
    loss = F.cross_entropy(F.linear(hidden, weight).float(), p["labels"], ignore_index=-100)
    return loss.item(), list(torch.autograd.grad(loss, [hidden, weight]))


def row_of(what: str, found: list[tuple[float, list[Tensor]]], loss: float, truth: list[Tensor], **more: Any) -> dict:
    off = math.sqrt(statistics.fmean((value - loss) ** 2 for value, _ in found))
    row = {"what": what, "loss_error": off, "error": errors([grads for _, grads in found], truth), **more}
    print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def measure_errors(p: Problem, kinds: list[str]) -> list[dict[str, Any]]:
    loss, truth = true_loss(p), products(p)
    rows = [row_of("eager bfloat16", [eager(p)], loss, truth)]
    out, grads = ours(p, False)
    rows.append(row_of("exact", [(out.loss.item(), grads)], loss, truth))
    rounded = products(p, lambda dz, probs: dz.to(torch.bfloat16).double())
    rows.append(row_of("dZ rounded to bfloat16", [(loss, rounded)], loss, truth))
    for eps in EPS:
        for kind in ["none", *kinds]:
            drawn = [ours(p, False, gradient="sampled", eps=eps, seed=s, proposal=kind) for s in range(SEEDS)]
            outs = [out for out, _ in drawn]
            more = {
                "entries": statistics.fmean(out.entries.float().mean().item() for out in outs),
                "largest_weight": max(out.largest_weight.item() for out in outs),
                "effective_share": min(out.effective_share.item() for out in outs),
            }
            found = [(out.loss.item(), grads) for out, grads in drawn]
            rows.append(row_of("sampled", found, loss, truth, proposal=kind, eps=eps, **more))
    return rows


def quantized(w: Tensor, kind: str, rows: int) -> None:
    """All that is done once for a W: its codes, and for int8 what oneDNN makes of them for products with ``rows``."""
    codes = quantize_weight(w, kind)
    if kind == "int8":
        proposal.packed(codes, rows)


def measure_times(p: Problem, kinds: list[str], rounds: int) -> list[dict[str, Any]]:
    x, w = p["hidden"].detach(), p["weight"].detach()
    logits = logits_buffer(x, len(x), len(w))
    kept = {kind: quantize_weight(w, kind) for kind in kinds}
    at_once = rows_within(len(w), logit_bytes=x.element_size(), budget=None, device="cpu")
    runs: dict[tuple[str, float | None, bool], Callable[[], Any]] = {
        ("one GEMM", None, False): lambda: torch.mm(x, w.t(), out=logits)
    }
    for kind in kinds:
        runs[f"quantising W, {kind}", None, False] = lambda kind=kind: quantized(w, kind, min(at_once, len(x)))
        runs[f"the product, {kind}", None, False] = lambda kind=kind: [
            proposal.logits_of(part, kept[kind], len(w)) for part in x.split(at_once)
        ]
    for frozen in (False, True):
        runs["exact", None, frozen] = lambda frozen=frozen: ours(p, frozen)
        for eps in EPS:
            for kind in ["none", *kinds]:
                options = {"gradient": "sampled", "eps": eps, "seed": 1, "proposal": kind}
                options |= {"quantized": kept.get(kind)}
                runs[f"sampled, {kind}", eps, frozen] = lambda frozen=frozen, o=options: ours(p, frozen, **o)
    medians = median_times(runs, rounds)
    one = medians["one GEMM", None, False]
    rows = []
    for (what, eps, frozen), seconds in medians.items():
        quantising = f"quantising W, {what.removeprefix('sampled, ')}"
        if what.startswith("sampled") and (quantising, None, False) in medians:
            seconds += medians[quantising, None, False] / MICRO_BATCHES
        rows.append({"what": what, "eps": eps, "W": "frozen" if frozen else "trained", "ms": 1000 * seconds})
        rows[-1] |= {"to_one_gemm": seconds / one, "to_exact": seconds / medians["exact", None, frozen]}
        print(" ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--times-only", action="store_true", help="no errors, which take minutes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args, settings = parser.parse_known_args()
    real = cross_entropy_alone(real_problem(recipes.load(args.recipe, settings), args.rows, torch.bfloat16))
    about = {"device": doctor.describe_device(torch.device("cpu")), **doctor.versions(())}
    shape = {"rows": len(real["hidden"]), "vocab": len(real["weight"]), "width": real["hidden"].shape[1]}
    print(about, shape)
    device = torch.device("cpu")
    print(f"host memory: {host.keep_freed_memory(device)}")  # as in training: the product's result is a new tensor
    refused = {kind: proposal.refusal(kind, device, torch.bfloat16, shape["width"]) for kind in proposal.KINDS}
    found: dict[str, Any] = {"refused": refused}
    if not args.times_only:
        proposal.refusal = lambda *_, **__: None  # errors are those of any machine: products of 8-bit numbers are exact
        problems = {"real": real, "random": random_problem(real)}
        found["errors"] = {name: measure_errors(p, list(proposal.KINDS)) for name, p in problems.items()}
    kinds = [kind for kind, reason in refused.items() if reason is None]
    for kind, reason in refused.items():
        print(f"no times of {kind}: {reason}" if reason else f"times of {kind}")
    if kinds:
        found["times"] = measure_times(real, kinds, args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "proposal.json").write_text(json.dumps({"versions": about, "shape": shape, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

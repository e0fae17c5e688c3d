"""The sampled gradient on real hidden states: error and time by eps, beside rounding, filtering and the exact path.

    python -m benchmarks.sampled recipes/smollm2-vicuna.yaml --data.train PATH/vicuna_eval.json [--rows N] [--rounds N]

The recipe's seed model reads its first examples; the hidden states of the rows that are trained on, their labels and
scores, are the problem. Errors are relative (norm) against the float64 gradient of the same problem, rms over seeds.
Times are medians over rounds in which all take turns, as ratios to one bare GEMM (the logits) of the same rounds.
Writes sampled.json and sampled.png.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tract_fast import doctor, host, linear_tract_loss, model, perf, recipe as recipes
from tract_fast.data import batch as batches
from tract_fast.loss.chunked import logits_buffer
from tract_fast.model import hidden_states
from tract_fast.prepare import prepare

EPS = [2.0**-k for k in (8, 9, 10, 11, 12, 13, 14)]
SEEDS = 5
FILTER = 2.0**-12  # Cut Cross-Entropy's, of blocks of entries; here of each entry
HEAVY = 2048  # columns
BLOCK = 128  # rows of float64 logits at a time

Problem = dict[str, Tensor]


@torch.no_grad()
def real_problem(recipe: recipes.Recipe, rows: int, dtype: torch.dtype) -> Problem:
    """Arguments of the loss: ``rows`` trained rows of the recipe's first examples, from its seed model."""
    data = prepare(recipe, lambda line: None)
    built = model.build(recipe, data.config, data.tokenizer, data.scale, torch.device("cpu"), lambda line: None)
    mean = {"ce_weight": 1.0, "regression_weight": 1.0, "score_ce": True, "ce_reduction": "token"}
    found: list[tuple[Tensor, batches.Batch]] = []
    for example in data.train:
        batch = batches.collate([example], batches.normalizer([example], **mean), score_ce=True)
        found.append((hidden_states(built.backbone, batch)[batch.rows], batch))
        if sum(len(h) for h, _ in found) >= rows:
            break
    starts = [sum(len(h) for h, _ in found[:i]) for i in range(len(found))]
    score_rows = torch.cat([b.score_rows + s for (_, b), s in zip(found, starts, strict=True)])
    kept = score_rows < rows
    return {
        "hidden": torch.cat([h for h, _ in found])[:rows].to(dtype),
        "weight": built.head.weight.detach().to(dtype),
        "labels": torch.cat([b.labels for _, b in found])[:rows],
        "score_rows": score_rows[kept],
        "score_targets": torch.cat([b.score_targets for _, b in found])[kept],
        "score_token_ids": built.head.score_token_ids,
        "score_values": built.head.score_values,
    }


def logit_gradient(p: Problem, rows: slice) -> Tensor:
    """dZ of some rows in float64, of the mean loss."""
    z = p["hidden"][rows].double() @ p["weight"].double().t()
    probs, labels = z.softmax(-1), p["labels"][rows]
    counted = labels >= 0
    dz = probs * counted[:, None]
    dz[counted, labels[counted]] -= 1
    dz /= (p["labels"] >= 0).sum()
    ids, values = p["score_token_ids"], p["score_values"].double()
    here = (p["score_rows"] >= rows.start) & (p["score_rows"] < rows.stop)
    for row, target in zip(p["score_rows"][here] - rows.start, p["score_targets"][here], strict=True):
        q = z[row, ids].softmax(-1)
        expected = q @ values
        dz[row, ids] += 2 * (expected - target) * q * (values - expected) / len(p["score_rows"])
    return dz


@torch.no_grad()
def products(p: Problem, change: Callable[[Tensor, Tensor], Tensor] = lambda dz, p_: dz) -> list[Tensor]:
    """(dX, dW) in float64 of dZ as ``change`` leaves it."""
    x, w = p["hidden"].double(), p["weight"].double()
    dx, dw = torch.zeros_like(x), torch.zeros_like(w)
    for i in range(0, len(x), BLOCK):
        rows = slice(i, min(i + BLOCK, len(x)))
        dz = logit_gradient(p, rows)
        dz = change(dz, (x[rows] @ w.t()).softmax(-1))
        dx[rows] = dz @ w
        dw += dz.t() @ x[rows]
    return [dx, dw]


def ours(p: Problem, frozen: bool, **options: Any) -> tuple[Any, list[Tensor]]:
    """The loss, and its gradients in hidden and, unless frozen, weight."""
    hidden, weight = p["hidden"].requires_grad_(), p["weight"].requires_grad_(not frozen)
    out = linear_tract_loss(**p | {"hidden": hidden, "weight": weight}, implementation="chunked", **options)
    return out, list(torch.autograd.grad(out.loss, [hidden] if frozen else [hidden, weight]))


def errors(found: list[list[Tensor]], truth: list[Tensor]) -> dict[str, float]:
    """Root mean square over draws of the relative error."""
    both = zip(("dX", "dW"), zip(*found, strict=True), truth, strict=True)
    return {
        name: statistics.fmean(((x.double() - t).norm() / t.norm()).item() ** 2 for x in draws) ** 0.5
        for name, draws, t in both
    }


def measure_errors(p: Problem, loss: str) -> list[dict[str, Any]]:
    """Errors with the score terms, whose few rows have most of the gradient's norm, or of the cross-entropy alone."""
    if loss == "CE":
        p = cross_entropy_alone(p)
    truth = products(p)
    bf16 = lambda dz, probs: dz.to(torch.bfloat16).double()  # noqa: E731
    dropped = lambda dz, probs: dz * ((probs >= FILTER) | (dz < 0))  # noqa: E731
    rows = [{"what": "exact", "error": errors([ours(p, False)[1]], truth)}]
    rows.append({"what": "dZ rounded to bfloat16", "error": errors([products(p, bf16)], truth)})
    rows.append({"what": "entries below 2^-12 dropped", "error": errors([products(p, dropped)], truth)})
    for eps in EPS:
        drawn = [ours(p, False, gradient="sampled", eps=eps, seed=seed) for seed in range(SEEDS)]
        out = drawn[0][0]
        row = {"what": "sampled", "eps": eps, "error": errors([grads for _, grads in drawn], truth)}
        row |= {"entries": out.entries.float().mean().item(), "most": out.entries.max().item()}
        rows.append(row | {"added_variance": out.added_variance.item()})
    for row in rows:
        row["loss"] = loss
        print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def median_times(runs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median seconds of each, all taking turns in an order that changes."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for i in range(rounds + 1):
        order = list(runs)
        random.Random(i).shuffle(order)
        for key in order:
            begin = time.perf_counter()
            runs[key]()
            times[key].append(time.perf_counter() - begin)
    return {key: statistics.median(t[1:]) for key, t in times.items()}  # the first is warm-up


def cross_entropy_alone(p: Problem) -> Problem:
    """``p`` without its score terms."""
    return p | {name: p[name][:0] for name in ("score_rows", "score_targets")}


def measure_times(p: Problem, rounds: int) -> list[dict[str, Any]]:
    x, w = p["hidden"].detach(), p["weight"].detach()
    logits = logits_buffer(x, len(x), len(w))  # memory like that of the loss
    runs: dict[tuple[str, float | None, bool], Callable[[], Any]] = {
        ("one GEMM", None, False): lambda: torch.mm(x, w.t(), out=logits)
    }
    for frozen in (False, True):
        runs["exact", None, frozen] = lambda frozen=frozen: ours(p, frozen)
        for eps in EPS:
            run = lambda frozen=frozen, eps=eps: ours(p, frozen, gradient="sampled", eps=eps, seed=1)  # noqa: E731
            runs["sampled", eps, frozen] = run
    medians = median_times(runs, rounds)
    one = medians["one GEMM", None, False]
    rows = []
    for (what, eps, frozen), seconds in medians.items():
        rows.append({"what": what, "eps": eps, "W": "frozen" if frozen else "trained", "ms": 1000 * seconds})
        rows[-1] |= {"to_one_gemm": seconds / one, "to_exact": seconds / medians["exact", None, frozen]}
        print(" ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def measure_heavy(p: Problem, rounds: int) -> list[dict[str, Any]]:
    """What it would bring to treat the ``HEAVY`` columns with most entries densely: their share of the entries that are
    drawn, and the time of the two dense products with them (dX, dW) beside one GEMM with all columns."""
    x, w = p["hidden"].detach(), p["weight"].detach()
    expected = {eps: torch.zeros(len(w), dtype=torch.float64) for eps in EPS}
    for i in range(0, len(x), BLOCK):
        probs = (x[i : i + BLOCK].double() @ w.double().t()).softmax(-1)
        for eps, total in expected.items():
            total += (probs / eps).clamp(max=1.0).sum(0)
    columns = w[:HEAVY].contiguous()
    dz, dx, dw, logits = x.new_zeros(len(x), HEAVY), x.new_empty(x.shape), w.new_empty(columns.shape), x @ w.t()
    runs = {
        "one GEMM": lambda: torch.mm(x, w.t(), out=logits),
        "dX": lambda: torch.mm(dz, columns, out=dx),
        "dW": lambda: torch.mm(dz.t(), x, out=dw),
    }
    one, *parts = median_times(runs, rounds).values()
    rows = [
        {"what": "dense products", "columns": HEAVY, "dX_to_one_gemm": parts[0] / one, "dW_to_one_gemm": parts[1] / one}
    ]
    for eps, total in expected.items():
        share = total.topk(HEAVY).values.sum() / total.sum()
        rows.append({"what": "share of entries", "eps": eps, "share": share.item()})
    for row in rows:
        print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def plot(error_rows: list[dict], time_rows: list[dict], path: Path) -> None:
    """Error of dX of the cross-entropy against time, W trained."""
    from matplotlib.figure import Figure

    time_of = {(r["what"], r["eps"]): r["to_one_gemm"] for r in time_rows if r["W"] == "trained"}
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    error_rows = [r for r in error_rows if r["loss"] == "CE"]
    chosen = [r for r in error_rows if r["what"] == "sampled"]
    places = [(time_of["sampled", r["eps"]], 100 * r["error"]["dX"]) for r in chosen]
    axes.plot(*zip(*places, strict=True), marker="o", label="sampled")
    for r, place in zip(chosen, places, strict=True):
        axes.annotate(f"{r['eps']:.0e}", place, textcoords="offset points", xytext=(5, 5), fontsize=8)
    exact = error_rows[0]["error"]["dX"]
    axes.plot(time_of["exact", None], 100 * exact, "s", label="exact")
    for r in error_rows[1:3]:
        axes.axhline(100 * r["error"]["dX"], linestyle=":", color="gray")
        axes.annotate(r["what"], (max(x for x, _ in places), 100 * r["error"]["dX"]), fontsize=8, color="gray")
    axes.set(xlabel="time / one GEMM (W trained)", ylabel="error of dX, %", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 where the CPU multiplies it"
    )
    parser.add_argument("--times-only", action="store_true", help="no errors, which take minutes, and no plot")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args, settings = parser.parse_known_args()
    slow = perf.slow_bfloat16(torch.device("cpu"))
    dtype = getattr(torch, args.dtype or ("float32" if slow else "bfloat16"))
    print("host memory:", host.keep_freed_memory(torch.device("cpu")))  # as in training
    p = real_problem(recipes.load(args.recipe, settings), args.rows, dtype)
    about = {"device": doctor.describe_device(torch.device("cpu")), **doctor.versions(()), "dtype": str(dtype)}
    shape = {"rows": len(p["hidden"]), "vocab": len(p["weight"]), "width": p["hidden"].shape[1]}
    print(about, shape)
    found = {} if args.times_only else {"errors": measure_errors(p, "TRACT") + measure_errors(p, "CE")}
    found["times"] = measure_times(p, args.rounds)
    if not args.times_only:
        found["heavy"] = measure_heavy(p, args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sampled.json").write_text(json.dumps({"versions": about, "shape": shape, **found}, indent=1) + "\n")
    if not args.times_only:
        plot(found["errors"], found["times"], args.out / "sampled.png")


if __name__ == "__main__":
    main()

"""RMSNorm and the gated product, forward and backward, against transformers' modules and against moving the bytes.

    python -m benchmarks.lean [--tokens 4096] [--width 576] [--inner 1536] [--rounds 30] [--out FILE.json]

All take turns in one process; medians, and their ratios. "floor" is the bytes that must be read and written once, at
the rate of a copy of the larger tensors, measured in turn with the rest. "and computed again": with what ours computes
once more for the linear layers that read the result, which transformers' modules keep instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tract_fast.elementwise import gated_product, rms_norm

Runs = dict[str, Callable[[], object]]
# elements moved: those of the norm are T x D, those of the product T x I; backward without and with computing again
MOVED = {"norm forward": 2, "norm backward": 3, "product forward": 3, "product backward": 5}
AGAIN = {"norm backward": 2, "product backward": 3}


def contestants(tokens: int, width: int, inner: int, dtype: torch.dtype) -> Runs:
    """What is timed, by "operation, who"."""
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=draw).to(dtype)  # noqa: E731
    x, weight = make(tokens, width).requires_grad_(), make(width).requires_grad_()
    gate, up = make(tokens, inner).requires_grad_(), make(tokens, inner).requires_grad_()
    dy, dproduct, to = make(tokens, width), make(tokens, inner), make(tokens, inner)
    norm = LlamaRMSNorm(width).to(dtype)
    forwards = {
        "norm": {"transformers": lambda: norm(x), "ours": lambda: rms_norm(x, weight, 1e-6)},
        "product": {"transformers": lambda: F.silu(gate) * up, "ours": lambda: gated_product(gate, up, "silu")},
    }
    runs: Runs = {"copy": lambda: to.copy_(dproduct)}
    for name, by in forwards.items():
        gradient = dy if name == "norm" else dproduct
        leaves = {"norm": (x, weight), "product": (gate, up)}[name]
        for who, forward in by.items():
            wanted = (x, norm.weight) if name == "norm" and who == "transformers" else leaves
            runs[f"{name} forward, {who}"] = forward
            out = forward()
            runs[f"{name} backward, {who}"] = lambda out=out, wanted=wanted, gradient=gradient: torch.autograd.grad(
                out, wanted, gradient, retain_graph=True
            )
            if who == "ours":

                def with_again(out: Tensor = out, wanted=wanted, gradient=gradient) -> None:
                    with torch.no_grad():
                        out.grad_fn.again(out.grad_fn)
                    torch.autograd.grad(out, wanted, gradient, retain_graph=True)

                runs[f"{name} backward, ours and computed again"] = with_again
    return runs


def measure(runs: Runs, rounds: int) -> dict[str, float]:
    """Median seconds of each, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def rows(found: dict[str, float], tokens: int, width: int, inner: int, size: int) -> list[dict[str, object]]:
    """A line for each operation: milliseconds and ratios to the floor."""
    rate = 2 * tokens * inner * size / found["copy"]  # bytes a second
    lines = []
    for operation, moved in MOVED.items():
        elements = tokens * (width if operation.startswith("norm") else inner)
        line = {"operation": operation, "floor ms": 1e3 * moved * elements * size / rate}
        for who in ("transformers", "ours", "ours and computed again"):
            if (name := f"{operation}, {who}") in found:
                line[f"{who} ms"] = 1e3 * found[name]
                floor = moved + (AGAIN[operation] if who.endswith("again") else 0)
                line[f"{who} / floor"] = found[name] * rate / (floor * elements * size)
        line["times faster"] = found[f"{operation}, transformers"] / found[f"{operation}, ours"]
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("width", 576), ("inner", 1536), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the numbers there")
    args = parser.parse_args()
    results = {}
    for dtype in (torch.bfloat16, torch.float32):
        found = measure(contestants(args.tokens, args.width, args.inner, dtype), args.rounds)
        results[str(dtype)] = rows(found, args.tokens, args.width, args.inner, dtype.itemsize)
        rate = 2 * args.tokens * args.inner * dtype.itemsize / found["copy"]
        print(f"\n{dtype}, {torch.get_num_threads()} threads, a copy moves {rate / 1e9:.1f} GB/s")
        for line in results[str(dtype)]:
            told = (f"{k} {v:.2f}" for k, v in line.items() if isinstance(v, float))
            print(f"{line['operation']:17}", ", ".join(told))
    if args.out:
        args.out.write_text(json.dumps({**vars(args), "out": None, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

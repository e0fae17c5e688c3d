"""The loss against its floor and its peers: time, memory and error of one forward and backward.

    python benchmarks/loss.py [--device cpu|cuda] [--shapes NAME ...] [--rounds N] [--out FOLDER]

Every time is a median over rounds in which all contestants take turns, and is shown as a ratio to the bare GEMMs of
the same
shape in the same rounds (three, or two with W frozen), into buffers made before. Errors are relative (norm) against
float64 on the same inputs. Hidden states are scaled so that
a row has a few hundred tokens with a probability above 2^-12 (365 of 49152 at D = 576): on logits that are all small a
filter of small gradients drops everything and looks too good.
Writes ``loss.json`` (with device and versions) and ``loss.png``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_fast import linear_tract_loss

SHAPES = {  # name: (N, V, D): heads of models, with rows of one micro-batch
    "smollm2-135m": (1024, 49152, 576),
    "smollm2-135m-3000": (3000, 49152, 576),
    "gemma-3-270m": (2048, 262144, 640),
    "llama-3.1-8b-512": (512, 128256, 4096),
    "llama-3.1-8b": (8192, 128256, 4096),
    "mistral-7b": (4096, 32000, 4096),
    "qwen3-8b": (8192, 151936, 4096),
    "llama-3.1-8b-16384": (16384, 128256, 4096),
}
ON_CPU = ("smollm2-135m", "smollm2-135m-3000")
SCORES = 5


class Problem:
    """One shape on one device: inputs of the whole TRACT loss, or of its cross-entropy alone."""

    def __init__(self, n: int, v: int, d: int, device: str, dtype: torch.dtype, frozen: bool, scores: bool):
        generator = torch.Generator(device).manual_seed(0)
        self.weight = torch.randn(v, d, generator=generator, device=device).mul_(d**-0.5).to(dtype)
        self.hidden = torch.randn(n, d, generator=generator, device=device).mul_(3.5).to(dtype).requires_grad_()
        self.weight.requires_grad_(not frozen)
        self.labels = torch.randint(v, (n,), generator=generator, device=device)
        count = max(1, n // 120) if scores else 0
        self.score_rows = torch.arange(count, device=device) * 120 % n
        self.score_targets = torch.rand(count, generator=generator, device=device) * 4 + 1
        self.ids = torch.arange(SCORES, device=device) * 7 + 11
        self.labels[self.score_rows] = self.ids[torch.arange(count, device=device) % SCORES]
        self.values = torch.arange(1.0, SCORES + 1, device=device)

    def parameters(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    def ours(self, implementation: str, **options) -> Tensor:
        return linear_tract_loss(
            self.hidden, self.weight, self.labels, self.score_rows, self.score_targets, self.ids, self.values,
            implementation=implementation, **options,
        ).loss  # fmt: skip

    def eager(self, double: bool = False) -> Tensor:
        """What a trainer without a fused loss does; in float64 it is the truth."""
        hidden, weight = (x.double() if double else x for x in (self.hidden, self.weight))
        z = F.linear(hidden, weight)
        z = z if double else z.float()
        loss = F.cross_entropy(z, self.labels)
        if len(self.score_rows):
            probs = z[self.score_rows][:, self.ids].softmax(-1)
            loss = loss + (probs @ self.values.to(z.dtype) - self.score_targets).square().mean()
        return loss


def contestants(p: Problem, scores: bool) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function that returns the loss; only what runs here and computes this loss."""
    cuda = p.hidden.is_cuda
    found: dict[str, Callable[[], Tensor]] = {
        "chunked": lambda: p.ours("chunked"),
        "reference": lambda: p.ours("reference"),
        "eager": p.eager,
        "compile": torch.compile(p.eager),
    }
    if cuda:
        found["fused"] = lambda: p.ours("fused")
    if scores:
        return found  # no peer has the regression term
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            p.hidden, p.weight, p.labels, options=options
        )
    if cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda: liger(p.weight, p.hidden, p.labels)
    if cuda and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cce"] = lambda: linear_cross_entropy(p.hidden, p.weight, p.labels)
        found["cce exact"] = lambda: linear_cross_entropy(p.hidden, p.weight, p.labels, impl="cce_exact")
    if cuda and importlib.util.find_spec("quack"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        found["quack"] = lambda: chunked_linear_cross_entropy(p.hidden, p.weight, p.labels)
    return found


def bare_gemms(p: Problem) -> Callable[[], None]:
    """The floor: logits, dX and, with W trained, dW into buffers that are there."""
    x, w = p.hidden.detach(), p.weight.detach()
    logits, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=dx)
        if p.weight.requires_grad:
            torch.mm(logits.t(), x, out=dw)

    return run


def step(p: Problem, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(loss(), p.parameters())

    return run


def timed(run: Callable[[], None], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)


def peak_extra(run: Callable[[], None], device: str) -> float:
    """MiB above what was held before, at the peak of one call; on the CPU, of the process, every millisecond."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    peak, done = [resident()], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return (peak[0] - before) / 2**20


def errors(p: Problem, loss: Callable[[], Tensor], truth: list[Tensor]) -> dict[str, float]:
    value = loss()
    grads = torch.autograd.grad(value, p.parameters())
    found = [value.detach(), *grads]
    names = ["loss"] + ["dX" if x is p.hidden else "dW" for x in p.parameters()]
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(names, found, truth, strict=True)}


def measure(name: str, device: str, dtype: torch.dtype, frozen: bool, scores: bool, rounds: int) -> list[dict]:
    """All contestants on one shape."""
    n, v, d = SHAPES[name]
    p = Problem(n, v, d, device, dtype, frozen, scores)
    exact = p.eager(double=True)
    truth = [exact.detach(), *(g.double() for g in torch.autograd.grad(exact, p.parameters()))]
    del exact
    rows, runs = [], {"bare GEMMs": bare_gemms(p)}
    for label, loss in contestants(p, scores).items():
        try:
            step(p, loss)()  # compiles, and shows what does not run
        except (RuntimeError, NotImplementedError, ValueError, AssertionError, TypeError) as error:
            print(f"  {label}: does not run here: {' '.join(str(error).split())[:150]}")
            continue
        runs[label] = step(p, loss)
        rows.append({"contestant": label, "error": errors(p, loss, truth)})
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            times[label].append(timed(run, device))
    floor = statistics.median(times["bare GEMMs"])
    shape = {"shape": name, "N": n, "V": v, "D": d, "dtype": str(dtype).removeprefix("torch."), "W": "frozen" if frozen
             else "trained", "loss": "TRACT" if scores else "CE", "bare_gemms_ms": floor}  # fmt: skip
    for row in rows:
        label = row["contestant"]
        median = statistics.median(times[label])
        row |= shape | {"ms": median, "ratio": median / floor, "peak_extra_mib": peak_extra(runs[label], device)}
        wrong = "  ".join(f"{k} {e:.1e}" for k, e in row["error"].items())
        print(
            f"  {label:26} {median:9.2f} ms  {row['ratio']:5.2f} x bare  {row['peak_extra_mib']:7.0f} MiB  {wrong}",
            flush=True,
        )
    return rows


def versions(device: str) -> dict[str, str]:
    import importlib.metadata as metadata

    found = {"device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()}
    found["capability"] = torch.backends.cpu.get_cpu_capability() if device == "cpu" else ""
    found["threads"] = str(torch.get_num_threads())
    for package in ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def plot(rows: list[dict], path: Path) -> None:
    """Ratios to the bare GEMMs, a panel a shape."""
    from matplotlib.figure import Figure

    panels = sorted({(r["shape"], r["W"], r["loss"]) for r in rows})
    figure = Figure(figsize=(10, 2.2 * len(panels)), layout="constrained")
    for axes, key in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        chosen = [r for r in rows if (r["shape"], r["W"], r["loss"]) == key]
        axes.barh([r["contestant"] for r in chosen], [r["ratio"] for r in chosen], color="#4c72b0")
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_title(", ".join(key), fontsize=9)
        axes.set_xlabel("time / bare GEMMs")
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: all that fit the device")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    about = versions(args.device)
    print(about)
    rows = []
    for name in args.shapes or (ON_CPU if args.device == "cpu" else tuple(SHAPES)):
        for frozen in (False, True):
            for scores in (False, True):
                n, v, d = SHAPES[name]
                kind = f"W {'frozen' if frozen else 'trained'}, {'TRACT' if scores else 'CE'}"
                print(f"{name}: N={n} V={v} D={d}, {args.dtype}, {kind}")
                rows += measure(name, args.device, getattr(torch, args.dtype), frozen, scores, args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "loss.json").write_text(json.dumps({"versions": about, "rows": rows}, indent=1) + "\n")
    plot(rows, args.out / "loss.png")


if __name__ == "__main__":
    main()

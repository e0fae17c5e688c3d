"""The loss against its floor and its peers: time, memory and error of one forward and backward.

    python -m benchmarks.loss [--device cpu|cuda] [--shapes NAME ...] [--only NAME ...] [--dtype ...] [--rounds N]

Every time is a median over rounds in which all contestants take turns, shown as a ratio to the bare GEMMs of the rows
that count, in the same rounds (three, or two with W frozen), into buffers made before. Errors are relative (norm)
against float64 on the same inputs. Shapes named vicuna are packed judgements of which a tenth of the tokens counts.
On CUDA shapes that would pass ``--minutes`` are left out, which is said. Writes ``loss.json`` (with device and
versions) and ``loss.png``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import SHAPES, Problem, bare_gemms, contestants
from tract_fast import doctor, perf
from tract_fast.loss import native

ON_CPU = ("smollm2-135m", "smollm2-135m-vicuna", "smollm2-135m-3000")
PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels")
ON_CUDA = tuple(name for name in SHAPES if name != "tiny")


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
    """MiB above what was held before, at the peak of one call. On the CPU of the process, looked at every millisecond:
    a lower bound, since memory that libc kept from a call before does not count."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    native.release()  # what ours keeps from call to call counts as its own
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
    found = [value.detach(), *torch.autograd.grad(value, p.parameters())]
    names = ["loss"] + ["dX" if x is p.hidden else "dW" for x in p.parameters()]
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(names, found, truth, strict=True)}


def measure(
    name: str, device: str, dtype: torch.dtype, *, frozen: bool, scores: bool, rounds: int, only: list[str] | None
) -> list[dict]:
    """All contestants, or ``only`` these, on one shape."""
    p = Problem(SHAPES[name], device, dtype, frozen=frozen, scores=scores)
    truth = p.truth()
    rows, runs = [], {"bare GEMMs": bare_gemms(p)}
    found = contestants(p)
    if absent := set(only or ()) - set(found):
        print(f"  not here: {', '.join(sorted(absent))}; there are {', '.join(found)}")
    for label, loss in found.items():
        if only and label not in only:
            continue
        try:
            step(p, loss)()  # compiles, and shows what does not run
            rows.append({"contestant": label, "error": errors(p, loss, truth)})
        except Exception as error:  # whatever a peer raises where it does not run; ours must
            if label in ("chunked", "fused"):
                raise
            torch.cuda.empty_cache()  # it may have been out of memory
            print(f"  {label}: does not run here: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
            continue
        runs[label] = step(p, loss)
    del truth
    runs["bare GEMMs"]()
    times: dict[str, list[float]] = {label: [] for label in runs}
    for i in range(rounds):
        order = list(runs)
        random.Random(i).shuffle(order)  # nobody always runs after the same one
        for label in order:
            times[label].append(timed(runs[label], device))
    floor = statistics.median(times["bare GEMMs"])
    about = {
        "shape": name,
        **SHAPES[name]._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "W": "frozen" if frozen else "trained",
        "loss": "TRACT" if scores else "CE",
        "bare_gemms_ms": floor,
        "bare_gemms_least_ms": min(times["bare GEMMs"]),
    }
    for row in rows:
        label = row["contestant"]
        median = statistics.median(times[label])
        row |= about | {
            "ms": median,
            "least_ms": min(times[label]),
            "most_ms": max(times[label]),
            "ratio": median / floor,
            "peak_extra_mib": peak_extra(runs[label], device),
        }
        wrong = "  ".join(f"{k} {e:.1e}" for k, e in row["error"].items())
        spread = f"({row['least_ms']:.2f} to {row['most_ms']:.2f})"
        print(
            f"  {label:26} {median:9.2f} ms {spread}  {row['ratio']:5.2f} x bare"
            f"  {row['peak_extra_mib']:7.0f} MiB  {wrong}",
            flush=True,
        )
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Ratios to the bare GEMMs, a panel a shape."""
    from matplotlib.figure import Figure

    panels = sorted({(r["shape"], r["W"], r["loss"]) for r in rows})
    figure = Figure(figsize=(10, 2.6 * len(panels)), layout="constrained")
    for axes, key in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        chosen = [r for r in rows if (r["shape"], r["W"], r["loss"]) == key]
        axes.barh([r["contestant"] for r in chosen], [r["ratio"] for r in chosen], color="#4c72b0")
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_title(", ".join(key), fontsize=9)
        axes.set_xlabel("time / bare GEMMs")
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help=f"default: all on CUDA, {', '.join(ON_CPU)}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants, such as chunked eager; default: all")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on CUDA and where the CPU multiplies it"
    )
    parser.add_argument("--rounds", type=int, default=7, help="times that each contestant is measured; 7")
    parser.add_argument("--minutes", type=float, default=6.5, help="on CUDA: start no shape after these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for loss.json, loss.png")
    args = parser.parse_args()
    if args.dtype is None:
        args.dtype = "float32" if perf.slow_bfloat16(torch.device(args.device)) else "bfloat16"
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    cuda = args.device == "cuda"
    about = {"device": doctor.describe_device(torch.device(args.device)), **doctor.versions(PEERS)}
    print(about)
    if absent := [name for name in PEERS if about[name] == "not installed"]:
        print(f"left out, not installed: {', '.join(absent)} (pip install --no-deps {' '.join(absent)})")
    rows = []
    names = args.shapes or (ON_CUDA if cuda else ON_CPU)
    # every shape once before the variants of any
    for (frozen, scores), name in itertools.product(itertools.product((False, True), (True, False)), names):
        kind = f"W {'frozen' if frozen else 'trained'}, {'TRACT' if scores else 'CE'}"
        if cuda and time.monotonic() - began > 60 * args.minutes:
            print(f"{name}, {kind}: left out, {args.minutes} minutes are over (--minutes)")
            continue
        print(f"{name}: {SHAPES[name]}, {args.dtype}, {kind}")
        rows += measure(
            name,
            args.device,
            getattr(torch, args.dtype),
            frozen=frozen,
            scores=scores,
            rounds=args.rounds,
            only=args.only,
        )
        (args.out / "loss.json").write_text(json.dumps({"versions": about, "rows": rows}, indent=1) + "\n")
    plot(rows, args.out / "loss.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

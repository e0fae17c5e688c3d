"""Training with a sampled gradient against exact training: the curves of runs that differ in gradient and seed.

    for seed in 1 2 3; do for gradient in exact sampled; do
      tract-fast train recipes/vicuna/full.yaml --data.eval HELD_OUT.jsonl --train.seed $seed \
        --loss.gradient $gradient --run.dir RUNS/$gradient-$seed
    done; done
    python -m benchmarks.sampled_training RUNS [--other NAME] [--out DIR]

Reads ``metrics.jsonl`` of every run in RUNS named so; ``--other int8``: of runs int8-1, int8-2, ... in place of
sampled-1, ... (with ``--loss.proposal int8`` besides). Prints the held-out measures at the end of each run, and how far
the two gradients of a seed lie apart beside how far seeds do; writes sampled-training.json and .png, or int8-training.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

Runs = dict[str, dict[str, list[dict[str, Any]]]]  # gradient -> seed -> lines of metrics.jsonl
MEASURES = ("ce", "pearson", "rmse")


def read(folder: Path, other: str) -> Runs:
    found: Runs = {"exact": {}, other: {}}
    for path in sorted(folder.glob("*-*/metrics.jsonl")):
        gradient, _, seed = path.parent.name.partition("-")
        if gradient in found:
            found[gradient][seed] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def steps(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if "loss" in line]


def held_out(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last evaluation of a run."""
    return [line for line in lines if "eval" in line][-1]["eval"]


def distance(a: list[dict], b: list[dict], key: str) -> float:
    """Mean absolute difference of two curves."""
    return statistics.fmean(abs(x - y) for x, y in zip(steps(a, key), steps(b, key), strict=True))


def compare(runs: Runs) -> dict[str, Any]:
    """Differences between gradients (of one seed) and between seeds (of one gradient), largest of each."""
    exact, other = runs.values()
    seeds = sorted(exact.keys() & other.keys())
    pairs = {
        "gradients": [(exact[s], other[s]) for s in seeds],
        "seeds": [(g[a], g[b]) for g in runs.values() for a, b in combinations(seeds, 2)],
    }
    found: dict[str, Any] = {}
    for name, both in pairs.items():
        found[name] = {f"held-out {m}": max(abs(held_out(a)[m] - held_out(b)[m]) for a, b in both) for m in MEASURES}
        found[name] |= {f"curve of {key}": max(distance(a, b, key) for a, b in both) for key in ("loss", "ce")}
    return found


def plot(runs: Runs, path: Path) -> None:
    """Cross-entropy by step; a colour a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (gradient, of), style in zip(runs.items(), ("-", "--"), strict=True):
        for i, (seed, lines) in enumerate(of.items()):
            axes.plot(steps(lines, "step"), steps(lines, "ce"), style, color=f"C{i}", label=f"{gradient}, seed {seed}")
    axes.set(xlabel="step", ylabel="cross-entropy of the step, nats per token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--other", default="sampled", help="what the runs that are not exact are named by")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.other == "exact":
        parser.error("--other exact: must name the runs that are held against the exact ones, such as sampled")
    runs = read(args.runs, args.other)
    last = {g: {seed: held_out(lines) for seed, lines in of.items()} for g, of in runs.items()}
    for gradient, of in last.items():
        for seed, found in of.items():
            print(gradient, seed, " ".join(f"{m} {found[m]:.4f}" for m in MEASURES))
    found = compare(runs)
    for name, row in found.items():
        print(f"between {name}, at most:", " ".join(f"{k} {v:.4f}" for k, v in row.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"held out": last, "differences": found, "metrics": runs}, indent=1)
    (args.out / f"{args.other}-training.json").write_text(text + "\n")
    plot(runs, args.out / f"{args.other}-training.png")


if __name__ == "__main__":
    main()

"""Where a training step's time goes: a table by part, forward and backward apart.

    python -m benchmarks.parts RECIPE [--steps N] [--out DIR] [--section.key value ...]
    python -m benchmarks.parts --model llama-3.2-1b [...]

torch.profiler records some steps of the recipe after two that warm up. Modules are marked by their kind while they
run; an operator of the backward pass belongs to the part whose forward call made its node (they have the same sequence
number). On a CPU an operator's time is its own processor-side time; on CUDA that of the kernels it launched. ``idle``
is what is left of the wall time: waiting, Python between operators, and on CUDA gaps between kernels. The profiler
itself costs time, mostly in Python: shares are of the profiled steps. With ``--model`` weights and tokens are random,
lengths real, and a step has four sequences, as in ``benchmarks.step``. Writes parts.json and parts.md, with ``--model``
named for it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import judgements
from tract_fast import doctor, recipe as recipes, shard, train
from tract_fast.errors import UserError
from tract_fast.launch import StopSignal
from tract_fast.prepare import prepare

MARK = "part::"
ATTENTION = ("scaled_dot_product", "_flash_attention", "_varlen", "flash_attn", "_efficient_attention")
PARTS = {  # what train_step and FSDP2 name themselves
    "step: data": "data",
    "step: clip": "clip",
    "step: optimizer": "optimizer",
    "FSDP::": "sharding",
}


def part_of_module(name: str, module: nn.Module, model) -> str | None:
    """The part that a module is, by what it is in the model; None: that of the one around it."""
    kind = type(module).__name__.lower()
    if module is model.head:
        return "head and loss"
    if module is model.lm.get_input_embeddings():
        return "embedding"
    if "norm" in kind:
        return "norm"
    if "rotary" in kind:
        return "RoPE and rest of attention"
    if name.endswith("mlp"):
        return "MLP"
    if name.endswith("self_attn"):
        return "RoPE and rest of attention"
    if isinstance(module, nn.Linear) and "self_attn" in name:
        return "attention projections"
    return None


def mark(model: nn.Module) -> None:
    """Have every module of a part record when it runs."""
    for name, module in model.named_modules():
        part = part_of_module(name, module, model)
        if part is None:
            continue
        open_marks: list[record_function] = []

        def enter(module, args, part=part, stack=open_marks) -> None:
            stack.append(record_function(MARK + part))
            stack[-1].__enter__()

        def leave(module, args, output, stack=open_marks) -> None:
            stack.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def attribute(events, device_type: str) -> dict[tuple[str, str], float]:
    """Seconds by (part, direction) of a profile's events."""
    by_sequence: dict[int, str] = {}
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    places: dict[int, tuple[str, str]] = {}

    def own_part(event) -> str | None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        if any(word in event.name for word in ATTENTION):
            return "attention"
        return next((part for start, part in PARTS.items() if event.name.startswith(start)), None)

    def place(event) -> tuple[str, str]:
        if id(event) not in places:
            above = place(event.cpu_parent) if event.cpu_parent else ("rest", "")
            direction = above[1]
            part = own_part(event)
            if event.name.startswith("autograd::engine::evaluate_function"):
                direction = "backward"
                part = part or by_sequence.get(event.sequence_nr)
            elif event.name.startswith("step: "):
                direction = event.name.removeprefix("step: ")
            places[id(event)] = (part or above[0], direction)
        return places[id(event)]

    ordered = sorted((e for e in events if e.device_type.name == "CPU"), key=lambda e: e.time_range.start)
    for event in ordered:
        part, direction = place(event)
        if event.sequence_nr >= 0 and direction == "forward":
            by_sequence[event.sequence_nr] = part
        own = event.self_device_time_total if device_type == "cuda" else event.self_cpu_time_total
        seconds[part, direction if direction in ("forward", "backward") else ""] += own / 1e6
    return seconds


def record(job: train.Job, steps: int) -> tuple[dict[tuple[str, str], float], float]:
    """(seconds by part and direction, wall seconds) of some steps after two."""
    device = job.ranks.device
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with StopSignal(loud=False) as stop:
        for step in range(2):
            train.train_step(job, step, stop)
        mark(job.model)
        with profile(activities=activities) as found:
            begin = time.perf_counter()
            for step in range(2, 2 + steps):
                train.train_step(job, step, stop)
            if device.type == "cuda":
                torch.cuda.synchronize()
            wall = time.perf_counter() - begin
    return attribute(found.events(), device.type), wall


def rows_of(seconds: dict[tuple[str, str], float], wall: float, steps: int) -> list[dict]:
    """A row a part, the largest first; ``idle`` and shares of the wall time."""
    rows = []
    for part in {part for part, _ in seconds}:
        forward, backward, other = (seconds.get((part, way), 0.0) / steps for way in ("forward", "backward", ""))
        rows.append({"part": part, "forward": forward, "backward": backward, "other": other})
    rows.append({"part": "idle", "forward": 0.0, "backward": 0.0, "other": (wall - sum(seconds.values())) / steps})
    for row in rows:
        row["seconds"] = row["forward"] + row["backward"] + row["other"]
        row["share"] = row["seconds"] * steps / wall
    return sorted(rows, key=lambda row: -row["seconds"])


def table(rows: list[dict]) -> str:
    lines = ["| part | forward s | backward s | other s | share |", "|---|---|---|---|---|"]
    for r in rows:
        numbers = " | ".join(f"{r[way]:.3f}" if r[way] else "-" for way in ("forward", "backward", "other"))
        lines.append(f"| {r['part']} | {numbers} | {r['share']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    try:
        run()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--model", choices=judgements.CONFIGS, help="random weights and tokens instead of a recipe")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args, settings = parser.parse_known_args()
    if args.steps < 1:
        raise SystemExit(f"--steps {args.steps}: must be 1 or more")
    if (args.recipe is None) is (args.model is None):
        raise SystemExit("give a recipe, or --model")
    given = None if args.model else recipes.load(args.recipe, settings)
    with tempfile.TemporaryDirectory() as scratch, shard.start_ranks() as ranks:
        if args.model:
            recipe, data = judgements.random_problem(args.model, Path(scratch), ranks.device, args.steps + 2)
        else:
            recipe = given
            data = prepare(recipe, lambda line: None)
        job = train.assemble(recipe, ranks, data, print)
        if job.total < args.steps + 2:
            raise SystemExit(f"--steps {args.steps} and two before: the recipe has {job.total} steps")
        seconds, wall = record(job, args.steps)
    rows = rows_of(seconds, wall, args.steps)
    about = {"device": doctor.describe_device(ranks.device), **doctor.versions(), "step_seconds": wall / args.steps}
    settings = recipes.as_dict(recipe)
    settings["data"]["train"] = Path(recipe.data.train).name  # where it lies says nothing to others
    about |= {"recipe": settings, "random": args.model is not None}
    name = f"parts-{args.model}" if args.model else "parts"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps({"versions": about, "rows": rows}, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(table(rows) + "\n")
    print(f"a step: {wall / args.steps:.3f} s")
    print(table(rows))


if __name__ == "__main__":
    main()

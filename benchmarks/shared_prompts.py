"""An optimizer step with shared prompts against one without: time and memory beside the tokens that are computed.

    python -m benchmarks.shared_prompts RECIPE [--data.train FILE] [--k 1 2 3] [--prompts N] [--rounds N] [--out DIR]

Some prompts of the data, each with its first k rationales, are one micro-batch: forward, backward, clipping and
AdamW, through FSDP2 as in training. Shared and unshared take turns; times are medians over rounds, peak memory is what
a step needs beyond what is resident before it. A share of 1 means that time falls as tokens do. Processor time is there
for a CPU that others use, too: with OMP_NUM_THREADS=1 it says what the step costs alone. Writes shared-prompts.json and
shared-prompts.png.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peak import PeakMemory
from tract_fast import doctor, recipe as recipes, shard, train
from tract_fast.data import batch as batches
from tract_fast.data.prompt import Encoded
from tract_fast.feed import normalizer_of
from tract_fast.prepare import prepare
from tract_fast.shard import Ranks


def families(examples: list[Encoded], most: int, prompts: int, seed: int) -> list[list[Encoded]]:
    """The first ``most`` examples of each of some prompts that have as many, prompts drawn at random."""
    members: dict[int, list[Encoded]] = {}
    for example, group in zip(examples, batches.prompt_groups(examples).of.tolist(), strict=True):
        members.setdefault(group, []).append(example)
    large = [found[:most] for found in members.values() if len(found) >= most]
    if len(large) < prompts:
        raise SystemExit(f"--prompts {prompts} --k {most}: the data have {len(large)} prompts with so many rationales")
    return random.Random(seed).sample(large, prompts)


def step(job: train.Job, examples: list[Encoded], shared: bool) -> tuple[float, float, int]:
    """(seconds, processor seconds, tokens computed) of one optimizer step on ``examples`` in one micro-batch."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    loss, device = job.recipe.loss, job.ranks.device
    norm = normalizer_of(loss, examples)
    batch = batches.collate(examples, norm, score_ce=loss.score_ce, share=job.sharing.share if shared else None).to(
        device
    )
    job.model(batch).loss.backward()
    trained = list(job.model.trainable().values())
    shard.clip_gradients(trained, 1.0, shard.gradient_norm(trained))
    job.optimizer.step()
    job.optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    return *seconds, batch.input_ids.shape[1]


def measure(job: train.Job, groups: list[list[Encoded]], k: int, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    examples = [e for group in groups for e in group[:k]]
    times: dict[bool, list[float]] = {False: [], True: []}
    cpu_times: dict[bool, list[float]] = {False: [], True: []}
    tokens, memory = {}, {}
    for number in range(rounds + 1):
        for share in (False, True) if number % 2 else (True, False):
            with PeakMemory(job.ranks.device) as peak:
                seconds, cpu_seconds, tokens[share] = step(job, examples, share)
            times[share].append(seconds)
            cpu_times[share].append(cpu_seconds)
            memory[share] = max(memory.get(share, 0), peak.above)
    seconds, cpu = ({share: statistics.median(t[1:]) for share, t in found.items()} for found in (times, cpu_times))
    row = {"k": k, "sequences": len(examples), "tokens_unshared": tokens[False], "tokens_shared": tokens[True]}
    row |= {"seconds_unshared": seconds[False], "seconds_shared": seconds[True]}
    row |= {"cpu_seconds_unshared": cpu[False], "cpu_seconds_shared": cpu[True]}
    row |= {"all_seconds": {"unshared": times[False][1:], "shared": times[True][1:]}}
    row |= {"peak_bytes_unshared": memory[False], "peak_bytes_shared": memory[True]}
    row["token_ratio"] = tokens[False] / tokens[True]
    row["time_ratio"] = seconds[False] / seconds[True]
    row["cpu_time_ratio"] = cpu[False] / cpu[True]
    row["memory_ratio"] = memory[False] / memory[True]
    row["share"] = row["time_ratio"] / row["token_ratio"]
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios of tokens, time and memory by k."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("token_ratio", "tokens"), ("time_ratio", "time of a step"), ("memory_ratio", "peak memory")):
        axes.plot([r["k"] for r in rows], [r[name] for r in rows], marker="o", label=label)
    axes.set(xlabel="rationales per prompt", ylabel="unshared / shared", xticks=[r["k"] for r in rows])
    axes.legend()
    figure.savefig(path, dpi=150)


def run(recipe: recipes.Recipe, ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    data = prepare(recipe)
    job = train.assemble(recipe, ranks, data, print)
    if job.sharing.share is None:
        raise SystemExit("nothing to measure: this recipe does not share prompts")
    groups = families(data.train, max(args.k), args.prompts, recipe.train.seed)
    rows = []
    for k in args.k:
        rows.append(measure(job, groups, k, args.rounds))
        r = rows[-1]
        print(
            f"k {k}: tokens {r['tokens_unshared']} -> {r['tokens_shared']} ({r['token_ratio']:.2f}x), "
            f"step {r['seconds_unshared']:.2f} s -> {r['seconds_shared']:.2f} s ({r['time_ratio']:.2f}x, "
            f"{r['share']:.0%} of the token ratio; processor {r['cpu_time_ratio']:.2f}x), "
            f"peak {r['peak_bytes_unshared'] / 2**20:.0f} MiB -> "
            f"{r['peak_bytes_shared'] / 2**20:.0f} MiB",
            flush=True,
        )
    about = {"device": doctor.describe_device(ranks.device), **doctor.versions(()), "dtype": recipe.model.dtype}
    about |= {"model": recipe.model.path, "lora_rank": recipe.lora.rank, "prompts": args.prompts, "rounds": args.rounds}
    about["threads"] = torch.get_num_threads()
    return {"versions": about, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, help="a recipe; its settings can follow, such as --model.dtype bfloat16")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3], help="rationales per prompt")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of a step")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each kind, after one to warm up")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args, settings = parser.parse_known_args()
    recipe = recipes.load(args.recipe, settings)
    recipe = replace(recipe, data=replace(recipe.data, share_prompts="auto"))
    with shard.start_ranks() as ranks:
        found = run(recipe, ranks, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "shared-prompts.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found["rows"], args.out / "shared-prompts.png")


if __name__ == "__main__":
    main()

"""The command ``plan``: what a run will need, before a machine is rented for it.

Memory comes from the training step itself, run without values (``trace``); times from what makers state of GPUs and
from shares of it that are assumed (``forecast``). Nothing is trained or written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from tract_fast import estimate, fitting, forecast, gpus, memory, trace
from tract_fast.errors import UserError
from tract_fast.estimate import Memory, StepPlan, Target
from tract_fast.forecast import Sizes
from tract_fast.gpus import GIB
from tract_fast.prepare import Prepared, prepare
from tract_fast.recipe import Recipe
from tract_fast.sharing import Sharing

MODES = ("none", "selective", "full")  # of train.activation_checkpointing, to compare


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all parts of the output are about."""

    recipe: Recipe
    data: Prepared
    target: Target
    sharing: Sharing
    step: StepPlan
    place: trace.Place
    sizes: Sizes
    mfu: float


def run(recipe: Recipe, *, gpu: str | None, count: int | None, mfu: float) -> int:
    """Print the plan of ``recipe`` on ``count`` GPUs called ``gpu``; None: as many as the recipe says, what is here.
    Raises UserError where a setting cannot work or the GPU is not known."""
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: must be a share of the peak, above 0 and at most 1, such as 0.4")
    if count is not None and count < 1:
        raise UserError(f"--gpus {count}: must be 1 or more")
    target = target_of(recipe, gpu, count)
    if target.world % recipe.shard.replicate:
        raise UserError(f"shard.replicate = {recipe.shard.replicate}: must divide the number of GPUs, {target.world}")
    console = Console(highlight=False, soft_wrap=True)
    for warning in recipe.warnings():
        console.print(f"warning: {warning}", markup=False)
    data = prepare(recipe, functools.partial(console.print, markup=False), None if target.here else target.device)
    made = plan_of(recipe, data, target, mfu)
    console.rule("plan")
    console.print(header(made), markup=False)
    counting = console.status("counting memory: steps without values")  # seconds to minutes; shown in a terminal
    with counting:
        found = estimate.memory(recipe, data, target, made.step, made.sharing)
    console.rule(f"memory of one rank at its peak: in the {found.moment}")
    console.print(estimate.memory_table(recipe, found, made.place.loss))
    if found.host:
        node = min(target.world, forecast.NODE)
        console.print(
            f"host memory (shard.cpu_offload): {found.host / GIB:.2f} GiB a rank, {node * found.host / GIB:.2f} GiB "
            f"for {node} on a node: weights, gradients and AdamW state; their pages are locked",
            markup=False,
        )
    with counting:
        for line in about_memory(made, found):
            console.print(line, markup=False)
    console.rule("time")
    for line in about_time(made):
        console.print(line, markup=False)
    return 0


def plan_of(recipe: Recipe, data: Prepared, target: Target, mfu: float) -> Plan:
    """Pack the steps of ``recipe`` and count its model."""
    sharing = estimate.sharing_of(recipe, data, target)
    place = estimate.place_of(recipe, data, target, sharing)
    return Plan(
        recipe=recipe,
        data=data,
        target=target,
        sharing=sharing,
        step=estimate.plan(recipe, data.train, target.world, sharing),
        place=place,
        sizes=forecast.sizes_of(trace.outline(recipe, data, place), recipe, data.config),
        mfu=mfu,
    )


def header(plan: Plan) -> str:
    """Machine, model and steps."""
    recipe, sizes, place = plan.recipe, plan.sizes, plan.place
    idle = plan.target.world - min(recipe.train.batch, len(plan.data.train))
    unused = f"\n{idle} of {plan.target.world} ranks have nothing to do: raise train.batch" if idle > 0 else ""
    return (
        f"{described(plan.target)}; attention {place.attention}, loss {place.loss}\n"
        f"{recipe.model.path}: {sizes.weights / 1e6:,.1f}M weights, {sizes.trained / 1e6:,.2f}M of them trained, "
        f"computed in {recipe.model.dtype}\n"
        f"{estimate.describe_steps(recipe, plan.data, plan.step)}\n{plan.sharing.line}{unused}"
    )


def target_of(recipe: Recipe, gpu: str | None, count: int | None) -> Target:
    """The machine that is asked for. Raises UserError for a GPU that is not known."""
    world = count or estimate.ranks_of(recipe)
    if gpu is None:
        return estimate.this_machine(world)
    return Target(device=torch.device("cuda"), world=world, gpu=gpus.called(gpu), here=False)


def described(target: Target) -> str:
    """What the plan is for."""
    if target.device.type == "cpu":
        ranks = f"{target.world} rank{'s' if target.world > 1 else ''}"
        return f"a CPU with {ranks}: no GPU is here; name one with --gpu, such as --gpu h100-80gb"
    name = target.gpu.name if target.gpu and target.gpu.name else "GPU of unknown kind (name one with --gpu)"
    return f"{target.world} x {name}{' (here)' if target.here else ''}"


def about_memory(plan: Plan, found: Memory) -> Iterator[str]:
    """The peak by checkpointing mode, whether it fits, the largest micro-batch, what would help."""
    recipe, data, target = plan.recipe, plan.data, plan.target
    peaks = {recipe.train.activation_checkpointing: found}
    for mode in MODES:
        if mode not in peaks:
            changed = replace(recipe, train=replace(recipe.train, activation_checkpointing=mode))
            peaks[mode] = estimate.memory(changed, data, target, plan.step, plan.sharing)
    told = ", ".join(f"{mode} {peak.total / GIB:.2f}" for mode, peak in peaks.items())
    yield f"in all by train.activation_checkpointing, GiB: {told}"
    limit = fitting.room(target)
    if limit is None:
        yield "not compared with a GPU: none is named or known"
        return
    fits = found.total <= limit
    yield f"{found.total / GIB:.2f} of {limit / GIB:.1f} GiB: {'fits' if fits else 'DOES NOT FIT'}"
    most, whole = fitting.largest(recipe, data, target, limit, found)
    if most is None:
        yield f"not even the longest example fits by itself (train.max_tokens {fitting.longest_of(data)})"
    else:
        rest = ", a rank's whole step in one micro-batch: more changes nothing" if whole else ""
        yield f"largest micro-batch that fits: train.max_tokens {most}{rest}"
    if not fits:
        yield memory.remedies(recipe, data, target, now=found, most=most)


def about_time(plan: Plan) -> Iterator[str]:
    """Arithmetic and communication of a step, and hours where a GPU's rates are stated."""
    recipe, sizes, gpu = plan.recipe, plan.sizes, plan.target.gpu
    sent = forecast.traffic(sizes, recipe, plan.target, plan.step)
    if sizes.work is None:
        yield "arithmetic is not known for this architecture, whose blocks hold weights outside of linear layers"
        return
    flops = forecast.flops_of(sizes.work, sizes.blocks, recipe, plan.step)
    yield (
        f"a step: {plan.step.tokens_per_step:,.0f} tokens, {flops.model / 1e12:,.2f} TFLOP of the model, "
        f"{flops.slowest / 1e12:,.2f} on the slowest rank with what is computed again; a rank receives "
        f"{sent.gathered / 2**20:,.0f} MiB of weights and {sent.reduced / 2**20:,.0f} MiB of gradients"
    )
    if gpu is None or not gpu.bandwidth:
        yield "no times: no rates are stated for this machine: name a GPU with --gpu"
    else:
        rates = forecast.Rates.of(gpu, recipe.run.peak_tflops, plan.mfu, dtype=recipe.model.dtype)
        yield from hours(plan, rates, flops, sent)


def duration(seconds: float) -> str:
    """In the unit that suits: 0.18 s, 4.5 min, 31 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{told(seconds / size)} {unit}"
    return f"{told(seconds)} s"


def told(number: float) -> str:
    """Two digits that count, and all before the point: 0.083, 4.5, 1,200."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def hours(plan: Plan, rates: forecast.Rates, flops: forecast.Flops, sent: forecast.Traffic) -> Iterator[str]:
    """A step, the stages, and what their times rest on."""
    recipe, sizes, world = plan.recipe, plan.sizes, plan.target.world
    ways = max(1, world // recipe.shard.replicate)
    each = forecast.step_time(sizes, flops, sent, rates, ways=ways, calls=plan.step.calls)
    yield (
        f"a step takes {each.total:.3f} s: arithmetic and launching it {each.compute:.3f}, meanwhile communication "
        f"{each.communication:.3f}, then the update {each.update:.3f}"
    )
    parts, notes = {f"stage 1, {plan.step.steps} steps": each.total * plan.step.steps}, []
    if recipe.stage2.train and recipe.data.rationale == "keep":
        made = forecast.generation(sizes, recipe, plan.data.train, rates)
        steps = forecast.second_stage_steps(recipe, len(plan.data.train))
        parts[f"generation, {made.rationales} rationales, {made.tokens:,} tokens"] = made.seconds
        parts[f"stage 2, {steps} steps"] = each.total * steps
        notes.append("generation is that of transformers, on one GPU; rationales as long as those in the data")
        if recipe.generate.backend != "auto":
            notes.append(f"generate.backend = {recipe.generate.backend} has other times")
    for name, seconds in {**parts, "in all": sum(parts.values())}.items():
        yield f"  {duration(seconds):>10}  {name}"
    yield f"{told(world * sum(parts.values()) / 3600)} GPU-hours, where all {world} are held throughout"
    yield f"assumed, not measured: {rates}"
    if world > forecast.NODE:
        notes.append(f"the link between nodes is slower than that of {forecast.NODE} GPUs, which is taken here")
    if recipe.shard.cpu_offload:
        notes.append("shard.cpu_offload: traffic with the host and AdamW there come on top")
    yield "; ".join([*notes, "not counted: loading, evaluations, checkpoints, compiling"])

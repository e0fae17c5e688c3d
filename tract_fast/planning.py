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

from tract_fast import estimate, forecast, gpus, memory, trace
from tract_fast.errors import UserError
from tract_fast.estimate import Memory, StepPlan, Target
from tract_fast.forecast import Sizes
from tract_fast.gpus import GIB
from tract_fast.prepare import Prepared, prepare
from tract_fast.recipe import Recipe
from tract_fast.sharing import Sharing

MULTIPLE = 256  # tokens that train.max_tokens is rounded down to
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
    found = estimate.memory(recipe, data, target, made.step, made.sharing)
    console.rule(f"memory of one rank at its peak: in the {found.moment}")
    console.print(estimate.memory_table(recipe, found, made.place.loss))
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


def room(target: Target) -> int | None:
    """Bytes of memory of one GPU; None where that is not known."""
    if target.device.type == "cuda" and target.here:
        return torch.cuda.get_device_properties(target.device).total_memory
    return int(target.gpu.memory) if target.gpu and target.gpu.memory else None


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
    limit = room(target)
    if limit is None:
        yield "not compared with a GPU: none is named or known"
        return
    fits = found.total <= limit
    yield f"{found.total / GIB:.2f} of {limit / GIB:.1f} GiB: {'fits' if fits else 'DOES NOT FIT'}"
    most, whole = largest(recipe, data, target, limit, found)
    if most is None:
        longest = max(len(e.ids) for e in [*data.train, *data.held_out])
        yield f"not even the longest example fits by itself (train.max_tokens {longest})"
    else:
        rest = ", a rank's whole step in one micro-batch: more changes nothing" if whole else ""
        yield f"largest micro-batch that fits: train.max_tokens {most}{rest}"
    if not fits:
        yield memory.remedies(recipe, data, target)


def largest(recipe: Recipe, data: Prepared, target: Target, limit: int, found: Memory) -> tuple[int | None, bool]:
    """(the largest train.max_tokens whose memory is at most ``limit``, whether a step has no more tokens than that).

    A multiple of MULTIPLE, or the longest example; None where that does not fit. ``found``: memory as the recipe is.
    """
    longest = max(len(e.ids) for e in [*data.train, *data.held_out])

    def fits(tokens: int) -> bool:
        if tokens == recipe.train.max_tokens:
            return found.total <= limit
        changed = replace(recipe, train=replace(recipe.train, max_tokens=tokens))
        return estimate.needed(changed, data, target).total <= limit

    low, high = -(-longest // MULTIPLE), -(-most_tokens(recipe, data, target) // MULTIPLE)
    high = max(low, high)
    if fits(high * MULTIPLE):
        return high * MULTIPLE, True
    if not fits(low * MULTIPLE):
        return (longest if fits(longest) else None), False
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * MULTIPLE) else (low, middle)
    return low * MULTIPLE, False


def most_tokens(recipe: Recipe, data: Prepared, target: Target) -> int:
    """Tokens of the fullest step of a rank, what is shared counted each time: with as many in a micro-batch, each rank
    has one."""
    whole = replace(recipe, train=replace(recipe.train, max_tokens=sum(len(e.ids) for e in data.train)))
    step = estimate.plan(whole, data.train, target.world, estimate.sharing_of(whole, data, target))
    return max(sum(len(e.ids) for e in micro.examples) for ranks in step.packed for rank in ranks for micro in rank)


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
    elif recipe.model.dtype != "bfloat16" and recipe.run.peak_tflops is None:
        yield (
            f"no times: stated rates are of bfloat16 and model.dtype is {recipe.model.dtype}: give --model.dtype "
            "bfloat16, or the device's in float32 with --run.peak_tflops"
        )
    else:
        yield from hours(plan, forecast.Rates.of(gpu, recipe.run.peak_tflops, plan.mfu), flops, sent)


def hours(plan: Plan, rates: forecast.Rates, flops: forecast.Flops, sent: forecast.Traffic) -> Iterator[str]:
    """Seconds of a step, hours of the stages, and what they rest on."""
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
        yield f"  {seconds / 3600:10.3f} h  {name}"
    yield f"{world * sum(parts.values()) / 3600:.3f} GPU-hours, where all {world} are held throughout"
    yield f"assumed, not measured: {rates}"
    if world > forecast.NODE:
        notes.append(f"the link between nodes is slower than that of {forecast.NODE} GPUs, which is taken here")
    if recipe.shard.cpu_offload:
        notes.append("shard.cpu_offload: traffic with the host and AdamW there come on top")
    yield "; ".join([*notes, "not counted: loading, evaluations, checkpoints, compiling"])

"""What a run would do, before it does it: the step plan, memory, and for ``--dry-run`` the recipe and one example.

Memory is that of tensors, counted by running the step without values (``trace``), and stated beside them what else a
process holds: assumptions for CUDA, and for a CPU what was measured. ``docs/plan.md`` holds it against measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tract_fast import gpus, optim, recipe as recipes, trace
from tract_fast.attention import DOCUMENTS
from tract_fast.data import batch as batches, prompt
from tract_fast.data.prompt import Encoded
from tract_fast.data.tree import Layout
from tract_fast.gpus import GIB, Gpu
from tract_fast.head import choose_loss
from tract_fast.ledger import ACTIVATIONS
from tract_fast.mimic import GATHERED, GRADIENTS, REDUCED
from tract_fast.model import DTYPES, choose_attention
from tract_fast.prepare import Prepared
from tract_fast.recipe import Recipe
from tract_fast.shard import local_device
from tract_fast.sharing import Sharing, choose_sharing, plan_step

CPU_PROCESS = 450 * 2**20  # Python, torch, transformers, tokenizer, data: measured
CPU_FRAGMENTATION = 1.2  # of the activations, held by malloc beside them: measured .9 to 1.6 (docs/plan.md)
CUDA_CONTEXT = 0.6 * GIB  # the driver's context and kernels: assumed
NCCL_BUFFERS = 0.5 * GIB  # with several ranks: assumed
CUDA_FRAGMENTATION = 0.05  # of the tensors, kept by the caching allocator beside them: assumed
NEAR = 0.99  # of the largest size of a micro-batch: another one is not traced for the rest
PLANNED_STEPS = 200  # at most this many steps are packed for the plan's averages
ORDER = (trace.WEIGHTS, trace.STATE, GRADIENTS, REDUCED, GATHERED, ACTIVATIONS, trace.LOSS, trace.BACKWARD, trace.REST)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The machine that a plan is for."""

    device: torch.device
    world: int
    gpu: Gpu | None
    """None: a CPU, or a GPU of which nothing is stated."""
    here: bool = True


def this_machine(world: int) -> Target:
    """What there is here, with ``world`` ranks."""
    device = local_device()
    gpu = gpus.recognised(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Target(device=device, world=world, gpu=gpu)


def ranks_of(recipe: Recipe) -> int:
    """Ranks that a recipe starts here."""
    return recipe.run.nproc if isinstance(recipe.run.nproc, int) else max(1, torch.cuda.device_count())


@dataclass(frozen=True)
class Micro:
    """One micro-batch."""

    examples: tuple[Encoded, ...]
    layout: Layout

    @property
    def rows(self) -> int:
        return sum(len(e.ids) - e.prompt_len for e in self.examples)

    def segments(self) -> tuple[list[int], list[int]]:
        """(queries, keys) of each."""
        return [end - start for _, start, end in self.layout.segments], [end for _, _, end in self.layout.segments]

    def keys(self) -> int:
        """Keys that are gathered for shared prompts."""
        return sum(map(len, self.layout.keys())) if self.layout.shares else 0

    def pairs(self) -> int:
        """Queries times keys: what attention with a mask holds."""
        return sum(q * k for q, k in zip(*self.segments(), strict=True))


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The run in numbers; those called ``max`` are of the largest micro-batch among the steps that were planned."""

    steps: int
    epochs: float
    ranks: int
    micro_batches: float  # per step and all ranks, on average
    tokens_per_step: float
    max_tokens: int
    max_rows: int
    max_keys: int  # keys that are gathered for shared prompts
    planned: int
    calls: float  # micro-batches of a rank in a step, on average; the same number on all ranks, some may be empty
    several: bool  # some rank has more than one micro-batch in a step
    packed: list[list[list[Micro]]] = field(repr=False)  # of each step that was planned: of each rank

    def largest(self, *, masked: bool = True) -> list[Micro]:
        """The micro-batches that may need the most memory: each size (tokens, rows, gathered keys, and with ``masked``
        attention pairs of query and key) is in one of them at most 1% below its largest."""
        every = [micro for step in self.packed for rank in step for micro in rank]
        sizes = [(m.layout.tokens, m.rows, m.keys(), *([m.pairs()] if masked else [])) for m in every]
        needed = [NEAR * max(size) for size in zip(*sizes, strict=True)]
        found, open_sizes = [], set(range(len(needed)))
        while open_sizes:  # one that is near the largest in several ways spares a trace for each
            reached = [{k for k in open_sizes if size[k] >= needed[k]} for size in sizes]
            best = max(range(len(every)), key=lambda i: (len(reached[i]), sizes[i]))
            found.append(every[best])
            open_sizes -= reached[best]
        return found


def plan(recipe: Recipe, examples: list[Encoded], world: int = 1, sharing: Sharing | None = None) -> StepPlan:
    """Pack the first steps as training would; ``sharing``: what it shares."""
    sharing = sharing or Sharing("")
    settings = recipe.train
    steps = batches.total_steps(
        len(examples), batch=settings.batch, epochs=settings.epochs, max_steps=settings.max_steps
    )
    packed = []
    for step in range(min(steps, PLANNED_STEPS)):
        members, ranks = plan_step(settings, examples, sharing, step, world)
        parts = [[tuple(members[i] for i in part) for part in rank if part] for rank in ranks]
        packed.append([[Micro(p, batches.layout_of(p, share=sharing.share)) for p in rank] for rank in parts])
    every = [micro for step in packed for rank in step for micro in rank]
    return StepPlan(
        steps=steps,
        ranks=world,
        epochs=steps / batches.steps_per_epoch(len(examples), settings.batch),
        micro_batches=len(every) / len(packed),
        tokens_per_step=sum(m.layout.tokens for m in every) / len(packed),
        max_tokens=max(m.layout.tokens for m in every),
        max_rows=max(m.rows for m in every),
        max_keys=max(m.keys() for m in every),
        planned=len(packed),
        calls=sum(max(map(len, step)) for step in packed) / len(packed),
        several=any(len(rank) > 1 for step in packed for rank in step),
        packed=packed,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment when there are most of them: of tensors by purpose, and of what is beside."""

    tensors: dict[str, int]
    moment: str
    beside: dict[str, int]
    host: int = 0
    """Of host memory, beside all of it, where weights, gradients and AdamW's state are there (shard.cpu_offload)."""

    @property
    def total(self) -> int:
        return sum(self.tensors.values()) + sum(self.beside.values())


def sharing_of(recipe: Recipe, data: Prepared, target: Target) -> Sharing:
    """What a run on ``target`` shares."""
    name, _ = choose_attention(recipe.model, data.config, target.device)
    return choose_sharing(recipe, data.config, name, data.train, target.world)


def place_of(recipe: Recipe, data: Prepared, target: Target, sharing: Sharing) -> trace.Place:
    """Where a run on ``target`` computes, and by what."""
    dtype = DTYPES[recipe.model.dtype]
    return trace.Place(
        device=target.device,
        attention=choose_attention(recipe.model, data.config, target.device)[0],
        loss=choose_loss(recipe.loss, dtype, target.device, data.config, here=target.here)[0],
        world=target.world,
        share=sharing.share,
    )


def memory(recipe: Recipe, data: Prepared, target: Target, step: StepPlan, sharing: Sharing) -> Memory:
    """What a rank needs in the steps of ``step``, from the second on."""
    place = place_of(recipe, data, target, sharing)
    micros = step.largest(masked=place.attention == DOCUMENTS)
    peaks = [trace.peak(recipe, data, m.examples, place, several=step.several) for m in micros]
    peak = max(peaks, key=lambda p: p.total)
    tensors = {name: peak.parts[name] for name in ORDER if peak.parts.get(name)}
    if target.device.type == "cpu":
        kept = int(CPU_FRAGMENTATION * tensors.get(ACTIVATIONS, 0))
        return Memory(tensors, peak.moment, {"the process (CPU)": CPU_PROCESS, "held by the allocator (CPU)": kept})
    beside = {
        "CUDA's context and kernels (assumed)": CUDA_CONTEXT,
        "NCCL's buffers (assumed)": NCCL_BUFFERS if target.world > 1 else 0,
        f"kept by the allocator ({CUDA_FRAGMENTATION:.0%}, assumed)": CUDA_FRAGMENTATION * peak.total,
    }
    return Memory(tensors, peak.moment, {name: int(size) for name, size in beside.items() if size}, peak.host)


def needed(recipe: Recipe, data: Prepared, target: Target) -> Memory:
    """What a run of ``recipe`` needs on a rank of ``target``."""
    sharing = sharing_of(recipe, data, target)
    return memory(recipe, data, target, plan(recipe, data.train, target.world, sharing), sharing)


def memory_table(recipe: Recipe, found: Memory, loss: str) -> Table:
    """The purposes, a line each."""
    table = Table("what", "MiB", box=None)
    about = {
        ACTIVATIONS: f"{ACTIVATIONS} (train.activation_checkpointing {recipe.train.activation_checkpointing})",
        trace.LOSS: f"{trace.LOSS} ({loss}): logits and gradients",
        GATHERED: f"{GATHERED} in {recipe.model.dtype}",
    }
    tensors = sum(found.tensors.values())
    rows = {about.get(name, name): size for name, size in found.tensors.items()} | {"tensors at the peak": tensors}
    for name, size in {**rows, **found.beside, "in all": found.total}.items():
        table.add_row(name, f"{size / 2**20:,.0f}")
    return table


def describe_steps(recipe: Recipe, data: Prepared, step: StepPlan) -> str:
    """A line on what a step computes."""
    sequences = min(recipe.train.batch, len(data.train))
    return (
        f"{step.steps} steps = {step.epochs:.2f} epochs of {len(data.train)} examples; {sequences} sequences, "
        f"{step.tokens_per_step:.0f} tokens and {step.micro_batches:.1f} micro-batches a step over "
        f"{step.ranks} rank{'s' if step.ranks > 1 else ''} (first {step.planned} steps packed)"
    )


def show(recipe: Recipe, data: Prepared, start: Path | None) -> None:
    """Print all of it; nothing is trained or written. ``start`` is the checkpoint that the run would go on from."""
    console = Console(highlight=False, soft_wrap=True)
    console.rule("recipe")
    console.print(recipes.dump(recipe), markup=False)
    target = this_machine(ranks_of(recipe))
    name, reason = choose_attention(recipe.model, data.config, target.device)
    sharing = sharing_of(recipe, data, target)
    step = plan(recipe, data.train, target.world, sharing)
    console.rule("plan")
    first, last = (optim.learning_rate(s, step.steps, recipe.train) for s in (0, step.steps - 1))
    loss, why = choose_loss(recipe.loss, DTYPES[recipe.model.dtype], target.device, data.config)
    console.print(
        f"{describe_steps(recipe, data, step)}\n"
        f"lr {first:.2e} at first, {recipe.train.lr:.2e} at its peak, {last:.2e} at last; "
        f"{len(data.held_out)} held-out examples; {len(data.left_out)} records left out\n"
        f"{sharing.line}\n"
        f"device {target.device}; attention {name} ({reason}); loss {loss} ({why})\n"
        f"{recipe.run.dir}: {f'goes on from {start.name}' if start else 'a new run'}",
        markup=False,
    )
    try:
        found = memory(recipe, data, target, step, sharing)
    except trace.Untraceable as error:
        console.print(str(error), markup=False)
    else:
        console.rule(f"memory (estimate, one rank of {target.world}), most in the {found.moment}")
        console.print(memory_table(recipe, found, loss))
    console.rule(Text(f"one example: {data.train[0].id}"))
    console.print(prompt.show(data.tokenizer, data.scale, data.train[0]))

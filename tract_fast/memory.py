"""Memory that has run out: what was held, and what would help, with numbers; and what CUDA's allocator did."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tract_fast import estimate, fitting, perf, resume
from tract_fast.errors import RunStopped
from tract_fast.estimate import Memory, Target
from tract_fast.gpus import GIB
from tract_fast.prepare import Prepared
from tract_fast.recipe import Recipe
from tract_fast.trace import Untraceable


def ran_out(error: BaseException) -> bool:
    """Whether an error is that of memory: CUDA's allocator, PyTorch's on a CPU, or Python's."""
    told = str(error)
    texts = ("can't allocate memory", "Cannot allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    no_memory = any(text in told for text in texts)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and no_memory)


@contextlib.contextmanager
def watched(recipe: Recipe, data: Prepared, world: int, model: nn.Module, optimizer, doing: str) -> Iterator[None]:
    """Raise RunStopped where memory runs out inside, with what was held and the settings that would help, in order."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        asked = " ".join(str(error).split())[:160]
        held = ", ".join(f"{what} {size / GIB:.2f} GiB" for what, size in holdings(model, optimizer).items())
        told = [f"out of memory {doing} ({asked}); held: {held}"]
        told += [write_snapshot(Path(recipe.run.dir))] if recipe.run.memory_snapshot else []
        print(f"{'; '.join(told)}; looking for what would help", file=sys.stderr, flush=True)
        traceback.clear_frames(error.__traceback__)  # what the step held is not needed to look for it
        raise RunStopped("; ".join([*told, advice(recipe, data, world)])) from error


def advice(recipe: Recipe, data: Prepared, world: int) -> str:
    """``remedies`` of a run that has used up its memory; tracing a step for each takes a while for a large model."""
    try:
        return remedies(recipe, data, estimate.this_machine(world))
    except Untraceable as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return "no memory is left to find what would help: tract-fast plan tells it"


def holdings(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Bytes on this rank by purpose; of a CUDA device also all that is allocated, of a CPU what the process has had."""
    parameters = list(model.parameters())
    states = optimizer.state.values() if optimizer else ()
    found = {
        "weights": _bytes(parameters),
        "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
        "AdamW state": _bytes(v for state in states for v in state.values() if isinstance(v, Tensor)),
    }
    if torch.cuda.is_available():
        on_device = sum(found.values()) if all(p.is_cuda for p in parameters) else 0  # else offloaded
        found["activations and the rest"] = torch.cuda.memory_allocated() - on_device
        found["kept by the allocator"] = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    else:
        found["the process at its peak"] = perf.peak_memory(torch.device("cpu"))
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def remedies(recipe: Recipe, data: Prepared, target: Target, now: Memory | None = None, most: int | None = None) -> str:
    """The settings that lower the estimate, each with what it saves and, where the GPU's memory is known, whether the
    run then fits: those first that leave the result as it is, which a run that has a checkpoint can go on with.

    ``now``: the estimate as it is, and ``most``: the largest train.max_tokens that fits, where they are at hand.
    """
    now = (now or estimate.needed(recipe, data, target)).total
    limit = fitting.room(target)
    same, other = [], []
    for setting, changed, ranks in changes(recipe, fitting.longest_of(data), target):
        then = estimate.needed(changed, data, replace(target, world=ranks)).total
        if changed.train.max_tokens != recipe.train.max_tokens and limit is not None:
            tokens = most or fitting.between(recipe, data, target, limit, now, then)
            if changed.train.max_tokens < tokens < recipe.train.max_tokens:
                changed = fitting.with_tokens(recipe, tokens)
                setting, then = f"train.max_tokens {tokens}", estimate.needed(changed, data, target).total
        if now - then <= 0.01 * now:
            continue
        told = f"about {(now - then) / GIB:.2f} of {now / GIB:.2f} GiB less"
        if limit is not None:
            told += ", fits" if then <= limit else f", still {(then - limit) / GIB:.2f} GiB too much"
        if resume.refused(recipe, changed):
            other.append(f"{setting} ({told}; another result: in another run.dir)")
        else:
            same.append(f"{setting} ({told})")
    lines = ", ".join(same + other)
    return f"what would help, in this order: {lines}" if lines else "no setting would help much: a larger GPU"


def changes(recipe: Recipe, longest: int, target: Target) -> Iterator[tuple[str, Recipe, int]]:
    """(setting to write, the recipe with it, ranks): what to try, in order."""
    train, split, world = recipe.train, recipe.shard, target.world

    def changed(section: str, **values) -> Recipe:
        return replace(recipe, **{section: replace(getattr(recipe, section), **values)})

    if train.activation_checkpointing == "none":  # costs little time, and saves half of what the next one does
        selective = changed("train", activation_checkpointing="selective")
        yield "train.activation_checkpointing selective", selective, world
    if train.activation_checkpointing != "full":
        yield "train.activation_checkpointing full", changed("train", activation_checkpointing="full"), world
    if train.max_tokens > longest:
        yield f"train.max_tokens {longest}", changed("train", max_tokens=longest), world
    if recipe.loss.implementation == "reference":
        yield "loss.implementation auto", changed("loss", implementation="auto"), world
    if not split.reshard_after_forward and world > 1:
        yield "shard.reshard_after_forward true", changed("shard", reshard_after_forward=True), world
    if split.replicate > 1:
        yield "shard.replicate 1", changed("shard", replicate=1), world
    yield f"{2 * world} ranks (run.nproc, or more nodes)", recipe, 2 * world
    if not split.cpu_offload and target.device.type == "cuda":
        yield "shard.cpu_offload true", changed("shard", cpu_offload=True), world
    if recipe.data.share_prompts != "off":  # of what is shared, keys and values are gathered for each sequence
        yield "data.share_prompts off", changed("data", share_prompts="off"), world
    if recipe.lora.rank == 0:
        yield "lora.rank 8 (adapters instead of all weights)", changed("lora", rank=8), world


@contextlib.contextmanager
def recorded(asked: bool, device: torch.device, folder: Path) -> Iterator[None]:
    """Record every allocation on a CUDA device (``run.memory_snapshot``) and write them at the end."""
    if not asked or device.type != "cuda":
        if asked:
            print("run.memory_snapshot: nothing is recorded, the allocations of a CPU are not kept by PyTorch")
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=200_000)  # PyTorch documents it under this name
    try:
        yield
        print(write_snapshot(folder))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def write_snapshot(folder: Path) -> str:
    """Write what ``recorded`` has kept, for pytorch.org/memory_viz; returns a line that says where."""
    if not torch.cuda.is_available():
        return "no memory snapshot: this is a CPU"
    path = folder / f"memory_{torch.cuda.current_device()}.pickle"
    torch.cuda.memory._dump_snapshot(str(path))
    return f"memory snapshot: {path}"

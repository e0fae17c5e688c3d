"""Work for two ranks: functions that a test gives to both at once, in one pair of processes for all of them."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor

from tract_fast import checkpoint, model, optim, shard, train
from tract_fast.data import batch as batches
from tract_fast.errors import UserError
from tract_fast.launch import Joined
from tract_fast.prepare import prepare
from tract_fast.recipe import Recipe

WORLD = 2


@dataclass(frozen=True)
class Task:
    """``work(*arguments, **options, joined)`` on both ranks; its error, as text, is found under ``name``."""

    name: str
    work: Callable
    arguments: tuple
    options: dict = field(default_factory=dict)


def on_two_ranks(tasks: Sequence[Task], folder: Path) -> dict[str, str]:
    """Do all tasks in two processes; returns the traceback by name of those that failed."""
    mp.spawn(_rank, (tasks, folder), nprocs=WORLD)
    return {task.name: text for task in tasks if (text := _failure(folder, task.name))}


def _failure(folder: Path, name: str) -> str:
    files = [folder / f"{name}.{rank}.error" for rank in range(WORLD)]
    return "\n".join(file.read_text() for file in files if file.exists())


def _rank(rank: int, tasks: Sequence[Task], folder: Path) -> None:
    torch.set_num_threads(1)
    for task in tasks:
        port = _agreed_port(rank, folder / f"{task.name}.port")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
        try:
            task.work(*task.arguments, **task.options, joined=Joined(rank, rank, WORLD, "test"))
        except Exception:  # of any kind: the test that reads the file fails with it, and other tasks still run
            (folder / f"{task.name}.{rank}.error").write_text(traceback.format_exc())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _agreed_port(rank: int, file: Path) -> int:
    """A free port, looked for just before it is used: of those found minutes before, others take some."""
    if rank == 0:
        file.with_suffix(".new").write_text(str(free_port()))
        file.with_suffix(".new").rename(file)
    until = time.monotonic() + 300
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return int(file.read_text())


def trained_steps(recipe: Recipe, file: Path, steps: int = 4, *, joined: Joined | None = None) -> None:
    """Losses, first gradients and final weights of some optimizer steps, as the loop takes them, into a file."""
    with shard.start_ranks(joined, replicate=recipe.shard.replicate if joined else 1) as ranks:
        job = train.assemble(recipe, ranks, prepare(recipe, lambda text: None), lambda text: None)
        found: dict[str, Tensor] = {}
        real, norms = optim.torch.optim.AdamW.step, []

        def step(optimizer, *rest, **options):
            if not norms:
                found.update({f"grad.{n}": p.grad.full_tensor().cpu() for n, p in job.model.trainable().items()})
            return real(optimizer, *rest, **options)

        job.optimizer.step = step.__get__(job.optimizer)
        for i in range(steps):
            with train.StopSignal() as stop:
                record = train.train_step(job, i, stop)
            norms.append([record[key] for key in ("loss", "ce", "mse", "score_mass", "grad_norm")])
        weights = {f"weight.{n}": p.full_tensor().detach().cpu() for n, p in job.model.trainable().items()}
        if ranks.is_main:
            found |= weights | {"records": torch.tensor(norms, dtype=torch.float64)}
            save_file({name: value.clone().contiguous() for name, value in found.items()}, file)


def run(recipe: Recipe, *, joined: Joined | None = None) -> None:
    """A whole training run."""
    assert train.run(recipe, joined=joined) == 0


def run_apart(*recipes: Recipe, joined: Joined) -> None:
    """A run whose ranks have folders of their own must be refused on all of them."""
    with pytest.raises(UserError, match=r"run.dir = .* is not the same folder on all nodes \(1 of 2 ranks"):
        train.run(recipes[joined.rank], joined=joined)


def run_unlike(*recipes: Recipe, told: str, joined: Joined) -> None:
    """A run whose ranks were given different things must be refused on all of them, with the difference."""
    with pytest.raises(UserError, match=rf"rank 1 \(on .*\) would train something else than rank 0 .*: {told}"):
        train.run(recipes[joined.rank], joined=joined)


def start_of_main(run_dir: Path, *, joined: Joined) -> None:
    """A rank whose node does not see the newest checkpoint yet goes on from it all the same."""
    found = checkpoint.latest(run_dir)
    with shard.start_ranks(joined) as ranks:
        assert train.agreed(found if ranks.is_main else None, run_dir, ranks) == found
        assert train.agreed(None if ranks.is_main else found, run_dir, ranks) is None


def files_of_main(recipe: Recipe, *, joined: Joined) -> None:
    """Where one rank has no safetensors files, or a damaged one, it is so for all."""
    real, lines = model.weight_files, []
    with shard.start_ranks(joined) as ranks:
        data = prepare(recipe, lambda text: None)

        def build(files: list[Path] | None) -> None:
            model.weight_files = lambda settings: real(settings) if ranks.is_main else files
            model.build(recipe, data.config, data.tokenizer, data.scale, ranks.device, lines.append)

        try:
            build(None)
            assert "weights: rank 0 reads the whole model (rank 1: there are no safetensors files)" in lines
            damaged = Path(recipe.run.dir + ".safetensors")
            damaged.write_bytes(b"torn")
            with pytest.raises(UserError, match=r"rank 1: .* is damaged or cut short"):
                build([damaged])
        finally:
            model.weight_files = real


def scoreless_gradients(recipe: Recipe, file: Path, *, joined: Joined | None = None) -> None:
    """Gradients of a step whose second half has rows and no score: the other rank's, or the second micro-batch."""
    with shard.start_ranks(joined) as ranks:
        data = prepare(recipe, lambda text: None)
        job = train.assemble(recipe, ranks, data, lambda text: None)
        norm = batches.normalizer(
            data.train[:4], ce_weight=1.0, regression_weight=1.0, score_ce=True, ce_reduction="token"
        )
        scored, bare = (batches.collate(part, norm, score_ce=True) for part in (data.train[:2], data.train[2:4]))
        empty = {name: getattr(bare, name)[:0] for name in ("score_rows", "score_targets", "score_weights")}
        parts = [scored, replace(bare, **empty)]
        for part in parts if joined is None else parts[joined.rank : joined.rank + 1]:
            job.model(part).loss.backward()
        found = {n: p.grad.full_tensor() for n, p in job.model.trainable().items()}
        if ranks.is_main:
            save_file(found, file)

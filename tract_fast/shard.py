"""Ranks, the mesh, and FSDP2: one code path from one process to many.

A single process is a mesh of one. Losses are divided by global counts before backward, so gradients are summed over
ranks, never averaged: the divide factor is 1 and the reduction is forced to be a plain sum (gloo has no scaled sum, and
NCCL's returned zeros for bfloat16 up to torch 2.13, pytorch#190745).
"""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tract_fast.errors import PeerLost, UserError
from tract_fast.launch import Joined
from tract_fast.model import TractModel
from tract_fast.sections import Shard

LINGER = 5.0  # seconds that a rank stays when it has lost another, so that its launcher sees that one first


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh  # ("shard",), or ("replicate", "shard")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def local_device(local_rank: int = 0) -> torch.device:
    """The device of this process: its own CUDA device if there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def start_ranks(joined: Joined | None = None, *, replicate: int = 1, timeout: int = 1800) -> Iterator[Ranks]:
    """Join the ranks that a launcher started, or with None make a group of one; left at the end.

    ``replicate`` and ``timeout`` are ``shard.replicate`` and ``run.timeout``. Raises UserError where the ranks cannot
    be split so, or a node has more ranks than GPUs.
    """
    # where each task of a node is given one GPU, that is number 0 for all of them
    device = local_device(joined.local_rank if joined and torch.cuda.device_count() > 1 else 0)
    cuda = device.type == "cuda"
    if cuda and device.index < torch.cuda.device_count():
        torch.cuda.set_device(device)
    store, rank, world = dist.HashStore(), 0, 1
    wait = timedelta(seconds=timeout)
    if joined:
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        # torchrun hands ranks that it starts again the same store, in which the addresses of the dead ones still stand
        store = dist.PrefixStore(name_of_start(store, rank, world, timeout), store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    try:
        check_devices(device, rank, world)
        yield Ranks(rank, world, device, make_mesh(device, world, replicate))
    except PeerLost:
        raise  # leaving in order would wait for who is gone
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.barrier()
        dist.destroy_process_group()


def check_devices(device: torch.device, rank: int, world: int) -> None:
    """Raise UserError, on every rank, where two ranks would have one GPU, or one has none."""
    if device.type != "cuda" or world == 1:
        return
    there = device.index < torch.cuda.device_count()
    mine = (rank, socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid) if there else None)
    found: list[Any] = [None] * world
    dist.all_gather_object(found, mine)
    refuse_shared(found)


def refuse_shared(devices: Iterable[tuple[int, str, str | None]]) -> None:
    """Raise UserError where (rank, host, GPU or None) say that ranks of a host are more than its GPUs."""
    owners: dict[tuple[str, str], int] = {}
    for rank, host, gpu in devices:
        if gpu is None or (host, gpu) in owners:
            why = "no GPU is left" if gpu is None else f"the GPU is that of rank {owners[host, gpu]}"
            raise UserError(f"run.nproc: for rank {rank} on {host} {why}: start one rank a GPU")
        owners[host, gpu] = rank


def name_of_start(store: dist.Store, rank: int, world: int, timeout: float) -> str:
    """A name that all ranks of this start know and no earlier start had; rank 0 makes it.

    torchrun's count of restarts is none: a node does not count those that another node's failure caused. What an
    earlier start left in ``store`` is told apart by each rank's own word, which only its own start can hold. Raises
    DistStoreError where the ranks do not meet within ``timeout`` seconds.
    """
    own = uuid.uuid4().hex
    until = time.monotonic() + timeout
    if rank == 0:
        store.set("start", own)
        words = [f"{own}/{other}" for other in range(1, world)]
        if words:
            store.wait(words, timedelta(seconds=timeout))
        store.set(f"{own}/met", " ".join(store.get(word).decode() for word in words))
        return own
    while time.monotonic() < until:
        name = store.get("start").decode()
        store.set(f"{name}/{rank}", own)
        met = f"{name}/met"
        if store.check([met]) and own in store.get(met).decode().split():
            return name
        time.sleep(0.05)
    raise dist.DistStoreError(f"rank {rank} has not met rank 0 within {timeout} s")


def make_mesh(device: torch.device, world: int, replicate: int) -> DeviceMesh:
    """All ranks in one dimension, or ``replicate`` groups of neighbours. Raises UserError where they are not even."""
    if world % replicate:
        raise UserError(f"shard.replicate = {replicate}: must divide the number of ranks, {world}")
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, world // replicate), mesh_dim_names=("replicate", "shard"))


@contextlib.contextmanager
def peers_watched(ranks: Ranks) -> Iterator[None]:
    """Raise PeerLost where a call inside fails because another rank has ended or not answered for ``run.timeout``."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
            raise
        reason = " ".join(str(error).split())[-200:]
        time.sleep(LINGER)
        hangs = "timed out" in reason.lower()
        raise PeerLost(f"another rank {'does not answer' if hangs else 'has ended'}: {reason}", hangs=hangs) from error


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise UserError where the ranks do not see one ``run.dir``: checkpoints would be torn apart."""
    mark = torch.tensor([uuid.uuid4().int & (2**62 - 1)])
    dist.broadcast(mark, 0)
    token = folder / f".shared_{mark.item()}"  # its name is all: a full disk is told of by another check
    if ranks.is_main:
        token.touch()
    dist.barrier()
    seen = torch.tensor([float(token.is_file())])
    dist.all_reduce(seen)
    if ranks.is_main:
        token.unlink()
    if int(seen.item()) != ranks.world:
        raise UserError(
            f"run.dir = {folder} is not the same folder on all nodes ({int(seen.item())} of {ranks.world} ranks see "
            "what rank 0 writes): choose one on a file system that they share"
        )


@dataclass(frozen=True)
class Unit:
    """Modules whose weights are gathered and whose gradients are reduced together."""

    name: str
    modules: list[nn.Module]
    resharded: bool | None  # after forward; None: FSDP2's choice for the root, which keeps its weights
    in_backward: bool = True  # whether backward needs the weights


def units(model: TractModel, settings: Shard) -> list[Unit]:
    """What is sharded together: each block, the embedding, [norm, head] (all three if that is tied), the rest."""
    each = settings.reshard_after_forward
    count = len(model.blocks)
    found = [Unit(f"block {i} of {count}", [block], each) for i, block in enumerate(model.blocks, 1)]
    embedding = model.lm.get_input_embeddings()
    tail = [m for m in model.backbone.children() if "norm" in type(m).__name__.lower()] + [model.head]
    if model.head.weight is embedding.weight:
        tail.insert(0, embedding)
    else:
        found.append(Unit("the embedding", [embedding], each, in_backward=False))  # its gradient needs the tokens alone
    # the tail is last in forward and first in backward
    return [*found, Unit("the loss", tail, False), Unit("the rest", [model], None)]


def shard(model: TractModel, mesh: DeviceMesh, compute_dtype: torch.dtype, settings: Shard) -> None:
    """Shard ``model`` in place by its ``units``.

    Weights are gathered in ``compute_dtype``, gradients reduced in float32. Forward inputs are not cast: score targets
    and row weights must reach the head in float32. On a mesh of two dimensions the first holds replicas.
    """
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    pin = mesh.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pin) if settings.cpu_offload else OffloadPolicy()
    options = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    for unit in units(model, settings):
        modules = unit.modules if len(unit.modules) > 1 else unit.modules[0]
        fully_shard(modules, **options, reshard_after_forward=unit.resharded)
        if not unit.in_backward:
            unit.modules[0].set_unshard_in_backward(False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            if mesh.size() > 1:
                module.set_gradient_divide_factor(1.0)  # one rank has that without, and no copy that is divided by 1
            elif mesh.device_type == "cpu":
                module.set_custom_reduce_scatter(OfOneRank())


class OfOneRank:
    """The reduce-scatter of a mesh of one: FSDP2 asks for a buffer that gradients go into, then for one that they come
    out of, and copies the first to the second. Here both are one, and a copy to itself is nothing.

    For CPUs: on CUDA the second buffer is of the stream of the reduction, which may read it after the first one, of the
    stream of the computation, would have been given to somebody else.
    """

    def __init__(self) -> None:
        self.given: weakref.ref[Tensor] | None = None  # dead where the second call never came

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        given, self.given = self.given and self.given(), None
        if given is None:
            given = torch.empty(*size, dtype=dtype, device=device)
            self.given = weakref.ref(given)
        return given

    def __call__(self, *args: Any, **options: Any) -> None:
        raise AssertionError("a mesh of one rank has nothing to reduce")


def reshard(model: TractModel) -> None:
    """Put back the shards after a forward pass that no backward follows.

    The tail stays gathered after its forward; until it is resharded the model's parameters are copies in the compute
    dtype, which the optimizer does not know and a checkpoint must not hold.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    dist.all_reduce(values)
    return values


def all_largest(values: Tensor) -> Tensor:
    """Maximum over ranks, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global L2 norm of all gradients, a () float32 tensor; call on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients so that their global norm is at most ``max_norm``; ``norm`` from ``gradient_norm``."""
    torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)

"""Ranks, the mesh, and FSDP2: one code path from one process to many.

A single process is a mesh of one. Losses are divided by global counts before backward, so gradients are summed over
ranks, never averaged: the divide factor is 1 and the reduction is forced to be a plain sum (gloo has no scaled sum, and
NCCL's returned zeros for bfloat16 up to torch 2.13, pytorch#190745).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tract_fast.model import TractModel


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def local_device() -> torch.device:
    """The device of this process: its own CUDA device if there is one, else the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


@contextlib.contextmanager
def start_ranks() -> Iterator[Ranks]:
    """Join the process group of ``torchrun`` if there is one, else make a group of one; left at the end."""
    device = local_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = dist.get_world_size()
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        yield Ranks(dist.get_rank(), world, device, mesh)
    finally:
        dist.destroy_process_group()


def shard(model: TractModel, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard ``model`` in place: each block, the embedding, [norm, head] (with a tied embedding: all three), the rest.

    Weights are gathered in ``compute_dtype``, gradients reduced in float32. Forward inputs are not cast: score targets
    and row weights must reach the head in float32.
    """
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": precision}
    for block in model.blocks:
        fully_shard(block, **options)
    embedding = model.lm.get_input_embeddings()
    tail = [m for m in model.backbone.children() if "norm" in type(m).__name__.lower()] + [model.head]
    if model.head.weight is embedding.weight:
        tail.insert(0, embedding)
    else:
        fully_shard(embedding, **options)
    fully_shard(tail, **options, reshard_after_forward=False)  # last in forward, first in backward
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


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


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global L2 norm of all gradients, a () float32 tensor; call on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients so that their global norm is at most ``max_norm``; ``norm`` from ``gradient_norm``."""
    torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)

"""FSDP2's memory, entered into a ledger while a model on meta tensors runs: FSDP2 itself refuses meta tensors.

The hooks stand where FSDP2's do and do to the ledger what its do to memory (torch 2.13, ``_fsdp_param_group.py``):
gather a unit before its forward and backward, put it back after, reduce gradients once those of its inputs are there.
``tests/test_trace.py`` holds it against FSDP2's own allocations, with one rank and with several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tract_fast.ledger import Ledger
from tract_fast.shard import Unit

GATHERED, REDUCED = "weights gathered", "gradients on their way"
GRADIENTS = "gradients (float32)"


@dataclass
class Split:
    """How parameters are split over ranks."""

    ways: int  # that each parameter is split; the rest of the ranks hold replicas
    width: int  # bytes of a gathered weight
    host: bool  # parameters and their gradients are in host memory
    before: bool  # micro-batches came before the one that is looked at, the last of a step
    whole: bool  # their gradients are summed whole and reduced after the last one (LoRA)
    alone: bool  # one rank on a CPU, whose reduction has one buffer (shard.OfOneRank)
    replicated: bool  # on several ranks

    def shard(self, p: Tensor) -> int:
        """Elements of the first rank, which holds the most: dimension 0 is cut into equal parts, the last padded."""
        return -(-p.shape[0] // self.ways) * p[0].numel()


@dataclass(eq=False)
class Gathered:
    """A unit while the model runs."""

    unit: Unit
    params: list[nn.Parameter]
    here: bool = False  # its weights, whole
    coming: bool = False  # they are gathered, and not yet copied to where they are used
    begun: bool = False  # its backward
    done: bool = False  # its gradients are on their way
    place: int = -1  # in the order of forward
    to_run: set[nn.Module] = field(default_factory=set)  # of its modules, in this forward


class Mimic:
    """Puts the hooks on the modules of ``units``, for one forward and backward; call ``finish`` after that. ``stored``:
    bytes of an element of each parameter where it is stored."""

    def __init__(self, ledger: Ledger, split: Split, units: list[Unit], stored: dict[nn.Parameter, int]):
        self.ledger, self.split, self.stored = ledger, split, stored
        self.all: list[Gathered] = []
        self.order: list[Gathered] = []  # of forward
        self.reducing: list[Gathered] = []  # whose buffers are kept until the next one's reduction
        self.last: Gathered | None = None  # whose gathered buffer is kept until the next one's
        owned: set[nn.Parameter] = set()
        for unit in units:
            inside = dict.fromkeys(p for module in unit.modules for p in module.parameters())
            one = Gathered(unit, [p for p in inside if p not in owned])
            owned.update(one.params)
            self.all.append(one)
            self._hold_sums(one)
            for module in unit.modules:
                module.register_forward_pre_hook(functools.partial(self._before, one), prepend=True, with_kwargs=True)
                module.register_forward_hook(functools.partial(self._after, one))

    def _hold_sums(self, one: Gathered) -> None:
        """Enter the gradients of the micro-batches before."""
        for p in one.params:
            if p.requires_grad and self.split.before:
                if self.split.whole:
                    self.ledger.hold((p, "summed"), REDUCED, 4 * p.numel())
                elif not self.split.host:
                    self.ledger.hold((p, "sum"), GRADIENTS, 4 * self.split.shard(p))

    # forward

    def _before(self, one: Gathered, module: nn.Module, args, kwargs):
        if _in_backward():  # computed again: the weights are here, the hooks set
            return args, kwargs
        if one.params:
            what = "the embedding" if isinstance(module, nn.Embedding) else one.unit.name
            self.ledger.moment = f"forward of {what}"
        if one.to_run:
            return args, kwargs
        one.to_run = set(one.unit.modules)
        self._unshard(one, forward=True)
        leaves, spec = tree_flatten((args, kwargs))
        hooked = [isinstance(x, Tensor) and x.requires_grad for x in leaves]
        if any(hooked):
            inputs = [x for x, hook in zip(leaves, hooked, strict=True) if hook]
            passed = iter(_AfterBackward.apply(functools.partial(self._after_backward, one), *inputs))
            leaves = [next(passed) if hook else x for x, hook in zip(leaves, hooked, strict=True)]
        return tree_unflatten(leaves, spec)

    def _after(self, one: Gathered, module: nn.Module, args, out):
        one.to_run.discard(module)
        if one.to_run or _in_backward():
            return
        if one.unit.resharded:
            self._reshard(one)
        if one.params:
            one.place = len(self.order)
            self.order.append(one)
        if one.unit.resharded is None:  # the root: forward has ended
            self._drop_last()
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(functools.partial(self._before_backward, one))

    # backward

    def _before_backward(self, one: Gathered, grad: Tensor) -> None:
        if one.done or not one.params:
            return
        if not one.begun:
            one.begun, self.ledger.moment = True, f"backward of {one.unit.name}"
        if one.unit.in_backward:
            self._unshard(one, forward=False)
        if one.place > 0:
            ahead = self.order[one.place - 1]
            if ahead.unit.in_backward and not ahead.here and not ahead.coming:
                self._gather(ahead)

    def _after_backward(self, one: Gathered) -> None:
        if one.done or not one.params:
            return
        one.done = True
        hold, drop = self.ledger.hold, self.ledger.drop
        with_grad = [p for p in one.params if p.grad is not None]
        self._reshard(one)
        for other in self.reducing:
            drop((other, "reduced"))
        self.reducing = []
        if not with_grad:
            return
        shard = sum(self.split.shard(p) for p in with_grad)
        hold((one, "reduced"), REDUCED, 4 * shard * self.split.ways)
        self.reducing.append(one)
        for p in with_grad:
            p.grad = None
            drop((p, "summed"))
        added = self.split.host or (self.split.before and not self.split.whole)  # to those of before
        if self.split.alone:
            if not added:  # the buffer is that of the gradients
                drop((one, "reduced"))
                hold((one, "gradients"), GRADIENTS, 4 * shard)
            return
        hold((one, "gradients"), GRADIENTS, 4 * shard)
        if self.split.ways == 1 and self.split.replicated:
            self.ledger.touch(4 * shard, REDUCED)  # divided by 1 into a copy
        if added:
            drop((one, "gradients"))

    def finish(self) -> None:
        """After backward: what FSDP2 does last, of units whose inputs have no gradient too."""
        for one in self.all:
            self._after_backward(one)
        for one in self.all:
            self.ledger.drop((one, "reduced"))
            self.ledger.drop((one, "coming"))

    # weights

    def _unshard(self, one: Gathered, *, forward: bool) -> None:
        if one.here or not one.params:
            return
        if not one.coming:
            self._gather(one)
        if forward:
            self._drop_last()
        elements = sum(p.numel() for p in one.params)
        if self.split.ways == 1 and not self.split.host:
            rounded = max((p.numel() for p in one.params if self.stored[p] != self.split.width), default=0)
            self.ledger.touch(rounded * self.split.width, GATHERED)
        self.ledger.hold((one, "weights"), GATHERED, elements * self.split.width)
        one.here, one.coming = True, False
        if forward and self.split.ways > 1:
            self.last = one  # overlaps with the next one's
        else:
            self.ledger.drop((one, "coming"))

    def _gather(self, one: Gathered) -> None:
        one.coming = True
        if self.split.host:  # brought from the host as they are stored
            self.ledger.hold((one, "brought"), GATHERED, sum(self.split.shard(p) * self.stored[p] for p in one.params))
        if self.split.ways > 1:
            shard = sum(self.split.shard(p) for p in one.params) * self.split.width
            self.ledger.hold((one, "mine"), GATHERED, shard)
            self.ledger.hold((one, "coming"), GATHERED, shard * self.split.ways)
            self.ledger.drop((one, "mine"))
        self.ledger.drop((one, "brought"))

    def _drop_last(self) -> None:
        if self.last:
            self.ledger.drop((self.last, "coming"))
        self.last = None

    def _reshard(self, one: Gathered) -> None:
        self.ledger.drop((one, "weights"))
        one.here = False


def _in_backward() -> bool:
    """FSDP2 asks the same way."""
    return torch._C._current_graph_task_id() != -1


class _AfterBackward(torch.autograd.Function):
    """Inputs as they are; ``call`` once their gradients are there."""

    @staticmethod
    def forward(ctx, call: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return inputs

    @staticmethod
    def backward(ctx, *grads: Tensor):
        ctx.call()
        return None, *grads

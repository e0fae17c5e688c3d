"""Which modules of a causal LM compute RMSNorm and the gated MLP by ``elementwise``, and so keep less for backward.

A module's ``forward`` is exchanged, on the instance: parameters and their names stay. It is where a small copy of that
very module, with random weights, computes what ours does; any other is left as it is, and why is told. Linear layers
that read a norm's or a product's result do not keep it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tract_fast import elementwise
from tract_fast.elementwise import ACTIVATIONS, gated_product, rms_norm
from tract_fast.loss import native

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
AGREES = 1e-5  # relative: most norms compute in float32 whatever they are given
SIZES = torch.tensor([[0.01], [1.0], [100.0]], dtype=torch.float64)  # of what is tried: an eps is seen, and a clamp


def choose_lean(setting: str, compiled: bool) -> tuple[bool, str]:
    """Whether norms and gated MLPs are exchanged, and why not. ``setting`` is ``model.lean``, ``compiled``
    ``train.compile``."""
    if setting == "off":
        return False, "off (model.lean)"
    if compiled:
        return False, "off (train.compile fuses these operations and chooses what to keep by itself)"
    return True, ""


def apply(lm: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Exchange what can be in the decoder of ``lm``, with or without storage, adapters put in before; returns a line to
    print. ``device`` and ``dtype`` are those that it will compute on and in."""
    decoder = lm.get_decoder()
    norms, mlps, left = 0, Counter(), Counter()
    for module in list(decoder.modules()):
        kind = type(module).__name__
        if not (is_norm := "RMSNorm" in kind) and not all(hasattr(module, name) for name in PROJECTIONS):
            continue
        try:
            if "forward" in vars(module):
                raise Other("is another's by now")
            if is_norm:
                eps, offset = known_norm(module)
                module.forward = functools.partial(_norm, module, eps, offset, device.type)
                norms += 1
            else:
                activation = known_mlp(module)
                module.forward = functools.partial(_mlp, module, activation, device.type)
                mlps[activation] += 1
        except Other as reason:
            left[f"{kind} {reason}"] += 1
    if norms or mlps:
        for module in decoder.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                module.forward = functools.partial(_linear, module)
    in_cpp = device.type == "cpu" and native.runs(dtype)
    return describe(norms, mlps, left, "C++" if in_cpp else "PyTorch")


def describe(norms: int, mlps: Counter[str], left: Counter[str], by: str) -> str:
    """What was exchanged, and what was not and why."""
    done = [f"{norms} RMSNorms"] if norms else []
    done += [f"{count} gated MLPs ({activation})" for activation, count in mlps.items()]
    text = f"{' and '.join(done)} in {by} keep less for backward" if done else "nothing to exchange"
    if not norms and not any("Norm" in reason for reason in left):
        left["no RMSNorm"] = 0
    if not mlps and not any("Norm" not in reason for reason in left):
        left["no MLP with gate_proj, up_proj and down_proj"] = 0
    told = [reason if count == 0 else f"{count} left as they are: {reason}" for reason, count in left.items()]
    return "; ".join([text, *told])


class Other(Exception):
    """A module that does not compute what ours does; its text says why, after the module's name."""


@torch.no_grad()
def known_norm(module: nn.Module) -> tuple[float, float]:
    """(eps, offset of the weight) of an RMSNorm. Raises Other."""
    _takes_one(module)
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or len(list(module.parameters())) > 1:
        raise Other("has more or less than one weight a column")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        raise Other("has no eps")
    draw = torch.Generator().manual_seed(0)
    width = weight.shape[0]
    x = SIZES * torch.randn(3, width, generator=draw, dtype=torch.float64)
    weights = SIZES * torch.randn(3, width, generator=draw, dtype=torch.float64)
    theirs = []
    for random in weights:
        small = copy.copy(module)
        small._parameters = {"weight": nn.Parameter(random)}
        small.train()  # a dropout is seen
        theirs.append(_result(small, x[None]))
    for offset in (0.0, 1.0):
        if all(_agree(t, rms_norm(x[None], w, eps, offset)) for t, w in zip(theirs, weights, strict=True)):
            return eps, offset
    raise Other("computes something else")


@torch.no_grad()
def known_mlp(module: nn.Module) -> str:
    """The activation of a gated MLP, one of ``ACTIVATIONS``. Raises Other."""
    _takes_one(module)
    draw = torch.Generator().manual_seed(0)
    width, inner = 6, 10
    gate, up, down = (_linear_layer(*size, draw) for size in ((width, inner), (width, inner), (inner, width)))
    small = copy.copy(module)
    rest = {name: copy.deepcopy(m) for name, m in module._modules.items() if name not in PROJECTIONS}
    small._modules = {**rest, "gate_proj": gate, "up_proj": up, "down_proj": down}
    small.train()  # a dropout is seen
    x = SIZES * torch.randn(3, width, generator=draw, dtype=torch.float64)
    theirs = _result(small, x[None])
    for activation in ACTIVATIONS:
        if _agree(theirs, down(gated_product(gate(x), up(x), activation))[None]):
            return activation
    raise Other("computes something else")


def _takes_one(module: nn.Module) -> None:
    """Raise Other where the module's own forward takes more than one tensor."""
    if len(inspect.signature(type(module).forward).parameters) != 2:
        raise Other("takes more than one argument")


def _linear_layer(width: int, out: int, draw: torch.Generator) -> nn.Linear:
    layer = nn.Linear(width, out, device="meta")
    layer.weight = nn.Parameter(torch.randn(out, width, generator=draw, dtype=torch.float64))
    layer.bias = nn.Parameter(torch.randn(out, generator=draw, dtype=torch.float64))
    return layer


def _result(small: nn.Module, x: Tensor) -> Tensor:
    """What the module's own forward gives. Raises Other where it does not run."""
    try:
        with torch.random.fork_rng(devices=[]):
            return type(small).forward(small, x)
    except Exception as error:  # of any code: what it is does not matter, and it is told
        reason = " ".join(str(error).split())[:80]
        raise Other(f"does not run on one tensor alone ({type(error).__name__}: {reason})") from error


def _agree(theirs: Tensor, ours: Tensor) -> bool:
    """Row by row: rows are of very different sizes."""
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return bool(((theirs - ours).norm(dim=-1) <= AGREES * ours.norm(dim=-1)).all())


def _norm(module: nn.Module, eps: float, offset: float, device_type: str, x: Tensor) -> Tensor:
    if x.dtype != module.weight.dtype:  # mixed, where only the module's own code knows the result's dtype
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, eps, offset, device_type)


def _mlp(module: nn.Module, activation: str, device_type: str, x: Tensor) -> Tensor:
    return module.down_proj(gated_product(module.gate_proj(x), module.up_proj(x), activation, device_type))


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return elementwise.linear(x, module.weight, module.bias)


def exchanged(lm: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, ``norm``, ``mlp`` or ``linear``) of each module whose forward is ours."""
    names = {_norm: "norm", _mlp: "mlp", _linear: "linear"}
    for name, module in lm.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, functools.partial) and forward.func in names:
            yield name, names[forward.func]

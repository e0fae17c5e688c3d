"""The doctor's self-test: loss, sampled gradient, attention and a checkpoint, each by what training itself calls.

A check returns what it found, as a line, and raises ``Wrong`` with such a line where that is not right.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tract_fast import attention, checkpoint, optim, shard
from tract_fast.checkpoint import Progress
from tract_fast.data.batch import collate, normalizer
from tract_fast.data.prompt import Encoded
from tract_fast.data.scores import ScoreScale
from tract_fast.errors import UserError
from tract_fast.head import TractHead
from tract_fast.loss import linear_tract_loss
from tract_fast.model import TractModel
from tract_fast.saver import Saver
from tract_fast.sections import Checkpoint, Shard, Train
from tract_fast.shard import Ranks

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, of loss and gradients against float64
DRAWS, DRAW_EPS = 48, 2.0**-6
VOCABULARY = 64


class Wrong(Exception):
    """A check ran and found another result than it must be."""


def verdict(check: Callable[[], str]) -> tuple[bool, str]:
    """(whether something is wrong, what to print) of a check."""
    began = time.perf_counter()
    try:
        bad, told = False, f"right; {check()}"
    except (Wrong, UserError) as error:
        bad, told = True, f"WRONG; {error}"
    except Exception as error:  # whatever a compiler, a driver or a library raises: told, and the rest is still printed
        bad, told = True, failure(error)
    return bad, f"{told} ({time.perf_counter() - began:.1f} s)"


def failure(error: Exception) -> str:
    """An error in one line."""
    return f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def problem(n: int, v: int, d: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(hidden, weight and bias in ``dtype``; labels, score rows and targets, score tokens and values), on the CPU."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    head = [(3 * random(n, d)).to(dtype), (random(v, d) / 10).to(dtype), random(v).to(dtype)]
    labels = torch.randint(v, (n,), generator=generator)
    rows = torch.arange(50, n, 100)
    targets = 1 + 4 * torch.rand(len(rows), generator=generator)
    return head, [labels, rows, targets, torch.arange(11, 40, 7), torch.arange(1.0, 6.0)]


def check_loss(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Relative error of loss, dX and dW against the definition in float64: 2500 rows of a small head in one chunk, and
    in several with bias, cap and the vocabulary's normalisation."""
    head, rest = problem(2500, 1003, 96, dtype)
    rest = [x.to(device) for x in rest]

    def grads(implementation: str, dtype: torch.dtype, several: bool) -> list[Tensor]:
        hidden, weight, bias = (x.to(device, dtype).requires_grad_() for x in head)
        more = {"bias": bias, "softcap": 20.0, "normalize": "vocab", "memory_budget": 1} if several else {}
        loss = linear_tract_loss(hidden, weight, *rest, implementation=implementation, **more).loss
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    errors = dict.fromkeys(("loss", "dX", "dW"), 0.0)
    for several in (False, True):
        pairs = zip(grads(implementation, dtype, several), grads("reference", torch.float64, several), strict=True)
        for name, (got, true) in zip(errors, pairs, strict=True):
            error = distance(got, true)
            errors[name] = error if not error <= errors[name] else errors[name]  # a NaN stays
    told = "error against float64: " + ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
    if not all(error <= TOLERANCE[dtype] for error in errors.values()):
        raise Wrong(told)
    return told


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative error (norm)."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def check_sampled(device: torch.device, dtype: torch.dtype, proposal: str = "none") -> str:
    """The sampled gradient of some seeds, drawn on such a ``proposal``: one differs from the exact gradient by what it
    says that it adds, and their mean by that over the root of their number."""
    head, rest = problem(256, 1003, 96, dtype)
    rest = [x.to(device) for x in rest]

    def grads(dtype: torch.dtype, **options) -> tuple[list[Tensor], float]:
        hidden, weight = (x.to(device, dtype).requires_grad_() for x in head[:2])
        out = linear_tract_loss(hidden, weight, *rest, normalize="vocab", **options)
        found = [g.double() for g in torch.autograd.grad(out.loss, (hidden, weight))]
        return found, out.added_variance.item() if "seed" in options else 0.0

    exact, _ = grads(torch.float64, implementation="reference")
    options = {"gradient": "sampled", "eps": DRAW_EPS, "proposal": proposal}
    drawn = [grads(dtype, **options, seed=seed) for seed in range(DRAWS)]
    told, wrong = [], False
    said = math.sqrt(sum(added for _, added in drawn) / DRAWS)
    for i, name in enumerate(("dX", "dW")):
        single = math.sqrt(sum(distance(found[i], exact[i]) ** 2 for found, _ in drawn) / DRAWS)
        mean = distance(sum(found[i] for found, _ in drawn) / DRAWS, exact[i])
        wrong |= not mean <= 2.5 * single / math.sqrt(DRAWS) + TOLERANCE[dtype] / 5
        wrong |= name == "dX" and not 0.5 * said <= single <= 1.5 * said + TOLERANCE[dtype] / 5
        told.append(f"{name} {single:.1e} a draw, {mean:.1e} the mean of {DRAWS}")
    line = f"error against exact: {'; '.join(told)} (said of one draw: {said:.1e})"
    if wrong or not said > 0:
        raise Wrong(line)
    return line


def tiny_model(ranks: Ranks, dtype: torch.dtype, seed: int) -> tuple[TractModel, torch.optim.Optimizer]:
    """A sharded random judge of two blocks, and its optimizer, as training makes them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention.register()
    name, _ = attention.resolve_attention("auto", ranks.device, dtype, softcap=False)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=256, **sizes)
    with torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=name)
    scale = ScoreScale(labels=tuple("123"), values=(1, 2, 3), token_ids=(5, 6, 7), prefix_ids=(1,), eos_id=0)
    lm.set_output_embeddings(TractHead(lm.get_output_embeddings(), scale))
    model = TractModel(lm.to(ranks.device))
    shard.shard(model, ranks.mesh, dtype, Shard())
    return model, optim.adamw(model.trainable().values(), Train())


def take_step(model: TractModel, optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """One optimizer step on two random examples; returns the loss."""
    draw = np.random.default_rng(0)
    ids = [np.array([*draw.integers(8, VOCABULARY, n), 5 + i, 0]) for i, n in enumerate((40, 23))]
    examples = [Encoded(x, 20, i, i + 1.0, 1.0, str(i), "q") for i, x in enumerate(ids)]
    norm = normalizer(examples, ce_weight=1.0, regression_weight=1.0, score_ce=True, ce_reduction="token")
    loss = model(collate(examples, norm, score_ce=True).to(device)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def check_save(dtype: torch.dtype) -> str:
    """A tiny judge takes a step; its weights and AdamW's state are saved, and another one that loads them must have the
    same bits. In a temporary folder, which is removed."""
    with tempfile.TemporaryDirectory(prefix="tract-fast-doctor-") as name, shard.start_ranks() as ranks:
        saved, loaded = tiny_model(ranks, dtype, seed=0), tiny_model(ranks, dtype, seed=1)
        loss = take_step(*saved, ranks.device)
        with Saver(Path(name), Checkpoint()) as saver:
            saver.start(*saved, Progress(step=1, fingerprint="doctor", template=False), {})
            saver.wait()
        checkpoint.load(checkpoint.latest(Path(name)), *loaded)
        states = [checkpoint.training_state(*one) for one in (saved, loaded)]
        odd = [key for key, value in states[0].items() if not torch.equal(local(value), local(states[1][key]))]
    if not math.isfinite(loss):
        raise Wrong(f"the loss of a step is {loss}")
    if odd:
        raise Wrong(f"{len(odd)} of {len(states[0])} tensors differ once loaded, such as {odd[0]}")
    return f"{len(states[0])} tensors of a training state, saved and loaded, are the same to the last bit"


def local(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

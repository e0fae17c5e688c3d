"""What the loss is measured against: one problem on one device, and every way to compute its loss that runs there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_fast import linear_tract_loss

SCORES = 5
SEQUENCE = 1120  # tokens of a judgement on the Vicuna bench, about
RATIONALE = 120  # of which count
IGNORED = -100
DOUBLE_ROWS = 1024  # rows of float64 logits at a time


class Shape(NamedTuple):
    """A head and a micro-batch: ``rows`` of its ``tokens`` count; None is all. ``budget`` is our loss's, in bytes
    of 16-bit logits (twice that in float32, so that the rows of a chunk are the same)."""

    rows: int
    vocab: int
    width: int
    tokens: int | None = None
    budget: int | None = None


def vicuna(sequences: int, vocab: int, width: int) -> Shape:
    """Packed judgements: a tenth of the tokens counts."""
    return Shape(sequences * RATIONALE, vocab, width, sequences * SEQUENCE)


SHAPES = {
    "tiny": Shape(128, 512, 64),  # for a rehearsal
    "smollm2-135m": Shape(1024, 49152, 576),
    "smollm2-135m-vicuna": vicuna(4, 49152, 576),
    "smollm2-135m-3000": Shape(3000, 49152, 576),
    "smollm2-135m-3000-70mb": Shape(3000, 49152, 576, budget=70_000_000),
    "llama-3.2-1b-512": Shape(512, 128256, 2048),
    "gemma-3-270m": Shape(2048, 262144, 640),
    "mistral-7b": Shape(4096, 32000, 4096),
    "llama-3.1-8b": Shape(8192, 128256, 4096),
    "llama-3.1-8b-vicuna": vicuna(8, 128256, 4096),
    "llama-3.1-8b-512": Shape(512, 128256, 4096),
    "llama-3.1-8b-16384": Shape(16384, 128256, 4096),
    "qwen3-8b": Shape(8192, 151936, 4096),
}


class Problem:
    """Inputs of the whole TRACT loss (``scores``), or of its cross-entropy alone, on all tokens of a micro-batch.

    Hidden states are scaled so that a row has a few hundred tokens with a probability above 2^-12 (365 of 49152 at
    D = 576): on logits that are all small a filter of small gradients drops everything and looks too good.
    """

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, *, frozen: bool, scores: bool):
        generator = torch.Generator(device).manual_seed(0)
        tokens, every = shape.tokens or shape.rows, RATIONALE if shape.tokens is None else SEQUENCE
        random = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
        self.scores = scores
        self.budget = None if shape.budget is None else shape.budget * dtype.itemsize // 2
        self.weight = random(shape.vocab, shape.width).mul_(shape.width**-0.5).to(dtype).requires_grad_(not frozen)
        self.hidden = random(tokens, shape.width).mul_(3.5).to(dtype).requires_grad_()
        place = torch.arange(tokens, device=device)
        # the last RATIONALE tokens of every sequence count, the last of them predicts the score
        self.rows = place if shape.tokens is None else place[place % SEQUENCE >= SEQUENCE - RATIONALE]
        score_tokens = place[every - 1 :: every].contiguous() if scores else place[:0]
        self.score_rows = torch.searchsorted(self.rows, score_tokens)
        self.ids = torch.arange(SCORES, device=device) * 7 + 11
        self.values = torch.arange(1.0, SCORES + 1, device=device)
        self.targets = torch.rand(len(score_tokens), generator=generator, device=device) * 4 + 1
        self.labels = torch.full_like(place, IGNORED)
        self.labels[self.rows] = torch.randint(shape.vocab, self.rows.shape, generator=generator, device=device)
        self.labels[score_tokens] = self.ids[torch.arange(len(score_tokens), device=device) % SCORES]
        self.score_tokens = score_tokens

    def parameters(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    def ours(self, implementation: str, **options) -> Tensor:
        """As the trainer calls it: rows that count are gathered first."""
        return linear_tract_loss(
            self.hidden if len(self.rows) == len(self.hidden) else self.hidden.index_select(0, self.rows),
            self.weight,
            self.labels[self.rows],
            self.score_rows,
            self.targets,
            self.ids,
            self.values,
            implementation=implementation,
            memory_budget=self.budget,
            **options,
        ).loss

    def eager(self) -> Tensor:
        """What a trainer without a fused loss does: logits of every token."""
        return self.materialised(self.hidden, self.labels, self.score_tokens)

    def eager_gathered(self) -> Tensor:
        """The same with the rows that count gathered first."""
        return self.materialised(self.hidden.index_select(0, self.rows), self.labels[self.rows], self.score_rows)

    def materialised(self, hidden: Tensor, labels: Tensor, score_rows: Tensor) -> Tensor:
        z = F.linear(hidden, self.weight).float()
        loss = F.cross_entropy(z, labels)
        return loss + self.squared_error(z[score_rows][:, self.ids].softmax(-1)) if self.scores else loss

    def squared_error(self, probs: Tensor) -> Tensor:
        return (probs @ self.values.to(probs.dtype) - self.targets).square().mean()

    def truth(self) -> list[Tensor]:
        """[loss, its gradients] in float64, rows a block at a time."""
        hidden, weight = (x.detach().double().requires_grad_(x.requires_grad) for x in (self.hidden, self.weight))
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        inputs = [x for x in (hidden, weight) if x.requires_grad]
        grads = [torch.zeros_like(x) for x in inputs]
        for rows in self.rows.split(DOUBLE_ROWS):
            z = F.linear(hidden[rows], weight)
            loss = F.cross_entropy(z, self.labels[rows], reduction="sum") / len(self.rows)
            here = torch.isin(self.score_tokens, rows)
            if here.any():
                probs = z[torch.searchsorted(rows, self.score_tokens[here])][:, self.ids].softmax(-1)
                error = probs @ self.values.double() - self.targets[here]
                loss = loss + error.square().sum() / len(self.targets)
            for grad, part in zip(grads, torch.autograd.grad(loss, inputs), strict=True):
                grad += part
            total += loss.detach()
        return [total, *grads]


def bare_gemms(p: Problem) -> Callable[[], None]:
    """The floor: logits of the rows that count, dX and, with W trained, dW, into buffers that are there."""
    x, w = p.hidden.detach()[p.rows], p.weight.detach()
    logits, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=dx)
        if p.weight.requires_grad:
            torch.mm(logits.t(), x, out=dw)

    return run


def contestants(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function that returns the loss, of everything that is installed and computes this loss."""
    torch._dynamo.reset()  # a fresh function per problem would soon pass the limit of recompilations, in silence
    found: dict[str, Callable[[], Tensor]] = {
        "chunked": lambda: p.ours("chunked"),
        "sampled": lambda: p.ours("auto", gradient="sampled"),
        "sampled 2^-12": lambda: p.ours("auto", gradient="sampled", eps=2.0**-12),
        "reference": lambda: p.ours("reference"),
        "eager": p.eager,
        "compile": torch.compile(p.eager, dynamic=False),
    }
    if len(p.rows) < len(p.hidden):
        found["eager, rows gathered"] = p.eager_gathered
        found["compile, rows gathered"] = torch.compile(p.eager_gathered, dynamic=False)
    if p.hidden.is_cuda:
        found["fused"] = lambda: p.ours("fused")
    found |= liger(p)
    return found if p.scores else found | cross_entropies(p)


def liger(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Liger's losses; the scaled one can be made into the TRACT loss by its log-probabilities of chosen tokens."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    def scaled() -> Tensor:
        chosen = {"selected_token_ids": p.ids} if p.scores else {}
        out = Scaled.apply(p.hidden, p.weight, p.labels, **chosen)
        nll, selected = (out[0], out[-1]) if isinstance(out, tuple) else (out, None)
        loss = nll.sum() / len(p.rows)
        return loss + p.squared_error(selected[p.score_tokens].softmax(-1)) if p.scores else loss

    found = {"liger scaled": scaled}
    if p.hidden.is_cuda and not p.scores:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        module = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda: module(p.weight, p.hidden, p.labels)
    return found


def cross_entropies(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Peers without a way to the scores."""
    x, w, y = p.hidden, p.weight, p.labels
    found = {}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy"] = lambda: F.linear_cross_entropy(x, w, y, options=options)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        if x.is_cuda:
            found["cce"] = lambda: cce(x, w, y)
            found["cce exact"] = lambda: cce(x, w, y, filter_eps=None)
        else:
            found["cce torch_compile"] = lambda: cce(x, w, y, impl="torch_compile")
    if x.is_cuda and importlib.util.find_spec("quack"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

        found["quack base"] = lambda: quack(x, w, y, use_scaled_exp=False)
        found["quack"] = lambda: quack(x, w, y)
    return found

"""The paper's recipes compute what the authors' code computes (PAPER: TRACT, arXiv 2503.04381; code d223302).

Written anew from a description of it: padded batches, logits of every token, the score digit without cross-entropy, the
mean over the batch's other target tokens, probabilities in the whole vocabulary, and the squared error divided by the
batch twice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tract_fast import recipe as recipes
from tract_fast.data import batch as batches
from tract_fast.data.prompt import Encoded
from tract_fast.data.scores import ScoreScale
from tract_fast.head import TractHead

RECIPES = Path(__file__).parents[2] / "recipes" / "paper"
V, D, B = 40, 12, 8
SCORE_IDS, VALUES = (11, 12, 13, 14, 15), (1.0, 2.0, 3.0, 4.0, 5.0)


def examples(rng: np.random.Generator) -> list[Encoded]:
    found = []
    for i in range(B):
        prompt, target = rng.integers(3, 9), rng.integers(3, 12)
        ids = rng.integers(16, V, prompt + target)
        score = int(rng.integers(5))
        ids[-2], ids[-1] = SCORE_IDS[score], 0
        found.append(Encoded(ids.astype(np.int32), int(prompt), score, VALUES[score], 1.0, str(i), str(i)))
    return found


def authors_loss(hidden: list[torch.Tensor], weight: torch.Tensor, data: list[Encoded]) -> torch.Tensor:
    longest = max(len(e.ids) for e in data)
    logits = torch.zeros(B, longest, V, dtype=torch.float64)
    labels = torch.full((B, longest), -100)
    for b, e in enumerate(data):
        logits[b, : len(e.ids)] = hidden[b] @ weight.T
        labels[b, e.prompt_len : len(e.ids)] = torch.tensor(e.ids[e.prompt_len :].astype(np.int64))
    squared = []
    for b, e in enumerate(data):
        place = len(e.ids) - 2
        labels[b, place] = -100
        chances = logits[b, place - 1].softmax(-1)[list(SCORE_IDS)]
        squared.append(((chances * torch.tensor(VALUES, dtype=torch.float64)).sum() - e.score) ** 2)
    shifted, targets = logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)
    cross_entropy = nn.functional.cross_entropy(shifted, targets, ignore_index=-100, reduction="sum")
    return cross_entropy / (targets != -100).sum() + torch.stack(squared).mean() / B


@pytest.mark.parametrize("name", ["mistral-7b", "llama-3.1-8b"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_those_of_the_authors(name, seed):
    recipe = recipes.load(RECIPES / f"{name}.yaml", [])
    assert recipe.train.batch == B
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    data = examples(rng)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden = [torch.randn(len(e.ids), D, generator=generator, dtype=torch.float64, requires_grad=True) for e in data]
    want = authors_loss(hidden, weight, data)
    upstream = 0.5 + seed
    gradients = torch.autograd.grad(want, [weight, *hidden], torch.tensor(upstream, dtype=torch.float64))

    loss = recipe.loss
    names = ("ce_weight", "regression_weight", "score_ce", "ce_reduction")
    norm = batches.normalizer(data, **{n: getattr(loss, n) for n in names})
    linear = nn.Linear(D, V, bias=False, dtype=torch.float64)
    linear.weight = nn.Parameter(weight.detach().clone())
    scale = ScoreScale(labels=tuple("12345"), values=VALUES, token_ids=SCORE_IDS, prefix_ids=(1,), eos_id=0)
    head = TractHead(linear, scale, normalize=loss.normalize, implementation="reference")
    packed = torch.cat([h.detach() for h in hidden]).requires_grad_()
    out = head(packed, batches.collate(data, norm, score_ce=loss.score_ce))
    out.loss.backward(torch.tensor(upstream, dtype=out.loss.dtype))
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(head.weight.grad, gradients[0], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(packed.grad, torch.cat(gradients[1:]), rtol=1e-5, atol=1e-9)

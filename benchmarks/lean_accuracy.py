"""How far a model in bfloat16 is from the same in float32, with and without ``model.lean``.

    python -m benchmarks.lean_accuracy --data PATH/vicuna_eval.json [--sequences 32]

SmolLM2-135M before training on one judgement of each of the first prompts. Root mean square over sequences: of the
last hidden states relative in the norm, of the mean cross-entropy in nats, of the expected score, of the loss.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import judgements
from tract_fast import shard, train
from tract_fast.prepare import Prepared
from tract_fast.recipe import Recipe

MEASURES = ("hidden states", "cross-entropy", "expected score", "loss")
Found = list[tuple[Tensor, float, float, float]]


@torch.no_grad()
def computed(recipe: Recipe, data: Prepared, dtype: str, lean: str) -> Found:
    """(hidden states that reach the head, cross-entropy, expected score, loss) of each sequence."""
    recipe = replace(recipe, model=replace(recipe.model, dtype=dtype, lean=lean))
    found, hidden = [], []
    with shard.start_ranks() as ranks:
        job = train.assemble(recipe, ranks, data, lambda line: None)
        job.model.head.register_forward_pre_hook(lambda module, args: hidden.append(args[0].float()))
        for step in range(job.total):
            out = job.model(job.feed.take(step).micro_batches[0].to(ranks.device))
            ce = (out.nll.double().sum() / (out.nll != 0).sum()).item()
            found.append((hidden.pop(), ce, out.expected_score[-1].item(), out.loss.item()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--sequences", type=int, default=32)
    args = parser.parse_args()
    recipe = judgements.recipe_of("smollm2-135m", judgements.REAL, args.sequences, data=args.data, batch=1)
    recipe = replace(recipe, data=replace(recipe.data, share_prompts="off"))
    data = judgements.read(recipe, real=True)
    data = replace(data, train=judgements.chosen(data.train, 1)[: args.sequences])
    truth = computed(recipe, data, "float32", "off")
    for lean in ("off", "auto"):
        pairs = list(zip(computed(recipe, data, "bfloat16", lean), truth, strict=True))
        off = [[((a[0] - b[0]).norm() / b[0].norm()).item(), *(a[i] - b[i] for i in (1, 2, 3))] for a, b in pairs]
        rms = [math.sqrt(statistics.fmean(x * x for x in column)) for column in zip(*off, strict=True)]
        print(
            f"model.lean {lean}:", ", ".join(f"{name} {value:.3g}" for name, value in zip(MEASURES, rms, strict=True))
        )


if __name__ == "__main__":
    main()

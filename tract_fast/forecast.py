"""How long a run takes, from what its maker states of a GPU and shares of it that are assumed: no measurement.

Per step: the slowest rank's arithmetic, what FSDP2 sends meanwhile, then the update of the weights. Generation: each
token reads all weights and the cache once, and launches every block's kernels. ``Rates`` are printed with the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tract_fast.data.batch import total_steps
from tract_fast.data.prompt import Encoded
from tract_fast.estimate import StepPlan, Target
from tract_fast.gpus import Gpu
from tract_fast.model import DTYPES, TractModel
from tract_fast.perf import Work, work_of
from tract_fast.recipe import Recipe
from tract_fast.selfcheck import heads_of
from tract_fast.shard import units

LINK = 0.7  # of the link between GPUs
MEMORY = 0.6  # of memory bandwidth
HOST = 0.8e-3  # seconds in which transformers launches a block's kernels, for each token that is generated
LAUNCH = 1.5e-3  # seconds in which forward and backward of a block are launched, for each micro-batch
NODE = 8  # GPUs that a link is stated for
UPDATE = 40  # bytes of memory traffic a trained weight: norm, clipping and AdamW, in float32


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is taken for reached: FLOP/s, and bytes a second of memory and between GPUs."""

    compute: float
    memory: float
    link: float
    told: str

    @classmethod
    def of(cls, gpu: Gpu, peak_tflops: float | None, mfu: float, *, dtype: str = "bfloat16") -> Rates:
        """Shares of what is stated of ``gpu`` for ``model.dtype``; ``peak_tflops``: ``run.peak_tflops``, instead of its
        own. In float32 products are PyTorch's own, without TF32."""
        peak = gpu.peak if dtype == "bfloat16" else gpu.single
        source = "dense bfloat16" if dtype == "bfloat16" else "float32 without tensor cores"
        if peak_tflops is not None:
            peak, source = peak_tflops * 1e12, "run.peak_tflops"
        told = (
            f"{mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s ({source}; --mfu), {MEMORY:.0%} of "
            f"{gpu.bandwidth / 1e12:.2f} TB/s of memory, {LINK:.0%} of {gpu.link / 1e9:.0f} GB/s between GPUs; "
            f"to launch a block at least {LAUNCH * 1e3:.1f} ms a micro-batch and {HOST * 1e3:.1f} ms a generated token"
        )
        return cls(compute=peak * mfu, memory=gpu.bandwidth * MEMORY, link=gpu.link * LINK, told=told)

    def __str__(self) -> str:
        return self.told


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model in numbers of weights."""

    weights: int
    trained: int
    again: int
    """Gathered a second time, for backward."""
    blocks: int
    cache: int
    """Keys and values of a token."""
    work: Work | None
    """None: its arithmetic is not known (experts)."""


def sizes_of(model: TractModel, recipe: Recipe, config) -> Sizes:
    """Those of a model that is not sharded; it may be on meta tensors."""
    count = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
    again = [u for u in units(model, recipe.shard) if u.resharded and u.in_backward]
    _, key_heads, width = heads_of(config)
    return Sizes(
        weights=count(model.parameters()),
        trained=count(model.trainable().values()),
        again=sum(count(module.parameters()) for u in again for module in u.modules),
        blocks=len(model.blocks),
        cache=2 * key_heads * width * len(model.blocks),
        work=work_of(model.blocks, model.head, config),
    )


def recomputed(setting: str, blocks: int) -> float:
    """The share of the blocks whose forward runs again in backward (``train.activation_checkpointing``): of all, of
    every k-th, the first among them; ``selective`` keeps what the time goes into."""
    if setting.isdigit():
        return len(range(0, blocks, int(setting))) / blocks
    return 1.0 if setting == "full" else 0.0


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of a step, on average over those that were planned."""

    model: float
    """Of all ranks; nothing computed twice."""
    slowest: float
    """Of the rank that has the most in each micro-batch, with what is computed again."""


def flops_of(work: Work, blocks: int, recipe: Recipe, step: StepPlan) -> Flops:
    """From the micro-batches themselves; in each, ranks wait for the one that has the most to do."""
    again = recomputed(recipe.train.activation_checkpointing, blocks)
    model = slowest = 0.0
    for ranks in step.packed:
        for at_once in itertools.zip_longest(*ranks):
            micros = [m for m in at_once if m]
            needed = [work.flops(*m.segments(), m.rows) for m in micros]
            model += sum(needed)
            slowest += max(n + again * work.forward(*m.segments()) for n, m in zip(needed, micros, strict=True))
    return Flops(model=model / step.planned, slowest=slowest / step.planned)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a rank receives in a step."""

    gathered: float
    reduced: float

    @property
    def total(self) -> float:
        return self.gathered + self.reduced


def traffic(sizes: Sizes, recipe: Recipe, target: Target, step: StepPlan) -> Traffic:
    """FSDP2's: weights for forward and backward of each micro-batch; float32 gradients after each, with LoRA once."""
    ways = max(1, target.world // recipe.shard.replicate)
    replicas = target.world // ways
    calls = step.calls
    part = (ways - 1) / ways
    gathered = part * (sizes.weights + sizes.again) * DTYPES[recipe.model.dtype].itemsize
    # a ring sends what is summed twice round the replicas
    reduced = 4 * sizes.trained * (part + 2 * (replicas - 1) / replicas / ways)
    return Traffic(gathered=calls * gathered, reduced=(1 if recipe.lora.rank else calls) * reduced)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds."""

    compute: float
    """Arithmetic, or launching it where that takes longer."""
    communication: float
    update: float

    @property
    def total(self) -> float:
        """Communication overlaps with arithmetic."""
        return max(self.compute, self.communication) + self.update


def step_time(sizes: Sizes, flops: Flops, sent: Traffic, rates: Rates, *, ways: int, calls: float) -> StepTime:
    """Of one optimizer step; weights are split ``ways``, and a rank has ``calls`` micro-batches."""
    return StepTime(
        compute=max(flops.slowest / rates.compute, calls * sizes.blocks * LAUNCH),
        communication=sent.total / rates.link,
        update=UPDATE * sizes.trained / ways / rates.memory,
    )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Rationales for the second stage, on one GPU."""

    rationales: int
    tokens: int
    seconds: float


def generation(sizes: Sizes, recipe: Recipe, examples: Sequence[Encoded], rates: Rates) -> Generation:
    """Written by transformers, ``generate.batch`` at a time, each as long as the data's own (at most
    ``generate.max_new_tokens``); a batch goes on until its longest has ended. As in ``judging``, the longest prompts
    come first, equal ones one after another, and those of a batch are computed once."""
    settings, width = recipe.generate, DTYPES[recipe.model.dtype].itemsize
    at_once = max(1, settings.batch // settings.n)
    seconds = tokens = 0.0
    order = sorted(examples, key=lambda e: (-e.prompt_len, e.ids[: e.prompt_len].tobytes()))
    for i in range(0, len(order), at_once):
        part = order[i : i + at_once]
        lengths = [min(len(e.ids) - e.prompt_len, settings.max_new_tokens) for e in part]
        prompts = [len(ids) for ids in {tuple(e.ids[: e.prompt_len].tolist()) for e in part}]
        sequences, longest = len(part) * settings.n, max(lengths)
        read = width * (sizes.weights + sizes.cache * sequences * (max(prompts) + longest / 2))
        products = 2 * sizes.weights * sequences
        a_token = max(read / rates.memory, products / rates.compute, sizes.blocks * HOST)
        prefill = sizes.work.forward(prompts, prompts) if sizes.work else 2 * sizes.weights * sum(prompts)
        seconds += prefill / rates.compute + longest * a_token
        tokens += settings.n * sum(lengths)
    return Generation(rationales=settings.n * len(examples), tokens=int(tokens), seconds=seconds)


def second_stage_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of the second stage: on as many examples as there are rationales."""
    own = examples * recipe.generate.n
    count = own + (examples if recipe.stage2.rationales == "both" else 0)
    train = recipe.train
    return total_steps(count, batch=train.batch, epochs=train.epochs, max_steps=train.max_steps)

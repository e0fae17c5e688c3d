"""The ways to train a judge that ``benchmarks.step`` compares: one function each, which takes steps and tells of them.

All train the same model on the same sequences in the same order, with float32 masters, computation in bfloat16, fused
AdamW, a constant learning rate and gradients clipped at norm 1. ``hf`` and ``hf-liger`` hold the TRACT loss as one
would write it beside Hugging Face's Trainer; ``trl`` trains on the cross-entropy alone, which is all it has. These
three are as they come: padded batches, scaled_dot_product_attention with a mask. What they gain from unpadded batches
and flash-attn, where one sets that up, is not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.judgements import chosen
from tract_fast import model as models, perf, shard, train
from tract_fast.data.prompt import Encoded
from tract_fast.launch import StopSignal
from tract_fast.prepare import Prepared
from tract_fast.recipe import Recipe

IGNORED = -100


class DoesNotRun(Exception):
    """A contestant that cannot run here, and why."""


@dataclass
class Problem:
    """``recipe.train.batch`` prompts a step, one feedback each, in the order of the data."""

    recipe: Recipe
    data: Prepared
    device: torch.device
    steps: int
    begin: Callable[[], None] = lambda: None
    """Called when all is built, before the first step."""

    def examples(self) -> list[Encoded]:
        return chosen(self.data.train, 1)[: self.steps * self.recipe.train.batch]


@dataclass
class Taken:
    """One step; ``seconds`` begin where the step before ended."""

    seconds: float
    loss: float
    sequences: int
    tokens: int  # computed, padding included
    flops: int | None  # of the sequences' own tokens, the head on the rows that count; what else is computed is waste


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- ours


def tract(
    problem: Problem,
    *,
    gradient: str = "exact",
    siblings: int = 1,
    one_by_one: bool = False,
    recompute: str = "none",
    lean: str = "auto",
) -> Iterator[Taken]:
    """tract-fast's own step. ``siblings``: feedbacks of each prompt, which then share it; ``one_by_one``: each sequence
    is a micro-batch; ``recompute``: ``train.activation_checkpointing``; ``lean``: ``model.lean``."""
    recipe = problem.recipe
    examples = chosen(problem.data.train, siblings)[: problem.steps * recipe.train.batch * siblings]
    settings = replace(recipe.train, batch=recipe.train.batch * siblings, activation_checkpointing=recompute)
    if one_by_one:
        settings = replace(settings, max_tokens=max(len(e.ids) for e in examples))
    share = replace(recipe.data, share_prompts="auto" if siblings > 1 else "off")
    loss, model = replace(recipe.loss, gradient=gradient), replace(recipe.model, lean=lean)
    recipe = replace(recipe, train=settings, data=share, loss=loss, model=model)
    with shard.start_ranks() as ranks, StopSignal(loud=False) as stop:
        job = train.assemble(recipe, ranks, replace(problem.data, train=examples), lambda line: None)
        if siblings > 1 and job.sharing.share is None:
            raise DoesNotRun(job.sharing.line)
        problem.begin()
        began = time.perf_counter()
        for step in range(problem.steps):
            record = train.train_step(job, step, stop)
            _sync(ranks.device)
            ended = time.perf_counter()
            # what shared prompts save counts as done: it is the same training
            members = examples[step * settings.batch : (step + 1) * settings.batch]
            yield Taken(ended - began, record["loss"], len(members), record["tokens"], useful_flops(job.work, members))
            began = time.perf_counter()


def useful_flops(work: perf.Work | None, examples: list[Encoded]) -> int | None:
    lengths = [len(e.ids) for e in examples]
    rows = sum(len(e.ids) - e.prompt_len for e in examples)
    return work.flops(lengths, lengths, rows) if work else None


# --- the others


def load(problem: Problem):
    """The causal LM as transformers loads it, trained weights in float32; adapters by peft where there are some."""
    dtype = models.DTYPES[problem.recipe.model.dtype] if problem.recipe.lora.rank else torch.float32
    lm = models.load_lm(problem.recipe.model, dtype=dtype, attention_name="sdpa", config=problem.data.config)
    if problem.recipe.lora.rank:
        models.add_lora(lm, problem.recipe.lora, dtype, problem.recipe.train.seed)
    return lm


def padded(examples: list[dict]) -> dict[str, Tensor]:
    """Right-padded to the longest, as transformers' own collators do."""
    longest = max(len(e["ids"]) for e in examples)
    batch = {
        "input_ids": torch.zeros(len(examples), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(examples), longest, dtype=torch.long),
        "labels": torch.full((len(examples), longest), IGNORED),
        "score_at": torch.tensor([len(e["ids"]) - 3 for e in examples]),  # what predicts the score token
        "scores": torch.tensor([e["score"] for e in examples]),
    }
    for row, e in enumerate(examples):
        ids = torch.as_tensor(e["ids"], dtype=torch.long)
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, e["prompt_len"] : len(ids)] = ids[e["prompt_len"] :]
    return batch


def eager_loss(lm, batch: dict[str, Tensor], scale) -> Tensor:
    """The TRACT loss over all logits: mean cross-entropy of the trained tokens plus the squared error of the score."""
    logits = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits.float()
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    at_score = logits[torch.arange(len(logits), device=logits.device), batch["score_at"]]
    return ce + squared_error(at_score[:, list(scale.token_ids)], batch["scores"], scale)


@torch.no_grad()
def float32_loss(problem: Problem) -> float:
    """``eager_loss`` of the first step in float32."""
    lm = load(problem).float().to(problem.device)
    rows = [
        {"ids": e.ids, "prompt_len": e.prompt_len, "score": e.score}
        for e in problem.examples()[: problem.recipe.train.batch]
    ]
    batch = {name: tensor.to(problem.device) for name, tensor in padded(rows).items()}
    return eager_loss(lm, batch, problem.data.scale).item()


def squared_error(logits: Tensor, scores: Tensor, scale) -> Tensor:
    expected = logits.softmax(-1) @ torch.tensor(scale.values, device=logits.device)
    return (expected - scores).square().mean()


def liger_loss(lm, batch: dict[str, Tensor], scale, dtype: torch.dtype) -> Tensor:
    """``eager_loss`` in ``dtype`` with Liger's fused linear cross-entropy, which needs all tokens' hidden states."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden = hidden_of(lm, batch, dtype)
    weight = lm.get_output_embeddings().weight.to(hidden.dtype)
    ce = LigerFusedLinearCrossEntropyLoss()(
        weight, hidden[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten().contiguous()
    )
    at_score = hidden[torch.arange(len(hidden), device=hidden.device), batch["score_at"]]
    return ce + squared_error((at_score @ weight[list(scale.token_ids)].T).float(), batch["scores"], scale)


def arguments(problem: Problem) -> dict:
    """Settings of Hugging Face's Trainer that say what all contestants do."""
    settings = problem.recipe.train
    return {
        "output_dir": "unused",
        "per_device_train_batch_size": settings.batch,
        "max_steps": problem.steps,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "optim": "adamw_torch_fused",
        "bf16": problem.recipe.model.dtype == "bfloat16",
        "use_cpu": problem.device.type == "cpu",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": problem.device.type == "cuda",
    }


def watched(trainer, problem: Problem, work: perf.Work | None) -> Iterator[Taken]:
    """Steps of a Trainer; its ``compute_loss`` is wrapped to see losses and shapes."""
    from transformers import TrainerCallback

    seen: list[tuple[Tensor, int]] = []
    compute = trainer.compute_loss

    def watch(model, inputs, *rest, **more):
        found = compute(model, inputs, *rest, **more)
        seen.append(((found[0] if isinstance(found, tuple) else found).detach(), inputs["input_ids"].numel()))
        return found

    trainer.compute_loss = watch
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **more) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *args, **more) -> None:
            _sync(problem.device)
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    problem.begin()
    trainer.train()
    examples, batch = problem.examples(), problem.recipe.train.batch
    for step, (loss, tokens) in enumerate(seen):
        members = examples[step * batch : (step + 1) * batch]
        yield Taken(ends[step + 1] - ends[step], loss.item(), len(members), tokens, useful_flops(work, members))


def hugging_face(problem: Problem, *, liger: bool = False) -> Iterator[Taken]:
    """``Trainer`` with padded batches and the loss in plain PyTorch, or with Liger's kernels and loss."""
    from transformers import Trainer, TrainingArguments

    if liger:
        refuse_without_liger(problem.device)
    scale = problem.data.scale
    loss = partial(liger_loss, dtype=models.DTYPES[problem.recipe.model.dtype]) if liger else eager_loss

    class TractTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return loss(model, inputs, scale)

    lm = load(problem)
    work = perf.work_of(models.TractModel(lm).blocks, lm.get_output_embeddings(), lm.config)
    rows = [{"ids": e.ids, "prompt_len": e.prompt_len, "score": e.score} for e in problem.examples()]
    options = arguments(problem)
    # its own fused cross-entropy would be left unused beside ours
    kernels = {"liger_kernel_config": {"fused_linear_cross_entropy": False}, "use_liger_kernel": True} if liger else {}
    trainer = TractTrainer(
        model=lm, args=TrainingArguments(**options, **kernels), train_dataset=rows, data_collator=padded
    )
    yield from watched(trainer, problem, work)


def hidden_of(lm, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Last hidden states in ``dtype``, in which the head would take them: the Trainer's autocast covers the call of the
    whole model alone."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.autocast(batch["input_ids"].device.type, dtype, enabled=dtype != torch.float32):
        return lm.get_decoder()(**inputs, use_cache=False).last_hidden_state.to(dtype)


def refuse_without_liger(device: torch.device) -> None:
    try:
        import liger_kernel  # noqa: F401
    except ImportError as error:
        raise DoesNotRun("liger-kernel is not installed") from error
    if device.type != "cuda":
        raise DoesNotRun("Liger's kernels need a GPU")


def trl(problem: Problem) -> Iterator[Taken]:
    """TRL's ``SFTTrainer`` on prompt and completion: the cross-entropy of the completion, padded batches."""
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise DoesNotRun(f"not installed: {error.name}") from error
    if isinstance(problem.data.tokenizer, range):
        raise DoesNotRun("it needs a tokenizer, and these are random tokens")
    lm = load(problem)
    work = perf.work_of(models.TractModel(lm).blocks, lm.get_output_embeddings(), lm.config)
    rows = [
        {
            "input_ids": [int(i) for i in e.ids],
            "completion_mask": [0] * e.prompt_len + [1] * (len(e.ids) - e.prompt_len),
        }
        for e in problem.examples()
    ]
    options = {**arguments(problem), "gradient_checkpointing": False, "max_length": None, "completion_only_loss": True}
    trainer = SFTTrainer(
        model=lm,
        args=SFTConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=problem.data.tokenizer,
    )
    yield from watched(trainer, problem, work)


CONTESTANTS: dict[str, tuple[str, Callable[[Problem], Iterator[Taken]]]] = {
    "hf": ("Trainer, padded, eager loss", hugging_face),
    "hf-liger": ("Trainer, padded, Liger", lambda p: hugging_face(p, liger=True)),
    "trl": ("TRL SFTTrainer (cross-entropy alone)", trl),
    "exact": ("tract-fast", tract),
    "lean-off": ("tract-fast, model.lean off", lambda p: tract(p, lean="off")),
    "selective": (
        "tract-fast, model.lean off, activation_checkpointing selective",
        lambda p: tract(p, lean="off", recompute="selective"),
    ),
    "exact-1": ("tract-fast, a sequence at a time", lambda p: tract(p, one_by_one=True)),
    "lean": (
        "tract-fast, a sequence at a time, recomputed",
        lambda p: tract(p, one_by_one=True, recompute="full"),
    ),
    "sampled": ("tract-fast, sampled gradient", lambda p: tract(p, gradient="sampled")),
    "shared": ("tract-fast, 3 feedbacks share a prompt", lambda p: tract(p, siblings=3)),
}

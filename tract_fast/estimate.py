"""What a run would do, before it does it: the resolved recipe, the step plan, memory, and one example token by token.

The memory estimate counts what is known (weights, gradients, AdamW state, the loss's logits) and approximates what the
blocks keep for backward by the tensors a Llama-like block saves. On a CPU it adds what was measured there: the process
itself, and memory that the allocator does not give back between tensors. ``docs/results.md`` holds it against runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from tract_fast import optim, recipe as recipes
from tract_fast.data import batch as batches, prompt
from tract_fast.data.prompt import Encoded
from tract_fast.head import choose_loss
from tract_fast.loss.plan import BLOCK_BUDGET, plan_chunks
from tract_fast.loss.sampled import EPS, list_length
from tract_fast.model import DTYPES, add_lora, choose_attention
from tract_fast.prepare import Prepared
from tract_fast.recipe import Recipe
from tract_fast.shard import local_device
from tract_fast.sharing import Sharing, choose_sharing, plan_step

CPU_PROCESS = 450 * 2**20  # Python, torch, transformers, tokenizer, data: measured
CPU_FRAGMENTATION = 0.75  # of the activations, held by malloc beside them: measured with the demo
REFERENCE_LOGITS = 6.25  # tensors of rows x vocabulary that the reference loss holds at its peak: measured
PLANNED_STEPS = 200  # at most this many steps are packed for the plan's averages


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The run in numbers; tokens, rows and keys are of the largest micro-batch among the steps that were planned."""

    steps: int
    epochs: float
    micro_batches: float  # per step, on average
    tokens_per_step: float
    max_tokens: int
    max_rows: int
    max_keys: int  # keys that are gathered for shared prompts
    planned: int


def plan(recipe: Recipe, examples: list[Encoded], world: int = 1, sharing: Sharing | None = None) -> StepPlan:
    """Pack the first steps as training would; ``sharing``: what it shares."""
    sharing = sharing or Sharing("")
    settings = recipe.train
    steps = batches.total_steps(
        len(examples), batch=settings.batch, epochs=settings.epochs, max_steps=settings.max_steps
    )
    micro, tokens, rows, keys, counts = [], [], [], [0], []
    for step in range(min(steps, PLANNED_STEPS)):
        members, packed = plan_step(settings, examples, sharing, step, world)
        parts = [[members[i] for i in part] for rank in packed for part in rank if part]
        micro.append(len(parts))
        layouts = [batches.layout_of(part, share=sharing.share) for part in parts]
        computed = [layout.tokens for layout in layouts]
        tokens += computed
        keys += [sum(map(len, layout.keys())) for layout in layouts if layout.shares]
        rows += [sum(len(e.ids) - e.prompt_len for e in part) for part in parts]
        counts.append(sum(computed))
    return StepPlan(
        steps=steps,
        epochs=steps / batches.steps_per_epoch(len(examples), settings.batch),
        micro_batches=sum(micro) / len(micro),
        tokens_per_step=sum(counts) / len(counts),
        max_tokens=max(tokens),
        max_rows=max(rows),
        max_keys=max(keys),
        planned=len(micro),
    )


def memory(recipe: Recipe, config, step: StepPlan, world: int = 1) -> dict[str, int]:
    """Bytes by purpose on one rank of ``world``, for the largest micro-batch."""
    lm = _meta_model(recipe, config)
    ways = max(1, world // recipe.shard.replicate)  # that weights and their state are split
    host = recipe.shard.cpu_offload and local_device().type == "cuda"  # then they are not in the GPU's memory
    text = config.get_text_config()
    width = DTYPES[recipe.model.dtype].itemsize
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in lm.parameters() if not p.requires_grad)
    blocks, hidden = text.num_hidden_layers, text.hidden_size
    head_dim = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    heads = text.num_attention_heads + 2 * key_heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    # saved per token by one block: the residual stream and its norms (float32 inside), q, k, v, their rotated copies,
    # the attention output, and gate, up, activation and product of the MLP
    in_block = hidden * (2 * 4 + 6 * width) + 2 * heads * head_dim * width + 4 * inner * width
    between_blocks = hidden * width
    every = recipe.train.activation_checkpointing
    if every in ("none", "selective"):
        per_token = blocks * in_block * (0.6 if every == "selective" else 1.0)
    else:
        kept = 1.0 if every == "full" else 1.0 / int(every)
        per_token = blocks * (kept * between_blocks + (1 - kept) * in_block) + in_block
    # keys and values that shared prompts gather are kept in blocks that are not computed again, and in one that is
    gathering = blocks if every == "none" else 1 + (blocks * (1 - 1 / int(every)) if every.isdigit() else 0)
    shared_keys = gathering * 2 * key_heads * head_dim * width * step.max_keys
    device = local_device()
    implementation, _ = choose_loss(recipe.loss, DTYPES[recipe.model.dtype], device, config)
    masters = 0 if host else 4 * trained // ways
    activations = int(per_token * step.max_tokens + shared_keys)
    parts = {
        "frozen weights": 0 if host else frozen * width // ways,
        "trained weights (float32)": masters,
        "weights gathered in the compute dtype": gathered(recipe, lm, width),
        "gradients (float32)": masters,
        "AdamW state (float32)": 2 * masters,
        f"activations of {step.max_tokens} tokens": activations,
        f"loss of {step.max_rows} rows ({implementation})": loss_memory(
            implementation, lm.get_output_embeddings().weight, step.max_rows, device, width, lists_of(recipe, lm)
        ),
    }
    if device.type == "cpu":
        parts |= {
            "the process (CPU)": CPU_PROCESS,
            "held by the allocator (CPU)": int(CPU_FRAGMENTATION * activations),
        }
    return parts


def gathered(recipe: Recipe, lm: nn.Module, width: int) -> int:
    """Bytes of weights that a rank holds whole for the computation; with one rank FSDP2 copies them, too."""
    everything = sum(p.numel() for p in lm.parameters())
    if not recipe.shard.reshard_after_forward:
        return everything * width
    # two blocks (one is computed, the next is on its way), the embedding and the head
    blocks = max((m for m in lm.modules() if isinstance(m, nn.ModuleList)), key=len)
    inside = sum(p.numel() for p in blocks.parameters())
    return (2 * inside // len(blocks) + everything - inside) * width


def lists_of(recipe: Recipe, lm: nn.Module) -> int:
    """Places of a row's list, where the gradient is sampled; 0 where it is exact."""
    if recipe.loss.gradient == "exact":
        return 0
    return list_length(len(lm.get_output_embeddings().weight), len(recipe.score.labels), recipe.loss.eps or EPS)


def loss_memory(
    implementation: str, weight: Tensor, rows: int, device: torch.device, logit_bytes: int, lists: int = 0
) -> int:
    """Bytes that the loss holds at its peak beside the gradients: logits, dX, and dW in float32 if it is summed.
    ``lists``: places of a row's list, of a sampled gradient."""
    n_vocab, hidden = weight.shape
    if implementation == "reference":
        return int(REFERENCE_LOGITS * 4 * rows * n_vocab)
    dx = rows * hidden * (4 + logit_bytes)
    if implementation == "fused":
        return dx + BLOCK_BUDGET + (rows * hidden * logit_bytes if weight.requires_grad else 0)
    trained = weight.requires_grad and not lists
    plan = plan_chunks(rows, n_vocab, hidden, logit_bytes=logit_bytes, trained_weight=trained, device=device.type)
    summed = 4 * n_vocab * hidden if trained and not plan.defer else 0
    return plan.rows * n_vocab * logit_bytes + dx + summed + 8 * rows * lists


def _meta_model(recipe: Recipe, config) -> nn.Module:
    """The model without storage, frozen as it will be."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        if recipe.lora.rank:
            add_lora(lm, recipe.lora, DTYPES[recipe.model.dtype], recipe.train.seed)
    return lm


def show(recipe: Recipe, data: Prepared, start: Path | None) -> None:
    """Print all of it; nothing is trained or written. ``start`` is the checkpoint that the run would go on from."""
    console = Console(highlight=False, soft_wrap=True)
    console.rule("recipe")
    console.print(recipes.dump(recipe), markup=False)
    device = local_device()
    name, reason = choose_attention(recipe.model, data.config, device)
    world = recipe.run.nproc if isinstance(recipe.run.nproc, int) else max(1, torch.cuda.device_count())
    sharing = choose_sharing(recipe, data.config, name, data.train, world)
    step = plan(recipe, data.train, world, sharing)
    console.rule("plan")
    first, last = (optim.learning_rate(s, step.steps, recipe.train) for s in (0, step.steps - 1))
    loss, why = choose_loss(recipe.loss, DTYPES[recipe.model.dtype], device, data.config)
    sequences = min(recipe.train.batch, len(data.train))
    console.print(
        f"{step.steps} steps = {step.epochs:.2f} epochs of {len(data.train)} examples; {sequences} sequences, "
        f"{step.tokens_per_step:.0f} tokens and {step.micro_batches:.1f} micro-batches a step "
        f"(first {step.planned} steps packed)\n"
        f"lr {first:.2e} at first, {recipe.train.lr:.2e} at its peak, {last:.2e} at last; "
        f"{len(data.held_out)} held-out examples; {len(data.left_out)} records left out\n"
        f"{sharing.line}\n"
        f"device {device}; attention {name} ({reason}); loss {loss} ({why})\n"
        f"{recipe.run.dir}: {f'goes on from {start.name}' if start else 'a new run'}",
        markup=False,
    )
    console.rule(f"memory (estimate, one rank of {world})")
    table = Table("what", "MiB", box=None)
    parts = memory(recipe, data.config, step, world)
    for name, size in {**parts, "in all": sum(parts.values())}.items():
        table.add_row(name, f"{size / 2**20:,.0f}")
    console.print(table)
    console.rule(Text(f"one example: {data.train[0].id}"))
    console.print(prompt.show(data.tokenizer, data.scale, data.train[0]))

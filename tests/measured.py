"""Training steps whose tensors are counted, in a process of their own: ``python -m tests.measured NAME DIR``.

The most bytes above what was held when a step began, which is weights and AdamW's state: on a GPU CUDA's allocator
keeps count; on a CPU PyTorch's profiler says what its allocator has given out, and buffers that our C++ takes elsewhere
(``native.scratch``) are taken from there, so that they are counted too. Several ranks are one process with PyTorch's
fake process group: it sends nothing, and FSDP2 holds what it would.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from tests.tiny import tiny_tokenizer
from tests.tiny_models import random_lm
from tests.tiny_runs import tiny_recipe, write_data
from tract_fast import launch, memory, recipe as recipes, shard, train, weights
from tract_fast.loss import native
from tract_fast.prepare import prepare
from tract_fast.recipe import Recipe
from tract_fast.shard import Ranks

SIZE = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
MODELS = {
    "llama": lambda v, **size: LlamaConfig(vocab_size=v, tie_word_embeddings=False, **SIZE, **size),
    "llama_tied": lambda v, **size: LlamaConfig(vocab_size=v, tie_word_embeddings=True, **SIZE, **size),
    "qwen3": lambda v, **size: Qwen3Config(vocab_size=v, **SIZE, **size),
    "gemma3": lambda v, **size: Gemma3TextConfig(vocab_size=v, sliding_window=32, **SIZE, **size),
}
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 32}
DEEP = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 32}
THIN = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 16}
BF16 = {"model__dtype": "bfloat16"}
# family, vocabulary, sizes, ranks, settings
CASES: dict[str, tuple[str, int, dict, int, dict]] = {
    "full, float32": ("llama", 8000, WIDE, 1, {}),
    "LoRA, bfloat16, tied": ("llama_tied", 8000, WIDE, 1, {"lora__rank": 8, **BF16}),
    "recomputed, tied": ("llama_tied", 8000, DEEP, 1, {"train__activation_checkpointing": "full"}),
    "every second recomputed, qwen3, shared prompts": (
        "qwen3", 8000, DEEP, 1, {"train__activation_checkpointing": "2", "data__share_prompts": "auto"},
    ),
    "selective, LoRA, micro-batches": (
        "llama", 8000, DEEP, 1,
        {"train__activation_checkpointing": "selective", "lora__rank": 64, "train__max_tokens": 700},
    ),
    "several chunks, dW in float32": ("llama_tied", 160_000, THIN, 1, {**BF16, "train__batch": 80}),
    "sampled, micro-batches": ("llama", 16_000, WIDE, 1, {"loss__gradient": "sampled", "train__max_tokens": 1200}),
    "full, micro-batches, tied": ("llama_tied", 16_000, THIN, 1, {"train__max_tokens": 200}),
    "two replicas, bfloat16": ("llama", 8000, WIDE, 2, {**BF16, "shard__replicate": 2}),
    "four ranks, gemma3, bfloat16, micro-batches": ("gemma3", 8000, WIDE, 4, {**BF16, "train__max_tokens": 300}),
}  # fmt: skip


def make(name: str, folder: Path) -> Recipe:
    """The recipe of a case, written to ``folder`` with its model and its data."""
    family, vocabulary, size, _, settings = CASES[name]
    path = folder / family
    tiny_tokenizer().save_pretrained(path)
    random_lm(MODELS[family](vocabulary, **size)).save_pretrained(path)
    siblings = 6 if "data__share_prompts" in settings else 1
    write_data(folder / "data.jsonl", n=settings.get("train__batch", 30), siblings=siblings)
    usual = {"train__batch": 30, "train__max_tokens": 8000, "train__shuffle": False, "train__max_steps": 2}
    usual |= {"data__holdout": 0.0, "data__share_prompts": "off"}
    recipe = tiny_recipe(folder, family=family, **usual | settings)
    (folder / "recipe.yaml").write_text(recipes.dump(recipe))
    return recipe


def measure(recipe: Recipe, world: int) -> dict[str, int]:
    """``peak``: the most bytes of tensors in the second step above those at its start, ``held``."""
    data = prepare(recipe, lambda text: None)
    with ranks_of(world, recipe.shard.replicate) as ranks, launch.StopSignal(loud=False) as stop:
        job = train.assemble(recipe, ranks, data, lambda text: None)
        native.scratch = lambda like, rows, columns: like.new_empty(rows, columns)
        train.train_step(job, 0, stop)
        held = memory.holdings(job.model, job.optimizer)
        peak = peak_of(lambda: train.train_step(job, 1, stop), ranks.device)
    assert held["gradients"] == 0
    return {"peak": peak, "held": held["weights"] + held["AdamW state"]}


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors inside ``step`` above those at its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    return max(itertools.accumulate(allocations(seen)))


@contextmanager
def ranks_of(world: int, replicate: int) -> Iterator[Ranks]:
    """This process as the first of so many ranks."""
    if world == 1:
        with shard.start_ranks() as ranks:
            yield ranks
        return
    device = torch.device("cpu")
    weights._of_any_rank = lambda text: text  # objects cannot be exchanged with ranks that are not there
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    yield Ranks(0, world, device, shard.make_mesh(device, world, replicate))
    dist.destroy_process_group()


def allocations(seen: torch.profiler.profile) -> list[int]:
    """Bytes of each call of the allocator in turn, negative where they are given back; of what was there before the
    profiler began nothing is known."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(measure(make(name, folder), CASES[name][3])))

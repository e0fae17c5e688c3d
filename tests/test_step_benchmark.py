"""The benchmark of a step compares like with like: every contestant has the same losses, also after updates."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import judgements, parts, step, trainers
from tests.tiny_runs import tiny_recipe, write_data
from tract_fast import recipe as recipes, shard, train
from tract_fast.launch import StopSignal
from tract_fast.prepare import prepare

CPU = torch.device("cpu")
OURS = ("exact", "selective", "exact-1", "lean")


def problem(tmp_path, **changes):
    write_data(tmp_path / "data.jsonl", n=36, siblings=3)
    changes = {"train__schedule": "constant", "train__warmup": 0.0, "train__max_tokens": 2000, **changes}
    recipe = tiny_recipe(tmp_path, train__shuffle=False, data__holdout=0.0, train__batch=3, **changes)
    data = prepare(replace(recipe, data=replace(recipe.data, share_prompts="off")), lambda text: None)
    return trainers.Problem(recipe, data, CPU, steps=3)


@pytest.mark.parametrize("rank", [0, 4])
def test_all_train_alike(tmp_path, rank):
    """In float32 the losses of the first steps are Trainer's, before and after updates."""
    given = problem(tmp_path, lora__rank=rank)
    reference = list(trainers.hugging_face(given))
    assert [t.sequences for t in reference] == [3, 3, 3]
    assert reference[0].loss == pytest.approx(trainers.float32_loss(given), rel=1e-5)
    for name in OURS:
        taken = list(trainers.CONTESTANTS[name][1](given))
        assert [t.loss for t in taken] == pytest.approx([t.loss for t in reference], rel=2e-4), name
        assert [t.flops for t in taken] == [t.flops for t in reference], name
        assert taken[0].tokens < reference[0].tokens, "padding is computed by Trainer alone"
    unchanged = list(trainers.hugging_face(problem(tmp_path, lora__rank=rank, train__lr=1e-12)))
    assert unchanged[2].loss != pytest.approx(reference[2].loss, rel=2e-4), "updates are seen in the losses"


def test_hidden_states_for_ligers_loss_are_in_the_runs_dtype(tmp_path):
    """Outside of the call that Trainer's autocast covers."""
    given = problem(tmp_path)
    lm = trainers.load(given)
    rows = [{"ids": e.ids, "prompt_len": e.prompt_len, "score": e.score} for e in given.examples()]
    for dtype in (torch.bfloat16, torch.float32):
        assert trainers.hidden_of(lm, trainers.padded(rows), dtype).dtype == dtype
    assert lm.get_output_embeddings().weight.dtype == torch.float32


def test_siblings_share(tmp_path):
    given = problem(tmp_path)
    (first, *_) = trainers.tract(given, siblings=3)
    assert first.sequences == 9
    examples = trainers.chosen(given.data.train, 3)[:9]
    assert first.tokens < sum(len(e.ids) for e in examples)
    assert len(trainers.chosen(given.data.train, 1)) == 12


def test_random_judgements_of_real_lengths(tmp_path, monkeypatch):
    """A whole run of the benchmark without texts or weights, in processes of its own."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "vocab_size": 500}
    monkeypatch.setitem(judgements.CONFIGS, "tiny", ("llama", small))
    folder = judgements.make_model("tiny", tmp_path / "tiny", CPU)
    spec = {"model": "tiny", "path": str(folder), "gguf_file": None, "data": None, "dtype": "float32", "launched": 0.0}
    spec |= {"batch": 2, "steps": 2}
    names = ("hf", "exact", "selective", "sampled", "shared", "trl")
    found = {name: [step.launch({**spec, "contestant": name})] for name in names}
    assert "tokenizer" in found["trl"][0]["not_run"] or "not installed" in found["trl"][0]["not_run"]
    rows = [step.row_of(name, "tiny", runs, peak=1e12) for name, runs in found.items()]
    float32 = step.launch({**spec, "contestant": step.FLOAT32, "steps": 1})["loss"]
    step.relate(rows, float32)
    errors = {r["contestant"]: r.get("loss_error") for r in rows}
    assert (
        errors["hf"] < 1e-5
        and errors["exact"] < 1e-4
        and errors["selective"] < 1e-4
        and errors["shared"] is None
        and not step.wrong(rows)
    )
    by_name = {r["contestant"]: r for r in rows}
    assert by_name["shared"]["sequences"] == 6 and by_name["exact"]["exact_time_ratio"] == 1
    _, data = judgements.random_problem("tiny", tmp_path / "again", CPU, 4)
    assert len(data.train) == 320
    assert "| tiny |" in step.table(rows)
    step.plot(rows, tmp_path / "step.png")
    lengths = [len(e.ids) for e in judgements.read(judgements.recipe_of("tiny", str(folder), 2), real=False).train]
    assert len(lengths) == 960 and max(lengths) == 1882 and sum(lengths) / 960 == pytest.approx(1152, abs=1)


def test_another_loss_is_told():
    row = {"model": "m", "sequences": 4, "samples_per_second": 1.0, "peak_bytes": 1}
    rows = [{**row, "contestant": name, "losses": [loss]} for name, loss in (("hf", 3.06), ("exact", 3.36))]
    step.relate(rows, 3.0)
    (told,) = step.wrong(rows)
    assert told.startswith("m exact: its first loss is 12.0%")
    rows[1]["losses"] = [float("nan")]
    step.relate(rows, 3.0)
    assert step.wrong(rows)


def test_a_contestant_that_fails_is_a_line(tmp_path):
    spec = {"model": "x", "path": str(tmp_path), "gguf_file": None, "data": None, "dtype": "float32", "batch": 2}
    found = step.launch({**spec, "steps": 1, "contestant": "exact"})
    assert found["not_run"].startswith("failed: ")
    rows = [step.row_of("exact", "x", [found], 1.0)]
    step.relate(rows, None)
    assert "failed: " in step.table(rows)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_part_of_a_step_has_its_time(tmp_path, family):
    recipe = tiny_recipe(tmp_path, family=family, train__max_steps=4)
    data = prepare(recipe, lambda text: None)
    with shard.start_ranks() as ranks:
        seconds, wall = parts.record(train.assemble(recipe, ranks, data, lambda text: None), 2)
    for part in ("attention", "attention projections", "MLP", "norm", "head and loss"):
        assert seconds[part, "forward"] > 0 and (seconds[part, "backward"] > 0 or part == "head and loss"), part
    for part in ("optimizer", "data", "clip", "sharding"):
        assert sum(s for (name, _), s in seconds.items() if name == part) > 0, part
    rows = parts.rows_of(seconds, wall, 2)
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert next(r["share"] for r in rows if r["part"] == "rest") < 0.3
    assert "| idle |" in parts.table(rows)


def test_backward_belongs_to_the_part_of_its_forward(tmp_path):
    """All of the time of a slow backward is its module's."""
    recipe = tiny_recipe(tmp_path)
    data = prepare(recipe, lambda text: None)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            (torch.randn(1200, 1200) @ torch.randn(1200, 1200)).sum()
            return grad

    with shard.start_ranks() as ranks, StopSignal(loud=False) as stop:
        job = train.assemble(recipe, ranks, data, lambda text: None)
        mlp = job.model.blocks[0].mlp
        inner = mlp.forward
        mlp.forward = lambda x: Slow.apply(inner(x))
        train.train_step(job, 0, stop)
        parts.mark(job.model)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            train.train_step(job, 1, stop)
    seconds = parts.attribute(found.events(), "cpu")
    backward = {part: s for (part, way), s in seconds.items() if way == "backward"}
    assert max(backward, key=backward.get) == "MLP"


def test_the_benchmarks_help():
    for name in ("step", "parts"):
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "Writes" in done.stdout, done.stderr


def test_a_bad_recipe_is_told_by_parts(tmp_path, monkeypatch):
    """What cannot work, and what comes to light when data is read: one line."""
    (tmp_path / "bad.yaml").write_text("model: {pth: x}")
    (tmp_path / "lost.yaml").write_text(recipes.dump(tiny_recipe(tmp_path, data__train=str(tmp_path / "lost.json"))))
    for name, told in (("bad", "error: model.pth .*no such setting"), ("lost", "error: data.train: .*no such file")):
        monkeypatch.setattr(sys, "argv", ["parts", str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match=told):
            parts.main()


@pytest.mark.parametrize("minutes", ["nan", "0", "-1"])
def test_minutes_are_some(monkeypatch, minutes):
    monkeypatch.setattr(sys, "argv", ["step", f"--minutes={minutes}"])
    with pytest.raises(SystemExit, match="must be a number above 0"):
        step.main()


def test_committed_lengths():
    entries = json.loads(judgements.LENGTHS.read_text())
    assert len(entries) == 320 and all(len(lengths) == len(scores) == 3 for _, lengths, scores in entries)

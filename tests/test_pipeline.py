"""``run``: the steps in order, each as its own command makes it, skipped when done, refused when made otherwise."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.kills import killed_again_and_again, sizes
from tests.servers import stand_command
from tests.tiny_runs import tiny_recipe
from tract_fast import checkpoint, cli, pipeline, recipe as recipes, train
from tract_fast.errors import UserError
from tract_fast.recipe import Evaluate, Generate, Recipe

SAMPLING = Generate(max_new_tokens=40, batch=8)


def small(folder: Path, **changes) -> Recipe:
    """A pipeline over the tiny model that learns to write its score sentence."""
    settings = {"train__max_steps": 60, "train__lr": 1e-2, "train__batch": 8, "data__holdout": 0.25} | changes
    return replace(tiny_recipe(folder, **settings), generate=SAMPLING)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Recipe:
    recipe = small(tmp_path_factory.mktemp("pipeline"))
    assert pipeline.run(recipe) == 0
    return recipe


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """What a run made, without times; of weights the tensors, since the order of a safetensors header is chance."""
    kept = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".jsonl", ".json")]
    return {str(p.relative_to(folder)): content(p) for p in kept if p.name != "metrics.jsonl"}


def content(path: Path) -> bytes:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors = sorted(load_file(path).items())
    return b"".join(name.encode() + t.numpy().tobytes() for name, t in tensors)


def test_second_stage_is_the_seed_model_on_the_judges_own_rationales(done):
    folder = Path(done.run.dir)
    first, second = (recipes.load(folder / stage / "recipe.yaml", []) for stage in ("stage1", "stage2"))
    assert second.model == first.model == done.model
    assert second.data.train == str(folder / "generate" / "rationales.jsonl")
    own, held_out = lines(folder / "generate" / "rationales.jsonl"), lines(folder / "held_out.jsonl")
    assert len(own) == 18
    assert len(held_out) == 6
    assert not {r["question"] for r in own} & {r["question"] for r in held_out}
    annotated = {(r["prompt"], r["score"]) for r in lines(Path(done.data.train))}
    assert {(r["prompt"], int(r["score"])) for r in [*own, *held_out]} <= annotated
    found = json.loads((folder / "evaluate" / "held_out" / "metrics.json").read_text())
    assert found["n"] == 6
    assert {r["question"] for r in lines(folder / "evaluate" / "held_out" / "predictions.jsonl")} == {
        r["question"] for r in held_out
    }
    evals = [r["eval"]["n"] for r in lines(folder / "stage2" / "metrics.jsonl") if "eval" in r]
    assert evals == [6, 6]


def test_rationales_from_a_server_of_each_judge(done, tmp_path, monkeypatch, capsys):
    stand_command(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    folder = shutil.copytree(done.run.dir, tmp_path / "run")
    generate = replace(done.generate, backend="vllm")
    recipe = replace(done, run=replace(done.run, dir=str(folder)), generate=generate)
    with pytest.raises(UserError, match=r"generate\.backend"):
        pipeline.run(recipe)
    assert pipeline.run(recipe, begin="generate", until="generate") == 0
    assert "vllm serve" in capsys.readouterr().out
    assert len(lines(folder / "generate" / "rationales.jsonl")) == 18
    assert "vllm" in json.loads((folder / "generate" / "settings.json").read_text())["dtype"]


def test_a_server_cannot_have_the_judges_of_a_run(done):
    with pytest.raises(UserError, match="no server has them"):
        pipeline.run(replace(done, generate=replace(done.generate, backend="http://127.0.0.1:1")))


def test_a_run_belongs_to_one_process(done):
    for folder, work in ((done.run.dir, pipeline.run), (f"{done.run.dir}/stage1", train.run)):
        recipe = replace(done, run=replace(done.run, dir=folder))
        with checkpoint.locked(Path(folder), "run.dir"), pytest.raises(UserError, match="another process"):
            work(recipe)


def test_evaluation_data_is_read_before_any_work(tmp_path, capsys):
    recipe = small(tmp_path, data__holdout=0.0)
    whole = Path(recipe.data.train).read_text()
    broken = tmp_path / "broken.jsonl"
    broken.write_text(whole + '{"prompt": "p"}\n')
    evaluation = Evaluate(data=(str(broken),))
    with pytest.raises(UserError, match=r"broken.jsonl:25"):
        pipeline.run(replace(recipe, evaluate=evaluation))
    assert not (Path(recipe.run.dir) / "stage1").exists()
    broken.write_text(whole)
    recipe = replace(recipe, evaluate=evaluation, train=replace(recipe.train, max_steps=1))
    assert pipeline.run(recipe, until="stage1") == 0
    assert "questions of evaluate.data" in capsys.readouterr().out


def test_finished_steps_are_skipped(done, capsys):
    before = files(Path(done.run.dir))
    assert pipeline.run(done) == 0
    shown = capsys.readouterr().out
    assert shown.count("done before") == 4
    assert "step 1/" not in shown
    assert files(Path(done.run.dir)) == before


def test_steps_made_otherwise_are_refused_by_name(done):
    other = replace(done, generate=replace(done.generate, seed=7))
    with pytest.raises(UserError, match=r"generate was made with other .*\(generate.seed\): --from generate"):
        pipeline.run(other)
    other = replace(done, loss=replace(done.loss, regression_weight=2.0))
    with pytest.raises(UserError, match=r"stage1 was made with .*loss.regression_weight"):
        pipeline.run(other)
    data = Path(done.data.train)
    whole = data.read_bytes()
    data.write_bytes(whole + b"\n")
    with pytest.raises(UserError, match=r"stage1 was made with other settings or data \(files\)"):
        pipeline.run(done)
    data.write_bytes(whole)


def test_until_and_from(done, tmp_path, capsys):
    folder = shutil.copytree(Path(done.run.dir), tmp_path / "run")
    recipe = replace(done, run=replace(done.run, dir=str(folder)))
    whole = files(folder)
    assert pipeline.run(recipe, begin="stage2", until="stage2") == 0
    shown = capsys.readouterr().out
    assert shown.count("removed: ") == 2
    assert not (folder / "evaluate").exists()
    assert pipeline.run(recipe) == 0
    same = {name: data for name, data in files(folder).items() if "recipe" not in name}
    assert set(same) == set(whole)
    for name in ("generate/rationales.jsonl", "stage2/judge/model.safetensors", "evaluate/held_out/predictions.jsonl"):
        assert same[name] == whole[name]
    other = replace(recipe, generate=replace(recipe.generate, seed=7))
    with pytest.raises(UserError, match=r"generate was made with other"):
        pipeline.run(other, begin="stage2")
    with pytest.raises(UserError, match=r"--until generate comes before --from stage2"):
        pipeline.run(recipe, begin="stage2", until="generate")
    gone = replace(recipe, data=replace(recipe.data, train="nope.jsonl"))
    with pytest.raises(UserError, match=r"nope.jsonl"):
        pipeline.run(gone, begin="stage1")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(recipe.data.train).read_text() + '{"prompt": "p"}\n')
    with pytest.raises(UserError, match=r"broken.jsonl:25"):
        pipeline.run(replace(recipe, data=replace(recipe.data, train=str(broken))), begin="stage1")
    with pytest.raises(UserError, match=r"evaluate.data: .*broken.jsonl:25"):
        pipeline.run(replace(recipe, evaluate=replace(recipe.evaluate, data=(str(broken),))), begin="stage1")
    with pytest.raises(UserError, match=r"model.path = "):
        pipeline.run(replace(recipe, model=replace(recipe.model, path="./gone")), begin="stage1")
    assert files(folder).keys() == whole.keys()  # refused before anything is removed
    shutil.rmtree(folder / "evaluate")
    assert pipeline.run(recipe) == 0
    assert (folder / "evaluate" / "held_out" / "metrics.json").is_file()
    with pytest.raises(UserError, match=r"--until stage3: the steps of this recipe are stage1, generate"):
        pipeline.run(recipe, until="stage3")


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("stage1/judge", "stage1"),
        ("generate/rationales.jsonl", "generate"),
        ("stage2/judge/tract.json", "stage2"),
        ("evaluate/held_out", "evaluate"),
    ],
)
def test_a_step_whose_product_is_gone_is_made_again(done, capsys, part, step):
    folder = Path(done.run.dir)
    whole = files(folder)
    if (folder / part).is_dir():
        shutil.rmtree(folder / part)
    else:
        (folder / part).unlink()
    assert pipeline.run(done) == 0
    shown = capsys.readouterr().out
    assert f"── {step}: {folder / step}" in shown and shown.count("done before") == 3
    assert files(folder) == whole


def test_a_step_that_was_begun_otherwise(tmp_path, monkeypatch):
    """Is named with the way out, which keeps the steps before; what leaves the result as it is may change."""
    recipe = small(tmp_path, train__max_steps=2)
    monkeypatch.setattr(pipeline.launch, "train", lambda recipe: train.run(recipe) or 75)
    assert pipeline.run(recipe) == 75
    with pytest.raises(UserError, match=r"stage1 was begun with other .*\(train.lr\): --from stage1 removes it"):
        pipeline.run(replace(recipe, train=replace(recipe.train, lr=0.5)))
    monkeypatch.undo()
    slower = replace(recipe, train=replace(recipe.train, lr=0.5))
    assert pipeline.run(slower, begin="stage1", until="stage1") == 0
    other = replace(slower, train=replace(slower.train, max_tokens=300, activation_checkpointing="full"))
    assert pipeline.run(other, until="stage1") == 0


def test_continued_from_the_first_stage_on_both_kinds_of_rationales(done, tmp_path):
    folder = shutil.copytree(Path(done.run.dir), tmp_path / "run")
    recipe = replace(done, run=replace(done.run, dir=str(folder)))
    recipe = replace(recipe, stage2=replace(recipe.stage2, start="stage1", rationales="both"))
    assert pipeline.run(recipe, begin="stage2", until="stage2") == 0
    second = recipes.load(folder / "stage2" / "recipe.yaml", [])
    assert second.model.path == str(folder / "stage1" / "judge")
    mixed = lines(folder / "annotated_and_own.jsonl")
    assert second.data.train == str(folder / "annotated_and_own.jsonl")
    assert len(mixed) == 36
    assert sum(r["id"].endswith("/own") for r in mixed) == 18


def test_one_stage_alone(tmp_path):
    recipe = small(tmp_path, train__max_steps=2, data__rationale="drop")
    with pytest.raises(UserError, match=r"set stage2.train: false"):
        pipeline.run(recipe)
    recipe = replace(recipe, stage2=replace(recipe.stage2, train=False))
    assert pipeline.run(recipe) == 0
    folder = Path(recipe.run.dir)
    assert sorted(p.name for p in folder.iterdir()) == ["evaluate", "stage1", "steps.json"]
    assert json.loads((folder / "evaluate" / "held_out" / "metrics.json").read_text())["rationales"] == "none"


def test_what_cannot_be_evaluated_is_refused_at_once(tmp_path):
    recipe = small(tmp_path, data__holdout=0.0)
    with pytest.raises(UserError, match=r"set data.holdout or evaluate.data"):
        pipeline.run(recipe)
    cold = replace(recipe, data=replace(recipe.data, holdout=0.25), evaluate=replace(recipe.evaluate, n=3))
    with pytest.raises(UserError, match=r"evaluate.n = 3: must be 1 at generate.temperature 0"):
        pipeline.run(replace(cold, generate=replace(cold.generate, temperature=0.0)))
    fresh = replace(cold, evaluate=recipe.evaluate, run=replace(cold.run, dir=str(tmp_path / "fresh")))
    with pytest.raises(UserError, match=r"has no steps.json: no step has begun"):
        pipeline.run(fresh, begin="stage1")
    twice = replace(recipe, evaluate=replace(recipe.evaluate, data=("a/x.json", "b/x.jsonl")))
    with pytest.raises(UserError, match=r"two of them have the same name"):
        pipeline.run(twice)
    assert not Path(recipe.run.dir).exists()


@pytest.mark.soak
def test_killed_at_random_instants(tmp_path):
    """10 SIGKILLs and more; afterwards the files are those of a run that was never killed."""
    recipe = small(tmp_path, checkpoint__every=10)
    whole = replace(recipe, run=replace(recipe.run, dir=str(tmp_path / "whole")))
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipe))
    command = [sys.executable, "-m", "tract_fast", "run", str(tmp_path / "recipe.yaml")]
    folder = Path(recipe.run.dir)
    options = {"most": 20, "rng": random.Random(0), "within": 0.5}
    kills = killed_again_and_again(command, lambda: sizes(folder), **options)
    print(f"{kills} kills")
    assert kills >= 10
    assert pipeline.run(recipe) == pipeline.run(whole) == 0
    made, wanted = files(folder), files(Path(whole.run.dir))
    assert set(made) == set(wanted)
    for name, data in wanted.items():
        assert made[name].replace(b"/run/", b"/whole/") == data, name


def test_a_stopped_training_ends_the_run_with_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.launch, "train", lambda recipe: 75)
    recipe = small(tmp_path)
    assert pipeline.run(recipe) == 75
    assert list(pipeline.records(Path(recipe.run.dir))) == ["stage1 begun"]


def test_command(done, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(done))
    assert cli.main(["run", str(path), "--until", "generate"]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert cli.main(["run", str(path), "--from", "nothing"]) == 2
    assert "--from nothing: the steps of this recipe are" in capsys.readouterr().err
    assert cli.main(["run", str(path), "--generate.n", "0"]) == 2
    assert "generate.n = 0: must be above 0" in capsys.readouterr().err
    assert cli.main(["run", str(path), "--train.lrr", "1"]) == 2

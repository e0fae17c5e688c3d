"""``generate``: records that ``train`` reads, draws of their own for each example, the health of what was written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_runs import tiny_recipe
from tract_fast import cli, generate, train
from tract_fast.data.feedback import read_examples, split_by_question
from tract_fast.errors import UserError
from tract_fast.generate import Written, faults_of, repeated
from tract_fast.judge import Judge
from tract_fast.judging import Item, Source
from tract_fast.recipe import Generate

SHORT = Generate(n=2, max_new_tokens=40, batch=6)
OPTIONS = {"labels": ("1", "2", "3", "4", "5"), "values": (1, 2, 3, 4, 5), "rationale": "keep", "on_error": "fail"}


def quiet(line: str) -> None:
    pass


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rationales.jsonl").read_text().splitlines()]


def source(trained: Path) -> Source:
    return Source(data=str(trained.parent / "data.jsonl"), holdout=0.25)


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("generated")
    generate.run(str(trained), source(trained), out, SHORT, say=quiet)
    return out


def test_every_training_example_gets_rationales_and_keeps_its_score(trained, done):
    examples = read_examples(str(trained.parent / "data.jsonl"), **OPTIONS).examples
    mine, held_out = split_by_question(examples, 0.25, 42)
    health = json.loads((done / "health.json").read_text())
    assert health["n"] == 2 * len(mine)
    assert health["kept"] == len(records(done)) == 2 * len(mine) - health["faults"]["empty"]
    assert {r["question"] for r in records(done)} == {e.question for e in mine}
    own = {f"{e.id}/{k}": e for e in mine for k in range(2)}
    for record in records(done):
        e = own[record["id"]]
        assert (record["prompt"], float(record["score"])) == (e.prompt, e.score)
    predictions = {r["id"]: r for r in map(json.loads, (done / "predictions.jsonl").read_text().splitlines())}
    for e in mine:
        texts = [d["rationale"] for d in predictions[e.id]["draws"]]
        assert texts == [r["rationale"] for r in records(done) if r["id"].startswith(f"{e.id}/")]
    assert len({r["rationale"] for r in records(done)}) > len(mine) // 2
    assert not {e.question for e in held_out} & {r["question"] for r in records(done)}


def test_train_reads_what_generate_writes(trained, done, tmp_path):
    recipe = tiny_recipe(trained.parent, run="stage2", train__max_steps=1)
    recipe = replace(recipe, data=replace(recipe.data, train=str(done / "rationales.jsonl"), holdout=0.0))
    recipe = replace(recipe, run=replace(recipe.run, dir=str(tmp_path / "stage2")))
    assert train.run(recipe) == 0


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(trained, done, tmp_path, part):
    out = shutil.copytree(done, tmp_path / "out")
    whole = (done / "predictions.jsonl").read_bytes()
    (out / "predictions.jsonl").write_bytes(whole[: int(part * len(whole))])
    (out / "rationales.jsonl").unlink()
    generate.run(str(trained), source(trained), out, SHORT, say=quiet)
    for name in ("predictions.jsonl", "rationales.jsonl", "health.json"):
        assert (out / name).read_bytes() == (done / name).read_bytes()


def test_examples_that_share_a_prompt_get_draws_of_their_own(trained, tmp_path):
    data = tmp_path / "bench.jsonl"
    bench = {"instruction": "Is it kind?", "gpt4_score": [2, 4], "gpt4_feedback": ["the reply is curt", "kind"]}
    data.write_text(json.dumps(bench) + "\n" + json.dumps({"prompt": "Other?", "score": 3.5, "weight": 2}) + "\n")
    health = generate.run(str(trained), Source(data=str(data)), tmp_path / "out", SHORT, say=quiet)
    found = records(tmp_path / "out")
    assert [r["score"] for r in found] == ["2", "2", "4", "4", 3.5, 3.5]
    assert [r["weight"] for r in found] == [1.0] * 4 + [2.0] * 2
    assert len({r["rationale"] for r in found[:4]}) > 1
    judge = Judge.from_pretrained(trained)
    four = judge.score("Is it kind?", n=4, max_new_tokens=40)
    assert [r["rationale"] for r in found[:4]] == [d.rationale for d in four.draws]
    assert health["words_annotated"] == [1.75, 2.5, 3.25]  # of 4 words and of 1: the third record has no rationale


def written(text: str, **changes) -> Written:
    item, words = Item("a", "p", "", 3.0, "q"), text.split()
    one = Written(item, 0, text, len(words), repeated(words), expected_score=3.5, complete=True, tokens=9)
    return replace(one, **changes)


@pytest.mark.parametrize(
    ("one", "faults"),
    [
        (written("six words of no great note"), []),
        (written("", complete=False), ["empty", "no_score", "length"]),
        (written("so cut off in the middle", complete=False, tokens=40), ["no_score", "truncated"]),
        (written("so on it goes " * 4), ["repeated"]),
        (written("too short"), []),
        (written("short"), ["length"]),
        (written("a b c d e f g", expected_score=4.01), ["disagree"]),
        (written("a b c d e f g", expected_score=1.9), ["disagree"]),
        (written("a b c d e f g", expected_score=2.0), []),
    ],
)
def test_faults(one, faults):
    assert list(faults_of(one, 8, 4.0, 40)) == faults


def test_length_is_no_fault_where_nothing_is_annotated():
    assert list(faults_of(written("short"), None, 4.0, 40)) == []


def test_repeated_is_the_share_of_ngrams_that_came_before():
    assert repeated(["a", "b", "c", "d", "e", "f"]) == 0
    assert repeated(["a", "b", "c"]) == 0
    assert repeated(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repeated(["a"] * 10) == pytest.approx(6 / 7)


def test_what_drop_names_is_left_out_and_counted(trained, done, tmp_path):
    out = shutil.copytree(done, tmp_path / "out")
    health = generate.run(str(trained), source(trained), out, replace(SHORT, drop=("disagree", "no_score")), say=quiet)
    left_out = health["n"] - health["kept"]
    assert 0 < health["faults"]["disagree"] <= left_out <= sum(health["faults"].values())
    draws = {
        f"{r['id']}/{k}": (abs(d["expected_score"] - r["label"]), d["complete"])
        for r in map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
        for k, d in enumerate(r["draws"])
    }
    good = {id for id, (error, complete) in draws.items() if error <= 1 and complete}
    assert {r["id"] for r in records(out)} == good


def test_a_judge_without_rationales_writes_none(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "writes", False)
    with pytest.raises(UserError, match=r"was trained without rationales"):
        generate.run(str(trained), source(trained), tmp_path / "out", SHORT, say=quiet)


def test_command(trained, tmp_path, capsys):
    words = ["generate", str(trained), str(trained.parent / "data.jsonl"), "--holdout", "0.25", "--limit", "3"]
    words += ["--max-new-tokens", "40", "--out", str(tmp_path / "out"), "--drop", "truncated", "repeated"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "3 rationales" in shown
    assert "truncated, left out" in shown
    assert "own score: pearson" in shown
    assert cli.main([*words, "--batch", "0"]) == 2
    assert "generate.batch = 0: must be at least 1" in capsys.readouterr().err

"""``report``: one page from all that is below a folder, with strangers' words escaped."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.tiny_runs import tiny_recipe
from tract_fast import cli, evaluate, generate, page, train
from tract_fast.errors import UserError
from tract_fast.judging import Source
from tract_fast.recipe import Generate, Sampling


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """A training, two evaluations and a generation."""
    root = tmp_path_factory.mktemp("several")
    data = Source(data=str(trained.parent / "data.jsonl"), holdout=0.25)
    evaluate.run(str(trained), data, root / "two", Sampling(n=2, max_new_tokens=40), say=quiet)
    evaluate.run(str(trained), data, root / "given", Sampling(), teacher_forced=True, say=quiet)
    generate.run(str(trained), data, root / "own", Generate(max_new_tokens=40), say=quiet)
    recipe = tiny_recipe(trained.parent, train__max_steps=2)
    assert train.run(replace(recipe, run=replace(recipe.run, dir=str(root / "stage1")))) == 0
    return root


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_everything_below_the_folder_is_on_the_page(folder, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert f"written: {folder / 'report.html'}" in capsys.readouterr().out
    text = (folder / "report.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Evaluations side by side", "given", "two", "own", "stage1"]
    metrics = json.loads((folder / "two" / "metrics.json").read_text())
    value, low, high = (f"{metrics['rail']['rmse'][key]:.3f}" for key in ("value", "low", "high"))
    assert re.search(rf"<td>{value}\s*<small>{low} to {high}</small></td>", text)
    assert "Rationales that disagree most" in text
    assert text.count("<details>") == 6 + 9  # three of each kind; given rationales have one draw
    images = [attrs["src"] for tag, attrs in Elements(text).found if tag == "img"]
    assert len(images) == 3
    for source in images:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")


def test_the_page_needs_nothing_else_and_runs_nothing(folder):
    text = page.write(folder).read_text()
    for tag, attrs in Elements(text).found:
        assert tag not in ("script", "link", "iframe")
        assert not any(name.startswith("on") or str(value).startswith("http") for name, value in attrs.items())


def test_what_a_model_wrote_is_escaped(folder, tmp_path):
    records = [json.loads(line) for line in (folder / "two" / "predictions.jsonl").read_text().splitlines()]
    records[0]["id"] = "<b>id</b>"
    records[0]["draws"][0]["rationale"] = "<script>alert(1)</script>"
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:3]))
    (tmp_path / "metrics.json").write_bytes((folder / "two" / "metrics.json").read_bytes())
    text = page.write(tmp_path).read_text()
    assert "&lt;script&gt;alert(1)" in text
    assert "<script" not in text
    assert "<b>" not in text


def test_best_and_worst_by_hand():
    records = [{"id": str(k), "label": 3.0, "expected_score": 3.0 + k, "rationale": "r", "draws": []} for k in range(5)]
    for k, record in enumerate(records):
        record["draws"] = [{"rationale": "r", "expected_score": e} for e in (3.0, 3.0 + (7 * k) % 5)]
    found = page.examples(records)
    names = [[r["id"] for r in rs] for rs in found.values()]
    assert names == [["0", "1", "2"], ["4", "3", "2"], ["2", "4", "1"]]


def test_what_other_programs_wrote_is_told_and_left_out(folder, tmp_path, capsys):
    for name in ("run-a", "run-b"):
        shutil.copytree(folder / "two", tmp_path / name / "evaluate" / "held_out")
    for name, text in (("metrics.json", "[1]"), ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n'), ("health.json", "{")):
        (tmp_path / name).write_text(text)
    text = page.write(tmp_path).read_text()
    assert capsys.readouterr().out.count("left out: ") == 3
    for name in ("run-a", "run-b"):
        assert text.count(f"<td>{name}/evaluate/held_out</td>") == 1


def test_a_folder_with_nothing_is_refused(tmp_path):
    (tmp_path / "metrics.json").write_text('{"another": "program"}')
    with pytest.raises(UserError, match=r"holds no run, evaluation or generation"):
        page.write(tmp_path)

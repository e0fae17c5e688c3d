"""``evaluate``: what it writes, that stopping changes nothing, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kills import killed_again_and_again, sizes
from tests.tiny_runs import write_data
from tract_fast import cli, evaluate, judging
from tract_fast.checkpoint import locked
from tract_fast.data.feedback import Example, cut_rationale, has_score, read_label
from tract_fast.errors import UserError
from tract_fast.evaluate import by_prompt, summary
from tract_fast.judge import Judge
from tract_fast.judging import Source
from tract_fast.metrics import with_intervals
from tract_fast.recipe import Sampling

LABELS = ("1", "2", "3", "4", "5")
SHORT = Sampling(n=2, max_new_tokens=40)


def example(id: str, prompt: str, score: float, question: str = "q") -> Example:
    return Example(id=id, prompt=prompt, rationale="r", score=score, question=question)


def quiet(line: str) -> None:
    pass


def data_of(run: Path) -> Source:
    return Source(data=str(run.parent / "data.jsonl"), holdout=0.25)


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory) -> Path:
    """A finished evaluation with two draws a prompt."""
    out = tmp_path_factory.mktemp("evaluation")
    evaluate.run(str(trained), data_of(trained), out, SHORT, batch=4, say=quiet)
    return out


def test_predictions_and_metrics_say_the_same(done):
    records = [json.loads(line) for line in (done / "predictions.jsonl").read_text().splitlines()]
    metrics = json.loads((done / "metrics.json").read_text())
    assert metrics["n"] == len(records) == 6
    assert metrics["draws"] == 12
    for record in records:
        assert {"id", "label", "decoded_score", "score_mass", "rationale"} <= set(record)
        assert len(record["draws"]) == 2
        mean = sum(d["expected_score"] for d in record["draws"]) / 2
        assert record["expected_score"] == pytest.approx(mean)
        assert sum(v * p for v, p in zip(range(1, 6), record["distribution"], strict=True)) == pytest.approx(mean)
    columns = ([r[key] for r in records] for key in ("expected_score", "label", "question"))
    assert metrics["rail"] == with_intervals(*columns)
    assert metrics["no_score_sentence"] == sum(not d["complete"] for r in records for d in r["draws"])
    assert metrics["dtype"] == "float32"
    assert metrics["generate"]["n"] == 2
    assert (done / "scores.png").stat().st_size > 1000


@pytest.mark.parametrize("part", [0.0, 0.15, 0.4, 0.62, 0.97])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(trained, done, tmp_path, part, monkeypatch):
    whole = (done / "predictions.jsonl").read_bytes()
    out = shutil.copytree(done, tmp_path / "out")
    (out / "metrics.json").unlink()
    (out / "predictions.jsonl").write_bytes(whole[: int(part * len(whole))])
    judged = []
    judge = Judge.judge
    monkeypatch.setattr(Judge, "judge", lambda self, texts, *rest: judged.append(texts) or judge(self, texts, *rest))
    evaluate.run(str(trained), data_of(trained), out, SHORT, batch=4, say=quiet)
    assert (out / "predictions.jsonl").read_bytes() == whole
    assert (out / "metrics.json").read_bytes() == (done / "metrics.json").read_bytes()
    assert sum(map(len, judged)) == 6 - 2 * (3 - len(judged))  # whole batches of two prompts
    assert len(judged) <= {0.0: 3, 0.97: 1}.get(part, 3)
    assert judged


@pytest.mark.soak
def test_killed_at_random_instants(trained, tmp_path):
    """SIGKILLs at 5 instants and more; afterwards the predictions are those of a run that was never killed."""
    data = str(trained.parent / "data.jsonl")
    words = ["--n", "2", "--max-new-tokens", "200", "--batch", "2", "--temperature", "3"]
    command = [sys.executable, "-m", "tract_fast", "evaluate", str(trained), data, *words]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    options = {"most": 12, "rng": random.Random(0), "within": 0.5}
    kills = killed_again_and_again([*command, "--out", str(killed)], lambda: sizes(killed), **options)
    print(f"{kills} kills")
    assert kills >= 5
    for out in (killed, whole):
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    for name in ("predictions.jsonl", "metrics.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_killed_between_batches_it_goes_on_to_the_same_bytes(trained, done, tmp_path, monkeypatch):
    calls = []
    judge = Judge.judge

    def dies(self, *rest):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return judge(self, *rest)

    monkeypatch.setattr(Judge, "judge", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(str(trained), data_of(trained), tmp_path, SHORT, batch=4, say=quiet)
    evaluate.run(str(trained), data_of(trained), tmp_path, SHORT, batch=4, say=quiet)
    assert (tmp_path / "predictions.jsonl").read_bytes() == (done / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"settings": Sampling(n=2, max_new_tokens=41)}, "max_new_tokens"),
        ({"batch": 6}, "batch"),
        ({"teacher_forced": True}, "rationales"),
    ],
)
def test_other_settings_need_another_folder(trained, done, changes, key):
    settings = changes.pop("settings", SHORT)
    before = (done / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"holds predictions with {key} = .*: give another --out"):
        evaluate.run(str(trained), data_of(trained), done, settings, **{"batch": 4} | changes, say=quiet)
    assert (done / "predictions.jsonl").read_bytes() == before


def test_another_judge_or_other_data_need_another_folder(trained, done, tmp_path):
    plain = shutil.copytree(trained / "judge", tmp_path / "judge")
    about = json.loads((plain / "tract.json").read_text())
    (plain / "tract.json").write_text(json.dumps(about | {"normalize": "vocab"}))
    with pytest.raises(UserError, match=r"normalize = scores, and these have vocab"):
        evaluate.run(str(plain), data_of(trained), done, SHORT, batch=4, say=quiet)
    with pytest.raises(UserError, match=r"data_fingerprint"):
        evaluate.run(str(trained), Source(data=str(trained.parent / "data.jsonl")), done, SHORT, batch=4, say=quiet)


def test_teacher_forced_scores_each_rationale(trained, tmp_path):
    found = evaluate.run(str(trained), data_of(trained), tmp_path, SHORT, teacher_forced=True, batch=4, say=quiet)
    assert found["rationales"] == "given"
    assert (found["n"], found["draws"], found["no_score_sentence"]) == (6, 6, 0)
    assert found["decoded"]["n"] == 6
    assert found["generate"] is None


def test_given_rationales_of_a_prompt_are_scored_together(trained, tmp_path, monkeypatch):
    """Rationales of several lengths after one prompt, apart in the file: one batch, which computes the prompt once."""
    lines = write_data(tmp_path / "all.jsonl", n=12, siblings=3).read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(lines[i] for i in (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)))
    batches, given = [], Judge.given
    monkeypatch.setattr(Judge, "given", lambda self, ids, tails: batches.append(ids) or given(self, ids, tails))
    source = Source(data=str(tmp_path / "data.jsonl"))
    evaluate.run(str(trained), source, tmp_path / "out", SHORT, teacher_forced=True, batch=3, say=quiet)
    assert len(batches) == 4 and all(len({tuple(row) for row in ids}) == 1 for ids in batches)


def test_a_judge_without_rationales_is_held_against_the_annotators_mean(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "writes", False)
    data = tmp_path / "bench.jsonl"
    bench = [{"instruction": f"Is it kind? {k}", "gpt4_score": [k, k + 1, k + 2]} for k in (1, 2, 3)]
    data.write_text("".join(json.dumps(record) + "\n" for record in bench))
    for teacher_forced in (False, True):
        found = evaluate.run(
            str(trained), Source(data=str(data)), tmp_path / "out", SHORT, teacher_forced=teacher_forced, say=quiet
        )
        assert (found["rationales"], found["n"], found["draws"]) == ("none", 3, 3)
    assert [r["label"] for r in judging.read_predictions(tmp_path / "out" / "predictions.jsonl").values()] == [2, 3, 4]


def test_control_tokens_in_given_rationales_are_refused(trained, tmp_path):
    data = tmp_path / "data.jsonl"
    token = Judge.from_pretrained(trained).tokenizer.eos_token
    data.write_text(json.dumps({"prompt": "Is it kind?", "rationale": f"kind {token} kind", "score": 3}) + "\n")
    with pytest.raises(UserError, match=r"its rationale holds the text .* leave such records out \(--skip"):
        evaluate.run(str(trained), Source(data=str(data)), tmp_path / "out", SHORT, teacher_forced=True, say=quiet)


def test_predictions_of_unknown_origin_are_not_taken(trained, done, tmp_path):
    out = shutil.copytree(done, tmp_path / "out")
    (out / "settings.json").write_text("[]")
    with pytest.raises(UserError, match=r"settings.json is damaged: give another --out"):
        evaluate.run(str(trained), data_of(trained), out, SHORT, batch=4, say=quiet)
    (out / "settings.json").unlink()
    with pytest.raises(UserError, match=r"holds predictions.jsonl without the settings"):
        evaluate.run(str(trained), data_of(trained), out, SHORT, batch=4, say=quiet)


def test_a_folder_without_predictions_is_free(trained, done, tmp_path):
    (tmp_path / "settings.json").write_bytes((done / "settings.json").read_bytes())
    (tmp_path / "predictions.jsonl").touch()
    assert evaluate.run(str(trained), data_of(trained), tmp_path, replace(SHORT, seed=7), batch=4, say=quiet)["n"] == 6


def test_a_folder_belongs_to_one_process(trained, done):
    with locked(done, "--out"), pytest.raises(UserError, match=r"is being written by another process"):
        evaluate.run(str(trained), data_of(trained), done, SHORT, batch=4, say=quiet)


def test_a_torn_line_is_gone_before_the_next_is_added(trained, done, tmp_path, monkeypatch):
    """Killed within a line, and again after the next batch."""
    whole = (done / "predictions.jsonl").read_bytes()
    out = shutil.copytree(done, tmp_path / "out")
    (out / "predictions.jsonl").write_bytes(whole[: len(whole) // 5])
    calls = []
    judge = Judge.judge

    def dies(self, *rest):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(self, *rest)

    monkeypatch.setattr(Judge, "judge", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(str(trained), data_of(trained), out, SHORT, batch=4, say=quiet)
    evaluate.run(str(trained), data_of(trained), out, SHORT, batch=4, say=quiet)
    assert (out / "predictions.jsonl").read_bytes() == whole


def test_given_rationales_need_no_room_for_new_ones(trained, tmp_path):
    much = Sampling(max_new_tokens=5000)
    with pytest.raises(UserError, match="has room for 0"):
        evaluate.run(str(trained), data_of(trained), tmp_path / "a", much, say=quiet)
    assert evaluate.run(str(trained), data_of(trained), tmp_path / "b", much, teacher_forced=True, say=quiet)["n"] == 6


def test_broken_prediction_lines_are_named(trained, done, tmp_path):
    out = shutil.copytree(done, tmp_path / "out")
    lines = (out / "predictions.jsonl").read_text().splitlines()
    (out / "predictions.jsonl").write_text("\n".join([lines[0], "[1]", *lines[1:]]))
    with pytest.raises(UserError, match=r"predictions.jsonl:2 is no prediction"):
        evaluate.run(str(trained), data_of(trained), out, SHORT, batch=4, say=quiet)


def test_rationale_may_hold_any_kind_of_line_break(tmp_path):
    path = tmp_path / "predictions.jsonl"
    records = {str(i): {"id": str(i), "rationale": f"a{mark}b"} for i, mark in enumerate("\u2028\x85\x0b\x1c\r\n")}
    path.write_text("".join(map(judging.line, records.values())), encoding="utf-8", newline="")
    assert judging.read_predictions(path) == records
    path.write_text("")
    assert judging.read_predictions(path) == {}


def test_records_and_prompts_that_cannot_be_judged(trained, tmp_path):
    data = tmp_path / "data.jsonl"
    good = {"prompt": "Is the reply kind?", "score": 4}
    data.write_text(
        "".join(json.dumps(r) + "\n" for r in (good, {"prompt": "kind " * 600, "score": 2}, {"prompt": "x"}))
    )
    with pytest.raises(UserError, match=r'data.jsonl:3: the field "score" is missing'):
        evaluate.run(str(trained), Source(data=str(data)), tmp_path / "a", SHORT, say=quiet)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:2]) + "{")
    told = []
    found = evaluate.run(str(trained), Source(data=str(data), skip=True), tmp_path / "b", SHORT, say=told.append)
    assert found["n"] == 1
    assert [entry["where"] for entry in found["left_out"]] == ["data.jsonl:3", "data.jsonl:2"]
    assert "has room for" in found["left_out"][1]["why"]
    assert any("2 left out" in line for line in told)
    data.write_text(json.dumps({"prompt": "kind " * 600, "score": 2}) + "\n")
    with pytest.raises(UserError, match=r"data.jsonl:1: the prompt has .* tokens.*leave such records out \(--skip"):
        evaluate.run(str(trained), Source(data=str(data)), tmp_path / "c", SHORT, say=quiet)
    with pytest.raises(UserError, match=r"no prompt is left to judge"):
        evaluate.run(str(trained), Source(data=str(data), skip=True), tmp_path / "d", SHORT, say=quiet)
    with pytest.raises(UserError, match=r"limit = -1: must be 0"):
        evaluate.run(str(trained), Source(data=str(data), limit=-1), tmp_path / "f", SHORT, say=quiet)
    with pytest.raises(UserError, match=r"batch = 0: must be at least 2, the rationales of one prompt"):
        evaluate.run(str(trained), Source(data=str(data)), tmp_path / "e", SHORT, batch=0, say=quiet)


def test_prompts_are_judged_once_and_held_against_their_mean():
    items = by_prompt([example("f:1#1", "a", 4), example("f:1#2", "a", 5), example("b", "b", 2), example("c", "a", 3)])
    assert [(i.id, i.label) for i in items] == [("f:1#1", 4.0), ("b", 2.0)]
    items = by_prompt([example("f:1#1", "a", 4), example("f:1#2", "a", 5), example("f:2#1", "b", 2)])
    assert [(i.id, i.label) for i in items] == [("f:1", 4.5), ("f:2#1", 2.0)]
    named = [example(f"task#{k}", "ab"[k > 2], score) for k, score in ((1, 1), (2, 2), (3, 5), (4, 5))]
    assert [(i.id, i.label) for i in by_prompt(named)] == [("task#1", 1.5), ("task#3", 5.0)]
    taken = [example("f", "b", 1), example("f#1", "a", 4), example("f#2", "a", 5)]
    assert [(i.id, i.label) for i in by_prompt(taken)] == [("f", 1.0), ("f#1", 4.5)]


def record(id: str, label: float, *draws: tuple[float, float | None, bool]) -> dict:
    found = [{"expected_score": e, "decoded_score": d, "complete": c, "score_mass": 0.5} for e, d, c in draws]
    own = found[0] if len(found) == 1 else {"draws": found, "score_mass": 0.5}
    decoded = [d for _, d, _ in draws if d is not None]
    means = {
        "expected_score": sum(e for e, _, _ in draws) / len(draws),
        "decoded_score": sum(decoded) / len(decoded) if decoded else None,
    }
    return {"id": id, "question": id, "label": label, **own, **means}


def test_summary_counts_what_never_reached_the_score():
    found = summary(
        [record("a", 4, (3.0, None, False)), record("b", 2, (2.5, 2.0, True)), record("c", 1, (1.5, 3.0, True))]
    )
    assert (found["n"], found["draws"], found["no_score_sentence"], found["decoded"]["n"]) == (3, 3, 1, 2)
    assert found["rail"]["mae"]["value"] == pytest.approx(2 / 3)
    assert found["complete_only"]["n"] == 2
    assert found["complete_only"]["rail"]["mae"]["value"] == pytest.approx(0.5)
    assert found["decoded"]["mae"]["value"] == pytest.approx(1.0)
    assert "first_draw" not in found


def test_summary_of_several_draws():
    rows = [
        record("a", 4, (3.0, None, False), (5.0, 5.0, True)),
        record("b", 2, (2.0, 2.0, True), (3.0, 3.0, True)),
        record("c", 1, (1.0, None, False), (2.0, None, False)),
    ]
    found = summary(rows)
    assert (found["n"], found["draws"], found["no_score_sentence"]) == (3, 6, 3)
    assert found["rail"]["mae"]["value"] == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert found["complete_only"]["n"] == 2
    assert found["complete_only"]["rail"]["mae"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert found["first_draw"]["rail"]["mae"]["value"] == pytest.approx(1 / 3)
    assert found["first_draw"]["decoded"]["n"] == 1


@pytest.mark.parametrize(
    ("text", "label", "reached"),
    [
        ("Good. So the overall score is 4", "4", True),
        ("Good. So the overall score is 4. [RESULT] 4", "4", True),
        ("Good. [RESULT] 3", "3", True),
        ("Good. So the overall score is four.", None, True),
        ("Good. So the overall score is 4.5", None, True),
        ("Good. So the overall quality is fine", None, False),
        ("Good. So the overall score is ", None, False),
        ("Good. So the overall score is a ", None, False),
        ("Good. So the overall score is a 4.", "4", True),
        ("Good. Therefore, the overall score is 4. Bye", "4", True),
        ("Good. so the overall score is 4", "4", True),
        ("Good. [RESULT] 9", None, True),
        ("Good. I would say 4", None, False),
        ("", None, False),
    ],
)
def test_score_that_an_output_ends_with(text, label, reached):
    assert read_label(text, LABELS) == label
    assert has_score(text) == reached
    verdict = reached or "So the overall" in text
    assert cut_rationale(text) == ("" if not text else "Good." if verdict else text)


def test_command(trained, tmp_path, capsys):
    words = ["evaluate", str(trained), str(trained.parent / "data.jsonl"), "--holdout", "0.25", "--n", "2"]
    words += ["--max-new-tokens", "40", "--batch", "4", "--out", str(tmp_path / "out"), "--limit", "3"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "3 prompts, 6 rationales" in shown
    assert "never reached the score sentence" in shown
    assert cli.main(words) == 0
    assert "holds 3 of 3 predictions: going on" in capsys.readouterr().out
    assert cli.main(["evaluate", str(trained)]) == 2
    assert "evaluate needs a judge and data: tract-fast evaluate MODEL DATA" in capsys.readouterr().err
    assert cli.main([*words, "--n", "0"]) == 2
    assert "generate.n = 0: must be above 0" in capsys.readouterr().err

"""``score``: lines in, judgements out, whatever the lines are."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_judges import random_judge
from tract_fast import cli, score
from tract_fast.data import prompt as prompts
from tract_fast.recipe import Sampling

SHORT = Sampling(max_new_tokens=12)
TEXTS = ["Is the reply kind?", "The reply is curt, it misses the point. Is the reply kind?", "Why?"]


def answers(judge, lines: list, settings: Sampling = SHORT, batch: int = 16) -> tuple[list[dict], int]:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    out = io.StringIO()
    failed = score.run(judge, raw, "stdin", out, settings, batch)
    return [json.loads(line) for line in out.getvalue().splitlines()], failed


def test_every_line_is_answered_in_its_place():
    judge = random_judge()
    found, failed = answers(
        judge, [{"id": 7, "prompt": TEXTS[0]}, {"instruction": TEXTS[1]}, b"\n", {"prompt": TEXTS[2]}]
    )
    want = judge.score(TEXTS, max_new_tokens=12)
    assert failed == 0
    assert [line.get("id") for line in found] == [7, None, None]
    assert [line.get("line") for line in found] == [None, 2, 4]
    assert [line["rationale"] for line in found] == [j.rationale for j in want]
    assert [line["score"] for line in found] == pytest.approx([j.score for j in want])
    assert found[0]["complete"] is False
    assert "draws" not in found[0]


def test_several_draws_are_shown_each():
    found, _ = answers(random_judge(), [{"prompt": TEXTS[0]}], Sampling(n=3, max_new_tokens=12))
    assert len(found[0]["draws"]) == 3


def test_lines_that_cannot_be_judged_do_not_hide_the_others():
    lines = [
        {"prompt": TEXTS[0]},
        b"{\n",
        {"prompt": " "},
        {"prompt": 3, "id": "three"},
        {"prompt": "kind " * 700},
        {"text": "x"},
        b"[1]\n",
        b'{"prompt": "\xff"}\n',
        b'{"prompt": "\\ud83d", "id": "\\ud83d"}\n',
        {"self": "x"},
        {"prompt": "x<|im_end|>"},
        b'{"prompt": "", "id": 1e999}\n',
        {"prompt": None, "instruction": TEXTS[1]},
    ]
    found, failed = answers(random_judge(), lines, batch=4)
    assert failed == 11
    assert len(found) == 13
    assert [i for i, line in enumerate(found) if "score" in line] == [0, 12]
    reasons = ["not JSON", "is empty", "not a text", "has room for", "give whole prompts", "a JSON list", "not UTF-8"]
    reasons += ["half a character", "give whole prompts", "is a control token", "is empty"]
    for line, reason in zip(found[1:12], reasons, strict=True):
        assert reason in line["error"]
    assert found[3]["id"] == "three"
    assert [line["line"] for line in (found[1], found[7], found[11])] == [2, 8, 12]


def test_parts_of_the_template_make_a_prompt():
    judge = random_judge(prompt_template=prompts.TEMPLATE)
    judge.context = 4096  # the template is longer than the tiny tokenizer likes
    parts = {name: "kind" for name in prompts.PARTS} | {"orig_response": "the reply is kind"}
    found, failed = answers(judge, [parts, {"orig_response": "x"}])
    assert failed == 1
    assert found[0]["rationale"] == judge.score(prompts.fill_template(parts), max_new_tokens=12).rationale
    assert "needs orig_instruction" in found[1]["error"]


def test_nothing_in_nothing_out():
    assert answers(random_judge(), []) == ([], 0)
    assert answers(random_judge(), [b"\n", b"  \n"]) == ([], 0)


def test_lines_are_answered_before_the_rest_is_read():
    out = io.StringIO()

    def lines():
        for text in TEXTS:
            yield json.dumps({"prompt": text}).encode() + b"\n"
            answered.append(out.getvalue().count("\n"))

    answered: list[int] = []
    score.run(random_judge(), lines(), "stdin", out, SHORT, batch=1)
    assert answered == [1, 2, 3]


def test_command_on_a_file(trained, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Is the reply kind?"}\n{"prompt": ""}\n')
    words = ["score", str(trained), str(file), "--max_new_tokens", "30"]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert [("score" in line, "error" in line) for line in map(json.loads, out.splitlines())] == [
        (True, False),
        (False, True),
    ]
    assert "1 lines could not be judged" in err
    for odd in (tmp_path / "none.jsonl", tmp_path):
        assert cli.main(["score", str(trained), str(odd)]) == 2
        assert f"{odd}: there is no such file" in capsys.readouterr().err
    assert cli.main(["score"]) == 2
    assert "score needs a judge" in capsys.readouterr().err
    assert cli.main([*words, "--batch", "0"]) == 2


def test_command_answers_a_line_before_the_next_is_written(trained):
    command = [sys.executable, "-m", "tract_fast", "score", trained, "--max_new_tokens", "20", "--batch", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, env=buffered, **pipes) as score_:
        for text in TEXTS:
            score_.stdin.write(json.dumps({"prompt": text}).encode() + b"\n")
            score_.stdin.flush()
            assert select.select([score_.stdout], [], [], 60)[0], "nothing comes until the input ends"
            assert "score" in json.loads(score_.stdout.readline())
        score_.stdin.close()
        assert score_.wait() == 0


def run(trained: Path, head: str, tail: str) -> subprocess.CompletedProcess:
    """``head | tract-fast score JUDGE | tail`` in a shell, its exit codes in the order of the pipe."""
    command = f"{sys.executable} -m tract_fast score {trained} --max_new_tokens 20 --batch 1"
    return subprocess.run(
        ["bash", "-c", f"{head} | {command} | {tail}; echo ${{PIPESTATUS[@]}} >&2"], capture_output=True, text=True
    )


def test_standard_input_that_ends_in_the_middle_of_a_line(trained):
    done = run(trained, """printf '{"prompt": "Is it kind?"}\\n{"prom'""", "cat")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert "score" in lines[0]
    assert "not JSON" in lines[1]["error"]
    assert done.stderr.splitlines()[-1] == "0 1 0"


def test_reader_that_leaves_early_ends_it_quietly(trained):
    done = run(trained, """yes '{"prompt": "Is it kind?"}' | head -n 400""", "head -n 1")
    assert "score" in json.loads(done.stdout)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].split()[-2] == "141"


def test_standard_input_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["score", "judge"]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_closed_standard_input_is_no_work(trained):
    done = run(trained, "true", "cat")
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "0 0 0"

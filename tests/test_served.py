"""Judges in servers: the same scores as here, everything asked for, and refusals instead of silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.servers import Stand, stand_command, transformers_serve
from tests.tiny import tiny_tokenizer
from tests.tiny_models import SIZE, random_lm
from tract_fast import cli, evaluate, generate
from tract_fast.errors import RunStopped, UserError
from tract_fast.judge import Judge
from tract_fast.judging import Source
from tract_fast.recipe import Generate, Sampling

SHORT = {"max_new_tokens": 24, "seed": 3}


def quiet(line: str) -> None:
    pass


def prompts_of(trained: Path) -> list[str]:
    lines = (trained.parent / "data.jsonl").read_text().splitlines()
    return list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))[:5]


@pytest.fixture
def stand(trained):
    with Stand(Judge.from_pretrained(trained)) as server:
        yield server


def test_scores_are_those_of_the_judge_here(trained, stand):
    """Each draw: the rationale is the server's, the score is what the judge gives after the same tokens."""
    served = Judge.from_pretrained(trained, backend=stand.address)
    found = served.score(prompts_of(trained), n=2, batch=4, **SHORT)
    assert len({draw.rationale for one in found for draw in one.draws}) > 2
    asked = [body for body in stand.requests if not body.get("logprob_token_ids")]
    assert len(asked) == 10 and len({body["seed"] for body in asked}) == 10
    rows = {tuple(body["prompt"]): body for body in stand.requests if body.get("logprob_token_ids")}
    for prompt, one in zip(prompts_of(trained), found, strict=True):
        (ids,) = served.render([prompt])
        for draw in one.draws:
            again = stand.judge.given([ids], [draw.rationale])[0]
            assert draw.expected_score == pytest.approx(again.score, abs=1e-5)
            assert draw.score_mass == pytest.approx(again.score_mass, abs=1e-5)
        assert sum(row[: len(ids)] == tuple(ids) for row in rows) >= 1


def test_all_that_decides_a_sample_is_asked_for(trained, stand):
    served = Judge.from_pretrained(trained, backend=f"{stand.address}/v1#judge")
    served.score("p q r", temperature=0.7, top_p=0.8, repetition_penalty=1.2, max_new_tokens=9)
    body = stand.requests[0]
    assert body["prompt"] == served.render(["p q r"])[0]
    asked = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2, "max_tokens": 9, "top_k": 0, "min_p": 0.0}
    assert {name: body[name] for name in asked} == asked
    assert served.scale.eos_id in body["stop_token_ids"]
    assert served.context == 300  # the smaller one


def test_generate_and_evaluate_go_on_and_do_not_repeat(trained, stand, tmp_path):
    """Killed after some answers: the same command asks for the rest alone."""
    source = Source(data=str(trained.parent / "data.jsonl"), holdout=0.25)
    settings = Generate(n=2, max_new_tokens=24, batch=6, backend=stand.address)
    health = generate.run(str(trained), source, tmp_path / "own", settings, say=quiet)
    asked = sum(not body.get("logprob_token_ids") for body in stand.requests)
    assert asked == health["n"]
    whole = (tmp_path / "own" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "own" / "predictions.jsonl").write_text("".join(whole[:-3]) + whole[-3][:20])
    stand.requests.clear()
    generate.run(str(trained), source, tmp_path / "own", settings, say=quiet)
    assert sum(not body.get("logprob_token_ids") for body in stand.requests) == 6
    kept = (tmp_path / "own" / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert kept == whole
    options = {"batch": 8, "say": quiet, "teacher_forced": True}
    here = evaluate.run(str(trained), source, tmp_path / "here", Sampling(), **options)
    there = evaluate.run(str(trained), source, tmp_path / "there", Sampling(), backend=stand.address, **options)
    for name in ("pearson", "rmse"):
        assert there["rail"][name]["value"] == pytest.approx(here["rail"][name]["value"], abs=1e-5)
    assert there["judge_fingerprint"] != here["judge_fingerprint"]


def test_a_server_that_fails_on_the_way_stops_with_what_is_done(trained, stand, tmp_path):
    source = Source(data=str(trained.parent / "data.jsonl"), holdout=0.25)
    settings = Generate(max_new_tokens=16, batch=2, backend=stand.address)

    def miscount(path, answer):
        if len(stand.requests) > 8 and path.endswith("completions"):
            answer["usage"]["prompt_tokens"] += 1
        return answer

    stand.change = miscount
    with pytest.raises(RunStopped, match="another tokenizer"):
        generate.run(str(trained), source, tmp_path / "own", settings, say=quiet)
    done = (tmp_path / "own" / "predictions.jsonl").read_text().splitlines()
    assert 1 <= len(done) <= 8


@pytest.mark.parametrize(
    "path, key, message",
    [
        ("/v1/completions", "logprobs", "does not give the log-probabilities"),
        ("/v1/completions", "token_ids", "does not return the tokens"),
    ],
)
def test_what_an_old_vllm_leaves_out_is_missed(trained, stand, path, key, message):
    def forget(where, answer):
        if where == path:
            answer["choices"][0].pop(key, None)
        return answer

    stand.change = forget
    with pytest.raises(RunStopped, match=message):
        Judge.from_pretrained(trained, backend=stand.address).score("p q", **SHORT)


def test_another_tokenizer_is_refused(trained, stand):
    stand.change = lambda path, answer: {"tokens": [1, 2]} if path == "/tokenize" else answer
    with pytest.raises(UserError, match="another tokenizer"):
        Judge.from_pretrained(trained, backend=stand.address)


def test_an_unknown_server_is_not_asked_for_what_it_may_ignore(trained, stand):
    stand.change = lambda path, answer: None if path in ("/version", "/tokenize") else answer
    told = []
    served = Judge.from_pretrained(trained, backend=stand.address, say=told.append)
    assert any("scores: read here" in line for line in told)
    with pytest.raises(UserError, match=r"repetition_penalty = 1\.03"):
        served.score("p q", **SHORT)


@pytest.mark.parametrize("backend", ["http://127.0.0.1:9", "vlm", "http://127.0.0.1:9#judge"])
def test_no_such_backend(trained, backend):
    with pytest.raises(UserError, match="backend = "):
        Judge.from_pretrained(trained, backend=backend)


def test_the_models_of_a_server_are_named(trained, stand):
    with pytest.raises(UserError, match="models are judge"):
        Judge.from_pretrained(trained, backend=f"{stand.address}#other")


def test_vllm_is_looked_for(trained, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no command vllm"):
        Judge.from_pretrained(trained, backend="vllm")


def test_vllm_that_does_not_start_is_told_with_its_last_line(trained, tmp_path, monkeypatch):
    command = tmp_path / "vllm"
    command.write_text("#!/bin/sh\necho cannot load >&2\nexit 3\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="cannot load"):
        Judge.from_pretrained(trained, backend="vllm")


def test_the_server_of_a_judge_ends_with_it(trained, tmp_path, monkeypatch):
    stand_command(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    served = Judge.from_pretrained(trained, backend="vllm")
    try:
        assert served.score("p q", **SHORT).score == pytest.approx(3, abs=2)
        assert served.process.process.poll() is None
    finally:
        served.close()
    assert served.process.process.poll() is not None


def test_transformers_serve(trained, tmp_path, capsys):
    """The real server: what it writes is the judge's own, and what it cannot read is read here."""
    merged = trained / "judge" / "merged" if (trained / "judge" / "merged").is_dir() else trained / "judge"
    with transformers_serve(merged, tmp_path / "log") as address:
        served = Judge.from_pretrained(trained, backend=address)
        here = Judge.from_pretrained(trained)
        texts = prompts_of(trained)
        found = served.score(texts, temperature=0.0, repetition_penalty=1.2, max_new_tokens=24)
        expected = here.score(texts, temperature=0.0, repetition_penalty=1.2, max_new_tokens=24)
        assert [one.rationale for one in found] == [one.rationale for one in expected]
        assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)
        draws = served.score(texts[0], n=4, temperature=1.5, max_new_tokens=24).draws
        assert len({draw.rationale for draw in draws}) > 1
        data = str(trained.parent / "data.jsonl")
        command = ["generate", str(trained), data, "--backend", address, "--max_new_tokens", "16", "--limit", "4"]
        assert cli.main([*command, "--out", str(tmp_path / "own")]) == 0
        assert len((tmp_path / "own" / "rationales.jsonl").read_text().splitlines()) >= 1
        lines = tmp_path / "prompts.jsonl"
        lines.write_text(json.dumps({"prompt": texts[0]}) + "\n")
        capsys.readouterr()
        assert cli.main(["score", str(trained), str(lines), "--backend", address, "--max_new_tokens", "16"]) == 0
        assert 1 <= json.loads(capsys.readouterr().out)["score"] <= 5
        out = ["--out", str(tmp_path / "eval")]
        command = ["evaluate", str(trained), data, "--backend", address, "--max_new_tokens", "16", "--limit", "3"]
        assert cli.main([*command, *out]) == 0
        assert "transformers" in json.loads((tmp_path / "eval" / "metrics.json").read_text())["dtype"]


@pytest.mark.skipif(shutil.which("vllm") is None, reason="vllm is not installed")
def test_vllm(trained, tmp_path):
    """vLLM itself: greedy rationales and scores are those of the judge here."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    # its attention on CPUs takes heads of 32 and more
    shape = SIZE | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    random_lm(LlamaConfig(vocab_size=len(tokenizer) + 3, **shape)).save_pretrained(tmp_path)
    served = Judge.from_pretrained(tmp_path, backend="vllm", dtype="float32", say=print)
    try:
        texts = prompts_of(trained)
        options = {"temperature": 0.0, "repetition_penalty": 1.2, "max_new_tokens": 24}
        found = served.score(texts, **options)
        expected = Judge.from_pretrained(tmp_path, dtype="float32").score(texts, **options)
        sampled = served.score(texts[0], n=3, temperature=1.5, max_new_tokens=24)
        again = served.score(texts[0], n=3, temperature=1.5, max_new_tokens=24)
        assert len({draw.rationale for draw in sampled.draws}) == 3
        assert [draw.rationale for draw in again.draws] == [draw.rationale for draw in sampled.draws]
        assert [one.rationale for one in found] == [one.rationale for one in expected]
        assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-3)
        assert [one.score_mass for one in found] == pytest.approx([one.score_mass for one in expected], abs=1e-3)
    finally:
        served.close()
    assert served.process.process.poll() is not None

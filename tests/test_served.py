"""Judges in servers: the same scores as here, everything asked for, and refusals instead of silence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.servers import LONGEST, Handler, Stand, stand_command, transformers_serve
from tests.tiny import tiny_tokenizer
from tests.tiny_models import SIZE, random_lm
from tract_fast import cli, evaluate, generate
from tract_fast.errors import RunStopped, UserError
from tract_fast.judge import Judge
from tract_fast.judging import Source
from tract_fast.loading import open_judge
from tract_fast.recipe import Generate, Sampling
from tract_fast.served import check_generation_config
from tract_fast.vllm import Vllm

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
        assert sum(row[: len(ids)] == tuple(ids) for row in rows) == len({d.rationale for d in one.draws})
        assert all(served.scale.eos_id not in row[len(ids) : -len(served.scale.prefix_ids)] for row in rows)


def test_all_that_decides_a_sample_is_asked_for(trained, stand):
    served = Judge.from_pretrained(trained, backend=f"{stand.address}/v1#judge")
    served.score("p q r", temperature=0.7, top_p=0.8, repetition_penalty=1.2, max_new_tokens=9)
    body = stand.requests[0]
    assert body["prompt"] == served.render(["p q r"])[0]
    asked = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2, "max_tokens": 9, "top_k": 0, "min_p": 0.0}
    assert {name: body[name] for name in asked} == asked
    assert served.scale.eos_id in body["stop_token_ids"]
    assert served.context == LONGEST - 1  # a score takes one token more


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


@pytest.mark.parametrize("value", [0.5, -9999.0, -0.01])
def test_what_is_no_log_probability_is_not_taken_for_one(trained, stand, value):
    def change(path, answer):
        if path == "/v1/completions" and answer["choices"][0]["logprobs"]:
            (named,) = answer["choices"][0]["logprobs"]["top_logprobs"]
            named.update(dict.fromkeys(named, value))
        return answer

    stand.change = change
    with pytest.raises(RunStopped, match="logprobs-mode"):
        Judge.from_pretrained(trained, backend=stand.address).score("p q", **SHORT)


def test_a_reply_that_the_server_cuts_is_missed(trained, stand):
    def cut(path, answer):
        if path == "/v1/completions":
            answer["choices"][0]["finish_reason"] = "length"
        return answer

    stand.change = cut
    with pytest.raises(RunStopped, match="its own limit"):
        Judge.from_pretrained(trained, backend=stand.address).score("p q", max_new_tokens=200)


def test_the_longest_prompt_that_fits_is_judged(trained, stand):
    served = Judge.from_pretrained(trained, backend=stand.address)
    room = served.room(24)
    ids = served.render(["p q r " * 200])[0][:room]
    assert 1 <= served.judge(["long"], [ids], Sampling(**SHORT))[0].score <= 5
    assert served.obstacle("long", room + 1, 24)


def test_tokens_that_cannot_be_compared_are_refused(trained, stand):
    stand.change = lambda path, answer: None if path == "/tokenize" else answer
    with pytest.raises(UserError, match="cannot be checked"):
        Judge.from_pretrained(trained, backend=stand.address)


def test_the_key_goes_to_its_host_alone(trained, stand, monkeypatch):
    """A server that sends on to another, which must not get the key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    class Elsewhere(BaseHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                return Handler.do_GET(self)
            self.send_response(302)
            self.send_header("Location", stand.address.replace("127.0.0.1", "localhost") + self.path)
            return self.end_headers()

        _send = Handler._send
        do_POST = Handler.do_POST

    first = Stand(stand.judge)
    first.RequestHandlerClass = Elsewhere
    with first:
        Judge.from_pretrained(trained, backend=first.address)
    assert first.keys == {"Bearer sk-secret"}
    assert stand.keys == {None}


def test_another_judge_of_the_same_name_is_not_gone_on_with(trained, stand, tmp_path):
    source = Source(data=str(trained.parent / "data.jsonl"), holdout=0.25)
    settings = Generate(max_new_tokens=16, batch=4, backend=stand.address)
    copy = shutil.copytree(trained / "judge", tmp_path / "judge")
    generate.run(str(copy), source, tmp_path / "own", settings, say=quiet)
    file = next(copy.rglob("*.safetensors"))
    weights = load_file(file)
    save_file({name: w * 1.01 for name, w in weights.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="judge_fingerprint"):
        generate.run(str(copy), source, tmp_path / "own", settings, say=quiet)


def test_settings_beside_the_weights_that_a_server_would_add_are_refused(trained, tmp_path):
    copy = shutil.copytree(trained / "judge", tmp_path / "judge")
    opened = open_judge(str(copy), quiet)
    check_generation_config(opened)
    (Path(opened.source) / "generation_config.json").write_text('{"min_p": 0.2, "temperature": 0.5}')
    with pytest.raises(UserError, match="sets min_p, which"):
        check_generation_config(opened)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_ended_while_a_request_hangs_what_was_done_is_there(trained, stand, tmp_path, number, code):
    """The first prompt, the longest, takes forever: the others are written all the same, and nothing waits for it."""
    stand.delay = lambda body: 600.0 if body is stand.requests[0] else 0.0
    data, out = str(trained.parent / "data.jsonl"), tmp_path / "own"
    command = [
        sys.executable,
        "-m",
        "tract_fast",
        "generate",
        str(trained),
        data,
        "--holdout",
        "0.25",
        "--out",
        str(out),
    ]
    command += ["--backend", stand.address, "--max_new_tokens", "16", "--batch", "4"]
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job would not  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, preexec_fn=listens, **pipes)
    written = out / "predictions.jsonl"
    lines = lambda: written.read_text().splitlines() if written.exists() else []  # noqa: E731
    begin = time.monotonic()
    while len(lines()) < 17 and time.monotonic() - begin < 120:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    assert len(lines()) == 17  # of 18
    process.send_signal(number)
    process.wait(20)
    assert process.returncode == code
    stand.delay = lambda body: 0.0
    stand.requests.clear()
    settings = Generate(max_new_tokens=16, batch=4, backend=stand.address)
    health = generate.run(str(trained), Source(data=data, holdout=0.25), out, settings, say=quiet)
    assert health["n"] == 18
    assert sum(not body.get("logprob_token_ids") for body in stand.requests) == 1


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
    assert any("are as this server has them" in line for line in told)


@pytest.mark.parametrize("backend", ["http://127.0.0.1:9", "vlm", "http://127.0.0.1:9#judge"])
def test_no_such_backend(trained, backend):
    with pytest.raises(UserError, match="backend = "):
        Judge.from_pretrained(trained, backend=backend)


def test_the_models_of_a_server_are_named(trained, stand):
    with pytest.raises(UserError, match="models are judge"):
        Judge.from_pretrained(trained, backend=f"{stand.address}#other")


def test_vllm_needs_whole_weights(trained, tmp_path, monkeypatch):
    stand_command(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    opened = replace(open_judge(str(trained), quiet), adapter=tmp_path)
    with pytest.raises(UserError, match="is an adapter"):
        Vllm(opened, "vllm", "auto", quiet)


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
    found = []
    # from a thread that ends: the server must not end with it
    worker = threading.Thread(target=lambda: found.append(Judge.from_pretrained(trained, backend="vllm --more x")))
    worker.start()
    worker.join()
    (served,) = found
    try:
        (ids,) = served.render(["p q"])
        whole = served.judge(["p q"], [ids], Sampling(**SHORT))[0]
        again = Judge.from_pretrained(trained).given([ids], [whole.rationale])[0]
        assert whole.score == pytest.approx(again.score, abs=1e-4)
        assert served.process.process.poll() is None
    finally:
        served.close()
    assert served.process.process.poll() is not None
    assert not served.process.log.exists()


def test_the_server_of_a_judge_ends_when_its_process_is_killed(trained, tmp_path):
    stand_command(tmp_path)
    script = (
        "import sys\nfrom tract_fast.judge import Judge\n"
        "judge = Judge.from_pretrained(sys.argv[1], backend='vllm')\n"
        "print(judge.process.process.pid, judge.process.log, flush=True)\nsys.stdin.read()\n"
    )
    env = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = [sys.executable, "-c", script, str(trained)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
    pid, log = process.stdout.readline().split()
    process.kill()
    process.wait()
    Path(log).unlink()
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":  # ended, and nobody asks for its exit code
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its judge")


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
        drawn = [served.score(texts[0], n=4, temperature=1.5, max_new_tokens=24).draws for _ in range(2)]
        assert len({draw.rationale for draw in drawn[0]}) > 1
        assert drawn[0] == drawn[1]  # each request has its seed, and they do not meet
        data = str(trained.parent / "data.jsonl")
        command = ["generate", str(trained), data, "--backend", address, "--max_new_tokens", "16", "--limit", "4"]
        assert cli.main([*command, "--out", str(tmp_path / "own")]) == 0
        assert len((tmp_path / "own" / "predictions.jsonl").read_text().splitlines()) == 4
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

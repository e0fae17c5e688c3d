"""Servers for tests: transformers' own, and one that speaks vLLM's dialect of the completions interface.

The second computes what vLLM would, with a judge of ours: vLLM itself is too large for every test run, so what is
tested with it is our side of the dialect. ``tests/test_served.py`` runs against the real one where it is installed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tract_fast.judge import Judge
from tract_fast.recipe import Sampling
from tract_fast.sample import sample


@contextlib.contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """The address of ``transformers serve MODEL`` on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", str(model), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()


LONGEST = 300


class Stand(ThreadingHTTPServer):
    """vLLM's side of the dialect. ``judge`` computes; ``requests`` are the bodies that came, ``keys`` what authorised
    them; ``change`` may edit an answer before it goes out, ``delay`` (seconds) hold a request back."""

    daemon_threads = True

    def __init__(self, judge: Judge, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.judge, self.lock = judge, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.change = lambda path, answer: answer
        self.delay = lambda body: 0.0
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Stand:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.shutdown()
        self.server_close()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, judge = body["prompt"], self.judge
        assert len(ids) + body["max_tokens"] <= LONGEST
        if body.get("logprob_token_ids"):
            values = judge.log_probs_after([ids], [len(ids) - 1])[0].tolist()
            assert body["logprob_token_ids"] == list(judge.scale.token_ids)
            assert (body["max_tokens"], body["temperature"], body["repetition_penalty"]) == (1, 1.0, 1.0)
            named = {f"token_id:{t}": v for t, v in zip(judge.scale.token_ids, values, strict=True)}
            logprobs = {"tokens": ["token_id:0"], "token_logprobs": [-1.0], "top_logprobs": [named], "text_offset": [0]}
            return answer_of("", len(ids), 1, logprobs=logprobs)
        names = ("temperature", "top_p", "repetition_penalty", "seed")
        settings = Sampling(**{name: body[name] for name in names}, max_new_tokens=body["max_tokens"])
        (tokens,) = sample(judge.lm, judge.tokenizer, [""], [ids], settings, body["stop_token_ids"]).tokens
        ended = len(tokens) < body["max_tokens"]  # what ends a reply is one of its tokens there
        tokens = [*tokens, body["stop_token_ids"][0]] if ended else tokens
        reason = "stop" if ended else "length"
        return answer_of(judge.text(tokens), len(ids), len(tokens), token_ids=tokens, finish_reason=reason)


def stand_command(folder: Path) -> Path:
    """A command ``vllm`` in ``folder`` that takes the arguments of vLLM's and starts a ``Stand`` with that judge."""
    command = folder / "vllm"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.servers "$@"\n')
    command.chmod(0o755)
    return command


def answer_of(text: str, prompt: int, written: int, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None, **more}
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    head = {"id": "1", "object": "text_completion", "created": 0, "model": "judge"}
    return head | {"choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    server: Stand

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "vllm"}]}
        models["data"][0]["max_model_len"] = LONGEST
        self.server.keys.add(self.headers["Authorization"])
        self._send({"/v1/models": models, "/version": {"version": "0.0.test"}, "/health": {}}.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            judge = self.server.judge
            return self._send({"tokens": judge.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]})
        self.server.requests.append(body)
        time.sleep(self.server.delay(body))
        with self.server.lock:  # one model
            found = self.server.complete(body)
        return self._send(found)

    def _send(self, found: Any) -> None:
        found = self.server.change(self.path, found)
        data = json.dumps(found).encode()
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    _, model, *flags = sys.argv[1:]
    Stand(Judge.from_pretrained(model), int(flags[flags.index("--port") + 1])).serve_forever()

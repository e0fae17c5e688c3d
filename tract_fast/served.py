"""A judge whose model runs in a server (``server``), or in vLLM's, which is started for it.

The tokenizer and ``tract.json`` are read here, and prompts are rendered here. The rationale is the server's sample.
The score after it is read there, too, where the server gives log-probabilities of given tokens (vLLM); where it does
not, the judge's own weights are loaded here and read it, teacher-forced, as the authors do.

A sample's seed depends on (seed, prompt, draw) alone. Whether the server writes the same again is up to its arithmetic:
it batches by what else is under way.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from tract_fast.data import prompt as prompts
from tract_fast.data.feedback import cut_rationale
from tract_fast.errors import RunStopped, UserError
from tract_fast.judge import Judge, Judgement, prompts_at_once
from tract_fast.loading import Opened, Say, choose_dtype, load_weights
from tract_fast.recipe import Sampling
from tract_fast.sample import cut_at_score
from tract_fast.server import Sample, Server
from tract_fast.shard import local_device

START_SECONDS = 1800  # loading a model of many GB, and compiling
END_SECONDS = 20


def served_judge(opened: Opened, backend: str, *, dtype: str, device, say: Say) -> ServedJudge:
    """The judge behind ``backend``: ``vllm`` or an address. Raises UserError where there is no such server."""
    process = None
    if backend == "vllm":
        process = Vllm(opened, dtype, say)
        backend = process.url
    elif not backend.startswith(("http://", "https://")):
        raise UserError(f"backend = {backend}: must be auto, vllm, or the address of a server, http://HOST:PORT")
    try:
        server = Server(backend)
        say(f"backend: {server}")
        reader = None
        if not server.reads_scores:
            say("scores: read here, by the judge's own weights, since the server gives no log-probabilities of tokens")
            chosen = torch.device(device) if device else local_device()
            reader = Judge(load_weights(opened, dtype, chosen, say), opened.tokenizer, opened.scale, opened.about)
        return ServedJudge(opened, server, reader, process)
    except BaseException:
        if process:
            process.end()
        raise


class ServedJudge(Judge):
    """A ``Judge`` whose rationales a server writes. ``reader`` reads the scores where the server cannot."""

    def __init__(self, opened: Opened, server: Server, reader: Judge | None, process: Vllm | None = None):
        self.tokenizer, self.scale, self.about = opened.tokenizer, opened.scale, opened.about
        self.server, self.reader, self.process = server, reader, process
        own = getattr(opened.config.get_text_config(), "max_position_embeddings", None)
        self.context = min((c for c in (own, server.context) if c), default=None)
        self.dtype = f"as {server.kind} has it" + (f", scores in {reader.dtype}" if reader else "")
        self.device = reader.device if reader else torch.device("cpu")
        self.ends = _end_tokens(opened)
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Raise UserError where the server's tokenizer is another one, if it tells."""
        (ids,) = self.render(["Is this the same tokenizer, 1 2 3?"])
        theirs = self.server.tokenize(self.tokenizer.decode(ids))
        if theirs is not None and theirs != ids:
            raise UserError(f"{self.server} has another tokenizer than the judge: serve the judge's merged folder")

    def calls(self, batch: int, n: int) -> tuple[int, int]:
        return 1, prompts_at_once(batch, n)

    def close(self) -> None:
        self.server.client.close()
        if self.process:
            self.process.end()

    def judge(
        self,
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        settings: Sampling,
        firsts: Sequence[int] | None = None,
    ) -> list[Judgement]:
        if not self.writes:
            return self.given(ids, [""] * len(ids))
        self.server.check(settings)
        firsts = firsts or [0] * len(ids)
        jobs = [
            (head, seed_of(settings.seed, text, first + draw))
            for text, head, first in zip(texts, ids, firsts, strict=True)
            for draw in range(settings.n)
        ]
        with ThreadPoolExecutor(len(jobs)) as pool:
            samples = list(pool.map(lambda job: self._sample(*job, settings), jobs))
        texts = [sample.text if sample.tokens is None else self.text(sample.tokens) for sample in samples]
        replies = [cut_at_score(text) for text in texts]
        tails = [self._tail(sample, reply) for sample, reply in zip(samples, replies, strict=True)]
        rows = [[*head, *tail, *self.scale.prefix_ids] for (head, _), tail in zip(jobs, tails, strict=True)]
        counts = [sample.count for sample in samples]
        return self.judgements(replies, counts, self.log_probs_after(rows), settings.n)

    def _sample(self, ids: Sequence[int], seed: int, settings: Sampling) -> Sample:
        prompt = list(ids) if self.server.takes_tokens else self._as_text(ids)
        return self.server.sample(prompt, len(ids), settings, seed, self.ends)

    def _as_text(self, ids: Sequence[int]) -> str:
        """A text that a server's tokenizer, which adds what it always adds, makes ``ids`` of. Raises UserError."""
        text = self.tokenizer.decode(ids)
        for start in ("", self.tokenizer.bos_token or ""):
            found = text.removeprefix(start)
            if self.tokenizer(found)["input_ids"] == list(ids):
                return found
        raise UserError(f"{self.server} takes texts, and the judge's tokenizer makes other tokens of them: use vLLM")

    def _tail(self, sample: Sample, reply: str) -> list[int]:
        """The tokens of a sample's rationale: those written, or made of the text where the server does not tell."""
        if sample.tokens is None:
            return prompts.tokenize(self.tokenizer, [cut_rationale(reply)])[0]
        return sample.tokens[: self.rationale_tokens(sample.tokens, reply)]

    def log_probs_after(self, rows: Sequence[Sequence[int]]) -> Tensor:
        if self.reader:
            return self.reader.log_probs_after(rows)
        with ThreadPoolExecutor(len(rows)) as pool:
            found = list(pool.map(lambda row: self.server.log_probs(row, self.scale.token_ids), rows))
        return torch.tensor(found, dtype=torch.float64)

    def fingerprint(self) -> str:
        """A hash of what is known of the server and of what else decides a score; its weights cannot be seen."""
        parts = (self.scale, self.about, self.tokenizer.chat_template, self.server.kind, self.server.version)
        read = self.reader.fingerprint() if self.reader else None
        name = None if self.process else self.server.model
        return hashlib.sha256(repr((*parts, name, read)).encode()).hexdigest()[:16]


def _end_tokens(opened: Opened) -> list[int]:
    """What ends a reply: the tokenizer's end token, and those that the model's own settings name."""
    try:
        own = GenerationConfig.from_pretrained(opened.source).eos_token_id
    except OSError:  # there are none
        own = None
    return sorted({opened.scale.eos_id, *([own] if isinstance(own, int) else own or [])})


def seed_of(seed: int, prompt: str, draw: int) -> int:
    """A seed of 63 bits that only these arguments decide."""
    digest = hashlib.sha256(f"{seed} {draw} {prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Vllm:
    """vLLM's server in a process of its own, with the judge's merged folder. Raises UserError where it does not start.

    vLLM may be installed in another environment: its command is looked for on the PATH.
    """

    def __init__(self, opened: Opened, dtype: str, say: Say):
        command = shutil.which("vllm")
        if command is None:
            raise UserError("backend = vllm: there is no command vllm on the PATH: pip install vllm, or start a server")
        if opened.adapter:
            raise UserError(
                f"backend = vllm needs all weights in one folder: {opened.path}/merged, which export writes"
            )
        chosen, reason = choose_dtype(dtype, opened.about.dtype, local_device())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = Path(tempfile.mkstemp(prefix="tract-fast-vllm-", suffix=".log")[1])
        arguments = [command, "serve", opened.source, "--served-model-name", "judge", "--dtype", chosen]
        arguments += ["--host", "127.0.0.1", "--port", str(port)]
        guard = shutil.which("setpriv")  # the server ends with this process, even if it is killed
        arguments = [guard, "--pdeathsig", "TERM", *arguments] if guard else arguments
        say(f"backend: {' '.join(arguments)} (dtype: {reason}; log: {self.log})")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.end()
            raise

    def _wait(self) -> None:
        begin = time.monotonic()
        while time.monotonic() - begin < START_SECONDS:
            if self.process.poll() is not None:
                lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise UserError(
                    f"backend = vllm: it ended before it was ready: {lines[-1] if lines else ''} ({self.log})"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(1)
        raise RunStopped(f"backend = vllm: not ready after {START_SECONDS} s: see {self.log}")

    def end(self) -> None:
        """End the server and what it has started."""
        for number, patience in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

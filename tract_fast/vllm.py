"""vLLM's server in a process of its own, with a judge's merged folder; it ends with the process that started it."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tract_fast.errors import RunStopped, UserError
from tract_fast.loading import Opened, Say, choose_dtype
from tract_fast.model import locate
from tract_fast.recipe import Model
from tract_fast.server import check_client, opener
from tract_fast.shard import local_device

START_SECONDS = 1800  # loading a model of many GB, and compiling
END_SECONDS = 20
# reads a pipe that only the starting process holds: its end is that process's end, however that came
WATCH = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGTERM)"


def is_vllm(backend: str) -> bool:
    """Whether ``backend`` asks for vLLM's server: ``vllm``, and its own arguments after it."""
    return backend.split(" ")[0] == "vllm"


def check_vllm() -> str:
    """The path of vLLM's command. Raises UserError where it, or the client, is missing.

    vLLM may be installed in another environment: its command is looked for on the PATH.
    """
    check_client()
    command = shutil.which("vllm")
    if command is None:
        raise UserError("backend = vllm: there is no command vllm on the PATH: pip install vllm, or start a server")
    return command


class Vllm:
    """Starts the server and waits until it is ready. Raises UserError where it does not start.

    ``backend`` is "vllm" and, after it, arguments for ``vllm serve``, such as "vllm --max-model-len 4096".
    """

    def __init__(self, opened: Opened, backend: str, dtype: str, say: Say):
        command = check_vllm()
        source = locate(Model(path=opened.source))
        if opened.adapter or "gguf_file" in source:
            what = "an adapter" if opened.adapter else "a GGUF file"
            raise UserError(
                f"{opened.path} is {what}, and backend = vllm needs all weights in one folder: that which export "
                "writes as judge/merged"
            )
        self.dtype, reason = choose_dtype(dtype, opened.about.dtype, local_device())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.key = f"http://127.0.0.1:{port}", secrets.token_hex(16)
        handle, name = tempfile.mkstemp(prefix="tract-fast-vllm-", suffix=".log")
        self.log = Path(name)
        labels = str(max(20, len(opened.scale.labels)))
        arguments = [command, "serve", source["pretrained_model_name_or_path"], "--served-model-name", "judge"]
        arguments += ["--dtype", self.dtype, "--host", "127.0.0.1", "--port", str(port), "--max-logprobs", labels]
        arguments += shlex.split(backend)[1:]
        say(f"backend: {shlex.join(arguments)} (dtype: {reason}; log: {self.log})")
        with os.fdopen(handle, "wb") as log:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "VLLM_API_KEY": self.key},  # nobody else's requests, and our own key to nobody else
            )
        watch = [sys.executable, "-S", "-c", WATCH, str(self.process.pid)]
        self.watch = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
        with ExitStack() as started:  # ended with whatever goes wrong while it loads
            started.callback(self.end, keep_log=True)
            self._wait()
            started.pop_all()

    def _wait(self) -> None:
        begin = time.monotonic()
        while time.monotonic() - begin < START_SECONDS:
            if self.process.poll() is not None:
                lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                last = lines[-1] if lines else ""
                raise UserError(f"backend = vllm: it ended before it was ready: {last} ({self.log})")
            try:
                with opener(own=True).open(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(1)
        raise RunStopped(f"backend = vllm: not ready after {START_SECONDS} s: see {self.log}")

    def end(self, keep_log: bool = False) -> None:
        """End the server and all that it has started."""
        self.watch.kill()
        self.watch.stdin.close()
        self.watch.wait()
        for number in (signal.SIGTERM, signal.SIGKILL):  # the second also for what outlived the first process
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(END_SECONDS)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
        if not keep_log:
            self.log.unlink(missing_ok=True)

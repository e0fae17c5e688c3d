"""A model behind an OpenAI-compatible server: samples, and log-probabilities of given tokens.

Servers differ in what they can do and in how they are asked for it, and most ignore what they do not know. So the kind
of server is found out first, a request says all that decides a sample in that server's own dialect, and the answer is
checked: what a server cannot do is refused here, never dropped there.

| | prompt | repetition penalty | log-probabilities of given tokens |
|---|---|---|---|
| vLLM | tokens | ``repetition_penalty`` | ``logprob_token_ids`` (vLLM pull request 43463) |
| ``transformers serve`` | text | in ``generation_config`` | none |
| any other | text | none: must be 1 | none |

Of the last, what there is no common word for (top-k, min-p, tokens that end a reply) stays as the server has it: said
when it is opened. ``transformers serve`` computes one request after another, with a random generator that all share, so
it is asked for one at a time; its ``--continuous-batching`` takes the first request's settings for all and must be off.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urldefrag

from tract_fast.errors import RunStopped, UserError
from tract_fast.recipe import Sampling

REQUEST_SECONDS = 3600  # the longest that one sample may take, waiting for others included
CONNECT_SECONDS = 20
LEAST_TEMPERATURE = 0.01
SLACK = 1e-3  # of probabilities that add up to 1
RETRIES = 5
LOWEST = -9999.0  # what vLLM writes for the logarithm of 0


@dataclass(frozen=True)
class Sample:
    """What a server wrote: its text, how many tokens, and which, where it says so."""

    text: str
    count: int
    tokens: list[int] | None


class Server:
    """One model of one server; its methods may be called from several threads.

    ``address`` is ``http://host:port`` (or ``https:``), with or without ``/v1``; ``#NAME`` after it names the model
    where the server has several. The key is taken from the environment's ``OPENAI_API_KEY``; with ``own_key`` the
    server is our own, and proxies are passed by. Raises UserError where no server answers there, or it is not clear
    which model is meant.
    """

    def __init__(self, address: str, own_key: str | None = None):
        openai = check_client()
        url, name = urldefrag(address)
        self.url, self.own = url.rstrip("/").removesuffix("/v1"), own_key is not None
        key = own_key or os.environ.get("OPENAI_API_KEY") or "none"
        if not key.isascii():
            raise UserError("OPENAI_API_KEY holds a character that no key has")
        self.openai = openai
        timeout = openai.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS)
        options = {"http_client": openai.DefaultHttpxClient(trust_env=False)} if self.own else {}
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=RETRIES, timeout=timeout, **options
        )
        models = self._models()
        chosen = [m for m in models if m.id == name] if name else models
        if len(chosen) != 1:
            names = ", ".join(m.id for m in models) or "none"
            raise UserError(f"backend = {address}: the server's models are {names}: name one, as in {self.url}#NAME")
        self.model: str = chosen[0].id
        self.context: int | None = getattr(chosen[0], "max_model_len", None)  # vLLM
        self.kind, self.version = self._kind()

    def __str__(self) -> str:
        return f"{self.model} of {self.kind} {self.version or 'server'} at {self.url}"

    @property
    def takes_tokens(self) -> bool:
        """Whether a prompt can be given as tokens; as text, the server makes tokens of it."""
        return self.kind == "vllm"

    @property
    def reads_scores(self) -> bool:
        """Whether log-probabilities of given tokens can be asked for."""
        return self.kind == "vllm"

    def _models(self) -> list[Any]:
        with self._reported(UserError, "is a server running there?"):
            try:
                return list(self.client.with_options(max_retries=0, timeout=CONNECT_SECONDS).models.list())
            except (AttributeError, TypeError, ValueError) as error:  # an answer of something else
                raise UserError(f"backend = {self.url} is no OpenAI-compatible server ({error!r:.100})") from error

    def _kind(self) -> tuple[str, str | None]:
        """Which server this is, by what it alone has."""
        version = self._json("/version")
        if isinstance(version, dict) and isinstance(version.get("version"), str):
            return "vllm", version["version"]
        described = self._json("/openapi.json")
        paths = described.get("paths") if isinstance(described, dict) else None
        return ("transformers" if "/load_model" in (paths or ()) else "other"), None

    def _json(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server has at ``path``; None where it has nothing there."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        # a redirect may lead to another host, which must not get the key
        request.add_unredirected_header("Authorization", f"Bearer {self.client.api_key}")
        try:
            with opener(own=self.own).open(request, timeout=CONNECT_SECONDS) as answer:
                return json.load(answer)
        except (urllib.error.HTTPError, ValueError):
            return None
        except OSError as error:
            raise UserError(f"backend = {self.url}: {error}") from None

    def tokenize(self, text: str) -> list[int] | None:
        """The server's own tokens of a text; None where it does not tell."""
        if self.kind != "vllm":
            return None
        found = self._json("/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})
        tokens = found.get("tokens") if isinstance(found, dict) else None
        if tokens is None:
            raise UserError(
                f"{self} does not say how it makes tokens (/tokenize), so it cannot be checked: use vLLM's own"
            )
        return tokens

    def check(self, settings: Sampling) -> None:
        """Raise UserError where the server cannot sample so."""
        if self.kind == "other" and settings.repetition_penalty != 1:
            raise UserError(
                f"repetition_penalty = {settings.repetition_penalty}: the server at {self.url} is neither vLLM nor "
                "transformers serve, so there is no telling how to ask it for that: write 1, or use one of these"
            )
        if self.kind == "vllm" and 0 < settings.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"temperature = {settings.temperature}: vLLM makes {LEAST_TEMPERATURE} of it: write 0 or that"
            )

    def sample(
        self, prompt: Sequence[int] | str, length: int, settings: Sampling, seed: int, ends: list[int]
    ) -> Sample:
        """One sample after ``prompt``, tokens or text as ``takes_tokens`` says, which is ``length`` tokens long.

        ``ends`` are the tokens that end it; they are no part of it. Raises RunStopped where the server fails, counts
        other tokens, or stops before it should.
        """
        answer, choice = self._complete(prompt=prompt, **self._asked(settings, seed, ends))
        if answer.usage is None or answer.usage.prompt_tokens != length:
            counted = None if answer.usage is None else answer.usage.prompt_tokens
            raise RunStopped(
                f"{self} counts {counted} tokens in a prompt of {length}: it has another tokenizer than the judge, or "
                "cut the prompt"
            )
        count = answer.usage.completion_tokens
        if choice.finish_reason == "length" and count < settings.max_new_tokens:
            raise RunStopped(
                f"{self} ends a reply after {count} tokens of {settings.max_new_tokens}: it has its own limit"
            )
        if not self.takes_tokens:
            return Sample(choice.text, count - (choice.finish_reason == "stop"), None)
        tokens = getattr(choice, "token_ids", None)
        if tokens is None:
            raise RunStopped(f"{self} does not return the tokens that it wrote: a newer vLLM does (0.10.2)")
        tokens = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        return Sample(choice.text, len(tokens), tokens)

    def _complete(self, **request: Any) -> tuple[Any, Any]:
        """The server's answer to a request, and its one choice."""
        with self._reported(RunStopped, "the same command goes on from here"):
            answer = self.client.completions.create(model=self.model, **request)
        if not answer.choices or len(answer.choices) != 1:
            raise RunStopped(f"{self} answers with {answer.choices!r:.100} instead of one choice")
        return answer, answer.choices[0]

    def _asked(self, settings: Sampling, seed: int, ends: list[int]) -> dict[str, Any]:
        """All that decides a sample; see ``served.check_generation_config`` for what a model's own settings may add."""
        if self.kind == "transformers":
            chosen = {
                "do_sample": settings.temperature > 0,
                "top_k": 0,
                "repetition_penalty": settings.repetition_penalty,
                "max_new_tokens": settings.max_new_tokens,
                "eos_token_id": ends,
                "pad_token_id": ends[0],
            }
            if settings.temperature > 0:
                chosen |= {"temperature": settings.temperature, "top_p": settings.top_p}
            # its generator of random numbers takes 32 bits
            return {"seed": seed % 2**32, "extra_body": {"generation_config": json.dumps(chosen)}}
        plain = {
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p if settings.temperature > 0 else 1.0,
            "seed": seed,
            "n": 1,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
        }
        if self.kind != "vllm":
            return plain
        own = {
            "repetition_penalty": settings.repetition_penalty,
            "top_k": 0,
            "min_p": 0.0,
            "stop_token_ids": ends,
            "skip_special_tokens": True,
            "return_token_ids": True,
        }
        return plain | {"extra_body": own}

    def log_probs(self, tokens: Sequence[int], chosen: Sequence[int]) -> list[float]:
        """Log-probabilities, in the vocabulary, of each of ``chosen`` as the token after ``tokens``.

        Raises RunStopped where the server does not give them.
        """
        own = {"logprob_token_ids": list(chosen), "return_tokens_as_token_ids": True, "top_k": 0, "min_p": 0.0}
        own |= {"repetition_penalty": 1.0}
        _, choice = self._complete(
            prompt=list(tokens), max_tokens=1, temperature=1.0, top_p=1.0, logprobs=len(chosen), extra_body=own
        )
        found = (choice.logprobs.top_logprobs or [None])[0] if choice.logprobs else None
        values = [(found or {}).get(f"token_id:{token}") for token in chosen]
        if any(value is None for value in values):
            raise RunStopped(
                f"{self} does not give the log-probabilities of all score tokens: that takes a vLLM with "
                "logprob_token_ids (2026-05 or later)"
            )
        if max(values) > SLACK or sum(map(math.exp, values)) > 1 + SLACK or max(values) <= LOWEST:
            raise RunStopped(
                f"{self} gives {values} as log-probabilities of the score tokens: start it with its default "
                "--logprobs-mode, and look whether its weights are whole"
            )
        return [-math.inf if value <= LOWEST else value for value in values]

    @contextlib.contextmanager
    def _reported(self, kind: type[Exception], remedy: str) -> Iterator[None]:
        """Errors of the server or on the way to it, in one line; a request that it refuses is refused again."""
        try:
            yield
        except self.openai.OpenAIError as error:
            reason = " ".join(str(error).split())[:300]
            status = getattr(error, "status_code", 500)
            hint = f" ({remedy})" if status >= 500 or status == 429 else ""
            raise kind(f"backend = {self.url}: {reason}{hint}") from error


def check_client() -> ModuleType:
    """The package openai. Raises UserError where it is not installed."""
    try:
        import openai
    except ImportError:
        raise UserError("servers are reached through the package openai: pip install openai") from None
    return openai


def opener(*, own: bool) -> urllib.request.OpenerDirector:
    """Opens addresses; of our ``own`` server not through a proxy."""
    return urllib.request.build_opener(*[urllib.request.ProxyHandler({})] if own else [])

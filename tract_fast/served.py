"""A judge whose model runs in a server (``server``), or in vLLM's, which is started for it.

The tokenizer and ``tract.json`` are read here, and prompts are rendered here. The rationale is the server's sample.
The score after it is read there, too, where the server gives log-probabilities of given tokens (vLLM); where it does
not, the judge's own weights are loaded here and read it, teacher-forced, as the authors do.

A sample's seed depends on (seed, prompt, draw) alone. Whether vLLM writes the same again is up to its arithmetic: it
batches by what else is under way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from tract_fast.data import prompt as prompts
from tract_fast.data.feedback import cut_rationale
from tract_fast.errors import UserError
from tract_fast.judge import Judge, Judgement, prompts_at_once
from tract_fast.loading import Opened, Say, load_weights
from tract_fast.model import locate
from tract_fast.recipe import Model, Sampling
from tract_fast.sample import cut_at_score, end_tokens, sample_key
from tract_fast.server import Sample, Server
from tract_fast.shard import local_device
from tract_fast.threads import in_order
from tract_fast.vllm import Vllm, is_vllm

PIECES, PIECE = 4096, 64  # of a weight file, bytes
NAMED = {  # settings that a request names, or that change no sample
    *("eos_token_id", "pad_token_id", "bos_token_id", "do_sample", "temperature", "top_p", "top_k"),
    *("repetition_penalty", "max_length", "max_new_tokens", "transformers_version", "_from_model_config"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
}


def served_judge(opened: Opened, backend: str, *, dtype: str, device, say: Say) -> ServedJudge:
    """The judge behind ``backend``: ``vllm`` or an address. Raises UserError where there is no such server."""
    process = None
    if not is_vllm(backend) and not backend.startswith(("http://", "https://")):
        raise UserError(f"backend = {backend}: must be auto, vllm, or the address of a server, http://HOST:PORT")
    with ExitStack() as started:  # ended with whatever goes wrong from here on
        if is_vllm(backend):
            process = Vllm(opened, backend, dtype, say)
            started.callback(process.end)
        server = Server(process.url, process.key) if process else Server(backend)
        say(f"backend: {server}")
        if server.kind == "transformers":
            check_generation_config(opened)
        if server.kind == "other":
            say("warning: top-k, min-p and what ends a reply are as this server has them: no word for them is common")
        reader = None
        if server.reads_scores and not process and dtype != "auto":
            raise UserError(f"dtype = {dtype}: the server has its own; leave it out")
        if not server.reads_scores:
            say("scores: read here, by the judge's own weights, since the server gives no log-probabilities of tokens")
            chosen = torch.device(device) if device else local_device()
            reader = Judge(load_weights(opened, dtype, chosen, say), opened.tokenizer, opened.scale, opened.about)
        judge = ServedJudge(opened, server, reader, process)
        started.pop_all()
        return judge


class ServedJudge(Judge):
    """A ``Judge`` whose rationales a server writes. ``reader`` reads the scores where the server cannot."""

    def __init__(self, opened: Opened, server: Server, reader: Judge | None, process: Vllm | None = None):
        self.tokenizer, self.scale, self.about = opened.tokenizer, opened.scale, opened.about
        self.server, self.reader, self.process = server, reader, process
        self.digest = weights_digest(opened)
        own = getattr(opened.config.get_text_config(), "max_position_embeddings", None)
        context = min((c for c in (own, server.context) if c), default=None)
        # reading a score asks for one token more, which is thrown away
        self.context = context - 1 if context and server.reads_scores else context
        written = process.dtype if process else "its own dtype"
        self.dtype = f"{server.kind}: {written}" + (f", scores in {reader.dtype}" if reader else "")
        self.device = reader.device if reader else torch.device("cpu")
        self.ends = end_tokens(_generation_config(opened), self.scale.eos_id)
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Raise UserError where the server's tokenizer is another one, if it tells."""
        (ids,) = self.render(["Is this the same tokenizer, 1 2 3?"])
        theirs = self.server.tokenize(self.tokenizer.decode(ids))
        if theirs is not None and theirs != ids:
            raise UserError(f"{self.server} has another tokenizer than the judge: serve the judge's merged folder")

    def calls(self, batch: int, n: int) -> tuple[int, int]:
        if self.reader:  # one forward pass for the scores of a batch
            return super().calls(batch, n)
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
        serial = self.server.kind == "transformers"  # its generator of random numbers is one for all requests
        samples = in_order(lambda job: self._sample(*job, settings), jobs, 1 if serial else len(jobs))
        texts = [sample.text if sample.tokens is None else self.text(sample.tokens) for sample in samples]
        replies = [cut_at_score(text) for text in texts]
        tails = [self._tail(sample, reply) for sample, reply in zip(samples, replies, strict=True)]
        rows = [[*head, *tail, *self.scale.prefix_ids] for (head, _), tail in zip(jobs, tails, strict=True)]
        counts = [sample.count for sample in samples]
        log_probs = self.log_probs_after(rows, [len(head) for head, _ in jobs])
        return self.judgements(replies, counts, log_probs, settings.n)

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

    def log_probs_after(self, rows: Sequence[Sequence[int]], prompt_lens: Sequence[int]) -> Tensor:
        if self.reader:
            return self.reader.log_probs_after(rows, prompt_lens)
        found = in_order(lambda row: self.server.log_probs(row, self.scale.token_ids), rows, len(rows))
        return torch.tensor(found, dtype=torch.float64)

    def fingerprint(self) -> str:
        """A hash of the judge's weights here, of what is known of the server, and of what else decides a score. Which
        weights the server has cannot be seen."""
        parts = (self.scale, self.about, self.tokenizer.chat_template, self.server.kind, self.server.version)
        parts = (*parts, self.ends, self.dtype, self.digest)
        read = self.reader.fingerprint() if self.reader else None
        name = None if self.process else self.server.model
        return hashlib.sha256(repr((*parts, name, read)).encode()).hexdigest()[:16]


def _generation_config(opened: Opened) -> GenerationConfig | None:
    """The settings beside a model's weights; None where there are none."""
    source = locate(Model(path=opened.source))["pretrained_model_name_or_path"]
    if Path(source).is_dir():
        return GenerationConfig.from_pretrained(source) if (Path(source) / "generation_config.json").exists() else None
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # a hub model without them; what else is wrong with the hub shows when its weights are read
        return None


def check_generation_config(opened: Opened) -> None:
    """Raise UserError where the settings beside the weights change samples in a way that ``transformers serve`` cannot
    be asked to leave out: what a request does not name, it takes from there."""
    found = _generation_config(opened)
    odd = set(found.to_diff_dict()) - NAMED if found else set()
    if odd:
        raise UserError(
            f"{opened.source}/generation_config.json sets {', '.join(sorted(odd))}, which transformers serve applies "
            "to every request: take it out, or use vLLM"
        )


def weights_digest(opened: Opened) -> str:
    """A hash of pieces of all weight files of the judge, so that another judge under the same name is not taken for it;
    of the name, where the files are not here."""
    digest = hashlib.sha256(opened.source.encode())
    source = locate(Model(path=opened.source))
    folders = [Path(p) for p in (source["pretrained_model_name_or_path"], opened.adapter) if p and Path(p).is_dir()]
    for path in sorted(p for folder in folders for p in (*folder.glob("*.safetensors"), *folder.glob("*.gguf"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(PIECES):
                file.seek(i * size // PIECES)
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def seed_of(seed: int, prompt: str, draw: int) -> int:
    """A seed of 63 bits that only these arguments decide."""
    return int.from_bytes(sample_key(seed, prompt, draw)[:8], "little") >> 1

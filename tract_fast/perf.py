"""Memory and speed of a run, what its arithmetic comes to, and what a device is slow at."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tract_fast import gpus


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a model multiplies: weights of its blocks' linear layers, its attention, its head."""

    trained: int  # weights whose gradient is computed: three products a token
    frozen: int  # weights that only hand gradients on: two
    heads: int  # heads * their width, over which queries meet keys
    windows: tuple[int | None, ...]  # of each layer; None: all that came before
    head: int  # weights of the head
    head_trained: bool

    def flops(self, queries: Sequence[int], keys: Sequence[int], rows: int) -> int:
        """Operations of forward and backward over segments of so many queries and keys, ``rows`` of which reach the
        head.

        What is computed again (activation checkpointing, fused kernels) is not counted, nor are norms and the like.
        Attention is exact: a token meets those of its own document that came before, within the layer's window; of a
        shared prompt there are keys for each rationale, and queries once.
        """
        linear = 2 * sum(queries) * (3 * self.trained + 2 * self.frozen)
        attention = 3 * self.attention(queries, keys)  # twice as many products backward as forward
        return linear + attention + 2 * rows * self.head * (3 if self.head_trained else 2)

    def attention(self, queries: Sequence[int], keys: Sequence[int]) -> int:
        """Operations of attention's forward: two products of each query and key that meet, in every layer."""
        met = Counter(self.windows)
        return sum(
            4 * self.heads * layers * sum(pairs(q, k, window) for q, k in zip(queries, keys, strict=True))
            for window, layers in met.items()
        )

    def forward(self, queries: Sequence[int], keys: Sequence[int]) -> int:
        """Operations of the blocks' forward."""
        return 2 * sum(queries) * (self.trained + self.frozen) + self.attention(queries, keys)


def pairs(queries: int, keys: int, window: int | None) -> int:
    """Pairs of a query and a key that causal attention forms, queries standing at the end of the keys."""
    before = keys - queries  # keys that even the first query has before itself
    if window is None or window >= keys:
        return queries * before + queries * (queries + 1) // 2
    short = min(max(window - before, 0), queries)  # queries whose window reaches the beginning
    return short * before + short * (short + 1) // 2 + (queries - short) * window


def work_of(blocks: Sequence[nn.Module], head: nn.Linear, config) -> Work | None:
    """The work of a model, sharded or not; None where its blocks hold weights outside of linear layers (experts)."""
    counts = {True: 0, False: 0}
    for block in blocks:
        linear = {id(m.weight) for m in block.modules() if isinstance(m, nn.Linear)}
        for p in block.parameters():
            if id(p) in linear:
                counts[p.requires_grad] += p.numel()
            elif p.ndim >= 2:
                return None
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(blocks)
    window = getattr(text, "sliding_window", None)
    if getattr(text, "layer_types", None) is None and window and getattr(text, "use_sliding_window", True):
        kinds = ["sliding_attention"] * len(blocks)
    return Work(
        trained=counts[True],
        frozen=counts[False],
        heads=text.num_attention_heads * head_dim,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        head=head.weight.numel(),
        head_trained=head.weight.requires_grad,
    )


def peak_flops(device: torch.device, stated: float | None) -> tuple[float | None, str]:
    """(FLOP/s of a device at its best, where the number is from); ``stated`` is ``run.peak_tflops``."""
    if stated is not None:
        return stated * 1e12, "run.peak_tflops"
    if device.type != "cuda":
        return None, "a CPU has no stated peak; set run.peak_tflops"
    name = torch.cuda.get_device_name(device)
    gpu = gpus.recognised(name)
    return (gpu.peak, f"{name}, dense bfloat16") if gpu else (None, f"{name} is not known; set run.peak_tflops")


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def slow_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` is a CPU below AVX-512, where products in bfloat16 take many times float32's time (measured on
    AVX2: a GEMM of 58 GFLOP .4 s in float32, 3 to 70 s in bfloat16)."""
    return device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def duration(seconds: float) -> str:
    """``3725`` -> ``1:02:05``."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


@contextlib.contextmanager
def profiled(first: int | None, done: int, folder: Path, rank: int) -> Iterator[torch.profiler.profile | None]:
    """Record two steps from step ``first`` on (1-based, ``run.profile``) into ``folder/rank_N.json``, a trace for
    Perfetto or chrome://tracing; call ``step`` of what it gives after each. None where nothing is recorded."""
    if first is None or first <= done:
        yield None
        return
    folder.mkdir(exist_ok=True)
    warm = min(1, first - done - 1)
    plan = torch.profiler.schedule(skip_first=first - done - 1 - warm, wait=0, warmup=warm, active=2, repeat=1)
    write = lambda profile: profile.export_chrome_trace(str(folder / f"rank_{rank}.json"))  # noqa: E731
    with torch.profiler.profile(schedule=plan, on_trace_ready=write, record_shapes=True) as profile:
        yield profile

"""Attention of a layer over packed documents on a CPU: one call a document against documents padded into one call.

    python -m benchmarks.attention [--lengths N ...] [--heads N] [--key-heads N] [--head-dim N] [--rounds N]

Forward and backward, both ways taking turns; medians over rounds after one. The default is a layer of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch

from tract_fast import attention, doctor
from tract_fast.perf import slow_bfloat16

CPU = torch.device("cpu")


def layer(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    dtype = torch.float32 if slow_bfloat16(CPU) else torch.bfloat16
    total = sum(args.lengths)
    shapes = [(1, heads, total, args.head_dim) for heads in (args.heads, args.key_heads, args.key_heads)]
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    upstream = torch.randn(1, total, args.heads, args.head_dim, dtype=dtype)
    ends = torch.tensor([0, *args.lengths]).cumsum(0).int()
    longest = max(args.lengths)
    fields = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    begin = time.perf_counter()
    out, _ = attention.document_attention(None, q, k, v, None, **fields)
    middle = time.perf_counter()
    torch.autograd.grad(out, (q, k, v), upstream)
    return middle - begin, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1008, 1175, 1150, 1100])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {"apart": [], "padded": []}
    for _ in range(args.rounds + 1):
        with mock.patch.object(attention, "_groups", lambda *_: []):
            times["apart"].append(layer(args))
        times["padded"].append(layer(args))
    print(doctor.describe_device(CPU), args.lengths, f"{args.heads} heads")
    for name, found in times.items():
        forward, backward = (1000 * statistics.median(t[i] for t in found[1:]) for i in (0, 1))
        print(f"{name:7} forward {forward:6.1f} ms, backward {backward:6.1f} ms, both {forward + backward:6.1f} ms")
    print(f"padded: {attention._groups(dict(enumerate(args.lengths)), args.heads, torch.get_num_threads())}")


if __name__ == "__main__":
    main()

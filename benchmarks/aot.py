"""Compile every Triton kernel configuration for GPUs that are not here, and print what each needs of one.

    python -m benchmarks.aot [--out FILE.json]

Triton compiles PTX and cubin without a device; its own ``cuobjdump`` tells registers, stack (spills) and instructions.
A configuration that spills, or that needs more shared memory than a multiprocessor has, would be slow or fail at
launch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton  # pip install triton, where torch did not bring it
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tract_fast.loss import fused, sampled, triton_rows, triton_sampled, triton_weight

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}  # what a 16-bit tl.dot must become
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
OPTIONS = {"plain": (False, False), "bias": (True, False), "cap": (False, True), "bias, cap": (True, True)}


@dataclass(frozen=True)
class Built:
    """One kernel, one configuration, one GPU generation."""

    kernel: str
    options: str
    dtype: str
    arch: int
    registers: int
    stack: int
    shared: int
    instructions: int
    matrix_units: bool


def cases():
    """(kernel, name, dtype, constants, launch configuration, odd) of everything that can be chosen, but for K: 8 stands
    for all, since a row's score tokens are few beside its block."""
    for (dtype, size), (options, (bias, cap)), odd in itertools.product(DTYPES.items(), OPTIONS.items(), (False, True)):
        flags = {"HAS_BIAS": bias, "SOFTCAP": cap}
        sizes = "odd" if odd else "even"
        for vocab, gradient in itertools.product((False, True), (False, True)):
            constants = flags | {"VOCAB": vocab, "GRADIENT": gradient, "K": 8}
            name = f"{options}, {sizes}, {'vocab' if vocab else 'scores'}, {'dZ' if gradient else 'loss only'}"
            config = triton.Config({"BLOCK": triton_rows.BLOCK_BYTES // size}, **triton_rows.LAUNCH)
            yield triton_rows.row_kernel, name, dtype, constants, config, odd
        for vocab in (False, True):
            yield from sampled_cases(f"{options}, {sizes}, {'vocab' if vocab else 'scores'}", dtype, flags, vocab, odd)
        for kernel in (fused.sums_kernel, fused.dz_kernel):
            for config in fused.TILES[size]:
                yield kernel, f"{options}, {sizes}", dtype, flags, config, odd


def sampled_cases(name: str, dtype: str, flags: dict, vocab: bool, odd: bool):
    """Of the sampled gradient."""
    shared = {"LOWEST": sampled.LOWEST, "PER_NAT": sampled.PER_NAT, "K": 8, "VOCAB": vocab} | flags
    drawn = {"OVER": sampled.OVER, "EXTRA": sampled.EXTRA, "STEPS": sampled.STEPS, "SCAN": triton_sampled.SCAN}
    block = {"BLOCK": triton_rows.BLOCK_BYTES // DTYPES[dtype]}
    config = triton.Config(block, **triton_rows.LAUNCH)
    exact = {"EXACT": dtype != "fp32", "FARTHEST": triton_sampled.FARTHEST}
    proposed = (False, True) if dtype == "bf16" and not odd else (False,)  # what float8 products write
    for yes, quantized in itertools.product((True, False), proposed):
        part = {"MAY_BE_LONG": yes, "PROPOSED": quantized}
        yield triton_sampled.draw_kernel, f"{name}, {part}", dtype, shared | drawn | part, config, odd
        part = {"NEED_DX": yes, "PROPOSED": quantized}
        launch = as_config(triton_sampled.SETTLE)
        yield triton_sampled.settle_kernel, f"{name}, {part}", dtype, shared | exact | part, launch, odd
    if vocab or any(flags.values()):
        return  # what follows has no logits
    for yes in (True, False):
        part = {"WRITE": yes}
        yield triton_weight.place_kernel, f"{name}, {part}", dtype, part, as_config(triton_weight.PLACE), odd
    for dw, db in ((True, True), (True, False), (False, True)):
        part = {"NEED_DW": dw, "NEED_DB": db}
        yield triton_weight.weight_kernel, f"{name}, {part}", dtype, part, as_config(triton_weight.WEIGHT), odd


def as_config(launch: dict) -> triton.Config:
    sizes = {name: value for name, value in launch.items() if name.isupper()}
    return triton.Config(sizes, **{name: value for name, value in launch.items() if not name.isupper()})


def build(kernel, name: str, dtype: str, constants: dict, config: triton.Config, arch: int, odd: bool) -> Built:
    """Compile one case for ``arch`` (90 is sm_90) and read what it came to.

    ``odd``: V and D are no multiples of 16; the rows of logits always are.
    """
    constants = constants | config.kwargs
    in_dtype = {"hidden", "weight", "bias", "logits", "dz", "dx", "dw", "db"}
    integers = {"labels": "*i64", "ids": "*i64", "used": "*i1", "starts": "*i64"}
    integers |= dict.fromkeys(("columns", "counts", "ends", "rows"), "*i32")
    scalars = dict.fromkeys(("softcap", "logit_scale", "eps"), "fp32")
    counts = {"n_rows", "n_vocab", "stride", "width", "n_tokens", "first", "last"}
    counts |= {"most", "room", "share_rows", "shares"}
    types, attributes = {}, {}
    for i, arg in enumerate(kernel.arg_names):
        if arg in constants:
            types[arg] = "constexpr"
        elif arg in in_dtype:
            types[arg] = f"*{dtype}"
        else:
            types[arg] = integers.get(arg) or scalars.get(arg) or ("i32" if arg in counts else "*fp32")
        if types[arg].startswith("*") or arg == "stride" or (not odd and arg in ("width", "n_vocab")):
            attributes[(i,)] = [["tt.divisibility", 16]]  # as for tensors of torch and usual sizes
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.maxnreg}
    if kernel is triton_sampled.draw_kernel:
        options |= triton_sampled.UNFUSED
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, code = inspect(binary.asm["cubin"])
    return Built(
        kernel=kernel.__name__,
        options=f"{name}, {describe(config)}",
        dtype=dtype,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=binary.metadata.shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
        matrix_units=MATRIX_UNITS[arch] in binary.asm["ptx"],
    )


def describe(config: triton.Config) -> str:
    sizes = [f"{name} {value}" for name, value in config.kwargs.items() if name != "UPCAST"]
    return ", ".join([*sizes, f"{config.num_warps} warps", f"{config.num_stages} stages"])


def inspect(cubin: bytes) -> tuple[str, str]:
    """(resource usage, disassembly) by the ``cuobjdump`` that triton carries."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout  # noqa: E731
        return run("--dump-resource-usage"), run("--dump-sass")


def build_nth(job: tuple[int, int]) -> Built:
    i, arch = job
    *case, odd = next(itertools.islice(cases(), i, None))
    return build(*case, arch, odd)


def problems(built: Built) -> list[str]:
    """What makes a configuration unusable."""
    found = []
    if built.stack:
        found.append(f"{built.stack} bytes of stack")
    if built.shared > SHARED_LIMIT[built.arch]:
        found.append(f"{built.shared} bytes of shared memory")
    if built.kernel in ("sums_kernel", "dz_kernel") and built.dtype != "fp32" and not built.matrix_units:
        found.append(f"no {MATRIX_UNITS[built.arch]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT), help="sm_.."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        # a kernel cannot be sent to another process, so a case is known by its place
        jobs = [(i, arch) for arch in args.arch for i, _ in enumerate(cases())]
        rows = list(pool.map(build_nth, jobs))
    print(f"triton {triton.__version__}; {os.cpu_count()} cores")
    print(f"{'kernel':12} {'arch':5} {'dtype':5} {'regs':>4} {'stack':>5} {'shared':>7} {'instr':>6}  configuration")
    for b in rows:
        wrong = "; ".join(problems(b))
        print(
            f"{b.kernel:12} sm_{b.arch:<3} {b.dtype:5} {b.registers:4} {b.stack:5} {b.shared:7} {b.instructions:6}  "
            f"{b.options}{'   <- ' + wrong if wrong else ''}"
        )
    if args.out:
        args.out.write_text(json.dumps({"triton": triton.__version__, "rows": [asdict(b) for b in rows]}, indent=1))
    return int(any(problems(b) for b in rows))


if __name__ == "__main__":
    raise SystemExit(main())

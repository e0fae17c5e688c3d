"""One command for a GPU machine that has nothing of ours: build, doctor, tests, benchmarks, and a table of it all.

    bash benchmarks/gpu.sh [--rehearse] [--minutes 9] [--only PART ...] [--out DIR]

Needs no network, nothing outside the repository, and of Python packages torch, triton, transformers, peft, scipy,
matplotlib, rich, pytest and hypothesis. ``WHEELS=folder`` brings others: wheels of what is missing go into
``build/gpu-site``, beside the machine's own packages, and a ``*.gguf`` there is the model of the step benchmark.

All of it ends after ``--minutes``: a part gets its share of the time that is left, what it does not use goes to those
after it, and one that does not end is ended (SIGINT, then SIGKILL) and told. The parts of ``--only`` have all the time.
Results go to ``benchmarks/results/<device>/``: a text per part, JSON, PNG and summary.md. Without a GPU nothing is run;
``--rehearse`` runs every part on the CPU, as small as can be, into a temporary folder that is removed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "gpu-site"
GRACE = 8.0  # seconds between SIGINT and SIGKILL
PROBE = (
    "import json, torch; gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None; "
    "print(json.dumps({'torch': torch.__version__, 'folder': torch.__path__[0], 'gpu': gpu}))"
)
# module -> what is lost without it
OPTIONAL = {
    "liger_kernel": "Liger's norm, RoPE and SwiGLU, and its losses as peers",
    "flash_attn": "attention of models that cap its logits",
    "cut_cross_entropy": "a peer of the loss",
    "quack": "a peer of the loss",
    "trl": "a peer of the step",
    "gguf": "a model in a *.gguf file",
    "tyro": "the command tract-fast (not needed here)",
    "datasets": "Parquet and hub data (not needed here)",
}


class Part(NamedTuple):
    """One command. ``{minutes}`` in it becomes the time that it is given, a little less than what it has."""

    name: str
    command: list[str]
    share: float
    """Of the time that is left, in proportion to the shares of the parts that follow."""
    missing: str = ""
    """Why it cannot run here; "" where it can."""


class Result(NamedTuple):
    name: str
    state: str
    """passed, failed, out of time, left out"""
    seconds: float
    told: str


def lacking(*modules: str) -> str:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"no Python package {', '.join(absent)}: bring wheels (WHEELS=folder)" if absent else ""


def wheel_part(folder: Path) -> Part:
    """Installs the wheels of what is not there, beside the machine's packages, which stay as they are."""

    def absent(wheel: Path) -> bool:
        try:
            importlib.metadata.distribution(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            return True
        return False

    wheels = [str(p) for p in sorted(folder.glob("*.whl")) if absent(p)]
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", str(SITE)]
    return Part("wheels", [*install, *wheels], 1, missing="" if wheels else f"none in {folder} that is not installed")


def parts(out: Path, tiny: bool, model: Path | None = None, torch: str = "") -> list[Part]:
    """What runs after the wheels are there; ``torch`` is the folder that the kernels are built against."""
    python = sys.executable
    tools = [name for name in ("cmake", "c++") if shutil.which(name) is None]
    build = f"no {' and no '.join(tools)} on the PATH: without the native CPU kernels" if tools else ""
    workers = ["-n", "4"] if (os.cpu_count() or 1) >= 8 and not lacking("xdist") else []
    fixed = ["env", "CUBLAS_WORKSPACE_CONFIG=:4096:8"]  # what deterministic algorithms need
    pytest = [*fixed, python, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *workers]
    untested = lacking("pytest", "hypothesis")
    marked = ["-k", "cpu and (adamw or wait or softmax)"] if tiny else ["-m", "gpu"]
    kernels = ["-k", "many_rows"] if tiny else ["-m", "not gpu and not soak"]
    loss, step, profile = ([python, "-m", f"benchmarks.{name}"] for name in ("loss", "step", "parts"))
    profile += ["--out", str(out), "--model", *(("smollm2-135m", "--steps", "1") if tiny else ("llama-3.2-1b",))]
    if tiny:
        loss += ["--device", "cpu", "--shapes", "tiny", "--only", "chunked", "eager", "--rounds", "1"]
        step += ["--device", "cpu", "--contestants", "exact", "--batch", "1", "--steps", "2", "--rounds", "1"]
    else:
        loss += ["--device", "cuda", "--minutes", "{minutes}"]
        step += ["--device", "cuda", "--models", "smollm2-135m", "llama-3.2-1b", "--rounds", "1"]
        step += ["--contestants", "hf", "hf-liger", "exact", "shared", "selective"]
    step += ["--minutes", "{minutes}", "--out", str(out)] + (["--model-path", str(model)] if model else [])
    # in the checkout: nothing of the machine's Python is written to, and all parts import from here
    settings = ["env", "TRACT_FAST_REQUIRE_EXT=1", f"TRACT_FAST_TORCH={torch}"]
    compile_here = [*settings, python, "setup.py", "-q", "build_ext", "--inplace"]
    doctor = [python, "-c", "from tract_fast import doctor; raise SystemExit(doctor.run())"]
    return [
        Part("build", compile_here, 1, build or lacking("setuptools")),
        Part("doctor", doctor, 1.5),
        Part("tests", [*pytest, *marked, "tests/test_gpu.py", "tests/loss"], 3, untested),
        Part("loss", [*loss, "--out", str(out)], 3),
        Part("step", step, 5),
        Part("parts", profile, 0.8),
        # the rest of the loss's tests compile most kernels, and come last for it
        Part("kernels", [*pytest, *kernels, "tests/loss/test_implementations.py"], 1.5, untested),
    ]


def run(part: Part, out: Path, seconds: float) -> Result:
    """Run a part for at most so long, its output into ``out``; whatever it started is ended with it."""
    if part.missing:
        return Result(part.name, "left out", 0.0, part.missing)
    log, began = out / f"{part.name}.txt", time.monotonic()
    command = [word.replace("{minutes}", f"{0.85 * seconds / 60:.2f}") for word in part.command]
    paths = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
    with log.open("w", encoding="utf-8") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment, "cwd": ROOT}
        process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            state = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
            end_group(process, signal.SIGINT)  # pytest and benchmarks tell what they have
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                print(f"{part.name}: does not end, killed", flush=True)
        finally:
            end_group(process, signal.SIGKILL)
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    last = text.splitlines()[-1] if text else ""
    code = f"exit {process.returncode}: " if state == "failed" else ""
    return Result(part.name, state, time.monotonic() - began, f"{code}{last}"[:160])


def end_group(process: subprocess.Popen, number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # all of it has ended


def run_all(planned: Sequence[Part], out: Path, deadline: float) -> list[Result]:
    """All parts one after another until ``deadline`` (of ``time.monotonic``), each with its share of what is left."""
    results = []
    for i, part in enumerate(planned):
        left = deadline - GRACE - time.monotonic()
        share = part.share / sum(p.share for p in planned[i:] if not p.missing or p is part)
        if left <= 0 and not part.missing:
            results.append(Result(part.name, "left out", 0.0, "no time was left"))
            continue
        print(f"{part.name}: {part.missing or f'at most {left * share:.0f} s'}", flush=True)
        results.append(run(part, out, left * share))
        if results[-1].state in ("failed", "out of time"):
            print("  " + "\n  ".join((out / f"{part.name}.txt").read_text(errors="replace").splitlines()[-25:]))
    return results


def summary(results: Sequence[Result], title: str) -> str:
    rows = [f"| {r.name} | {r.state} | {r.seconds:.0f} | {r.told.replace('|', '/')} |" for r in results]
    return "\n".join([title, "", "| part | result | seconds | last line |", "|---|---|---|---|", *rows]) + "\n"


def probe() -> dict[str, str | None]:
    """Of torch its version and folder, and the first GPU's name or None; {"error": why} where there is none to ask."""
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    lines = found.stdout.strip().splitlines()
    if found.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"error": found.stderr.strip().splitlines()[-1] if found.stderr.strip() else f"exit {found.returncode}"}


def slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="every part on the CPU, as small as can be")
    parser.add_argument("--minutes", type=float, default=9.0, help="of it all; 9")
    names = [part.name for part in parts(Path(), tiny=True)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results/<device>")
    args = parser.parse_args()
    if not (math.isfinite(args.minutes) and args.minutes > 0):
        parser.error(f"--minutes {args.minutes}: must be a number above 0, such as 9")
    deadline = time.monotonic() + 60 * args.minutes
    found = probe()
    if not found.get("gpu") and not args.rehearse:
        why = found.get("error") or f"torch {found['torch']} finds none"
        there = Path("/dev/nvidia0").exists()
        what = (
            "there is a GPU that torch cannot use"
            if there
            else "no GPU is found"
            if "error" in found
            else "no GPU here"
        )
        print(f"make gpu: {what} ({why}), so nothing is run; {sys.executable} is asked (PYTHON=... for another)")
        return int(there or "error" in found)
    if args.rehearse and not args.out:
        with tempfile.TemporaryDirectory(prefix="tract-fast-gpu-") as folder:
            code = measure(args, found, Path(folder), deadline)
        print("its results are removed; to keep them: --out DIR")
        return code
    return measure(args, found, (args.out or ROOT / "benchmarks/results" / slug(found["gpu"])).resolve(), deadline)


def measure(args: argparse.Namespace, found: dict[str, str | None], out: Path, deadline: float) -> int:
    """Run the parts into ``out`` and tell of them; returns the exit code. ``found``: of ``probe``."""
    out.mkdir(parents=True, exist_ok=True)
    wheels = os.environ.get("WHEELS")
    results = run_all([wheel_part(Path(wheels))], out, min(deadline, time.monotonic() + 60)) if wheels else []
    sys.path.append(str(SITE))
    importlib.invalidate_caches()
    models = sorted(Path(wheels).resolve().glob("*.gguf")) if wheels else []
    model = models[0] if models and not lacking("gguf") else None
    absent = [f"{m} ({lost})" for m, lost in OPTIONAL.items() if lacking(m)]
    chosen = [part for part in parts(out, args.rehearse, model, found.get("folder") or "") if part.name in args.only]
    results += run_all(chosen, out, deadline)
    title = f"{found.get('gpu') or 'rehearsal on a CPU'}, torch {found.get('torch')}"
    text = summary(results, title) + f"\nnot installed: {'; '.join(absent) or 'nothing'}\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nin {out}")
    return int(any(r.state in ("failed", "out of time") for r in results))


if __name__ == "__main__":
    raise SystemExit(main())

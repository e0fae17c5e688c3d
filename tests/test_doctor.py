"""``tract-fast doctor``: what it prints, and that each part of its self-test finds a fault in what training calls."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tract_fast import __version__, doctor, machine, selftest, shards
from tract_fast.cli import main
from tract_fast.head import choose_loss
from tract_fast.sections import Loss


@pytest.fixture
def only(monkeypatch):
    """Run those checks alone whose name begins so."""

    def chosen(prefix: str) -> None:
        every = doctor.checks
        monkeypatch.setattr(
            doctor, "checks", lambda device: (check for check in every(device) if check[0].startswith(prefix))
        )

    return chosen


def test_says_what_runs_and_why(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert __version__ in printed and torch.__version__.split("+")[0] in printed
    name, reason = choose_loss(Loss(), torch.float32, doctor.local_device(), doctor.Head())
    assert f"{name} ({reason})" in printed
    lines = {line[2:26].strip(): line[26:].strip() for line in printed.splitlines() if line.startswith("  ")}
    for name in (
        "system",
        "CPU",
        "cores",
        "memory",
        "disk",
        "proposal, int8",
        "proposal, fp8",
        "row pass",
        "liger",
        "lean",
        "compiled code",
        "optimizer",
    ):
        assert lines[name], name
    assert "generate.backend" in lines["generation"] or "backend = vllm: there is no command" in lines["generation"]
    for part in ("loss chunked", "loss sampled", *["loss int8"] * doctor.proposal.VNNI, "attention", "save"):
        for dtype in ("float32", "bfloat16"):
            assert "right; " in printed.split("self-test")[1].split(f"{part}, {dtype}")[1].splitlines()[0]
    assert "wrong: nothing" in printed and "FAILS" not in printed
    assert not list(tmp_path.glob("tract-fast-doctor-*")), "its folder is gone"


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_finds_a_wrong_loss(monkeypatch, capsys, only, factor):
    real = selftest.linear_tract_loss

    def wrong(*args, implementation, **options):
        out = real(*args, implementation=implementation, **options)
        return out if implementation == "reference" else out._replace(loss=out.loss * factor)

    only("loss chunked")
    monkeypatch.setattr(selftest, "linear_tract_loss", wrong)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG; error against float64") == 2 and "loss.implementation reference" in printed


@pytest.mark.parametrize("fault", ["biased", "nothing drawn", "too noisy", "nan"])
def test_finds_a_wrong_draw(monkeypatch, capsys, only, fault):
    """A gradient that is off by 5% on the whole; one that is exact while it says that it adds variance; one with three
    times the noise around the right mean."""
    real = selftest.linear_tract_loss

    def wrong(hidden, weight, *args, implementation="auto", gradient="exact", **options):
        if gradient == "exact":
            return real(hidden, weight, *args, implementation=implementation, **options)
        out = real(hidden, weight, *args, gradient=gradient, **options)
        options.pop("seed"), options.pop("eps")
        exact = real(hidden, weight, *args, implementation="reference", **options).loss
        factor = float("nan") if fault == "nan" else 1.05
        loss = {"nothing drawn": exact, "too noisy": exact + 3 * (out.loss - exact)}.get(fault, out.loss * factor)
        return out._replace(loss=loss)

    only("loss sampled, float32")
    monkeypatch.setattr(selftest, "linear_tract_loss", wrong)
    assert main(["doctor"]) == 1
    assert "WRONG; error against exact" in capsys.readouterr().out


def test_a_kernel_that_fails_is_told_and_the_rest_printed(monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError(f"no C compiler\nsecond line {Path.home()}/secret")

    monkeypatch.setattr(selftest, "linear_tract_loss", broken)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "FAILS: RuntimeError: no C compiler second line ~/secret" in printed
    after = printed.split("FAILS: RuntimeError", 1)[1]
    assert all(f"{name:24} right" in after for name in ("attention, bfloat16", "save, bfloat16"))
    losses = ("chunked", "sampled", *["int8"] * doctor.proposal.VNNI)
    wrong = [f"loss {name}, {dtype}" for dtype in ("float32", "bfloat16") for name in losses]
    assert f"wrong: {', '.join(wrong)}" in after


def test_finds_a_wrong_attention(monkeypatch, capsys, only):
    """Keys aligned to the queries' start: what sees a token too few."""
    real = doctor.selfcheck.document_attention

    def shifted(module, query, key, value, mask, **options):
        out, _ = real(module, query, key.roll(1, dims=2), value, mask, **options)
        return out, None

    only("attention")
    monkeypatch.setattr(doctor.selfcheck, "document_attention", shifted)
    monkeypatch.setattr(doctor.selfcheck, "varlen_attention", shifted)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.count("WRONG; data.share_prompts = auto: attention") == 2


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("changed", "WRONG; 1 of 84 tensors differ once loaded, such as optimizer."),
        ("disk full", "FAILS: OSError: checkpoint of step 1 could not be written"),
        ("infinite", "WRONG; the loss of a step is inf"),
    ],
)
def test_finds_a_wrong_save(monkeypatch, capsys, tmp_path, only, fault, told):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real = shards.write

    def write(file, parts):
        if fault == "disk full":
            raise OSError(28, "No space left on device")
        name = next(name for name in parts if name.endswith("exp_avg_sq"))
        if fault == "changed":
            parts = parts | {name: parts[name]._replace(local=parts[name].local * 1.0001)}
        real(file, parts)

    only("save, float32")
    monkeypatch.setattr(shards, "write", write)
    if fault == "infinite":
        taken = selftest.take_step
        monkeypatch.setattr(selftest, "take_step", lambda *args: taken(*args) + float("inf"))
    assert main(["doctor"]) == 1
    assert told in capsys.readouterr().out
    assert not list(tmp_path.glob("tract-fast-doctor-*"))
    assert not torch.distributed.is_initialized()


def test_a_choice_that_fails_is_told(monkeypatch, capsys, only):
    def broken(*args):
        raise RuntimeError("no such device")

    only("nothing")
    monkeypatch.setattr(doctor.optim, "adamw", broken)
    monkeypatch.setattr(machine, "gpus", broken)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILS: RuntimeError: no such device") == 2 and "generation " in printed
    assert "wrong: GPU, optimizer" in printed


@pytest.mark.skipif(doctor.local_device().type != "cpu" or bool(doctor.native.missing()), reason="no native kernels")
def test_a_variant_that_is_not_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setenv("TRACT_FAST_CPU", "abacus")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("error: TRACT_FAST_CPU = abacus: must be portable, or avx2")


@pytest.mark.parametrize("held", [None, "AVX512_CORE_BF16", "avx512_core_amx", "ALL"])
@pytest.mark.parametrize("amx", [False, True])
def test_says_what_a_cpu_multiplies_with(monkeypatch, amx, held):
    """With AMX the products of bfloat16 are as fast as those of 8 bits, unless oneDNN is held to less."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if held:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    there = {"avx512_bf16": True, "avx512_vnni": True, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    monkeypatch.setattr(doctor.proposal, "VNNI", True)
    device = torch.device("cpu")
    said = doctor.describe_device(device)
    assert ("(bfloat16, VNNI, AMX)" if amx else "(bfloat16, VNNI)") in said
    below = held == "AVX512_CORE_BF16"
    assert ("no further than AVX512_CORE_BF16 (ONEDNN_MAX_CPU_ISA)" in said) == below
    assert ("no faster than none" in doctor.describe_proposal("int8", device)) == (amx and not below)


def test_environment_shows_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    told = machine.host()
    assert "OMP_NUM_THREADS=3" in told["environment"] and "secret" not in str(told)


def test_memory_and_its_limit(tmp_path):
    info, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    info.write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n")
    assert machine.memory(info, limit) == "8.0 free of 16.0 GiB"
    limit.write_text("max\n")
    assert machine.memory(info, limit) == "8.0 free of 16.0 GiB"
    limit.write_text(f"{2**32}\n")
    assert machine.memory(info, limit) == "8.0 free of 16.0 GiB; this container may have 4.0 GiB"


@pytest.mark.parametrize("apart", [False, True])
def test_gpus(monkeypatch, tmp_path, apart):
    """What is asked of CUDA, with stand-ins for its answers."""
    about = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda i: about,
        "mem_get_info": lambda i: ((70 + i) * 2**30, 80 * 2**30),
        "can_device_access_peer": lambda a, b: not (apart and a == 1),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 7))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n")
    told = machine.gpus()
    assert told["GPU 1"] == "NVIDIA H100 80GB HBM3, sm_90, 71.0 free of 80.0 GiB"
    assert told["driver"] == f"580.65.06, CUDA {torch.version.cuda}, NCCL 2.27.7"
    assert told["GPU to GPU"] == ("through the host: 1-0" if apart else "all directly (P2P)")


def test_why_there_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat\n")
    (told,) = machine.gpus().values()
    assert "torch is built without CUDA" in told and "driver 535.104.05 is loaded" in told


def test_a_compiler_that_is_missing_is_named(monkeypatch, tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.compiler(cuda) == (False, "no gcc or clang on the PATH")
    assert machine.compiler(cpu)[0] is False and "on the PATH" in machine.compiler(cpu)[1]
    monkeypatch.setenv("CC", "nowhere")
    assert machine.compiler(cuda) == (False, "CC = nowhere: no such command")
    (tmp_path / "clang").write_text("")
    (tmp_path / "clang").chmod(0o755)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h is missing" in machine.compiler(cuda)[1]
    (tmp_path / "Python.h").write_text("")
    assert machine.compiler(cuda) == (True, "clang")

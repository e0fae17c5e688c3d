"""``tract-fast doctor``: what it prints, and that it finds a wrong loss."""

from __future__ import annotations

import pytest
import torch

from tract_fast import __version__, doctor
from tract_fast.cli import main


def test_says_what_runs_and_why(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert __version__ in printed and torch.__version__.split("+")[0] in printed
    name, reason = doctor.choose(
        "auto", device_type=doctor.local_device().type, dtype=torch.float32, **doctor.LLAMA_HEAD
    )
    assert f"loss: {name} ({reason})" in printed and "attention:" in printed
    assert "chunked: right" in printed and "WRONG" not in printed


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_finds_a_wrong_loss(monkeypatch, capsys, factor):
    real = doctor.linear_tract_loss

    def wrong(*args, implementation, **options):
        out = real(*args, implementation=implementation, **options)
        return out if implementation == "reference" else out._replace(loss=out.loss * factor)

    monkeypatch.setattr(doctor, "linear_tract_loss", wrong)
    assert main(["doctor"]) == 1
    assert "chunked: WRONG" in capsys.readouterr().out


def test_a_kernel_that_fails_is_told_and_the_rest_printed(monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("no C compiler\nsecond line")

    monkeypatch.setattr(doctor, "linear_tract_loss", broken)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "chunked: FAILS: RuntimeError: no C compiler second line" in printed and "row pass:" in printed


@pytest.mark.skipif(doctor.local_device().type != "cpu" or bool(doctor.native.missing()), reason="no native kernels")
def test_a_variant_that_is_not_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setenv("TRACT_FAST_CPU", "abacus")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("error: TRACT_FAST_CPU = abacus: must be portable, or avx2")

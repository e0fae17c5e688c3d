"""The native build as ``setup.py`` drives it: what is left out is said, and no earlier library passes for this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]


def build(out: Path, **environment: str) -> tuple[subprocess.CompletedProcess, Path]:
    """``setup.py build_ext`` into ``out``, where a library of an earlier build lies."""
    library = out / "tract_fast" / "_native.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    library.write_text("of an earlier build")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", out, "--build-temp", out / "temp"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRACT_FAST")}
    done = subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)
    return done, library


def test_left_out_on_purpose(tmp_path):
    done, library = build(tmp_path, TRACT_FAST_SKIP_EXT="1")
    assert done.returncode == 0
    assert "without the native CPU kernels" in done.stdout
    assert not library.exists()


def test_without_torch_it_installs_and_says_so(tmp_path):
    done, library = build(tmp_path, TRACT_FAST_TORCH=str(tmp_path / "nowhere"))
    assert done.returncode == 0
    assert "the native CPU kernels are left out: no torch in" in done.stdout
    assert "name its folder in TRACT_FAST_TORCH" in done.stdout
    assert not library.exists()


def test_without_cmake_it_installs_and_says_so(tmp_path):
    torch = tmp_path / "torch"
    (torch / "include").mkdir(parents=True)
    done, library = build(tmp_path, TRACT_FAST_TORCH=str(torch), PATH=str(tmp_path))
    assert done.returncode == 0
    assert "the native CPU kernels are left out" in done.stdout
    assert "cmake" in done.stdout
    assert not library.exists()


def test_required_and_not_possible_is_an_error(tmp_path):
    done, library = build(tmp_path, TRACT_FAST_TORCH=str(tmp_path / "nowhere"), TRACT_FAST_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "no torch in" in done.stderr
    assert not library.exists()


def test_a_module_of_an_earlier_build_is_not_packed(tmp_path):
    left = tmp_path / "tract_fast" / "long_gone.py"
    left.parent.mkdir()
    left.touch()
    subprocess.run([sys.executable, "setup.py", "build_py", "--build-lib", tmp_path], cwd=ROOT, check=True)
    assert (tmp_path / "tract_fast" / "train.py").exists()
    assert not left.exists()

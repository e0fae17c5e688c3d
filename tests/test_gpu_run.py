"""``make gpu``: without a GPU it runs nothing; a part that overruns is ended and told, and those after it still run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Part

ROOT = Path(__file__).parents[1]
INTERRUPTED = (
    "import time\n"
    "print('begun', flush=True)\n"
    "try:\n"
    "    time.sleep(100)\n"
    "except KeyboardInterrupt:\n"
    "    print('told what there is', flush=True)\n"
    "    raise SystemExit(3)\n"
)
# ignores SIGINT, and so does a process that it starts
STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(100)\n"
)


def python(name: str, code: str, share: float = 1.0, **options) -> Part:
    return Part(name, [sys.executable, "-c", code], share, **options)


@pytest.fixture
def soon(monkeypatch) -> float:
    """A deadline that gives each of four parts some seconds."""
    monkeypatch.setattr(gpu, "GRACE", 5.0)  # a busy machine takes seconds to wake a process
    return time.monotonic() + 30  # were two parts to take all of their grace, 7 seconds would be left for the other two


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path):
    out = tmp_path / "results"
    environment = {**os.environ, "PYTHON": sys.executable, "WHEELS": str(tmp_path)}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stdout and "nothing is run" in done.stdout and done.stdout.count("\n") == 1
    assert not out.exists()


def test_a_part_that_overruns_is_ended_and_the_rest_runs(tmp_path, soon, capsys):
    planned = [
        python("interrupted", INTERRUPTED, 0.5),
        python("stubborn", STUBBORN, 0.5),
        python("broken", "print('it broke'); raise SystemExit(2)"),
        python("absent", "raise SystemExit(1)", missing="no compiler"),
        python("quick", "print('fine')"),
    ]
    results = {r.name: r for r in gpu.run_all(planned, tmp_path, soon)}
    assert {name: r.state for name, r in results.items()} == {
        "interrupted": "out of time",
        "stubborn": "out of time",
        "broken": "failed",
        "absent": "left out",
        "quick": "passed",
    }
    assert results["interrupted"].told == "told what there is" and results["quick"].told == "fine"
    assert results["broken"].told == "exit 2: it broke" and results["absent"].told == "no compiler"
    assert "stubborn: does not end, killed" in capsys.readouterr().out
    child = int((tmp_path / "stubborn.txt").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z", "what it started is ended, too"


def test_nothing_begins_after_the_deadline(tmp_path):
    planned = [python("late", "open('late', 'w')"), python("absent", "", missing="no compiler")]
    late, absent = gpu.run_all(planned, tmp_path, time.monotonic() + gpu.GRACE - 1)
    assert (late.state, late.told) == ("left out", "no time was left") and absent.told == "no compiler"
    assert not (tmp_path / "late.txt").exists()


def test_time_that_is_not_used_goes_to_those_after(tmp_path, monkeypatch):
    given = []
    run = lambda part, out, seconds: given.append(seconds) or gpu.Result(part.name, "passed", 0.0, "")  # noqa: E731
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    gpu.run_all([Part("a", [], 1), Part("b", [], 2, missing="no"), Part("c", [], 3)], tmp_path, 100.0)
    assert [given[0], given[2]] == [25.0, 100.0]


@pytest.mark.parametrize(("code", "exit_code"), [("print('x')", 0), ("raise SystemExit(1)", 1)])
def test_exit_code_and_summary(monkeypatch, tmp_path, capsys, code, exit_code):
    monkeypatch.setattr(gpu, "parts", lambda *_, **__: [python("one", code), python("two", "print('a | b')")])
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--out", str(tmp_path), "--minutes", "1"])
    monkeypatch.delenv("WHEELS", raising=False)
    assert gpu.main() == exit_code
    text = (tmp_path / "summary.md").read_text()
    assert f"| one | {'failed' if exit_code else 'passed'} |" in text and "| two | passed |" in text
    assert "a / b" in text and "not installed: " in text and text in capsys.readouterr().out


@pytest.mark.parametrize("code", ["print('x')", "raise SystemExit(1)"])
def test_a_rehearsal_leaves_nothing_behind(monkeypatch, tmp_path, capsys, code):
    monkeypatch.setattr(gpu, "parts", lambda *_, **__: [python("one", code)])
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--minutes", "1"])
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("WHEELS", raising=False)
    assert gpu.main() == ("Exit" in code)
    printed = capsys.readouterr().out
    assert "| one |" in printed and "to keep them: --out DIR" in printed and not list(tmp_path.iterdir())


@pytest.mark.parametrize("minutes", ["nan", "0", "-1", "inf"])
def test_minutes_are_some(monkeypatch, capsys, minutes):
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", f"--minutes={minutes}"])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2 and "must be a number above 0, such as 9" in capsys.readouterr().err


def test_every_part_can_be_planned(tmp_path):
    """Their files and flags are there: a benchmark that does not know a flag would find out on the GPU machine."""
    for tiny in (False, True):
        for part in gpu.parts(tmp_path, tiny, Path("model.gguf")):
            assert all((ROOT / word).exists() for word in part.command if word.startswith("tests/"))
            module = part.command[part.command.index("-m") + 1] if "-m" in part.command else ""
            if module.startswith("benchmarks.") and not part.missing:
                shown = subprocess.run(
                    [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT
                )
                flags = [word for word in part.command if word.startswith("--")]
                assert shown.returncode == 0 and all(flag in shown.stdout for flag in flags), shown


def test_a_name_becomes_a_folder():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_wheels_of_what_is_missing_are_installed_beside_the_rest(monkeypatch, tmp_path):
    """One wheel that is new and one of a package that is there."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    monkeypatch.setattr(gpu, "SITE", site)
    for name in ("quite_new_package", "pytest"):
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as file:
            file.writestr(f"{name}.py", "answer = 42\n")
            file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{info}/RECORD", "")
    part = gpu.wheel_part(wheels)
    assert "quite_new" in part.command[-1] and not any("pytest-1.0" in word for word in part.command)
    result = gpu.run(part, tmp_path, 60)
    assert result.state == "passed", (tmp_path / "wheels.txt").read_text()
    assert (site / "quite_new_package.py").is_file()
    used = gpu.run(python("use", "import quite_new_package as q; print(q.answer)"), tmp_path, 60)
    assert used.told == "42"
    assert gpu.wheel_part(tmp_path).missing.startswith("none in")

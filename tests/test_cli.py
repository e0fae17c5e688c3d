"""The command line: help, exit codes, and how what goes wrong is told."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_runs import tiny_recipe
from tract_fast import __version__, recipe as recipes, settings
from tract_fast.cli import COMMANDS, main

COMMAND = [sys.executable, "-m", "tract_fast"]
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # as output is outside of containers


def run(*argv, **options):
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, timeout=60, **options)


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


HELP = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]


@pytest.mark.parametrize("argv", HELP)
def test_help_is_fast(argv):
    """Processor time, the best of ten: a busy machine does not count, and a slow one by what tyro alone takes then."""

    def seconds(start):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert start().returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def tyro():
        return seconds(lambda: subprocess.run([sys.executable, "-c", "import tyro"]))

    assert any(seconds(lambda: run(*argv)) < max(0.3, 4 * tyro()) for _ in range(10))


def test_help_loads_nothing_heavy():
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from tract_fast import cli; cli.main()"
    loaded = subprocess.run([sys.executable, "-c", code, "train", "--help"], capture_output=True, text=True).stdout
    heavy = {"torch", "transformers", "numpy", "datasets", "rich", "typeguard"}
    assert "tyro" in loaded.split() and not heavy & set(loaded.split())


def test_help_of_train_shows_every_setting():
    printed = run("train", "--help", env={**os.environ, "COLUMNS": "80", "PYTHONUTF8": "1"}).stdout
    text = " ".join(re.sub("[─-╿]", " ", printed).split())  # without boxes and line breaks
    for key, f in recipes.FIELDS.items():
        section = recipes.SECTIONS[key.partition(".")[0]]
        assert f"--{key} {settings.metavar(f.type)} {settings.docs(section)[f.name]} (" in text, key
        assert section.__doc__ in text
    assert "Peak learning rate. (default: 1.0e-05)" in text and "(default: ['1', '2', '3', '4', '5'])" in text
    assert text.count("(required)") == 4 and "--nproc INT|auto, --run.nproc INT|auto" in text and "--dry-run" in text
    places = [text.index(f"{name} options {cls.__doc__}") for name, cls in recipes.SECTIONS.items()]
    assert places == sorted(places)


def test_help_names_all_commands(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "--out DIR" in help_of(capsys, "export") and "--step N" in help_of(capsys, "export")
    assert "runs/demo" in help_of(capsys, "demo")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tract-fast {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "trian is no command; did you mean train?; tract-fast --help lists them"),
        (["plan"], "plan needs a recipe: tract-fast plan RECIPE.yaml"),
        (
            ["plan", "r.yaml", "--gpu", "h10-80gb"],
            "--gpu h10-80gb: no such GPU is known; did you mean h100-80gb?; those",
        ),
        (["plan", "r.yaml", "--gpus", "0"], "--gpus 0: must be 1 or more"),
        (["plan", "r.yaml", "--mfu", "1.5"], "--mfu 1.5: must be a share of the peak, above 0 and at most 1"),
        (["plan", "r.yaml", "--gpus", "two"], "--gpus two: must be a whole number, such as 8"),
        (["plan", "r.yaml", "--mfu", "half"], "--mfu half: must be a number, such as 0.4"),
        (["plan", "r.yaml", "--mfu", "nan"], "--mfu nan: must be a share of the peak"),
        (["plan", "r.yaml", "--dry-run"], "--dry-run is a flag of train; leave it out: plan trains nothing"),
        (["run", "r.yaml", "--dry_run"], "--dry-run is a flag of train; tract-fast plan RECIPE trains nothing"),
        (["plan", "r.yaml", "--gpuss", "2"], "--gpuss: no such setting"),
        (
            ["plan", "r.yaml", "--gpus", "3", "--shard.replicate", "2"],
            "shard.replicate = 2: must divide the number of G",
        ),
        (["my.yaml"], "my.yaml is no command; did you mean tract-fast train my.yaml?; tract-fast --help lists them"),
        (["--hlep"], "--hlep is no command; tract-fast --help lists them"),
        (["train", "none.yaml"], "none.yaml: no such recipe file"),
        (["train", "r.yaml", "--train.lrr", "3"], "--train.lrr: no such setting; did you mean train.lr?"),
        (["train", "r.yaml", "--learning-rate=3"], "--learning-rate: no such setting; did you mean train.lr?"),
        (["train", "r.yaml", "--train.lr"], "--train.lr needs a value: --train.lr NUMBER"),
        (["train", "--train.lr", "--dry-run", "r.yaml"], "--train.lr needs a value: --train.lr NUMBER"),
        (["train", "r.yaml", "train.lr=3"], "train.lr=3: write --train.lr=3"),
        (["train", "r.yaml", "--train.lr", "abc"], "train.lr = abc: must be a number"),
        (["train", "--train.lr", "-1", "r.yaml"], "train.lr = -1.0: must be above 0"),
        (["train", "--dry-run", "--nproc", "0", "r.yaml"], "run.nproc = 0: must be above 0, or auto"),
        (["train", "--dry_run", "r.yaml", "--train.clip", "-2"], "train.clip = -2.0: must be above 0, or null"),
        (["train", "bad.yaml"], "train.lr = [1, 2]: must be a number (bad.yaml:5)"),
        (["export", "none"], "none holds no checkpoint to export"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    recipe = "model: {path: m}\ndata: {train: d}\nrun: {dir: r}\ntrain:\n  lr: "
    (tmp_path / "r.yaml").write_text(recipe + "1.0e-5\n")
    (tmp_path / "bad.yaml").write_text(recipe + "[1, 2]\n")
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1 and not printed.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.yaml", "r.yaml"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["export", "r", "--step", "x"], "--step"),
        (["export", "r", "--otu", "x"], "--out"),
    ],
)
def test_what_the_parser_refuses(capsys, argv, words):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], "train needs a recipe: tract-fast train RECIPE.yaml"),
        (["train", "--train.lr", "1e-3"], "train needs a recipe"),
        (["train", "a.yaml", "--dry-run", "b.yaml"], "b.yaml: one word too many for train"),
        (["export"], "export needs a run: tract-fast export RUN_DIR"),
        (["export", "r", "--step", "3", "more"], "more: one word too many for export"),
        (["demo", "here"], "here: one word too many for demo"),
    ],
)
def test_words_that_lack_or_are_too_many(capsys, argv, words):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    """One sentence before a model is loaded, not a traceback after."""
    assert train_run(tmp_path / "run") == 0
    file = tmp_path / "file"
    file.write_text("x")
    assert main(["export", str(tmp_path / "run"), "--out", str(file)]) == 2
    assert f"error: --out = {file} cannot be written" in capsys.readouterr().err
    assert train_run(file / "run") == 2
    assert f"error: run.dir = {file / 'run'} cannot be written" in capsys.readouterr().err


def train_run(run_dir):
    recipe = tiny_recipe(run_dir.parent if run_dir.parent.is_dir() else run_dir.parent.parent, train__max_steps=1)
    path = Path(recipe.data.train).parent / "r.yaml"
    path.write_text(recipes.dump(recipe))
    return main(["train", str(path), "--run.dir", str(run_dir)])


def test_override_may_stand_before_the_recipe(tmp_path, capsys):
    """Through loading: the recipe's own mistake is only reached when its path was understood."""
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: m}\ndata: {train: d}\nrun: {dir: r}\n")
    for argv in (
        ["--loss.ce_weight", "0", str(path)],
        [str(path), "--loss.ce_weight=0"],
        ["--loss.ce-weight", "0", str(path)],
    ):
        assert main(["train", "--loss.regression_weight", "0", *argv]) == 2
        assert "loss.ce_weight = 0.0: loss.regression_weight is 0 too" in capsys.readouterr().err


def test_dry_run(tmp_path, capsys):
    """A whole command in this process: override, resolved recipe, and nothing trained."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(tiny_recipe(tmp_path)))
    assert main(["train", str(path), "--dry-run", "--train.lr", "2e-5"]) == 0
    printed = capsys.readouterr().out
    assert "lr: 2.0e-05" in printed and f"train: {tmp_path}/data.jsonl" in printed
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_go_on(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(tiny_recipe(tmp_path)))
    assert main(["train", str(path), "--train.lr", "1e30", "--train.clip", "null", "--checkpoint.every", "1"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: the ") and "before the update" in printed and printed.count("\n") == 1


def test_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    command, options = [*COMMAND, "train", "--help"], {"stderr": subprocess.PIPE, "text": True, "timeout": 60}
    ended = subprocess.run(command, stdout=writer, env=BUFFERED, **options)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk():
    with open("/dev/full", "w") as full:
        command, options = [*COMMAND, "--version"], {"stderr": subprocess.PIPE, "text": True, "timeout": 60}
        ended = subprocess.run(command, stdout=full, env=BUFFERED, **options)
    assert ended.returncode == 1
    assert ended.stderr == "error: No space left on device: free some space and give the same command\n"


def test_ctrl_c(tmp_path):
    """Interrupted while it waits for its recipe, which comes through a pipe."""
    fifo = tmp_path / "r.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [*COMMAND, "train", str(fifo)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )
    with fifo.open("w"):  # opens once the command reads
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "error: interrupted\n")

"""The command line: ``tract-fast train | export | demo | doctor``. Commands import what they need when they run."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from tract_fast import __version__, recipe as recipes
from tract_fast.errors import RunStopped, UserError

PROG = "tract-fast"
SWITCHES = {"--help", "-h", "--dry-run", "--dry_run"}  # flags without a value
LATER = ("generate", "run", "evaluate", "score", "plan")  # commands that are not in this version


def train(
    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")],
    settings: Annotated[object, tyro.conf.arg(name="", constructor_factory=recipes.flags)],
    dry_run: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["--dry-run"])] = False,
) -> int:
    """Train a judge by a recipe. The same command goes on with a run that was stopped.

    Any setting of the recipe can be given on the command line, as a YAML value: --train.lr 2e-5, --data.eval null,
    --score.labels '[A, B, C]'.

    Args:
        recipe: YAML file of settings; it needs at least model.path, data.train and run.dir.
        dry_run: Show the resolved recipe, the step plan, memory and one example token by token; train nothing.
    """
    resolved = recipes.build(recipe, recipes.overrides(settings))
    from tract_fast.train import run

    return run(resolved, dry_run=dry_run)


def export(
    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    step: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
) -> int:
    """Write a trained judge as folders that plain transformers and peft load.

    Args:
        run_dir: The run.dir of a training run.
        out: Where to write; RUN_DIR/judge if not given.
        step: Export the checkpoint of this step; the newest if not given.
    """
    from tract_fast import checkpoint

    print(f"written: {checkpoint.export(run_dir, out, step)}")
    return 0


def demo(dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/demo")) -> int:
    """Train a small judge on the CPU and print its held-out numbers before and after.

    Args:
        dir: Folder for the run.
    """
    from tract_fast import demo as demonstration

    return demonstration.run(dir)


def doctor() -> int:
    """Show versions, the device, what runs on it and why, and check the loss there."""
    from tract_fast import doctor as doctors

    return doctors.run()


COMMANDS = {"train": train, "export": export, "demo": demo, "doctor": doctor}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (run stopped), 2 (a mistake in what was given), 130 (Ctrl-C)."""
    try:
        try:
            return _dispatch(list(sys.argv[1:] if argv is None else argv))
        finally:
            print(end="", flush=True)  # so that a closed pipe or a full disk is met here
    except UserError as error:
        return _fail(error, 2)
    except RunStopped as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        _discard_output()
        return 141  # what a shell reports for a program that its pipe has ended
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or error.filename):
            raise
        if full:
            _discard_output()
        place = f" ({error.filename})" if error.filename else ""
        remedy = "free some space and give the same command" if full else "choose a place that can be written"
        return _fail(f"{error.strerror}{place}: {remedy}", 1)


def _dispatch(argv: list[str]) -> int:
    command = argv[0] if argv else "--help"
    if command == "--version":
        print(f"{PROG} {__version__}")
    elif command in ("--help", "-h"):
        print(_overview())
    elif command not in COMMANDS:
        raise UserError(f"{command} is no command{_meant(command)}; {PROG} --help lists them")
    else:
        if command == "train":
            recipes.check_flags(argv[1:], switches=("dry_run", "help"))
        _check_words(command, argv[1:])
        return tyro.cli(COMMANDS[command], prog=f"{PROG} {command}", args=argv[1:], use_underscores=True)
    return 0


def _check_words(command: str, argv: list[str]) -> None:
    """Raise UserError where the one word that a command takes is missing, or there are more."""
    wanted = {"train": "a recipe: tract-fast train RECIPE.yaml", "export": "a run: tract-fast export RUN_DIR"}
    words, skip = [], False
    for word in argv:
        if not skip and not word.startswith("-"):
            words.append(word)
        skip = not skip and word.startswith("--") and "=" not in word and word not in SWITCHES
    if {"--help", "-h"} & set(argv):
        return
    if command in wanted and not words:
        raise UserError(f"{command} needs {wanted[command]}")
    surplus = words[command in wanted :]
    if surplus:
        raise UserError(
            f"{' '.join(surplus)}: one word too many for {command}; a setting is written --section.key VALUE"
        )


def _overview() -> str:
    commands = [f"  {name:8}{command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} [--help] [--version] COMMAND ...",
            "",
            "Train LLM judges whose score is a number (TRACT, arXiv 2503.04381).",
            "",
            *commands,
            "",
            f"{PROG} COMMAND --help describes a command; for train, all settings.",
        ]
    )


def _meant(command: str) -> str:
    if command in LATER:
        return " of this version"
    if command.endswith((".yaml", ".yml")):
        return f"; did you mean {PROG} train {command}?"
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _fail(error: Exception | str, code: int) -> int:
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
    return code


def _discard_output() -> None:
    """Send what could not be written to nowhere, or Python would try again, and complain, when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

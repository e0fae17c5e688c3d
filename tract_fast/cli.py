"""The command line: ``tract-fast COMMAND``, a function per command.

Commands import what they need when they run.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from tract_fast import __version__, launch, recipe as recipes, words
from tract_fast.errors import PeerLost, RunStopped, UserError
from tract_fast.recipe import Generate, Sampling

PROG = "tract-fast"


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
    return launch.train(recipes.build(recipe, recipes.overrides(settings)), dry_run=dry_run)


def run(
    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")],
    settings: Annotated[object, tyro.conf.arg(name="", constructor_factory=recipes.flags)],
    until: Annotated[str | None, tyro.conf.arg(metavar="STEP")] = None,
    begin: Annotated[str | None, tyro.conf.arg(name="from", metavar="STEP")] = None,
) -> int:
    """The whole method: stage 1, its rationales, stage 2 from the seed model, evaluation. Finished steps are skipped.

    Any setting of the recipe can be given on the command line, as with train. The steps are stage1, generate, stage2
    and evaluate, each in a folder of run.dir; a step that was stopped goes on where it was.

    Args:
        recipe: YAML file of settings; it needs at least model.path, data.train, run.dir and data to evaluate on.
        until: Stop after this step.
        begin: Remove what this step and those after it left, and make it again.
    """
    resolved = recipes.build(recipe, recipes.overrides(settings))
    from tract_fast import pipeline

    return pipeline.run(resolved, until=until, begin=begin)


def plan(
    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")],
    settings: Annotated[object, tyro.conf.arg(name="", constructor_factory=recipes.flags)],
    gpus: Annotated[str | None, tyro.conf.arg(metavar="N")] = None,
    gpu: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    mfu: Annotated[str, tyro.conf.arg(metavar="SHARE")] = "0.4",
) -> int:
    """What a run will need: memory and when it is highest, time of a step and of both stages, settings that fit.

    Nothing is trained or written, and the GPU need not be here. Any setting of the recipe can be given on the command
    line, as with train.

    Args:
        recipe: YAML file of settings, as for train.
        gpus: GPUs that the run will have; run.nproc if not given.
        gpu: Their name, such as h100-80gb (a wrong one lists all); what is here if not given.
        mfu: Share of a GPU's arithmetic peak that is taken for reached: an assumption, not a measurement.
    """
    count = None if gpus is None else words.number("--gpus", gpus, int, "8")
    share = words.number("--mfu", mfu, float, "0.4")
    resolved = recipes.build(recipe, recipes.overrides(settings))
    from tract_fast import planning

    return planning.run(resolved, gpu=gpu, count=count, mfu=share)


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


def generate(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    settings: Annotated[Generate, tyro.conf.arg(name="")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/generate"),
    holdout: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.0,
    split_seed: Annotated[int, tyro.conf.arg(metavar="N")] = 42,
    limit: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    skip: tyro.conf.FlagCreatePairsOff[bool] = False,
    dtype: Annotated[str, tyro.conf.arg(metavar="auto|bfloat16|float32")] = "auto",
) -> int:
    """Have a trained judge write rationales for its training prompts, with the true scores: data for stage 2.

    Stopped, the same command goes on where it was, with the same rationales.

    Args:
        model: A judge that export wrote: merged, or an adapter.
        data: Judgements with true scores, in the forms that train reads.
        settings: How rationales are sampled, and which are left out.
        out: Folder for rationales.jsonl, health.json and predictions.jsonl.
        holdout: The data.holdout of the judge's training: its held-out questions get no rationales; 0: all do.
        split_seed: The train.seed of that training.
        limit: Only the first so many examples; 0: all.
        skip: Leave out and list broken records and prompts that are too long, instead of stopping.
        dtype: Precision; auto is what the judge was trained in, and float32 on a CPU slow at bfloat16.
    """
    from tract_fast import generate as generation
    from tract_fast.judging import Source

    source = Source(data=data, holdout=holdout, split_seed=split_seed, limit=limit or None, skip=skip)
    generation.show(generation.run(model, source, out, settings, dtype=dtype), out)
    return 0


def evaluate(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")],
    settings: Annotated[Sampling, tyro.conf.arg(name="")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/evaluate"),
    teacher_forced: tyro.conf.FlagCreatePairsOff[bool] = False,
    holdout: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.0,
    split_seed: Annotated[int, tyro.conf.arg(metavar="N")] = 42,
    limit: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    skip: tyro.conf.FlagCreatePairsOff[bool] = False,
    batch: Annotated[int, tyro.conf.arg(metavar="N")] = 16,
    dtype: Annotated[str, tyro.conf.arg(metavar="auto|bfloat16|float32")] = "auto",
    backend: Annotated[str, tyro.conf.arg(metavar="auto|vllm|http://...")] = "auto",
    calibrate: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
) -> int:
    """Judge held-out prompts and measure how far the scores agree with the true ones.

    Stopped, the same command goes on where it was, with the same numbers.

    Args:
        model: A judge that export wrote, or any instruct model for comparison (folder, hub name, package:NAME).
        data: Judgements with true scores, in the forms that train reads.
        settings: How rationales are sampled.
        out: Folder for predictions.jsonl, metrics.json and scores.png.
        teacher_forced: Score after the rationales in the data instead of the judge's own.
        holdout: Only the share of questions that a training with this data.holdout kept for evaluation; 0: all.
        split_seed: The train.seed of that training.
        limit: Only the first so many prompts; 0: all.
        skip: Leave out and list broken records and prompts that are too long, instead of stopping.
        batch: Sequences generated at a time.
        dtype: Precision; auto is what the judge was trained in, and float32 on a CPU slow at bfloat16.
        backend: Where the judge runs: auto (here), vllm (starts its server), or the address of a server that has it.
        calibrate: Show calibrated scores, too, fitted to this folder of another evaluation, on held-out training data.
    """
    from tract_fast import evaluate as evaluation
    from tract_fast.judging import Source

    source = Source(data=data, holdout=holdout, split_seed=split_seed, limit=limit or None, skip=skip)
    options = {
        "teacher_forced": teacher_forced,
        "batch": batch,
        "dtype": dtype,
        "backend": backend,
        "calibrate": calibrate,
    }
    evaluation.show(evaluation.run(model, source, out, settings, **options), out)
    return 0


def compare(
    first: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")],
    second: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")],
) -> int:
    """Hold two evaluations of the same prompts against each other, prompt by prompt.

    Args:
        first: Folder that evaluate wrote.
        second: Folder that evaluate wrote, on the same data.
    """
    from tract_fast import compare as comparison

    comparison.show(comparison.run(first, second), first, second)
    return 0


def score(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    settings: Annotated[Sampling, tyro.conf.arg(name="")],
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")] = Path("-"),
    batch: Annotated[int, tyro.conf.arg(metavar="N")] = 16,
    dtype: Annotated[str, tyro.conf.arg(metavar="auto|bfloat16|float32")] = "auto",
    backend: Annotated[str, tyro.conf.arg(metavar="auto|vllm|http://...")] = "auto",
) -> int:
    """Judge prompts from JSON Lines, a file or standard input, and print a judgement a line as they come.

    A line has the field prompt, or the parts of the judge's template (orig_instruction, ...); its id is handed on.
    Exits with 1 where a line could not be judged; its answer has the field error.

    Args:
        model: A judge that export wrote, or any instruct model.
        settings: How rationales are sampled.
        file: JSON Lines; - is standard input.
        batch: Sequences generated at a time; 1 answers each line before the next is read.
        dtype: Precision; auto is what the judge was trained in, and float32 on a CPU slow at bfloat16.
        backend: Where the judge runs: auto (here), vllm (starts its server), or the address of a server that has it.
    """
    piped = str(file) == "-"
    if (sys.stdin is None) if piped else not file.is_file():
        raise UserError("standard input is closed" if piped else f"{file}: there is no such file")
    with open(sys.stdin.fileno() if piped else file, "rb", closefd=not piped) as lines:
        from tract_fast import score as scoring
        from tract_fast.judge import Judge

        tell = functools.partial(print, file=sys.stderr)
        with contextlib.closing(Judge.from_pretrained(model, backend=backend, dtype=dtype, say=tell)) as judge:
            failed = scoring.run(judge, lines, file.name, sys.stdout, settings, batch)
    if failed:
        print(f"{failed} lines could not be judged: see their field error", file=sys.stderr)
    return int(failed > 0)


def report(folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]) -> int:
    """Write one page, DIR/report.html, with all runs, evaluations and generations below a folder.

    Args:
        folder: The run.dir of run or train, a folder that evaluate or generate wrote, or one that holds several.
    """
    from tract_fast import page

    print(f"written: {page.write(folder)}")
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


COMMANDS = {
    "train": train,
    "run": run,
    "plan": plan,
    "export": export,
    "generate": generate,
    "evaluate": evaluate,
    "compare": compare,
    "score": score,
    "report": report,
    "demo": demo,
    "doctor": doctor,
}


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


def entry() -> None:
    """``main`` as a process of its own."""
    code = main()
    from tract_fast.threads import leave

    leave(code)


def _dispatch(argv: list[str]) -> int:
    command = argv[0] if argv else "--help"
    if command == "--version":
        print(f"{PROG} {__version__}")
    elif command in ("--help", "-h"):
        print(_overview())
    elif command not in COMMANDS:
        raise UserError(f"{command} is no command{_meant(command)}; {PROG} --help lists them")
    else:
        words.check_flags(command, argv[1:])
        words.check_words(command, argv[1:])
        return tyro.cli(COMMANDS[command], prog=f"{PROG} {command}", args=argv[1:], use_underscores=True)
    return 0


def _overview() -> str:
    commands = [f"  {name:10}{command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
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
    if command.endswith((".yaml", ".yml")):
        return f"; did you mean {PROG} train {command}?"
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _fail(error: Exception | str, code: int) -> int:
    message = " ".join(str(error).splitlines())
    if not launch.note(
        code, message, lost=isinstance(error, PeerLost), hangs=getattr(error, "hangs", False)
    ):  # a launcher tells it once, for all ranks
        print("error:", message, file=sys.stderr)
    return code


def _discard_output() -> None:
    """Send what could not be written to nowhere, or Python would try again, and complain, when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""The whole method in one command: stage 1 -> generate -> stage 2 from the seed model -> evaluate.

``run.dir`` gets a folder per step, each what the step's own command would have made: ``stage1``, ``generate``,
``stage2``, ``evaluate/NAME``. ``steps.json`` records what each step is made from, settings and hashes of data files,
when it begins and when it is done; one that is done is skipped. A stopped step goes on where it was. TRACT: arXiv
2503.04381.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tract_fast import checkpoint, evaluate, generate, launch, recipe as recipes
from tract_fast.checkpoint import replace_file
from tract_fast.data import feedback
from tract_fast.data.records import file_of
from tract_fast.errors import UserError
from tract_fast.judging import Source, line
from tract_fast.prepare import prepare
from tract_fast.recipe import Recipe, Sampling, sampling_of
from tract_fast.resume import SAME_RESULT
from tract_fast.vllm import check_vllm, is_vllm

STEPS = ("stage1", "generate", "stage2", "evaluate")
RECORD, HELD_OUT, BOTH = "steps.json", "held_out.jsonl", "annotated_and_own.jsonl"
BEGUN = " begun"  # after a step's name in the record
TRAINING = ("model", "lora", "data", "score", "loss", "train")  # sections that decide a training

Inputs = dict[str, Any]


def run(recipe: Recipe, *, until: str | None = None, begin: str | None = None) -> int:
    """Run the steps of ``recipe`` that are not done, up to ``until``; returns the exit code of the step that ended it.

    ``begin`` names a step that is made again, with all after it: what they left is removed. Raises UserError before any
    work where a setting cannot work, or where a finished step was made from other settings or data.
    """
    steps = steps_of(recipe)
    for flag, step in (("--until", until), ("--from", begin)):
        if step is not None and step not in steps:
            raise UserError(f"{flag} {step}: the steps of this recipe are {', '.join(steps)}")
    if recipe.generate.backend.startswith("http"):
        raise UserError(
            f"generate.backend = {recipe.generate.backend}: the judges of a run are new, so no server has them; write "
            "vllm, which is started with each, or use the command generate"
        )
    if launch.joined():
        raise UserError("run starts the ranks of its training by itself: give it once, with run.nproc, not to torchrun")
    if is_vllm(recipe.generate.backend):
        check_vllm()
    if recipe.stage2.train and recipe.data.rationale == "drop":
        raise UserError(
            "data.rationale = drop: a judge without rationales writes none for a second stage; set stage2.train: false"
        )
    sets = evaluation_sets(recipe)
    sampling = evaluation_sampling(recipe)
    folder = Path(recipe.run.dir)
    checkpoint.make_folder(folder, "run.dir")
    with checkpoint.locked(folder, "run.dir"):
        return _run(recipe, steps, sets, sampling, until, begin)


def _run(
    recipe: Recipe,
    steps: tuple[str, ...],
    sets: dict[str, Source],
    sampling: Sampling,
    until: str | None,
    begin: str | None,
) -> int:
    folder = Path(recipe.run.dir)
    inputs = dict(zip(steps, chained(recipe, sets, steps), strict=True))
    again = steps[steps.index(begin) :] if begin else ()
    todo = [step for step in steps if step in again or not is_done(folder, step, inputs[step], sets)]
    if begin and until is not None and until not in again:
        raise UserError(f"--until {until} comes before --from {begin}: nothing would be made")
    if todo:
        check_sets(recipe, sets)
    if begin:
        if begin == "stage1":  # what cannot be made again is not removed
            prepare(recipe, lambda text: None)
        forget(folder, again)
    actions: dict[str, Callable[[], int]] = {
        "stage1": lambda: _train(stage1(recipe)),
        "generate": lambda: _generate(recipe),
        "stage2": lambda: _train(stage2(recipe)),
        "evaluate": lambda: _evaluate(recipe, sets, sampling, folder / steps[-2] / "judge"),
    }
    for step in steps:
        if step in todo:
            print(f"── {step}: {folder / step}")
            record(folder, {f"{step}{BEGUN}": inputs[step]})
            code = actions[step]()
            if code:
                return code
            record(folder, {step: inputs[step]}, over=f"{step}{BEGUN}")
        else:
            print(f"── {step}: done before, {folder / step}")
        if step == until:
            break
    return 0


def steps_of(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's steps, in order."""
    return STEPS if recipe.stage2.train else ("stage1", "evaluate")


def evaluation_sets(recipe: Recipe) -> dict[str, Source]:
    """What the judge is measured on, by the name of its folder. Raises UserError where there is nothing."""
    data, skip = recipe.data, recipe.data.on_error == "skip"
    if recipe.evaluate.data:
        names = [Path(source).stem.replace(":", "_") for source in recipe.evaluate.data]
        if len(set(names)) < len(names):
            raise UserError(f"evaluate.data = {list(recipe.evaluate.data)}: two of them have the same name")
        return {name: Source(data=s, skip=skip) for name, s in zip(names, recipe.evaluate.data, strict=True)}
    if data.eval is not None:
        return {"held_out": Source(data=data.eval, skip=skip)}
    if not data.holdout:
        raise UserError("run ends with an evaluation, and there is no data for it: set data.holdout or evaluate.data")
    return {"held_out": Source(data=data.train, holdout=data.holdout, split_seed=recipe.train.seed, skip=skip)}


def check_sets(recipe: Recipe, sets: dict[str, Source]) -> None:
    """Read ``evaluate.data`` before any work, and warn of questions that are trained on. Raises UserError."""
    if not recipe.evaluate.data:
        return
    trained, _ = _split(recipe)
    options = {"labels": recipe.score.labels, "values": recipe.score.values, "rationale": "drop"}
    for source in sets.values():
        try:
            found = feedback.read_examples(source.data, on_error="skip" if source.skip else "fail", **options).examples
        except UserError as error:
            raise UserError(f"evaluate.data: {error}") from None
        shared = feedback.question_overlap(trained, found)
        if shared:
            print(
                f"warning: {shared} questions of evaluate.data = {source.data} are trained on: its numbers will flatter"
            )


def stage1(recipe: Recipe) -> Recipe:
    """The recipe of the first stage: the seed model on annotated rationales."""
    return replace(recipe, run=replace(recipe.run, dir=str(Path(recipe.run.dir) / "stage1")))


def stage2(recipe: Recipe) -> Recipe:
    """The recipe of the second: on the judge's own rationales, from the seed model; writes the data it names."""
    folder = Path(recipe.run.dir)
    own = folder / "generate" / generate.RATIONALES
    data = replace(recipe.data, train=str(own), holdout=0.0, limit=None)
    if recipe.data.holdout or recipe.stage2.rationales == "both":
        annotated, held_out = _split(recipe)
        labels = dict(zip(recipe.score.values, recipe.score.labels, strict=True))
        if held_out:
            data = replace(data, eval=str(folder / HELD_OUT))
            replace_file(folder / HELD_OUT, "".join(line(feedback.as_record(e, labels)) for e in held_out))
        if recipe.stage2.rationales == "both":
            lines = [line(feedback.as_record(e, labels)) for e in annotated[: recipe.data.limit]]
            mine = (json.loads(text) for text in own.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
            lines += [line(r | {"id": f"{r['id']}/own"}) for r in mine]
            data = replace(data, train=str(folder / BOTH))
            replace_file(folder / BOTH, "".join(lines))
    model = recipe.model
    if recipe.stage2.start == "stage1":
        model = replace(model, path=str(merged(folder / "stage1" / "judge")), gguf_file=None)
    return replace(recipe, model=model, data=data, run=replace(recipe.run, dir=str(folder / "stage2")))


def merged(judge: Path) -> Path:
    """The folder with all of a judge's weights."""
    return judge / "merged" if (judge / "merged").is_dir() else judge


def _split(recipe: Recipe) -> tuple[list[feedback.Example], list[feedback.Example]]:
    """Annotated training and held-out examples, as training splits them."""
    loaded = feedback.read_examples(
        recipe.data.train,
        labels=recipe.score.labels,
        values=recipe.score.values,
        rationale=recipe.data.rationale,
        on_error=recipe.data.on_error,
    )
    return feedback.split_by_question(loaded.examples, recipe.data.holdout, recipe.train.seed, loaded.questions)


def _train(recipe: Recipe) -> int:
    code = launch.train(recipe)
    _free()
    if code == 0:
        print(f"written: {checkpoint.export(Path(recipe.run.dir))}")
        _free()
    return code


def _free() -> None:
    """Give back what the step before held: the next loads a model of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _generate(recipe: Recipe) -> int:
    data, folder = recipe.data, Path(recipe.run.dir)
    source = Source(
        data=data.train,
        holdout=data.holdout,
        split_seed=recipe.train.seed,
        limit=data.limit,
        skip=data.on_error == "skip",
    )
    out = folder / "generate"
    generate.show(generate.run(str(folder / "stage1" / "judge"), source, out, recipe.generate), out)
    _free()
    return 0


def evaluation_sampling(recipe: Recipe) -> Sampling:
    """How rationales are sampled for the evaluation: as by generate, ``evaluate.n`` of them. Raises UserError."""
    if recipe.evaluate.n > 1 and recipe.generate.temperature == 0:
        raise UserError(
            f"evaluate.n = {recipe.evaluate.n}: must be 1 at generate.temperature 0, where all are the same"
        )
    return sampling_of(recipe.generate, n=recipe.evaluate.n)


def _evaluate(recipe: Recipe, sets: dict[str, Source], settings: Sampling, judge: Path) -> int:
    for name, source in sets.items():
        out = Path(recipe.run.dir) / "evaluate" / name
        backend = recipe.generate.backend if recipe.data.rationale == "keep" else "auto"
        options = {"batch": recipe.evaluate.batch, "backend": backend}
        evaluate.show(evaluate.run(str(judge), source, out, settings, **options), out)
        _free()
    return 0


def chained(recipe: Recipe, sets: dict[str, Source], steps: tuple[str, ...]) -> Iterator[Inputs]:
    """What each step is made from: its settings but for those that leave its result as it is (``resume.SAME_RESULT``),
    its data files, and a hash of what the step before was made from."""
    settings = recipes.as_dict(recipe)
    for key in SAME_RESULT:
        section, name = key.split(".")
        del settings[section][name]
    before = None
    for step in steps:
        if step == "stage1":
            own = {name: settings[name] for name in TRAINING}
            own["files"] = [hash_of(source) for source in (recipe.data.train, recipe.data.eval) if source]
        elif step == "evaluate":
            sampled = asdict(evaluation_sampling(recipe)) | {"backend": recipe.generate.backend}
            own = {"evaluate": settings["evaluate"], "generate": sampled}
            own["files"] = {name: asdict(source) | {"hash": hash_of(source.data)} for name, source in sets.items()}
        else:
            own = {step: settings[step]}
        own = json.loads(json.dumps(own | {"before": before}))  # as it will be read again
        before = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]
        yield own


def hash_of(source: str) -> str:
    """A hash of a data file's bytes; the name of a hub data set."""
    path = file_of(source)
    if path is None:
        return source
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def records(folder: Path) -> dict[str, Inputs]:
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(folder: Path, entry: dict[str, Inputs], over: str = "") -> None:
    """Note that a step has begun, or is done, which is the end of the note ``over``."""
    kept = {name: inputs for name, inputs in records(folder).items() if name != over}
    replace_file(folder / RECORD, json.dumps(kept | entry, indent=2) + "\n")


def is_done(folder: Path, step: str, inputs: Inputs, sets: dict[str, Source]) -> bool:
    """Whether a step is done and what it made is there. Raises UserError where it was made, or begun, from something
    else."""
    noted, begun = records(folder), f"{step}{BEGUN}"
    before = noted.get(step, noted.get(begun))
    if before is None or not (folder / step).is_dir():
        return False
    if before == inputs:
        return step in noted and all(path.is_file() for path in products(folder / step, sets))
    old, new = (
        recipes.flatten({k: v if isinstance(v, dict) else {"": v} for k, v in x.items()}) for x in (before, inputs)
    )
    changed = [key.removesuffix(".") for key in {**old, **new} if old.get(key) != new.get(key)]
    told = ", ".join(key for key in changed if key != "before") or "of the step before"
    raise UserError(
        f"{folder / step} was {'made' if step in noted else 'begun'} with other settings or data ({told}): "
        f"--from {step} removes it and makes it again, with all that follows; or choose another run.dir"
    )


def products(made: Path, sets: dict[str, Source]) -> list[Path]:
    """The file of each thing that a step makes which is written last."""
    if made.name == "generate":
        return [made / generate.RATIONALES]
    if made.name == "evaluate":
        return [made / name / "metrics.json" for name in sets]
    return [merged(made / "judge") / "tract.json"]


def forget(folder: Path, steps: tuple[str, ...]) -> None:
    """Remove what the ``steps`` left and the record of them. Raises UserError where there is no run."""
    if not (folder / RECORD).exists():
        raise UserError(f"run.dir = {folder} has no {RECORD}: no step has begun, so leave out --from")
    for step in steps:
        if (folder / step).is_dir():
            aside = folder / f"{step}.removed"  # in one go, before the record: killed here, the step is not done
            shutil.rmtree(aside, ignore_errors=True)
            (folder / step).rename(aside)
            print(f"removed: {folder / step}")
            shutil.rmtree(aside)
    kept = {name: inputs for name, inputs in records(folder).items() if name.removesuffix(BEGUN) not in steps}
    replace_file(folder / RECORD, json.dumps(kept, indent=2) + "\n")

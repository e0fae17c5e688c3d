"""The recipe: its sections together, read from a file and a command line, and written.

What the settings are stands in ``sections.py``, and the reading of YAML in ``settings.py``.
"""

import dataclasses
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from tract_fast import settings
from tract_fast.errors import UserError
from tract_fast.sections import (
    Checkpoint,
    Data,
    Evaluate,
    Fault,
    Generate,
    Lora,
    Loss,
    Model,
    Run,
    Sampling,
    Score,
    Shard,
    Stage2,
    Train,
    sampling_of,
)

__all__ = [
    "FIELDS", "SECTIONS", "Checkpoint", "Data", "Evaluate", "Fault", "Generate", "Lora", "Loss", "Model", "Recipe",
    "Run", "Sampling", "Score", "Shard", "Stage2", "Train", "sampling_of",
]  # fmt: skip

# No `from __future__ import annotations` here: the fields' types are used as they stand.


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run."""

    model: Model
    lora: Lora = field(default_factory=Lora)
    data: Data
    score: Score = field(default_factory=Score)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    shard: Shard = field(default_factory=Shard)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    generate: Generate = field(default_factory=Generate)
    stage2: Stage2 = field(default_factory=Stage2)
    evaluate: Evaluate = field(default_factory=Evaluate)
    run: Run

    def warnings(self) -> list[str]:
        """What is allowed and probably not meant, a sentence each."""
        found = []
        if self.loss.normalize == "scores" and not (self.loss.score_ce and self.loss.ce_weight > 0):
            found.append(
                "loss.normalize = scores without cross-entropy on the score token (loss.score_ce, loss.ce_weight): "
                "nothing keeps probability on the score tokens; watch score_mass, or set loss.normalize: vocab"
            )
        if self.train.eval_every is not None and self.data.eval is None and not self.data.holdout:
            found.append("train.eval_every has nothing to evaluate on: set data.eval or data.holdout")
        every = self.train.eval_every
        if self.checkpoint.keep_best and (every is None or self.checkpoint.every % every):
            found.append(
                f"checkpoint.keep_best = {self.checkpoint.keep_best}: only checkpoints at a step that is evaluated can "
                "be the best; make checkpoint.every a multiple of train.eval_every"
            )
        if self.lora.rank == 0 and replace(self.lora, rank=Lora.rank) != Lora():
            found.append("lora.rank = 0 is full fine-tuning: the other settings of lora have no effect")
        return found


SECTIONS: dict[str, type] = {f.name: f.type for f in fields(Recipe)}
FIELDS: dict[str, dataclasses.Field] = {f"{name}.{f.name}": f for name, cls in SECTIONS.items() for f in fields(cls)}


def load(path: str | Path, argv: Sequence[str]) -> Recipe:
    """The recipe in a YAML file with command-line overrides (``--train.lr 2e-5``) on top. Raises UserError."""
    return build(path, parse(argv) if argv else {})


def build(path: str | Path, changes: Mapping[str, str]) -> Recipe:
    """The recipe in a YAML file, with settings by dotted name, written as YAML values, on top. Raises UserError."""
    found = settings.read_file(Path(path), SECTIONS)
    wrong = [f"{key}{found[key].where}: {settings.unknown(key, FIELDS)}" for key in found if key not in FIELDS]
    if wrong:
        raise UserError("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    found |= {key: settings.read_word(key, text) for key, text in changes.items()}
    for key, f in FIELDS.items():
        if key not in found and _default(f) is dataclasses.MISSING:
            raise UserError(f"{key} is not set: write it in {path} or give --{key} VALUE")
    try:
        values = {key: settings.typed(key, found[key], FIELDS[key].type) for key in found}
        return Recipe(
            **{
                name: cls(**{f.name: values[f"{name}.{f.name}"] for f in fields(cls) if f"{name}.{f.name}" in values})
                for name, cls in SECTIONS.items()
            }
        )
    except UserError as error:  # each begins with the name of a setting
        key = str(error).split(" ", 1)[0]
        raise UserError(f"{error}{found[key].where if key in found else ''}") from None


def parse(argv: Sequence[str]) -> dict[str, str]:
    """Command-line overrides as text by dotted name. Raises UserError where one is unknown or has no value."""
    import tyro

    check_flags(argv)
    return overrides(tyro.cli(flags(), args=argv, prog="tract-fast train", use_underscores=True, add_help=False))


def check_flags(argv: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raise UserError at the first flag that is no setting (nor one of ``others``) or lacks its value."""
    for word, after in itertools.pairwise([*argv, "--"]):
        flag, equals, _ = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            if equals and flag in FIELDS:
                raise UserError(f"{word}: write --{word}")
        elif key in FIELDS or key == "nproc":
            if not equals and after.startswith("--"):
                kind = FIELDS["run.nproc" if key == "nproc" else key].type
                raise UserError(f"{flag} needs a value: {flag} {settings.metavar(kind)}")
        elif key not in others and word != "--":
            raise UserError(f"{flag}: {settings.unknown(key, FIELDS)}")


def flags() -> type:
    """A dataclass for tyro that has the recipe's sections and fields, each a text or None, with its help."""
    from operator import itemgetter

    import tyro

    text = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="",
        instance_from_str=itemgetter(0),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [value],
    )

    def flag(key: str, f: dataclasses.Field, doc: str) -> Any:
        default = _default(f)
        required = default is dataclasses.MISSING
        hint = "(required)" if required else f"(default: {settings.as_text(default, f.type)})"
        aliases = ["--nproc"] if key == "run.nproc" else None
        about = tyro.conf.arg(metavar=settings.metavar(f.type), help=doc, help_behavior_hint=hint, aliases=aliases)
        return Annotated[object, text, about]

    def section(name: str, cls: type) -> Any:
        docs = settings.docs(cls)
        members = [(f.name, flag(f"{name}.{f.name}", f, docs[f.name]), field(default=None)) for f in fields(cls)]
        return Annotated[dataclasses.make_dataclass(cls.__name__, members), tyro.conf.arg(help=cls.__doc__)]

    return dataclasses.make_dataclass("Flags", [(name, section(name, cls)) for name, cls in SECTIONS.items()])


def overrides(parsed: Any) -> dict[str, str]:
    """The flags of a parsed command line that were given, by dotted name."""
    return {key: text for key, text in flatten(dataclasses.asdict(parsed)).items() if text is not None}


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with each setting's meaning above it; loading it gives an equal recipe."""
    lines = []
    for name, cls in SECTIONS.items():
        docs = settings.docs(cls)
        lines += [f"# {cls.__doc__}", f"{name}:"]
        for f in fields(cls):
            comment = textwrap.wrap(docs[f.name], 110, initial_indent="  # ", subsequent_indent="  # ")
            lines += [*comment, f"  {f.name}: {settings.as_text(getattr(getattr(recipe, name), f.name), f.type)}"]
        lines.append("")
    return "\n".join(lines)


def as_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe as nested dictionaries: section, then setting."""
    return dataclasses.asdict(recipe)


def flatten(nested: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``{"train": {"lr": 1}}`` as ``{"train.lr": 1}``."""
    return {f"{name}.{key}": value for name, section in nested.items() for key, value in section.items()}


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()

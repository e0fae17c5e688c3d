"""What can be told of a command line before tyro reads it, in our own words: flags, words and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from tract_fast import recipe as recipes
from tract_fast.errors import UserError

# flags without a value
SWITCHES = {"--help", "-h", "--dry-run", "--dry_run", "--teacher-forced", "--teacher_forced", "--skip"}
OWN_FLAGS = {  # besides the settings of a recipe
    "train": ("dry_run", "help"),
    "run": ("until", "from", "help"),
    "plan": ("gpus", "gpu", "mfu", "help"),
}
LISTS = {"--drop"}  # flags with one value or more
WORDS = {  # what a command takes besides flags, as it is told to who leaves it out; those in brackets may be left out
    "train": ("a recipe: tract-fast train RECIPE.yaml", 1, 1),
    "run": ("a recipe: tract-fast run RECIPE.yaml", 1, 1),
    "plan": ("a recipe: tract-fast plan RECIPE.yaml", 1, 1),
    "export": ("a run: tract-fast export RUN_DIR", 1, 1),
    "generate": ("a judge and data: tract-fast generate MODEL DATA", 2, 2),
    "evaluate": ("a judge and data: tract-fast evaluate MODEL DATA", 2, 2),
    "report": ("a folder of runs: tract-fast report DIR", 1, 1),
    "compare": ("two evaluations: tract-fast compare A B", 2, 2),
    "score": ("a judge: tract-fast score MODEL [FILE]", 1, 2),
}


def check_flags(command: str, argv: Sequence[str]) -> None:
    """Raise UserError where a command that takes settings of a recipe is given a flag that is none."""
    if command not in OWN_FLAGS:
        return
    if command != "train" and {"--dry-run", "--dry_run"} & set(argv):
        rest = "leave it out: plan trains nothing" if command == "plan" else "tract-fast plan RECIPE trains nothing"
        raise UserError(f"--dry-run is a flag of train; {rest}; one example token by token: train RECIPE --dry-run")
    recipes.check_flags(argv, OWN_FLAGS[command])


def check_words(command: str, argv: list[str]) -> None:
    """Raise UserError where a word that a command takes is missing, or there are more."""
    wanted, least, most = WORDS.get(command, ("", 0, 0))
    words, flag = [], ""  # the flag that takes the next word
    for word in argv:
        if word != "-" and word.startswith("-"):
            flag = word if word.startswith("--") and "=" not in word and word not in SWITCHES else ""
        elif not flag:
            words.append(word)
        elif flag not in LISTS:
            flag = ""
    if {"--help", "-h"} & set(argv):
        return
    if len(words) < least:
        raise UserError(f"{command} needs {wanted}")
    surplus = words[most:]
    if surplus:
        raise UserError(
            f"{' '.join(surplus)}: one word too many for {command}; a setting is written --section.key VALUE"
        )


def number(flag: str, text: str, kind: type[int] | type[float], such_as: str):
    """The number that a flag was given. Raises UserError where it is none."""
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{flag} {text}: must be {what}, such as {such_as}") from None

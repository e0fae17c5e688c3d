"""Do all ranks train the same thing? Each has its own command line, recipe, data and model files, and of another node's
nothing is seen: what differs would train silently wrong, or have ranks wait for one another for ever.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tract_fast import recipe as recipes
from tract_fast.errors import UserError
from tract_fast.model import weight_files
from tract_fast.prepare import Prepared
from tract_fast.recipe import Recipe
from tract_fast.shard import Ranks

PACKAGES = ("tract_fast", "torch", "transformers")
FREE = "run."  # settings of this start on this node, not of what is trained; that all have one run.dir is seen to
SHOWN = 3  # differences in a message


def check_alike(recipe: Recipe, data: Prepared, ranks: Ranks) -> None:
    """Raise UserError, on every rank, where one has other settings, data, model files or versions than rank 0."""
    if ranks.world == 1:
        return
    found: list[Any] = [None] * ranks.world
    dist.all_gather_object(found, (socket.gethostname(), facts(recipe, data)))
    wrong = difference(found)
    if wrong:
        raise UserError(wrong)


def facts(recipe: Recipe, data: Prepared) -> dict[str, str]:
    """What must be the same on every rank: settings by name, a hash of what is too long to show."""
    settings = recipes.flatten(recipes.as_dict(recipe))
    found = {name: str(value) for name, value in settings.items() if not name.startswith(FREE)}
    found |= {"training data": data.fingerprint, "held-out data": data.held_out_fingerprint}
    config = {name: value for name, value in data.config.to_dict().items() if name != "_name_or_path"}
    found["model configuration"] = _hash(json.dumps(config, sort_keys=True, default=str).encode())
    found |= files(weight_files(recipe.model) or ())
    return found | {f"version of {name}": importlib.metadata.version(name) for name in PACKAGES}


def files(paths: Iterable[Path]) -> dict[str, str]:
    """The size of each safetensors file and a hash of its header, which has names, types and shapes."""
    found = {}
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                header = file.read(8)
                header += file.read(min(int.from_bytes(header, "little"), path.stat().st_size))
            found[f"model file {path.name}"] = f"{path.stat().st_size} bytes, header {_hash(header)}"
    return found


def difference(found: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """How the first rank that differs from rank 0 does so; ``found``: (host, facts) by rank. Empty where none does."""
    first_host, first = found[0]
    for rank, (host, other) in enumerate(found):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            told = [f"{n} is {other.get(n, 'missing')} and not {first.get(n, 'missing')}" for n in names[:SHOWN]]
            more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
            return (
                f"rank {rank} (on {host}) would train something else than rank 0 (on {first_host}): "
                f"{'; '.join(told + more)}: give every node the same command, recipe and files"
            )
    return ""


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]

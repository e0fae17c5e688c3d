"""Tensors that are split over ranks by rows, in safetensors: each rank writes its own, any number of ranks reads them.

FSDP2 splits every parameter along its first dimension, so a rank's part is a range of rows. A file's metadata says
where each range stands in the whole; a file without it (any model in Hugging Face form) holds whole tensors. Nothing is
unpickled, and no communication is needed: a rank reads the rows it owns from whatever files hold them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

ROWS = "rows"  # of a file's metadata: {name: [first row, rows of the whole]}


class Part(NamedTuple):
    """One rank's rows of a tensor."""

    local: Tensor
    start: int  # its first row in the whole
    rows: int  # of the whole; a scalar counts as one
    writes: bool  # whether this rank writes them: replicas hold the same


def part(tensor: Tensor, is_main: bool = True) -> Part:
    """What this rank holds of ``tensor``: all of it where it is not sharded. Raises ValueError at another sharding."""
    if not isinstance(tensor, DTensor):
        return Part(tensor, 0, len(tensor) if tensor.ndim else 1, is_main)
    local, start, rows, writes = tensor.to_local(), 0, len(tensor), True
    coordinates = tensor.device_mesh.get_coordinate()
    for size, mine, placement in zip(tensor.device_mesh.shape, coordinates, tensor.placements, strict=True):
        if isinstance(placement, Shard) and placement.dim == 0:
            start = min(mine * math.ceil(rows / size), rows)  # as torch.chunk splits
        elif placement.is_replicate():
            writes = writes and mine == 0
        else:
            raise ValueError(f"a tensor is sharded as {placement}: only rows can be written and read")
    return Part(local, start, rows, writes)


def write(path: Path, parts: Mapping[str, Part]) -> None:
    """Write parts that are on the CPU to a file, and the file to disk. Raises OSError or SafetensorError."""
    tensors = {name: p.local for name, p in parts.items()}
    rows = {name: [p.start, p.rows] for name, p in parts.items()}
    save_file(tensors, path, metadata={ROWS: json.dumps(rows)})
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _placed(metadata: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """What a file's metadata says of rows. Raises ValueError where that is something else."""
    placed = json.loads(metadata.get(ROWS, "{}"))
    pairs = placed.values() if isinstance(placed, dict) else [None]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)):
            raise ValueError("the metadata of its rows is not what is written here")
    return {name: (start, rows) for name, (start, rows) in placed.items()}


class Stored:
    """The tensors in some safetensors files, by name. Raises SafetensorError where a file is damaged, ValueError where
    rows are missing or the files do not agree."""

    def __init__(self, files: Iterable[Path]):
        self.pieces: dict[str, list[tuple[int, int, object]]] = {}  # (first row, rows, file that has them)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors names them
        for path in files:
            file = safe_open(path, "pt")
            placed = _placed(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                shape = tuple(piece.get_shape())
                here = shape[0] if shape else 1
                start, rows = placed.get(name, (0, here))
                whole = (rows, *shape[1:]) if shape else ()
                self.pieces.setdefault(name, []).append((start, here, file))
                known = self.shapes.setdefault(name, whole), self.dtypes.setdefault(name, piece.get_dtype())
                if known != (whole, piece.get_dtype()):
                    raise ValueError(f"the files do not agree on {name}: {known} and {(whole, piece.get_dtype())}")
        for name, pieces in self.pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            end = 0
            for start, here, _ in pieces:
                end = start + here if start == end else -1
            if end != (self.shapes[name][0] if self.shapes[name] else 1):
                raise ValueError(f"rows of {name} are missing")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor; a scalar has one."""
        found = []
        for first, here, file in self.pieces[name]:
            low, high = max(start - first, 0), min(stop - first, here)
            if not self.shapes[name]:
                return file.get_tensor(name)
            if low < high:
                found.append(file.get_slice(name)[low:high])
        if not found:
            return torch.empty(0, *self.shapes[name][1:])
        return found[0] if len(found) == 1 else torch.cat(found)

    def whole(self, name: str) -> Tensor:
        """All rows of a tensor."""
        return self.read(name, 0, self.shapes[name][0] if self.shapes[name] else 1)

    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy this rank's rows of a tensor into it. Raises ValueError where the shapes differ."""
        if name not in self.shapes or self.shapes[name] != tuple(tensor.shape):
            held = f"as {self.shapes[name]}" if name in self.shapes else "not"
            raise ValueError(f"{name} {tuple(tensor.shape)} is {held} in the files")
        mine = part(tensor)
        with torch.no_grad():
            mine.local.copy_(self.read(name, mine.start, mine.start + (len(mine.local) if mine.local.ndim else 1)))


FAILURES = (OSError, SafetensorError)  # what a file that cannot be written raises

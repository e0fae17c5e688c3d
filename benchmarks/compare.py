"""Ratios of two benchmark runs, and what got worse: a guard that no absolute time enters.

    python -m benchmarks.compare OLD NEW     # files, or folders: files of the same name
    python -m benchmarks.compare NEW         # against the committed results of the same device

Every number that a benchmark's JSON has as a ratio is compared: ``ratio``, ``ratio_*`` and ``*to_*`` are costs, where
less is better; ``*_ratio`` is a gain over something else, where more is. Rows are the same where their strings and
whole numbers are (model, contestant, shape, ...). Worse by more than ``--tolerance`` (15%) is told and gives exit code
1; where a row's own rounds are further apart, half their range is what is tolerated. Peers are shown and never flagged;
rows of ours that the new run lacks are told, and one that failed gives exit code 1.
Of several committed folders with the same device line the one whose bare matrix products took the most similar time is
meant.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.15
COST, GAIN = re.compile(r"^ratio(_|$)|^to_|_to_"), re.compile(r"_ratio$")
ABOUT = ("dtype", "model", "lora_rank", "prompts", "data")  # of ``versions``: what was measured, beside with what
MEASURED = re.compile(r"bytes|memory|entries|most")  # whole numbers that say nothing of which row it is
BARE = "bare_gemms_ms"
OURS = (
    "chunked",
    "fused",
    "sampled",
    "sampled 2^-12",
    "exact",
    "lean-off",
    "selective",
    "exact-1",
    "lean",
    "shared",
)  # of contestants; the others are peers

Key = tuple[str, ...]


class Ratio(NamedTuple):
    value: float
    more_is_better: bool
    spread: float
    """Half the range of the row's rounds, relative to their median; 0 where it has none."""
    ours: bool = True


class Change(NamedTuple):
    key: Key
    old: float
    new: float
    worse: float
    """By which share it is worse; negative: better."""
    tolerated: float
    ours: bool = True

    @property
    def flagged(self) -> bool:
        return self.ours and not self.worse <= self.tolerated  # a NaN is flagged

    @property
    def told(self) -> str:
        word = "same" if self.worse == 0 else "better" if self.worse < 0 else "worse"
        return f"{self.old:8.3f} {self.new:8.3f} {abs(self.worse):7.1%} {word:6}  {', '.join(self.key[1:])}"


def ratios(found: Mapping[str, Any]) -> dict[Key, Ratio]:
    """Every ratio of a benchmark's JSON, by what it is of."""
    common = {k: v for k, v in found.get("versions", {}).items() if k in ABOUT} | found.get("shape", {})
    results: dict[Key, Ratio] = {}
    for section, rows in found.items():
        for row in rows if isinstance(rows, list) else ():
            name = identity(common | row)
            for column, value in row.items():
                if isinstance(value, (int, float)) and (COST.search(column) or GAIN.search(column)):
                    key = (section, *name, column)
                    while key in results:  # rows that nothing tells apart are taken in their order
                        key = (*key, "again")
                    spread = 0.0 if "memory" in column or "token" in column else half_range(row)
                    ours = row.get("contestant", row.get("what", "exact")) in OURS
                    results[key] = Ratio(float(value), bool(GAIN.search(column)), spread, ours)
    return results


def identity(row: Mapping[str, Any]) -> Key:
    """Strings and whole numbers of a row, and the threshold that a draw has; what is None may as well not be there."""
    parts = []
    for name in sorted(row):
        value = row[name]
        named = isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)) or name == "eps"
        if named and value is not None and not MEASURED.search(name) and not COST.search(name):
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return tuple(parts)


def half_range(row: Mapping[str, Any]) -> float:
    """Of the rounds that a row keeps: least, median, most; or all times of one or two series (of two the sum: a ratio
    has the noise of both); or rounds of several steps, of which the first warms up."""
    ranges = []
    if "least_ms" in row:
        ranges.append((row["most_ms"] - row["least_ms"]) / row["ms"])
    kept = row.get("all_seconds", [])
    for series in kept.values() if isinstance(kept, dict) else [kept]:
        times = [t for x in series for t in (x[1:] if isinstance(x, list) else [x])]
        if times:
            ranges.append((max(times) - min(times)) / sorted(times)[len(times) // 2])
    return sum(ranges) / 2


def compare(old: Mapping[Key, Ratio], new: Mapping[Key, Ratio], tolerance: float = TOLERANCE) -> list[Change]:
    """The ratios that both have."""
    changes = []
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        usable = all(math.isfinite(x.value) and x.value > 0 for x in (a, b))
        worse = (a.value / b.value if a.more_is_better else b.value / a.value) - 1 if usable else math.nan
        changes.append(Change(key, a.value, b.value, worse, max(tolerance, a.spread, b.spread), b.ours))
    return sorted(changes)


def load(path: Path) -> dict[str, Any]:
    """A benchmark's JSON. Ends the program where the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path}: not a benchmark's result, which is JSON ({error})") from error
    sections = list(found.values()) if isinstance(found, dict) else []
    rows = [row for section in sections for row in (section if isinstance(section, list) else [section])]
    if not sections or not all(isinstance(row, dict) for row in rows):
        raise SystemExit(f"{path}: not a benchmark's result, which has lists of rows and what they were measured with")
    return found


def files(old: Path, new: Path) -> Iterator[tuple[Path, Path]]:
    """Pairs to compare."""
    if new.is_file():
        yield old if old.is_file() else old / new.name, new
        return
    for path in sorted(new.glob("*.json")):
        if (old / path.name).is_file():
            yield old / path.name, path
        else:
            print(f"{path.name}: not in {old}, so not compared")


def committed(new: Path, results: Path = RESULTS) -> Path | None:
    """The folder of committed results for the device of ``new``; None where there is none."""
    measured = {path.name: load(path) for path in ([new] if new.is_file() else new.glob("*.json"))}
    fits: list[tuple[int, float, Path]] = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        same, apart = 0, 0.0
        for name, ours in measured.items():
            theirs = load(folder / name) if (folder / name).is_file() else {}
            if device_of(ours) is not None and device_of(theirs) == device_of(ours):
                same += 1
                apart += abs(math.log(bare_time(theirs, ours)))
        if same:
            fits.append((-same, apart, folder))
    return min(fits)[2] if fits else None


def device_of(found: Mapping[str, Any]) -> str | None:
    return found.get("versions", {}).get("device")


def bare_time(old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    """How many times as long the bare products of one shape took in ``old``; 1 where they have none in common."""
    times = [{identity(row): row[BARE] for row in found.get("rows", []) if BARE in row} for found in (old, new)]
    both = sorted(times[0].keys() & times[1].keys())
    return times[0][both[0]] / times[1][both[0]] if both else 1.0


def failures(found: Mapping[str, Any]) -> list[str]:
    """What to say of our own contestants that did not run."""
    rows = [row for rows in found.values() if isinstance(rows, list) for row in rows if "not_run" in row]
    return [f"{row['contestant']}: {row['not_run']}" for row in rows if row.get("contestant") in OURS]


def show(old: Path, new: Path, tolerance: float) -> list[Change]:
    """Print one pair of files; returns the changes."""
    before, after = (ratios(load(path)) for path in (old, new))
    changes = compare(before, after, tolerance)
    print(f"{new.name}: {len(changes)} ratios against {old}")
    for c in changes:
        mark = f"  <- WORSE (tolerated: {c.tolerated:.0%})" if c.flagged else ""
        print(f"  {c.told}{mark}")
    for told, keys in (("missing in the new run", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        names = sorted({", ".join(key[1:]) for key in keys})
        print(f"  {told}: {len(names)}" + (f", such as {'; '.join(names[:3])}" if names else ""))
    return changes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="file or folder; alone: the new one")
    parser.add_argument("new", type=Path, nargs="?", help="file or folder")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share by which a ratio may be worse; 0.15")
    args = parser.parse_args()
    for path in filter(None, (args.old, args.new)):
        if not path.exists():
            parser.error(f"{path}: there is no such file or folder")
    old, new = (args.old, args.new) if args.new else (committed(args.old), args.old)
    if old is None:
        print(
            f"no results are committed for this device, so there is nothing to compare. To commit these:\n"
            f"  cp -r {new} {RESULTS}/NAME-OF-THE-DEVICE && git add {RESULTS}"
        )
        return 0
    pairs = list(files(old, new))
    changes = [change for pair in pairs for change in show(*pair, args.tolerance)]
    broken = [told for _, path in pairs for told in failures(load(path))]
    if not changes:
        raise SystemExit(f"{old} and {new} have no ratio in common: nothing was compared")
    worse = [c for c in changes if c.flagged]
    better = sum(c.worse < -c.tolerated for c in changes)
    print(f"{len(changes)} ratios compared: {len(worse)} worse, {better} better; peers are shown and not judged")
    for told in [c.told for c in worse] + broken:
        print(f"  {told}")
    return int(bool(worse or broken))


if __name__ == "__main__":
    raise SystemExit(main())

"""The records of a data file, one at a time, each with its place: JSON Lines, JSON lists, Parquet, hub data sets.

JSON is read here and not by ``datasets``, which fails a whole file on one bad line, bad UTF-8 byte or duplicate key and
silently makes the types of a column alike. A broken record is named by file and line and does not hide the others. JSON
Lines are streamed; of a JSON list the text is held once.
"""

from __future__ import annotations

import codecs
import difflib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tract_fast.errors import UserError

SPACE = " \t\r\n"  # what JSON calls white space
EXAMPLE = '{"prompt": ..., "rationale": ..., "score": ...}'
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>.+))?")
FILE_NAME = re.compile(r"^\.|\.(json|jsonl|ndjson|parquet|arrow|csv|tsv|txt|xlsx|gz|zip|zst|bz2|xz)$")


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object, or one row, and where it is: "file:line" (":column" too if not the first on its line)."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that cannot be used: where it is and why."""

    where: str
    why: str


def read_records(source: str) -> Iterator[Record | Skipped]:
    """Records of a .json, .jsonl or .parquet file, of ``package:NAME/path``, or of a hub data set ``name[:split]``.

    Raises UserError when there is no such file or data set, or when it cannot be read on (a list that is not JSON).
    """
    readers = {".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
    try:
        path = file_of(source)
        if path is None:
            yield from _hub(source)
        elif path.suffix.lower() in readers:
            yield from readers[path.suffix.lower()](path)
        else:
            raise UserError(
                f"{source}: a data file is .jsonl, .json or .parquet; write JSON Lines, one {EXAMPLE} on each line"
            )
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or _first_line(error)})") from None


def file_of(source: str) -> Path | None:
    """The file that ``source`` names; None when it can only be a hub name."""
    if source.startswith("package:"):
        return _in_package(source)
    path = Path(source).expanduser() if source.startswith("~/") else Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in (".json", ".jsonl", ".parquet"))
        raise UserError(f"{source} is a folder: name one file" + (f" in it, such as {files[0]}" if files else ""))
    if path.exists():
        raise UserError(f"{source} is not a plain file")
    if HUB_NAME.fullmatch(source) and not FILE_NAME.search(source):
        return None
    if not path.parent.is_dir():
        raise UserError(f"{source}: there is no folder {path.parent}")
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()])
    raise UserError(f"{source}: there is no such file" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def _in_package(source: str) -> Path:
    name, _, inside = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{source}: there is no installed package {name!r}; write package:NAME/path/in/it.jsonl")
    for folder in spec.submodule_search_locations:
        if (Path(folder) / inside).is_file():
            return Path(folder) / inside
    raise UserError(f"{source}: the package {name!r} has no file {inside!r}")


def _json(path: Path) -> Iterator[Record | Skipped]:
    with path.open("rb") as file:
        head = file.read(1 << 16).removeprefix(codecs.BOM_UTF8)
    return _json_list(path) if head.lstrip(SPACE.encode()).startswith(b"[") else _json_lines(path)


def _check_head(path: Path) -> None:
    """Refuse a file that holds no JSON in one sentence, instead of calling each of its lines broken."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path.name} is UTF-16: save it as UTF-8")
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")):
        raise UserError(f"{path.name} is compressed: unpack it first")
    lines = [line.strip(SPACE.encode()) for line in head.removeprefix(codecs.BOM_UTF8).split(b"\n")]
    lines = [line for line in lines if line]
    if lines and not any(line.startswith((b"{", b"[")) for line in lines):
        first = lines[0].decode("utf-8", "replace")
        kind = "CSV" if re.search("[,;\t]", first) else "neither JSON nor JSON Lines"
        raise UserError(
            f"{path.name}:1: this looks like {kind} (it starts with {first[:40]!r}); "
            f"write it as JSON Lines, one {EXAMPLE} on each line"
        )


def _json_lines(path: Path) -> Iterator[Record | Skipped]:
    _check_head(path)
    empty = True
    with path.open("rb") as file:
        for record in parse_lines(file, path.name):
            empty = False
            yield record
    if empty:
        raise UserError(f"{path} is empty")


def parse_lines(lines: Iterable[bytes], name: str) -> Iterator[Record | Skipped]:
    """The record on each line that is not blank, as it comes."""
    problems: list[str] = []
    decoder = _decoder(problems)
    for number, raw in enumerate(lines, 1):
        raw = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).strip(SPACE.encode())
        if raw:
            problems.clear()
            value = _decode_line(raw, decoder, problems)
            yield _record(f"{name}:{number}", value, problems)


def _decode_line(raw: bytes, decoder: json.JSONDecoder, problems: list[str]) -> Any:
    try:
        return decoder.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        problems.insert(0, f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8")
    except json.JSONDecodeError as error:
        hint = "; a record is one line (a list of records belongs in a .json file)" if raw in (b"{", b"[") else ""
        problems.insert(0, f"not JSON: {_reason(error)} at column {error.colno}{hint}")
    except RecursionError:
        problems.insert(0, "not a record: brackets nested too deep")
    return None


def _json_list(path: Path) -> Iterator[Record | Skipped]:
    """Records of one JSON list. A list that breaks off raises: past that place a record looks like a part of one."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text, all_utf8 = data.decode("utf-8"), True
    except UnicodeDecodeError:  # a bad byte becomes a lone surrogate, which breaks only the record it is in
        text, all_utf8 = data.decode("utf-8", "surrogateescape"), False
    del data
    problems: list[str] = []
    decoder = _decoder(problems)
    skip_blank = re.compile(f"[{SPACE}]*").match
    position = skip_blank(text, skip_blank(text).end() + 1).end()  # after the "["
    line, line_start = 1 + text.count("\n", 0, position), text.rfind("\n", 0, position) + 1
    if text[position : position + 1] == "]":
        raise UserError(f"{path} is an empty list")
    named, mark = 0, ","  # ``named``: the line of the record before
    while mark == ",":
        problems.clear()
        value, end = _decode_item(text, position, decoder, f"{path.name}:{line}")
        if not all_utf8:
            _find_bad_byte(text[position:end], problems)
        yield _record(f"{path.name}:{line}" + f":{position - line_start + 1}" * (line == named), value, problems)
        named = line
        comma = skip_blank(text, end).end()
        mark = text[comma : comma + 1]
        after = skip_blank(text, comma + 1).end()
        newlines = text.count("\n", position, after)  # only of text not counted before: linear over the file
        if newlines:
            line, line_start = line + newlines, text.rindex("\n", position, after) + 1
        position = after
    if mark != "]":
        cut = "" if mark else " (is the file cut off?)"
        raise _list_broken(f"{path.name}:{named}", f"neither a comma nor the end of the list after this record{cut}")
    if position < len(text):
        raise _list_broken(f"{path.name}:{line}", "text after the end of the list")


def _decode_item(text: str, position: int, decoder: json.JSONDecoder, where: str) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, position)
    except json.JSONDecodeError as error:
        at_end = error.msg.startswith("Unterminated string") or not text[error.pos :].strip(SPACE)
        cut = " (is the file cut off?)" if at_end else ""
        raise _list_broken(where, f"{_reason(error)} at line {error.lineno} column {error.colno}{cut}") from None
    except RecursionError:
        raise _list_broken(where, "brackets nested too deep") from None


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")


def _list_broken(where: str, why: str) -> UserError:
    return UserError(f"{where}: not JSON: {why}; a list cannot be read past this, JSON Lines could")


def _find_bad_byte(text: str, problems: list[str]) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problems.append(f"byte 0x{ord(text[error.start]) - 0xDC00:02x} is not UTF-8")


def _decoder(problems: list[str]) -> json.JSONDecoder:
    """A decoder that notes in ``problems`` what is wrong with an object it can still read to its end."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in items:
            if key in fields:
                problems.append(f"the field {key!r} is written twice")
            fields[key] = value
        return fields

    def constant(name: str) -> None:
        problems.append(f"{name} is not a JSON number")

    def integer(digits: str) -> int:
        if len(digits) > 300:  # near what a float holds; Python itself refuses more than 4300 digits
            problems.append(f"a number of {len(digits)} digits")
            return 0
        return int(digits)

    return json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant, parse_int=integer)


def _record(where: str, value: Any, problems: list[str]) -> Record | Skipped:
    if problems:
        return Skipped(where, problems[0])
    if not isinstance(value, dict):
        return Skipped(where, f"a JSON {_kind(value)} where a record {EXAMPLE} is expected")
    return Record(where, value)


def _kind(value: Any) -> str:
    return {list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _parquet(path: Path) -> Iterator[Record | Skipped]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs the package datasets; install it or convert to JSON Lines") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f"{path.name}:{number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({_first_line(error)})") from None
    if not number:
        raise UserError(f"{path} has no rows")


def _hub(source: str) -> Iterator[Record]:
    found = HUB_NAME.fullmatch(source)
    name, split = found["name"], found["split"] or "train"
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} is no file here, and hub data sets need the package datasets: install it") from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(
            f"{source}, split {split!r}, was found and cannot be read: {_first_line(error.__cause__ or error)}"
        ) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{source} is no file here, and the Hugging Face hub did not give it, split {split!r} "
            f"({_first_line(error)}); name a local .jsonl, .json or .parquet file, or check the name and the network"
        ) from None
    return (Record(f"{name}:{number}", row) for number, row in enumerate(rows, 1))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")

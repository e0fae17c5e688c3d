"""The reader of data files: what was written comes back, what is broken is named by its line, and nothing else."""

import gzip
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings, strategies as st

from tract_fast.data.feedback import read_examples
from tract_fast.data.records import Record, Skipped, read_records
from tract_fast.errors import UserError

scalars = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | st.text(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=6
)
records = st.dictionaries(st.text(max_size=8), values, max_size=4)
BROKEN = [
    b"{",
    b"[",
    b'{"a": 1',
    b'{"a": 1}}',
    b'{"a": 1} {"a": 2}',
    b'{"a": 1, "a": 2}',
    b'{"a": {"b": 1, "b": 1}}',
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b'{"a": "\xff"}',
    b'{"a": "\xed\xa0\x80"}',
    b'{"a": "\t"}',
    b"[1, 2]",
    b'"text"',
    b"null",
    b"1" * 5000,
    b'{"a": ' * 50_000,
    b"prompt,rationale,score",
    b"\x00",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")

    def write(data: bytes, suffix=".jsonl") -> Path:
        file = folder / f"data{suffix}"
        file.write_bytes(data)
        return file

    return write


def read(file):
    return list(read_records(str(file)))


def lines(items, ascii=False) -> list[bytes]:
    return [json.dumps(item, ensure_ascii=ascii).encode() for item in items]


@given(items=st.lists(records, min_size=1, max_size=6), indent=st.sampled_from([None, 0, 2]), ascii=st.booleans())
def test_round_trip(path, items, indent, ascii):
    text = json.dumps(items, indent=indent, ensure_ascii=ascii)
    as_list = read(path(text.encode(), ".json"))
    as_lines = read(path(b"\n".join(lines(items, ascii))))
    assert [r.fields for r in as_list] == [r.fields for r in as_lines] == items
    assert [r.where for r in as_lines] == [f"data.jsonl:{n}" for n in range(1, len(items) + 1)]
    assert read(path(b"\r\n\r\n".join(lines(items, ascii)), ".json"))[-1].fields == items[-1]
    # a list's records are named by the line, and from the second on a line the column, where they start
    for record, item in zip(as_list, items, strict=True):
        line, _, column = record.where.removeprefix("data.json:").partition(":")
        rest = "\n".join(text.split("\n")[int(line) - 1 :])
        start = int(column) - 1 if column else rest.index("{")
        assert json.JSONDecoder().raw_decode(rest, start)[0] == item
    assert len({r.where for r in as_list}) == len(items)


@given(items=st.lists(records, min_size=1, max_size=5), broken=st.sampled_from(BROKEN), data=st.data())
def test_broken_line_is_named_and_hides_nothing(path, items, broken, data):
    at = data.draw(st.integers(0, len(items)))
    whole = lines(items)
    found = read(path(b"\n".join([*whole[:at], broken, *whole[at:]])))
    assert isinstance(found.pop(at), Skipped) and [r.fields for r in found] == items
    assert read(path(b"\n".join([*whole[:at], broken, *whole[at:]])))[at].where == f"data.jsonl:{at + 1}"


@settings(max_examples=300)
@given(
    data=st.binary(max_size=60),
    prefix=st.sampled_from([b"", b"[", b'[{"a":', b'{"a":', b'[{}\n,\n{"prompt":"', b"PAR1"]),
)
@example(data=b"[" * 100_000, prefix=b"")
@example(data=b'{"a":' * 100_000, prefix=b"[{},")
@example(data=b"1" * 5000, prefix=b"[")
@example(data=b"\xff]", prefix=b"[")
@example(data=b"", prefix=b"\xff\xfe[")
def test_random_bytes_raise_only_user_error(path, data, prefix):
    scale = {"labels": ["1", "2"], "values": [1, 2]}
    for suffix in (".json", ".jsonl", ".parquet"):
        for on_error in ("fail", "skip"):
            with pytest.raises(UserError):
                read_examples(str(path(prefix + data, suffix)), rationale="keep", on_error=on_error, **scale)


@given(items=st.lists(records, min_size=1, max_size=4), indent=st.sampled_from([None, 2]), data=st.data())
def test_list_that_is_cut_off_is_never_taken_for_whole(path, items, indent, data):
    text = json.dumps(items, indent=indent).encode()
    cut = data.draw(st.integers(1, len(text) - 1))
    with pytest.raises(UserError, match=r"data\.json(:\d+: not JSON: .*| is an empty list$)"):
        read(path(text[:cut], ".json"))
    with pytest.raises(UserError, match=r"data\.json:\d+: not JSON: text after the end of the list"):
        read(path(text + b"\n{}", ".json"))
    with pytest.raises(UserError, match=r"data\.json:\d+: not JSON: .*; a list cannot be read past this"):
        read(path(text[:-1] + b",]", ".json"))


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b'{"a": 1, "a": 2}', "the field 'a' is written twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": "\xff"}', "byte 0xff is not UTF-8"),
        (b"[1]", "a JSON list where a record"),
        (b"7", "a JSON number where a record"),
        (b"null", "a JSON null where a record"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number of 5000 digits"),
    ],
)
def test_broken_record_in_a_list_is_named_and_hides_nothing(path, record, why):
    found = read(path(b'[\n{"b": "\xc3\xbc"},\n' + record + b',\n{"c": 2}]\n', ".json"))
    assert [found[0], found[2]] == [Record("data.json:2", {"b": "ü"}), Record("data.json:4", {"c": 2})]
    assert found[1].where == "data.json:3" and found[1].why.startswith(why)


def test_list_error_names_record_and_place(path):
    with pytest.raises(UserError, match=r"^data.json:2: not JSON: Expecting ',' delimiter at line 4 column 2;"):
        read(path(b'[\n{"a": 1,\n"b": 2\n "c": 3},\n{}]', ".json"))
    with pytest.raises(UserError, match=r"^data.json:2: not JSON: neither a comma nor the end of the list after this"):
        read(path(b'[\n{"a": 1}\n{"b": 1}]', ".json"))
    for cut in (b'[\n{}, {"a": "b', b"[\n{}, ", b"[\n{}", b'[\n{"a": '):
        with pytest.raises(UserError, match=r"^data.json:2: not JSON: .* \(is the file cut off\?\); a list cannot"):
            read(path(cut, ".json"))


@pytest.mark.parametrize(
    ("data", "suffix", "message"),
    [
        (b"", ".jsonl", "is empty"),
        (b" \n\t\n", ".json", "is empty"),
        (b"\xef\xbb\xbf", ".json", "is empty"),
        (b" [\n ] ", ".json", "is an empty list"),
        (b"prompt,rationale,score\nhi,ho,3\n", ".json", "data.json:1: this looks like CSV .*'prompt,rationale,score'"),
        (b"prompt\tscore\nhi\t3\n", ".jsonl", "data.jsonl:1: this looks like CSV"),
        (b"hello", ".json", "data.json:1: this looks like neither JSON nor JSON Lines"),
        (b"a,b", ".csv", "a data file is .jsonl, .json or .parquet; write JSON Lines"),
        (b"{}", "", "a data file is .jsonl, .json or .parquet"),
        ('{"a": 1}'.encode("utf-16"), ".json", "is UTF-16: save it as UTF-8"),
        (gzip.compress(b"{}", mtime=0), ".jsonl", "is compressed"),
        (b"PAR1", ".parquet", "not a whole Parquet file"),
    ],
)
def test_what_is_no_data_file_is_said_in_one_sentence(path, data, suffix, message):
    with pytest.raises(UserError, match=message) as raised:
        read(path(data, suffix))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_byte_order_mark_is_no_part_of_the_first_record(path):
    mark = b"\xef\xbb\xbf"
    assert read(path(mark + b'{"a": 1}\n{"b": 2}'))[0] == Record("data.jsonl:1", {"a": 1})
    assert read(path(mark + b'[{"a": 1}]', ".json")) == [Record("data.json:1", {"a": 1})]


def test_indented_object_gets_a_hint(path):
    found = read(path(b'{\n"a": 1\n}\n', ".json"))
    assert "a record is one line (a list of records belongs in a .json file)" in found[0].why


def test_json_lines_are_streamed(path):
    file = path(b"".join(b'{"text": "%s", "n": %d}\n' % (b"x" * 1000, n) for n in range(8000)))
    tracemalloc.start()
    count = sum(record.fields["n"] for record in read_records(str(file)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000 * 7999 // 2
    assert peak < 1_000_000, f"{peak} bytes for a file of 8 MB"


@pytest.mark.parametrize("separator", [b",", b",\n"])
def test_a_long_list_takes_linear_time(path, separator):
    """On one line of 1 MB, where looking back for the start of the line each time would read 50 GB."""
    file = path(b"[" + separator.join([b'{"a": 1}'] * 100_000) + b"]", ".json")
    start = time.process_time()  # of this process alone: a busy machine does not count
    assert len(read(file)) == 100_000
    assert time.process_time() - start < 8, "about 1 when linear, minutes when not"


def test_parquet(tmp_path):
    rows = [{"prompt": f"p{i}", "score": i, "gpt4_score": None if i % 2 else [i, 1]} for i in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=100)
    found = read(tmp_path / "x.parquet")
    assert [r.fields for r in found] == rows
    assert found[1234].where == "x.parquet:1235"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows[:0], pyarrow.schema([("a", "int8")])), tmp_path / "y.parquet"
    )
    with pytest.raises(UserError, match=r"y.parquet has no rows"):
        read(tmp_path / "y.parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((tmp_path / "x.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut.parquet: not a whole Parquet file"):
        read(cut)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "sub").mkdir()
    for source, message in [
        (tmp_path / "trian.jsonl", r"trian.jsonl: there is no such file; did you mean train.jsonl\?"),
        (tmp_path / "q.parquet", "q.parquet: there is no such file$"),
        (tmp_path / "no" / "x.json", "there is no folder .*no$"),
        (tmp_path, "is a folder: name one file in it, such as train.jsonl"),
        (tmp_path / "sub", "is a folder: name one file$"),
        ("package:no_such_package/x.jsonl", "there is no installed package 'no_such_package'"),
        ("package:../x.jsonl", "there is no installed package"),
        ("package:tract_fast/no.jsonl", "the package 'tract_fast' has no file 'no.jsonl'"),
        ("/dev/null", "is not a plain file"),
    ]:
        with pytest.raises(UserError, match=message):
            read(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"trian.jsonl: .* did you mean train.jsonl\?"):
        read("trian.jsonl")
    with pytest.raises(UserError, match="there is no folder data"):
        read("data/train.csv")


def test_file_in_a_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "judged_things"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "x.jsonl").write_text('{"a": 1}')
    monkeypatch.syspath_prepend(tmp_path)
    assert read("package:judged_things/data/x.jsonl") == [Record("x.jsonl:1", {"a": 1})]


HUB = """
from tract_fast.data.records import _hub, read_records
from tract_fast.errors import UserError
try:
    list(read_records("some-one/judgements:test"))
except UserError as error:
    print(error)
print([(r.where, r.fields) for r in _hub("local_set:train")])
"""


def test_hub_data_sets(tmp_path):
    """Offline: one sentence. And a data set that ``datasets`` finds by name, here a folder, gives its rows."""
    (tmp_path / "local_set").mkdir()
    (tmp_path / "local_set" / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": root}
    command = [sys.executable, "-c", HUB]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sentence, rows = done.stdout.splitlines()
    assert sentence.startswith(
        "some-one/judgements:test is no file here, and the Hugging Face hub did not give it, split"
    )
    assert rows == "[('local_set:1', {'a': 1}), ('local_set:2', {'a': 2})]"

"""Check the records of every format, in units of any size, resumed after any unit."""

import bz2
import gzip
import json
import lzma

import corpus
import hypothesis
import pyarrow
import pytest
from backports import zstd
from hypothesis import strategies as st

from ttt_jax.data.prepare import records
from ttt_jax.data.prepare.records import Position, Problem

BOM = b"\xef\xbb\xbf"
START = Position()


def as_array(texts):
    return json.dumps([{"text": text, "meta": {}} for text in texts]).encode()


def as_indented_array(texts):
    return json.dumps([{"text": text, "meta": {}} for text in texts], indent=2, ensure_ascii=False).encode()


def one_after_another(texts):
    return b" ".join(json.dumps({"meta": {}, "text": text}, indent=1).encode() for text in texts)


FORMATS = {
    "lines.jsonl": corpus.jsonl,
    "whole.jsonl.zst": lambda texts: zstd.compress(corpus.jsonl(texts)),
    "frames.jsonl.zst": lambda texts: corpus.frames(corpus.jsonl(texts), 300),
    "whole.jsonl.gz": lambda texts: gzip.compress(corpus.jsonl(texts)),
    "members.jsonl.gz": lambda texts: corpus.members(corpus.jsonl(texts), 300),
    "whole.jsonl.xz": lambda texts: lzma.compress(corpus.jsonl(texts)),
    "streams.jsonl.bz2": lambda texts: corpus.members(corpus.jsonl(texts), 300, bz2.compress),
    "returns.jsonl": lambda texts: corpus.jsonl(texts).replace(b"\n", b"\r\n"),
    "open-ended.jsonl": lambda texts: corpus.jsonl(texts)[:-1],
    "mark.jsonl": lambda texts: BOM + corpus.jsonl(texts),
    "array.json": as_array,
    "indented.json": as_indented_array,
    "one-after-another.json": one_after_another,
    "together.json": lambda texts: b"".join(json.dumps({"text": text}).encode() for text in texts),
    "lines.json": corpus.jsonl,
    "blank.json": lambda texts: b"\r\n" + b" " * 5000 + b"\n" + as_array(texts),
    "mark.json": lambda texts: BOM + as_array(texts),
    "marked-lines.json": lambda texts: BOM + corpus.jsonl(texts),
    "frames.json.zst": lambda texts: corpus.frames(as_indented_array(texts), 300),
    "members.json.gz": lambda texts: corpus.members(one_after_another(texts), 300),
    "whole.json.bz2": lambda texts: bz2.compress(as_array(texts)),
    "streams.json.xz": lambda texts: corpus.members(as_indented_array(texts), 300, lzma.compress),
    "groups.parquet": corpus.parquet_file,
    "batches.parquet": lambda texts: corpus.parquet_file(texts, 10**6),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def read(files, start=START, unit_bytes=1 << 20, text_key="text"):
    """Return the records of each unit, and the position after it."""
    units = list(records.units(files, start, unit_bytes, text_key))
    return [(list(records.texts(unit, text_key)), unit.end) for _, unit, _ in units]


def found(*arguments, **options):
    return [record for unit, _ in read(*arguments, **options) for record in unit]


@pytest.mark.parametrize("name", FORMATS)
def test_records_come_in_order_numbered_from_one(tmp_path, name):
    texts = corpus.documents(600 if name == "batches.parquet" else 40)
    file = corpus.input_file(tmp_path / name, FORMATS[name](texts))
    assert found([file]) == list(enumerate(texts, 1))


@pytest.mark.parametrize("name", FORMATS)
@hypothesis.given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=9),
    unit_bytes=st.integers(1, 400),
    other=st.integers(1, 400),
)
@hypothesis.settings(max_examples=6)
def test_reading_resumes_after_any_unit_of_any_size(folder, name, texts, unit_bytes, other):
    """Resume in both of two files."""
    files = [corpus.input_file(folder / f"{i}-{name}", FORMATS[name](texts)) for i in range(2)]
    expected = 2 * list(enumerate(texts, 1))
    units = read(files, unit_bytes=unit_bytes)
    before = []
    for unit, end in units:
        before += unit
        assert before + found(files, start=end, unit_bytes=other) == expected
    assert before == expected
    assert units[-1][1] == Position(2)


def test_parquet_resumes_in_any_batch_of_any_group(tmp_path):
    """Resume inside groups of 600 rows, which are decoded 256 rows at a time."""
    texts = [f"text {i}" for i in range(1500)]
    file = corpus.input_file(tmp_path / "a.parquet", corpus.parquet_file(texts, 600))
    units = read([file], unit_bytes=400)
    assert len(units) > 25
    before = []
    for unit, end in units:
        before += unit
        assert before + found([file], start=end) == list(enumerate(texts, 1))


def test_a_unit_is_as_few_lines_as_have_unit_bytes(tmp_path):
    content = corpus.jsonl(corpus.documents(50))
    file = corpus.input_file(tmp_path / "a.jsonl", content)
    units = [(unit, read) for _, unit, read in records.units([file], Position(), 700, "text")]
    assert b"".join(unit.content for unit, _ in units) == content
    for unit, _ in units[:-1]:
        lines = unit.content.splitlines(keepends=True)
        assert len(unit.content) >= 700
        assert sum(map(len, lines[:-1])) < 700
    assert [read for _, read in units] == sorted(read for _, read in units)
    assert units[-1][1] == len(content)


def test_values_are_cut_into_units(tmp_path):
    texts = ["0123456789"] * 20
    for name in ("array.json", "groups.parquet"):
        file = corpus.input_file(tmp_path / name, FORMATS[name](texts))
        sizes = [len(unit) for unit, _ in read([file], unit_bytes=25)]
        assert sizes == [3, 3, 3, 3, 3, 3, 2]


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("a.txt.zst", zstd.compress), ("a.txt.gz", gzip.compress)]
)
def test_a_txt_file_is_one_document(tmp_path, name, pack):
    text = '  {"text": "a"}\r\n\n\x00 straße 🦉 \n'
    for mark in (b"", BOM):
        files = [corpus.input_file(tmp_path / name, pack(mark + text.encode()))] * 2
        assert found(files, unit_bytes=3) == [(1, text), (1, text)]
        assert found(files, start=read(files)[0][1]) == [(1, text)]


def test_another_text_key_is_read(tmp_path):
    texts = corpus.documents(9)
    lines = corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl(texts, "content", text="no"))
    array = corpus.input_file(tmp_path / "a.json", json.dumps([{"content": t, "text": 0} for t in texts]).encode())
    for file in (lines, array):
        assert found([file], text_key="content") == list(enumerate(texts, 1))
    table = corpus.input_file(tmp_path / "a.parquet", corpus.parquet_file(texts))
    assert found([table], text_key="id") == [Problem(i, "'id' is a number; expected a string") for i in range(1, 10)]


def test_blank_lines_count_but_are_no_records(tmp_path):
    file = corpus.input_file(tmp_path / "a.jsonl", b'\n \r\n{"text": "a"}\n\n\t\n{"text": ""}\n\n')
    for unit_bytes in (1, 20, 1000):
        assert found([file], unit_bytes=unit_bytes) == [(3, "a"), (6, "")]


def test_a_byte_order_mark_is_skipped_only_at_the_beginning(tmp_path):
    mark = BOM.decode()
    file = corpus.input_file(tmp_path / "a.jsonl", BOM + corpus.jsonl([f"{mark}a", "b"]))
    assert found([file]) == [(1, f"{mark}a"), (2, "b")]
    inside = corpus.input_file(tmp_path / "b.jsonl", b'{"text": "a"}\n' + BOM + b'{"text": "b"}\n')
    first, second = found([inside])
    assert first == (1, "a")
    assert (second.record, second.what[:8]) == (2, "not JSON")


def test_all_string_types_of_parquet_are_read(tmp_path):
    texts = corpus.documents(12)
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        file = corpus.input_file(tmp_path / "a.parquet", corpus.parquet_file(texts, type=kind))
        assert found([file], unit_bytes=50) == list(enumerate(texts, 1))


def test_an_array_accepts_what_json_lines_accept(tmp_path):
    """Check that values that strict JSON lacks, under keys that are not read, cost no record."""
    rows = [
        '"a": NaN',
        '"a": -Infinity',
        '"a": 1' + "0" * 400,
        '"a": ' + "7" * 5000,
        '"a": 1, "a": 2',
        '"a": "\\ud800"',
        '"a": 1e999',
    ]
    rows = [f'{{"text": "t{i}", {row}}}' for i, row in enumerate(rows)]
    expected = [(i + 1, f"t{i}") for i in range(len(rows))]
    for name, content in (("a.jsonl", "\n".join(rows)), ("a.json", f"[{', '.join(rows)}]")):
        assert found([corpus.input_file(tmp_path / name, content.encode())]) == expected

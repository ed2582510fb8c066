"""Check which record is reported for each fault that a file can have, and in which words."""

import bz2
import gzip
import io
import json
import lzma

import corpus
import pyarrow
import pytest
from backports import zstd
from pyarrow import parquet

from ttt_jax.data.prepare import records
from ttt_jax.data.prepare.files import InputFile
from ttt_jax.data.prepare.records import Position, Problem

TWO = corpus.jsonl(["a", "b"])
START = Position()


def found(file, start=START, unit_bytes=1 << 20):
    units = [unit for _, unit, _ in records.units([file], start, unit_bytes, "text")]
    return [record for unit in units for record in records.texts(unit, "text")]


def table(**columns):
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content)
    return content.getvalue()


def badly_encoded():
    """Return a Parquet file whose 301st text, in the second batch, is not UTF-8."""
    values = [b"fine"] * 300 + [b"\xff\xfe"] + [b"fine"] * 9
    return table(text=pyarrow.array(values, pyarrow.binary()).view(pyarrow.string()))


NULL = Problem(1, "'text' is null; expected a string")
NUMBER = Problem(1, "'text' is a number; expected a string")
LINES = [
    (b'{"text": "a"}\n{"text": "b\n{"text": "c"}\n', [(1, "a"), Problem(2, "not JSON: Unterminated string"), (3, "c")]),
    (b'{"text": "a"} {"text": "b"}\n{"text": "c"}\n', [Problem(1, "not JSON: Extra data"), (2, "c")]),
    (b"junk\n", [Problem(1, "not JSON: Expecting value")]),
    (b'\n{"txt": "a", "meta": 1}\n', [Problem(2, "no key 'text'; it has 'meta', 'txt'")]),
    (b"{}\n", [Problem(1, "no key 'text'; it has none")]),
    (b'{"text": null}\n{"text": "b"}\n', [NULL, (2, "b")]),
    (b'{"text": 5}\n', [NUMBER]),
    (b'{"text": 0.5}\n', [NUMBER]),
    (b'{"text": true}\n', [Problem(1, "'text' is a boolean; expected a string")]),
    (b'{"text": ["a"]}\n', [Problem(1, "'text' is an array; expected a string")]),
    (b'{"text": {"a": 1}}\n', [Problem(1, "'text' is an object; expected a string")]),
    (b'["a"]\n"a"\nnull\n7\n', [Problem(i + 1, f"expected a JSON object, found {what}") for i, what in
                                enumerate(("an array", "a string", "null", "a number"))]),
    (b'{"text": "a"}\n{"text": "xy\\ud800"}\n', [(1, "a"),
        Problem(2, "not valid Unicode: a lone surrogate at character 2")]),
    (b'{"text": "\\ud83e\\udd89"}\n', [(1, "🦉")]),
    (b'{"text": "a\xff"}\n{"text": "b"}\n', [Problem(1, "not valid UTF-8: invalid start byte at byte 11"), (2, "b")]),
    (b'{"text": "a"}\n{"text": "\xe6\xb0', [(1, "a"),
        Problem(2, "not valid UTF-8: unexpected end of data at byte 10")]),
    (b"[" * 100_000 + b"\n" + TWO, [Problem(1, "not JSON: maximum recursion depth"), (2, "a"), (3, "b")]),
    (b"", [Problem(1, "no records")]),
    (b" \n\r\n\t", [Problem(4, "no records")]),
]  # fmt: skip
VALUES = [
    (b'[{"text": "a"}, {"text": null}, {"text": "c"}]', [(1, "a"), Problem(2, NULL.what), (3, "c")]),
    (b'[{"text": 5}, {"text": 0.5}]', [NUMBER, Problem(2, NUMBER.what)]),
    (b'[{"txt": "a"}, [], {"text": "c"}]', [Problem(1, "no key 'text'; it has 'txt'"),
                                            Problem(2, "expected a JSON object, found an array"), (3, "c")]),
    (b'{"text": "a"} 5 {"text": "c"}', [(1, "a"), Problem(2, "expected a JSON object, found a number"), (3, "c")]),
    (b'[{"text": "a"}, {"text": "b"', [(1, "a"), Problem(2, "not JSON from here on: ")]),
    (b'[{"text": "a"},\n{"text": "b" 1},\n{"text": "c"}]', [(1, "a"),
        Problem(2, "not JSON: Expecting ',' delimiter: line 2 column 14; left out up to line 2 column 16"), (3, "c")]),
    (b'[{"text": "a"}, {"text": "b}, {"text": "c"}]', [(1, "a"),
        Problem(2, "not JSON from here on: Expecting ',' delimiter: line 1 column 33")]),
    (b'[{"text": "a"}] [{"text": "b"}]', [(1, "a"), Problem(2, "not JSON from here on: ")]),
    (b'[{"text": "a"}, {"text": "\xff"}, {"text": "c"}]', [(1, "a"), Problem(2, "not valid UTF-8"), (3, "c")]),
    (b"junk", [Problem(1, "not JSON from here on: ")]),
    (b"[" * 3000, [Problem(1, "not JSON from here on: ")]),
    (b"[]", [Problem(1, "no records")]),
    (b"", [Problem(1, "no records")]),
    (b" \n\n", [Problem(3, "no records")]),
]  # fmt: skip
TABLES = [
    (table(text=[None, "b"]), [NULL, (2, "b")]),
    (table(text=[1, 2]), [NUMBER, Problem(2, NUMBER.what)]),
    (table(text=[b"a"]), [Problem(1, "'text' is a bytes; expected a string")]),
    (table(txt=["a"], id=[1]), [Problem(1, "no column 'text'; it has 'txt', 'id'")]),
    (table(text=pyarrow.array([], pyarrow.string())), [Problem(1, "no records")]),
    (table(text=["a"])[:-20], [Problem(1, "not readable as Parquet: ")]),
    (b"", [Problem(1, "not readable as Parquet: ")]),
    (b"junk and more of it", [Problem(1, "not readable as Parquet: ")]),
]  # fmt: skip
# Cut such that the first line can be read, but not the second.
LONG = corpus.jsonl(["a", "b" * 5000 + str(list(range(3000)))])
ARRAY = json.dumps([{"text": "a"}, {"text": str(list(range(40_000)))}], indent=1).encode()
CUT = "Compressed file ended before the end-of-stream marker was reached"
STREAMS = (("xz", lzma.compress), ("bz2", bz2.compress))
PACKED = [
    ("a.jsonl.zst", corpus.frames(LONG, 50)[:-60], [(1, "a"), Problem(2, CUT)]),
    ("a.jsonl.gz", gzip.compress(LONG)[:-100], [(1, "a"), Problem(2, CUT)]),
    ("a.jsonl.gz", gzip.compress(TWO)[:-2], [(1, "a"), (2, "b"), Problem(3, CUT)]),
    ("a.jsonl.gz", gzip.compress(TWO)[:-8] + bytes(8), [(1, "a"), (2, "b"), Problem(3, "CRC check failed")]),
    ("a.jsonl.gz", gzip.compress(TWO) + b"more", [(1, "a"), (2, "b"), Problem(3, "Not a gzipped file")]),
    ("a.jsonl.zst", zstd.compress(TWO) + b"more", [(1, "a"), (2, "b"), Problem(3, "Unable to decompress")]),
    ("a.jsonl.zst", TWO, [Problem(1, "Unable to decompress Zstandard data: Unknown frame descriptor")]),
    ("a.jsonl.gz", TWO, [Problem(1, "Not a gzipped file")]),
    ("a.jsonl.zst", b"", [Problem(1, CUT)]),
    ("a.jsonl.gz", b"", [Problem(1, "no records")]),
    ("a.jsonl.zst", zstd.compress(b""), [Problem(1, "no records")]),
    ("a.jsonl.gz", gzip.compress(b"\n\n"), [Problem(3, "no records")]),
    *((f"a.jsonl.{end}", pack(LONG)[:-60], [(1, "a"), Problem(2, CUT)]) for end, pack in STREAMS[:1]),
    *((f"a.jsonl.{end}", pack(TWO)[:-2], [(1, "a"), (2, "b"), Problem(3, CUT)]) for end, pack in STREAMS[:1]),
    *((f"a.jsonl.{end}", pack(TWO) + b"more and more of it", [(1, "a"), (2, "b"), Problem(3, what)])
      for (end, pack), what in zip(STREAMS, ("Input format not supported", "Invalid data stream"), strict=True)),
    *((f"a.jsonl.{end}", pack(TWO) + pack(TWO)[:9], [(1, "a"), (2, "b"), Problem(3, CUT)]) for end, pack in STREAMS),
    ("a.jsonl.bz2", bz2.compress(TWO) + bytes(8), [(1, "a"), (2, "b"), Problem(3, "Invalid data stream")]),
    ("a.jsonl.xz", lzma.compress(TWO) + bytes(8), [(1, "a"), (2, "b")]),
    ("a.jsonl.xz", TWO, [Problem(1, "Input format not supported by decoder")]),
    ("a.jsonl.bz2", TWO, [Problem(1, "Invalid data stream")]),
    *((f"a.jsonl.{end}", b"", [Problem(1, CUT)]) for end, _ in STREAMS),
    *((f"a.jsonl.{end}", pack(b""), [Problem(1, "no records")]) for end, pack in STREAMS),
    *((f"a.txt.{end}", pack(b"a" * 99)[:-9], [Problem(1, CUT)]) for end, pack in STREAMS),
    *((f"a.json.{end}", pack(ARRAY)[:-100], [(1, "a"), Problem(2, f"not JSON from here on: {CUT}")])
      for end, pack in STREAMS[:1]),
    ("a.json.gz", gzip.compress(ARRAY)[:-100], [(1, "a"), Problem(2, f"not JSON from here on: {CUT}")]),
    ("a.json.gz", gzip.compress(b'[\n{"text": "a"}]')[:-4], [Problem(1, f"not JSON from here on: {CUT}")]),
    ("a.json.gz", b"junk", [Problem(1, "not JSON from here on: Not a gzipped file")]),
    ("a.json.zst", b"junk and more of it", [Problem(1, "not JSON from here on: Unable to decompress")]),
    ("a.json.zst", b"", [Problem(1, f"not JSON from here on: {CUT}")]),
    ("a.txt", b"", [Problem(1, "no records")]),
    ("a.txt", b"ab\xffc", [Problem(1, "not valid UTF-8: invalid start byte at byte 2")]),
    ("a.txt", b" \n", [(1, " \n")]),
    ("a.txt.gz", gzip.compress(b"a" * 99)[:-9], [Problem(1, CUT)]),
    ("a.txt.zst", zstd.compress(b"abcdefghijk" * 9)[:-1], [Problem(1, CUT)]),
    ("a.txt.zst", b"junk and more of it", [Problem(1, "Unable to decompress")]),
    ("a.txt.gz", b"", [Problem(1, "no records")]),
]  # fmt: skip
TABLE = [
    *(("a.jsonl", content, expected) for content, expected in LINES),
    *(("a.json", content, expected) for content, expected in VALUES),
    *(("a.parquet", content, expected) for content, expected in TABLES),
    *PACKED,
]


@pytest.mark.parametrize(("name", "content", "expected"), TABLE, ids=[f"{i}-{x[0]}" for i, x in enumerate(TABLE)])
def test_bad_records_are_located_and_the_others_are_read(tmp_path, name, content, expected):
    file = corpus.input_file(tmp_path / name, content)
    for unit_bytes in (1 << 20, 1):
        actual = found(file, unit_bytes=unit_bytes)
        cut = [
            Problem(a.record, a.what[: len(e.what)]) if isinstance(a, Problem) and isinstance(e, Problem) else a
            for a, e in zip(actual, expected, strict=False)
        ]
        assert cut + actual[len(cut) :] == expected
        whats = [record.what for record in actual if isinstance(record, Problem)]
        assert all("\n" not in what and "Traceback" not in what for what in whats)


def test_parquet_is_read_up_to_the_batch_that_cannot_be_decoded(tmp_path):
    """Check that the records before the batch of 256 rows that cannot be decoded are read."""
    records = found(corpus.input_file(tmp_path / "a.parquet", badly_encoded()))
    assert records[:256] == [(i, "fine") for i in range(1, 257)]
    assert records[256].record <= 301
    assert records[256].what.startswith("not readable as Parquet: 'utf-8' codec")


@pytest.mark.parametrize("bytes_off", [pytest.param(200, marks=pytest.mark.slow), 70_000])
@pytest.mark.parametrize("kind", ["jsonl.zst", "jsonl.gz"])
def test_a_broken_file_gives_the_same_records_from_any_position(tmp_path, kind, bytes_off):
    """Check any position. How much a decompressor returns before it fails depends on how much is asked for."""
    texts = [f"{i} {'abcdefgh'[i % 8] * (i % 71)} {i * 7919}" for i in range(4000)]
    lines = corpus.jsonl(texts)
    options = {zstd.CompressionParameter.checksum_flag: 1}
    packed = bytearray(zstd.compress(lines, options=options) if kind.endswith("zst") else gzip.compress(lines))
    packed[-bytes_off if bytes_off < len(packed) else len(packed) // 2] ^= 255
    file = corpus.input_file(tmp_path / f"a.{kind}", bytes(packed))
    units = [unit for _, unit, _ in records.units([file], START, 20_000, "text")]
    whole = [record for unit in units for record in records.texts(unit, "text")]
    assert isinstance(whole[-1], Problem)
    before = []
    for unit in units[:-1]:
        before += records.texts(unit, "text")
        assert before + found(file, unit.end, 20_000) == whole


def test_a_file_without_line_ends_is_not_read_into_memory(tmp_path, monkeypatch):
    """Check the bound with 64 bytes instead of a GiB."""
    monkeypatch.setattr(records, "_LONGEST_RECORD", 64)
    short = b'{"text": "' + b"x" * 40 + b'"}\n'
    file = corpus.input_file(tmp_path / "a.jsonl", short + b"x" * 65 + b"\n" + short)
    assert found(file) == [(1, "x" * 40), Problem(2, "a line of more than 64 bytes")]
    document = corpus.input_file(tmp_path / "a.txt", b"x" * 65)
    assert found(document) == [Problem(1, "a document of 64 bytes or more")]
    assert found(corpus.input_file(tmp_path / "b.txt", b"x" * 63)) == [(1, "x" * 63)]


def test_a_missing_file_is_an_error_and_no_bad_record(tmp_path):
    for name in ("gone.jsonl", "gone.json", "gone.txt", "gone.parquet"):
        with pytest.raises(FileNotFoundError):
            found(InputFile("train", str(tmp_path / name), 1))

"""Test JSON files that show when they are damaged."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax.storage import json_files, writing

CONTENT = {"a": 1, "b": [1.5, None, "x"], "c": {"d": True}}
RECORDS = [{"step": step, "loss": 1 / step, "tokens": 128 * step} for step in range(1, 6)]
LINES = "".join(map(json_files.line_with_checksum, RECORDS)).encode()


def test_objects_are_read_without_their_hash(tmp_path):
    path = tmp_path / "x.json"
    writing.write_atomically(path, json.dumps(json_files.with_hash(CONTENT), indent=2) + "\n")
    assert list(json.loads(path.read_text())) == [*CONTENT, "sha256"]
    assert json_files.read_object(path) == CONTENT
    path.write_text(json.dumps(CONTENT))  # of a version without hashes
    assert json_files.read_object(path) == CONTENT
    assert json_files.with_hash(json_files.with_hash(CONTENT)) == json_files.with_hash(CONTENT)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "damaged: it is empty"),
        (b"\0\0", "damaged: it is not JSON: "),
        (b"\xff{}", "damaged: it is not JSON: "),
        (b"[1]", "damaged: it holds no JSON object"),
        (b'{"a": ', "damaged: it is not JSON: "),
        (b"[" * 100_000, "damaged: it is not JSON: "),
        (
            json.dumps(json_files.with_hash(CONTENT)).replace("1.5", "2.5").encode(),
            'damaged, or edited: its "sha256" is ',
        ),
    ],
)
def test_damaged_objects_are_named(tmp_path, content, problem):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(json_files.DamagedFile) as caught:
        json_files.read_object(path)
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused_in_objects():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_files.with_hash({"x": math.nan})


def test_numbers_that_are_not_finite_are_null_in_lines():
    line = json_files.line_with_checksum({"step": 1, "loss": math.nan, "z": math.inf})
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    [record] = json_files.parse_lines(line.encode()).records
    assert record["step"] == 1
    assert math.isnan(record["loss"])


def test_lines_are_read_without_their_checksum():
    assert json_files.parse_lines(LINES) == json_files.Lines([*LINES.decode().splitlines()], RECORDS, {})
    without_checksums = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    assert [record["loss"] for record in json_files.parse_lines(without_checksums + LINES).records[:2]] == [2.0, 1.0]


@given(st.integers(0, len(LINES) * 8 - 1))
def test_a_flipped_bit_loses_only_the_lines_it_is_in(bit):
    damaged = bytearray(LINES)
    damaged[bit // 8] ^= 1 << bit % 8
    lines = json_files.parse_lines(bytes(damaged))
    hit = LINES[: bit // 8].count(b"\n")
    lost = {hit, hit + 1} if LINES[bit // 8 : bit // 8 + 1] == b"\n" else {hit}
    assert lines.records == [record for index, record in enumerate(RECORDS) if index not in lost]
    assert lines.problems or bit // 8 == len(LINES) - 1  # without its end, the last line may still be being written


@given(st.integers(0, len(LINES)))
def test_a_file_cut_short_keeps_its_whole_lines(length):
    lines = json_files.parse_lines(LINES[:length])
    assert lines.records == RECORDS[: LINES[:length].count(b"\n")]
    assert not lines.problems


def test_lines_that_are_left_out_are_named(tmp_path, capsys):
    lines = LINES.splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([lines[0], b"\n", b"\0\0\0\n", lines[1], lines[1], b"[]\n", b'{"loss": 1}\n', lines[2]]))
    found = json_files.read_lines(path)
    assert found.records == RECORDS[:3]
    assert found.problems == {
        2: "is empty",
        3: "holds NUL bytes only",
        5: "repeats a line before it",
        6: "is damaged: it is not a JSON object",
        7: "is not a record: it has no step",
    }
    json_files.read_lines(path)
    warning = f"{path}, line 2: is empty, and 4 more lines; left out, all other records are used\n"
    assert capsys.readouterr().err == warning  # printed once
    assert json_files.read_lines(tmp_path / "none").records == []


def test_a_folder_in_the_place_of_lines_is_a_problem_of_the_whole_file(tmp_path):
    lines = json_files.read_lines(tmp_path, warn=False)
    assert lines == json_files.Lines([], [], {}, "is a folder")
    assert lines.describe_damage(tmp_path) == f"{tmp_path}: is a folder; passed over"
    assert json_files.parse_lines(LINES).describe_damage(tmp_path) == ""

"""Cut files into units of records, and read the texts of a unit.

A unit is consecutive records of one file, cut at the first record boundary after a given number of bytes, so that
memory stays bounded whatever the size of a file. It has the position after it, from which a later run can continue. One
process cuts files into units, in order, which is cheap; many processes parse and tokenize the units.
"""

import dataclasses
import json
import numbers
from collections.abc import Iterator
from typing import Any

from ttt_jax import extras
from ttt_jax.data.prepare import json_values
from ttt_jax.data.prepare.files import CORRUPT, InputFile
from ttt_jax.errors import ConfigError

_LONGEST_RECORD = 1 << 30  # bytes; a longer line is no JSON line
_PARQUET_ROWS = 256  # that are decoded at a time
_END = object()
NOTHING = "no records"  # the problem of an empty file


@dataclasses.dataclass(frozen=True)
class Position:
    """The position in the input at which reading continues.

    Attributes:
      file: index of the file.
      offset: bytes of the decompressed file before the position; records in formats without lines.
      records: records of the file before the position.
      found: whether this file has had any record so far.
    """

    file: int = 0
    offset: int = 0
    records: int = 0
    found: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """A record that cannot be read, or the first record of the rest of a file that cannot be read.

    Attributes:
      record: its number, from 1.
      what: what is wrong.
    """

    record: int
    what: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """Consecutive records of a file.

    Attributes:
      kind: ``lines`` (``content`` is whole lines), ``document`` (the bytes of one), or ``values`` (of the text key).
      first_record: number of the first record, from 1; a line number if the file has lines.
      problem: why the file cannot be read after these records; None if it can.
      end: the position after these records.
    """

    kind: str
    content: bytes | list[Any]
    first_record: int
    problem: Problem | None
    end: Position


class _BrokenFileError(Exception):
    """The rest of a file cannot be read."""


def units(files: list[InputFile], start: Position, unit_bytes: int, text_key: str) -> Iterator[tuple[int, Unit, int]]:
    """Yield all records from a position on, with the index of their file and the number of bytes read of it so far.

    Raises:
      OSError: if a file cannot be read for another reason than its content.
    """
    for index in range(start.file, len(files)):
        begin = start if index == start.file else Position(index)
        file = files[index]
        with file.open() as raw:
            stream = raw if file.kind == "parquet" else file.decompressed(raw)
            if file.kind == "txt":
                found = _document(stream, begin)
            elif file.kind == "parquet":
                found = _values(_parquet(stream, begin.offset, text_key), begin, unit_bytes)
            elif file.kind == "json" and not _has_lines(file):
                found = _values(_json(stream, begin.offset, text_key), begin, unit_bytes)
            else:
                found = _lines(stream, begin, unit_bytes, seekable=not file.compressed)
            for unit in found:
                yield index, unit, raw.tell()


def texts(unit: Unit, text_key: str) -> Iterator[tuple[int, str] | Problem]:
    """Yield the texts of a unit with the numbers of their records, and its problems, in order."""
    if isinstance(unit.content, list):
        for number, value in enumerate(unit.content, unit.first_record):
            yield value if isinstance(value, Problem) else _checked(number, value, text_key)
    elif unit.kind == "document":
        if unit.content:
            yield _decoded(unit.first_record, unit.content)
    else:
        for number, line in enumerate(unit.content.split(b"\n"), unit.first_record):
            if line.strip():
                yield _of_line(number, line, text_key)
    if unit.problem:
        yield unit.problem


def _of_line(number: int, line: bytes, text_key: str) -> tuple[int, str] | Problem:
    decoded = _decoded(number, line)
    if isinstance(decoded, Problem):
        return decoded
    try:
        record = json_values.DECODER.decode(decoded[1])
    except (ValueError, RecursionError) as error:
        return Problem(number, f"not JSON: {error}")
    value = _text_of(number, record, text_key)
    return value if isinstance(value, Problem) else _checked(number, value, text_key)


def _text_of(number: int, record: Any, text_key: str) -> Any:
    if not isinstance(record, dict):
        return Problem(number, f"expected a JSON object, found {_json_type(record)}")
    if text_key not in record:
        return Problem(number, f"no key {text_key!r}; it has {', '.join(sorted(map(repr, record))[:5]) or 'none'}")
    return record[text_key]


def _checked(number: int, value: Any, text_key: str) -> tuple[int, str] | Problem:
    if not isinstance(value, str):
        return Problem(number, f"{text_key!r} is {_json_type(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Problem(number, f"not valid Unicode: a lone surrogate at character {error.start}")
    return number, value


def _decoded(number: int, content: bytes) -> tuple[int, str] | Problem:
    try:
        return number, content.decode("utf-8-sig" if number == 1 else "utf-8")  # a file may begin with a BOM
    except UnicodeDecodeError as error:
        return Problem(number, f"not valid UTF-8: {error.reason} at byte {error.start}")


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, numbers.Number) else f"a {type(value).__name__}")


def _lines(stream: Any, begin: Position, unit_bytes: int, seekable: bool) -> Iterator[Unit]:
    """Yield units of whole lines, each as few as have ``unit_bytes``.

    A stream that is not seekable is read line by line up to the position, so that a damaged file breaks off at the same
    line as if it were read without a stop.
    """
    offset, records, found = begin.offset, begin.records, begin.found
    skipped = begin.offset if seekable else 0
    ended = False
    while not ended:
        lines: list[bytes] = []
        size, problem = 0, ""
        try:
            if seekable:
                stream.seek(offset)
            while skipped < begin.offset:
                skipped += len(stream.readline(_LONGEST_RECORD)) or _raise_shorter()
            while size < unit_bytes and not ended:
                line = stream.readline(_LONGEST_RECORD)
                if len(line) == _LONGEST_RECORD:
                    raise _BrokenFileError(f"a line of more than {_LONGEST_RECORD} bytes")
                ended = not line
                size += len(line)
                if line:
                    lines.append(line)
        except (*CORRUPT, _BrokenFileError) as error:
            ended, problem = True, _reason(error)
        content, first = b"".join(lines), records + 1
        offset, records = offset + size, records + len(lines)
        found = found or bool(content.strip())
        if ended and not found and not problem:
            problem = NOTHING
        end = Position(begin.file + 1) if ended else Position(begin.file, offset, records, found)
        yield Unit("lines", content, first, _problem(records + 1, problem), end)


def _raise_shorter() -> int:
    raise _BrokenFileError("shorter than when it was read before")


def _document(stream: Any, begin: Position) -> Iterator[Unit]:
    content, problem = b"", ""
    try:
        content = stream.read(_LONGEST_RECORD)
        problem = "" if content else NOTHING
        if len(content) == _LONGEST_RECORD:
            raise _BrokenFileError(f"a document of {_LONGEST_RECORD} bytes or more")
    except (*CORRUPT, _BrokenFileError) as error:
        content, problem = b"", _reason(error)
    yield Unit("document", content, 1, _problem(1, problem), Position(begin.file + 1))


def _values(values: Iterator[Any], begin: Position, unit_bytes: int) -> Iterator[Unit]:
    """Yield units of values of the text key, each as few as have ``unit_bytes`` characters."""
    records = begin.records
    ended = False
    while not ended:
        content: list[Any] = []
        size, problem = 0, ""
        try:
            while size < unit_bytes and not ended:
                value = next(values, _END)
                if value is _END:
                    ended = True
                else:
                    content.append(value)
                    size += len(value) if isinstance(value, str) else 1
        except _BrokenFileError as error:
            ended, problem = True, str(error)
        first, records = records + 1, records + len(content)
        if ended and not records and not problem:
            problem = NOTHING
        end = Position(begin.file + 1) if ended else Position(begin.file, records, records, True)
        yield Unit("values", content, first, _problem(records + 1, problem), end)


def _problem(record: int, what: str) -> Problem | None:
    return Problem(record, what) if what else None


def _parquet(raw: Any, skip: int, text_key: str) -> Iterator[Any]:
    """Yield the values of a column after the first ``skip``."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"reading .parquet needs pyarrow; {extras.install_command('parquet')}") from error
    try:
        file = parquet.ParquetFile(raw)
        columns = file.schema_arrow.names
        if text_key not in columns:
            raise _BrokenFileError(f"no column {text_key!r}; it has {', '.join(map(repr, columns))}")
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[text_key]):
                values = batch.column(0).to_pylist()
                yield from values[skip:]
                skip = max(0, skip - len(values))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:  # the disk failed; errors of damaged content have no number
            raise
        raise _BrokenFileError(f"not readable as Parquet: {_reason(error)}") from error


def _has_lines(file: InputFile) -> bool:
    """Return whether a .json file holds JSON lines, which is whether its first nonblank line is a JSON object."""
    first = b""
    try:
        with file.open() as raw:
            stream = file.decompressed(raw)
            first = json_values.begin(stream)
            if first != b"{":
                return not first  # reading an empty file as lines reports that it is empty
            return isinstance(json.loads(stream.readline(_LONGEST_RECORD)), dict)
    except CORRUPT:
        return first == b"{"  # reading reports what is wrong
    except (ValueError, RecursionError):
        return False


def _json(stream: Any, skip: int, text_key: str) -> Iterator[Any]:
    """Yield the text of each record of one JSON array, or of JSON values one after another, after the first ``skip``.

    Values are decoded as JSON lines are, so that both formats accept the same records.
    """
    try:
        for number, record in enumerate(json_values.values(stream), 1):
            if number > skip:
                malformed = isinstance(record, json_values.Malformed)
                yield Problem(number, record.what) if malformed else _text_of(number, record, text_key)
    except (json_values.RestError, *CORRUPT) as error:
        raise _BrokenFileError(f"not JSON from here on: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())

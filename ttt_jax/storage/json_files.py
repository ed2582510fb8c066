"""Read and write JSON files that show when they are damaged: objects carry a hash, lines a checksum.

The hash is the last key of an object, ``sha256``; the checksum is the last key of a line, ``crc``. Readers check and
remove them. Files of early versions have neither, and are read without the check.
"""

import hashlib
import json
import math
import os
import re
import sys
import zlib
from typing import Any, NamedTuple

from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir import Workdir, explained
from ttt_jax.storage.writing import write_atomically

HASH = "sha256"
_LAST_KEY = re.compile(rb', "([^"]*)": (\d{1,10})}\s*$')
_warned: set[str] = set()


class DamagedFile(ConfigError):
    """The content of a file is not what was written; the message is one line that names the file and what to do."""


class Lines(NamedTuple):
    """The records of a file of JSON lines.

    Attributes:
      texts: the lines that hold records, without line breaks.
      records: their records.
      problems: what is wrong with the lines that were left out, by line number, counted from 1.
      file_problem: what is wrong with the file as a whole; empty where it could be read.
    """

    texts: list[str]
    records: list[dict[str, Any]]
    problems: dict[int, str]
    file_problem: str = ""

    def describe_damage(self, path: Workdir) -> str:
        """Return one line that names the file and what was left out; empty where nothing was."""
        if self.file_problem:
            return f"{path}: {self.file_problem}; passed over"
        if not self.problems:
            return ""
        first, *others = self.problems
        more = f", and {len(others)} more lines" if len(others) > 1 else f", and line {others[0]}" if others else ""
        return f"{path}, line {first}: {self.problems[first]}{more}; left out, all other records are used"


# ---- Objects


def with_hash(content: dict[str, Any]) -> dict[str, Any]:
    """Return an object as JSON holds it, with the hash of its content as its last key; raise ValueError for NaN."""
    content = json.loads(json.dumps(content, allow_nan=False))
    content.pop(HASH, None)
    return {**content, HASH: _digest(content)}


def write_object(path: Workdir, content: dict[str, Any]) -> None:
    """Write an object and its hash atomically; raise ValueError for NaN."""
    write_atomically(path, json.dumps(with_hash(content), indent=2, allow_nan=False) + "\n")


def parse(text: str | bytes, place: object) -> Any:
    """Return the value of a JSON text, without its hash.

    Args:
      place: the name of the file, for messages.

    Raises:
      DamagedFile: where the text is not JSON, or its content does not have the hash.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "it is empty" if not text.strip() else " ".join(f"it is not JSON: {error}".split())
        raise DamagedFile(f"{place}: damaged: {what}") from error
    if isinstance(value, dict) and isinstance(value.get(HASH), str):
        expected = value.pop(HASH)
        actual = _digest(value)
        if actual != expected:
            raise DamagedFile(
                f'{place}: damaged, or edited: its "{HASH}" is {expected[:12]}..., that of its content {actual[:12]}'
                f'...; bring back a good copy, or delete the key "{HASH}" to accept the content as it is'
            )
    return value


def read_object(path: Workdir) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
      FileNotFoundError, NotADirectoryError: where there is no such file.
      DamagedFile: where the file cannot be read, holds no object, or its content does not have its hash.
    """
    try:
        with explained(path):
            content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error.strerror or error}") from error
    value = parse(content, path)
    if not isinstance(value, dict):
        raise DamagedFile(f"{path}: damaged: it holds no JSON object")
    return value


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- Lines


def line_with_checksum(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON, line break included, with the checksum of its other keys as its last key.

    NaN and infinities are not JSON: they become null, which :func:`parse_lines` returns as NaN.
    """
    text = json.dumps({key: None if _not_finite(value) else value for key, value in record.items()}, allow_nan=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}\n'


def parse_lines(content: bytes) -> Lines:
    """Return the records of a file, each an object with an integer ``step``; a number that was not finite is NaN.

    Text after the last line break was cut short, and is ignored. Other lines that hold no record, and lines that repeat
    an earlier one, are left out and named in ``problems``.
    """
    lines, seen = Lines([], [], {}), set[bytes]()
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        record, problem = _record(line)
        if record is not None and line in seen:
            problem = "repeats a line before it"
        if problem or record is None:
            lines.problems[number] = problem
            continue
        seen.add(line)
        lines.texts.append(line.decode())
        lines.records.append(record)
    return lines


def read_lines(path: Workdir, *, warn: bool = True, tail: int | None = None) -> Lines:
    """Return the records of a file, as :func:`parse_lines`; no records where there is no file.

    Args:
      warn: whether to name the lines that were left out on standard error.
      tail: read only so many bytes at the end, and do not name lines, as the first one may be cut short.
    """
    try:
        with explained(path), path.open("rb") as file:
            if tail is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - tail))
            lines = parse_lines(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return Lines([], [], {})
    except IsADirectoryError:
        lines = Lines([], [], {}, "is a folder")
    if tail is not None:
        lines.problems.clear()
    if warn and (damage := lines.describe_damage(path)):
        warn_once(damage)
    return lines


def warn_once(message: str) -> None:
    """Print a message on standard error, at most once in this process."""
    if message not in _warned:
        _warned.add(message)
        print(message, file=sys.stderr, flush=True)


def _record(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the record of a line, or None and what is wrong with the line."""
    if not line.strip():
        return None, "is empty"
    if not line.strip(b"\0"):
        return None, "holds NUL bytes only"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, "is damaged: it is not JSON"
    if not isinstance(record, dict):
        return None, "is damaged: it is not a JSON object"
    last = _LAST_KEY.search(line)
    matches = last is not None and zlib.crc32(line[: last.start()] + b"}") == int(last[2])
    # A checksum that matches under another key shows that a bit of the key itself has flipped.
    if ("crc" in record or matches) and not (matches and last is not None and last[1] == b"crc"):
        return None, "is damaged: its checksum differs"
    record.pop("crc", None)
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return None, "is not a record: it has no step"
    return {key: math.nan if value is None else value for key, value in record.items()}, ""


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)

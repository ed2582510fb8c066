"""JSON files that show when they are damaged: objects carry a hash of their content, lines a checksum.

Files written before there were hashes carry neither, and are read without the check. The hash is the last key,
``sha256``, of the object; the checksum is the last key, ``crc``, of the line. Readers never return either of them.
"""

import hashlib
import json
import math
import re
import sys
import zlib
from typing import Any, NamedTuple

from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir import Workdir, explained
from ttt_jax.storage.writing import write_atomically

HASH = "sha256"
_LAST = re.compile(rb', "([^"]*)": (\d{1,10})}\s*$')
_warned: set[str] = set()


class DamagedFile(ConfigError):
    """A file whose content is not what was written; one line that names the file and what to do."""


class Lines(NamedTuple):
    """The records of a file of JSON lines.

    Attributes:
      texts: the lines that hold them, without line breaks.
      records: what they hold.
      problems: what is wrong with the lines that were left out, by line number, counted from 1; with the file, by 0.
    """

    texts: list[str]
    records: list[dict[str, Any]]
    problems: dict[int, str]


# ---- Objects


def with_hash(content: dict[str, Any]) -> dict[str, Any]:
    """Return an object as JSON holds it, with the hash of its content as its last key; ValueError for NaN."""
    content = json.loads(json.dumps(content, allow_nan=False))
    content.pop(HASH, None)
    return {**content, HASH: _digest(content)}


def write_object(path: Workdir, content: dict[str, Any]) -> None:
    """Replace a file as a whole by one that holds an object and its hash; ValueError for NaN."""
    write_atomically(path, json.dumps(with_hash(content), indent=2, allow_nan=False) + "\n")


def parse(text: str | bytes, place: object) -> Any:
    """Return the JSON in a text, without its hash.

    Args:
      place: the name of the file, for messages.

    Raises:
      DamagedFile: where it is not JSON, or its content is not what the hash says.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "it is empty" if not text.strip() else " ".join(f"it is not JSON: {error}".split())
        raise DamagedFile(f"{place}: damaged: {what}") from error
    if isinstance(found, dict) and isinstance(found.get(HASH), str):
        expected = found.pop(HASH)
        actual = _digest(found)
        if actual != expected:
            raise DamagedFile(
                f'{place}: damaged, or edited: its "{HASH}" is {expected[:12]}..., that of its content {actual[:12]}'
                f'...; bring back a good copy, or delete the key "{HASH}" to accept the content as it is'
            )
    return found


def read_object(path: Workdir) -> dict[str, Any]:
    """Return the object that a file holds.

    Raises:
      FileNotFoundError, NotADirectoryError: where there is no such file.
      DamagedFile: where it cannot be read, holds something else, or its content is not what its hash says.
    """
    try:
        with explained(path):
            content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error.strerror or error}") from error
    found = parse(content, path)
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: damaged: it holds no JSON object")
    return found


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- Lines


def line_with_checksum(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON, line break included, whose last key is the checksum of what is before it.

    NaN and infinities are not JSON: they become null, which :func:`parse_lines` returns as NaN.
    """
    text = json.dumps({key: None if _not_finite(value) else value for key, value in record.items()}, allow_nan=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}\n'


def parse_lines(content: bytes) -> Lines:
    """Return the records of a file, each an object with an integer ``step``; a number that was not finite is NaN.

    What follows the last line break was cut short, and is passed over without a word. Other lines that hold no record,
    and those that repeat a line before them, are among the problems.
    """
    found, seen = Lines([], [], {}), set[bytes]()
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        record, problem = _record(line)
        if record is not None and line in seen:
            problem = "repeats a line before it"
        if problem or record is None:
            found.problems[number] = problem
            continue
        seen.add(line)
        found.texts.append(line.decode())
        found.records.append(record)
    return found


def read_lines(path: Workdir, *, warn: bool = True) -> Lines:
    """Return the records of a file; none without a file.

    Args:
      warn: name the lines that were left out on standard error.
    """
    try:
        with explained(path):
            content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Lines([], [], {})
    except IsADirectoryError:
        found = Lines([], [], {0: "is a folder"})
    else:
        found = parse_lines(content)
    if found.problems and warn:
        warn_once(describe_problems(path, found.problems))
    return found


def describe_problems(path: Workdir, problems: dict[int, str]) -> str:
    """Return one line that names the file and the lines that are no records."""
    if 0 in problems:
        return f"{path}: {problems[0]}; passed over"
    first, *others = problems
    more = f", and {len(others)} more lines" if len(others) > 1 else f", and line {others[0]}" if others else ""
    return f"{path}, line {first}: {problems[first]}{more}; left out, all other records are used"


def warn_once(message: str) -> None:
    """Print a message to standard error, once in the life of a process."""
    if message not in _warned:
        _warned.add(message)
        print(message, file=sys.stderr, flush=True)


def _record(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the record of a line, or what is wrong with it."""
    if not line.strip():
        return None, "is empty"
    if not line.strip(b"\0"):
        return None, "holds NUL bytes only"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, "is damaged: it is not JSON"
    if not isinstance(record, dict):
        return None, "is damaged: it is no JSON object"
    last = _LAST.search(line)
    is_sealed = last is not None and zlib.crc32(line[: last.start()] + b"}") == int(last[2])
    if ("crc" in record or is_sealed) and not (is_sealed and last is not None and last[1] == b"crc"):
        return None, "is damaged: its checksum differs"
    record.pop("crc", None)
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return None, "is no record: it has no step"
    return {key: math.nan if value is None else value for key, value in record.items()}, ""


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)

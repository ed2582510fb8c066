"""Read the values of a JSON file one at a time: the elements of one array, or values one after another.

A syntax error costs as few values as possible: reading continues after the brackets that enclose it.
"""

import codecs
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

# Integers become floats: Python refuses integers of more than 4300 digits, also under keys that are not read.
DECODER = json.JSONDecoder(parse_int=float)
_BLOCK = 1 << 16  # bytes that are read first
_LONGEST = 1 << 30  # characters in a value
_NUMBER = re.compile(r"[-+.0-9eE]*")
_BLANK = re.compile(r"[ \t\r\n]*")
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as surrogateescape decodes them
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_WORD = re.compile(rf'{_STRING}|[^\s,\[\]{{}}"]+(?=[\s,\[\]{{}}"])', re.DOTALL)
_MARK = re.compile(rf'{_STRING}|["\[\]{{}}]', re.DOTALL)
_OPENING = {"}": "{", "]": "["}


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A value that is not JSON; ``what`` says why."""

    what: str


class RestError(Exception):
    """The rest of a file is not JSON."""


def begin(stream: Any) -> bytes:
    """Go to the first character that is neither blank nor a byte order mark, and return it."""
    block = stream.read(3).removeprefix(b"\xef\xbb\xbf")
    place = stream.tell() - len(block)
    block += stream.read(4096)
    while block and not block.lstrip():
        place += len(block)
        block = stream.read(1 << 16)
    stream.seek(place + len(block) - len(block.lstrip()))
    return block.lstrip()[:1]


def values(stream: Any) -> Iterator[Any]:
    """Yield the values of a seekable stream of bytes, decoded as JSON lines are; a bad value is :class:`Malformed`.

    Raises:
      RestError: if the rest cannot be read; the message has the line and column, counted from 1.
    """
    is_array = begin(stream) == b"["
    text = _Text(stream)
    if is_array:
        text.place = text.skip_blanks() + 1
    expected = "first" if is_array else "value"
    while mark := text.mark():
        if is_array and mark == "]":
            if expected == "value":
                yield Malformed(f"not JSON: no value before ']': {text.location(text.place)}")
            text.place += 1
            if mark := text.mark():
                raise RestError(f"expected the end of the file, found {mark!r}: {text.location(text.place)}")
            return
        if expected == "next" and mark == ",":
            text.place += 1
            expected = "value"
        elif expected == "next":
            what = f"expected ',' or ']', found {mark!r}: {text.location(text.place)}"
            if mark != "{":
                raise RestError(what)
            yield Malformed(f"not JSON: {what}")
            expected = "value"
        elif is_array and mark == ",":
            yield Malformed(f"not JSON: no value before ',': {text.location(text.place)}")
            text.place += 1
            expected = "value"
        else:
            yield text.value(is_array)
            expected = "next" if is_array else "value"
    if is_array:
        raise RestError(f"the array does not end: {text.location(text.place)}")


class _Text:
    """A part of the text of a stream, read as needed.

    Attributes:
      place: index in this part of the next character.
    """

    def __init__(self, stream: Any):
        self._stream, self._utf8 = stream, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self.place, self._ended, self._size = "", 0, False, _BLOCK
        self._known, self._line, self._column = 0, 1, 1  # an index in this part, and its line and column in the file

    def location(self, place: int) -> str:
        """Return the line and column of a character of this part."""
        line, column = self._line_and_column(place)
        return f"line {line} column {column}"

    def mark(self) -> str:
        """Go to the next character that is not blank, and return it; empty at the end."""
        self.place = self.skip_blanks()
        return self._text[self.place : self.place + 1]

    def skip_blanks(self) -> int:
        """Return the index of the next character that is not blank."""
        while (end := _BLANK.match(self._text, self.place).end()) == len(self._text) and not self._ended:  # type: ignore[union-attr]
            self.place = end
            self._read()
        return end

    def value(self, is_array: bool) -> Any:
        """Return the value that begins here, and go past it."""
        while True:
            error: ValueError | RecursionError | None = None
            try:
                found, end = DECODER.raw_decode(self._text, self.place)
                goes_on = _NUMBER.match(self._text, end).end() == len(self._text)  # type: ignore[union-attr]
            except (ValueError, RecursionError) as wrong:
                found, end, error = None, self._end(is_array, wrong), wrong
                goes_on = end == len(self._text)
            if not goes_on or (self._ended and not error):
                break
            if self._ended or len(self._text) - self.place > _LONGEST:
                raise RestError(self._what(error) if error else f"more than {_LONGEST} characters") from error
            self._read()
        source, self.place, self._size = self._text[self.place : end], end, _BLOCK
        if error:
            what = self._what(error)
            self._remember(end)
            return Malformed(f"not JSON: {what}; left out up to {self.location(end)}")
        return found if source.isascii() or not _ESCAPED.search(source) else Malformed("not valid UTF-8")

    def _what(self, error: ValueError | RecursionError) -> str:
        if isinstance(error, json.JSONDecodeError):
            return f"{error.msg}: {self.location(error.pos)}"
        return f"{error}: {self.location(self.place)}"

    def _end(self, is_array: bool, error: ValueError | RecursionError) -> int:
        """Return where a bad value ends, judged by its brackets; the end of this part if that is not known yet."""
        unknown = len(self._text)
        if str(error).startswith("Unterminated string"):
            return unknown
        if self._text[self.place] not in "{[":
            word = _WORD.match(self._text, self.place)
            return word.end() if word and is_array else unknown
        open_: list[str] = []
        for found in _MARK.finditer(self._text, self.place):
            mark = found[0]
            if mark in "{[":
                open_.append(mark)
            elif mark == '"':  # of a string that does not end
                return unknown
            elif mark in _OPENING:
                if _OPENING[mark] not in open_:  # closes what encloses the value
                    return found.start()
                while open_.pop() != _OPENING[mark]:
                    pass
                if not open_:
                    return found.end()
        return unknown

    def _read(self) -> None:
        """Read another block, and drop what is before the next character."""
        self._remember(self.place)
        block = self._stream.read(self._size)
        self._ended, self._size = not block, min(2 * self._size, _LONGEST)
        self._text, self.place = self._text[self.place :] + self._utf8.decode(block, final=self._ended), 0
        self._known = 0

    def _remember(self, place: int) -> None:
        self._line, self._column = self._line_and_column(place)
        self._known = place

    def _line_and_column(self, place: int) -> tuple[int, int]:
        lines = self._text.count("\n", self._known, place)
        if lines:
            return self._line + lines, place - self._text.rfind("\n", self._known, place)
        return self._line, self._column + place - self._known

"""A log that another machine writes to a shared file system."""

import codecs
import sys
from pathlib import Path

_END = 4096  # bytes of a log that is long already


class LogFile:
    """Shows on standard output what has been added to a file; the file may not be there yet.

    Args:
      path: of the file.
      only_end: leave out all but the last lines that are there already.
    """

    def __init__(self, path: Path, only_end: bool = False):
        self._path = path
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be written in two parts
        try:
            size = path.stat().st_size
        except OSError:
            return
        if only_end and size > _END:
            with path.open("rb") as file:
                file.seek(size - _END)
                file.readline()
                self._position = file.tell()

    def show(self) -> None:
        """Shows what is new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                new = file.read()
        except OSError:
            return
        self._position += len(new)
        sys.stdout.write(self._decoder.decode(new))
        sys.stdout.flush()

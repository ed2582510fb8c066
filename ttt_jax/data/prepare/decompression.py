"""The content of compressed files, by the endings of their names.

A file is one stream, or several, one after another. Whatever is not the whole of a stream is an error: the readers of
the standard library take damage behind the first stream of an .xz or .bz2 file for its end.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from backports import zstd

ENDINGS = {"zst": "zst", "zstd": "zst", "gz": "gz", "xz": "xz", "bz2": "bz2"}  # to formats
_WIDEST_WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}  # what `zstd --long=31` needs
_BLOCK = 1 << 18


class DamagedStreamError(Exception):
    """What is compressed cannot be decompressed."""


CORRUPT = (EOFError, zlib.error, zstd.ZstdError, gzip.BadGzipFile, DamagedStreamError)


def decompressed(raw: Any, ending: str) -> Any:
    """Return the content of an open file as a seekable stream; where it is damaged, reading raises one of ``CORRUPT``.

    Args:
      ending: one of :data:`ENDINGS`, or empty for what is not compressed.
    """
    form = ENDINGS.get(ending, "")
    if form == "zst":
        return zstd.ZstdFile(raw, "rb", options=_WIDEST_WINDOW)
    if form == "gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if form:
        raw = _Streams(raw, lzma.LZMADecompressor, b"\0") if form == "xz" else _Streams(raw, bz2.BZ2Decompressor)
    return io.BufferedReader(raw, 1 << 20)


class _Streams(io.RawIOBase):
    """The content of compressed streams one after another.

    Args:
      decompressor: makes one for the next stream.
      padding: bytes that may be between streams.
    """

    def __init__(self, raw: Any, decompressor: Callable[[], Any], padding: bytes = b""):
        self._raw, self._new, self._padding = raw, decompressor, padding
        self._stream, self._place = decompressor(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place counted from the beginning; going back decompresses anew."""
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("expected a place counted from the beginning")
        if offset < self._place:
            self._raw.seek(0)
            self._stream, self._place = self._new(), 0
        while self._place < offset and self.read(min(_BLOCK, offset - self._place)):
            pass
        return self._place

    def readinto(self, buffer: Any) -> int:
        found = self._next(len(buffer))
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)

    def _next(self, size: int) -> bytes:
        """Return up to so many bytes; none at the end of the file."""
        while True:
            more = b""
            if self._stream.eof:
                more = self._stream.unused_data.lstrip(self._padding)
                while not more:
                    if not (block := self._raw.read(_BLOCK)):
                        return b""
                    more = block.lstrip(self._padding)
                self._stream = self._new()
            elif self._stream.needs_input:
                more = self._raw.read(_BLOCK)
                if not more:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            try:
                found = self._stream.decompress(more, size)
            except (OSError, lzma.LZMAError) as error:
                raise DamagedStreamError(str(error)) from error
            if found:
                return found

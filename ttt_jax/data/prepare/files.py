"""The files that a user names: by path, glob, folder or any URL that fsspec knows."""

import bz2
import dataclasses
import gzip
import hashlib
import io
import lzma
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import fsspec
from backports import zstd
from fsspec.implementations.local import LocalFileSystem

from ttt_jax.errors import ConfigError, DataError
from ttt_jax.terminal.console import counted

KINDS = ("jsonl", "json", "txt", "parquet")
_CHECKSUMS = ("md5Hash", "crc32c", "ETag", "blob_id")  # of gs:// (two), s3:// and hf://
_READERS = 8  # threads that read files for their hashes
ENDINGS = {"zst": "zst", "zstd": "zst", "gz": "gz", "xz": "xz", "bz2": "bz2"}  # to formats
_WIDEST_WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}  # what `zstd --long=31` needs
_BLOCK = 1 << 18


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file of documents.

    Attributes:
      split: its documents belong to this one.
      location: path or URL.
      size: bytes, as it lies there.
      content: what tells its content from any other, such as ``sha256:...``; empty before :func:`with_content` has
        found it.
    """

    split: str
    location: str
    size: int
    content: str = ""

    @property
    def kind(self) -> str:
        """Return one of :data:`KINDS`."""
        return kind(self.location)[0]

    @property
    def compressed(self) -> bool:
        """Return whether it has to be decompressed."""
        return bool(kind(self.location)[1])

    def open(self) -> Any:
        """Open the file as it lies there."""
        fs, path = filesystem(self.location, self.location)
        return fs.open(path, "rb")

    def decompressed(self, raw: Any) -> Any:
        """Return the content of the file that :meth:`open` opened; seekable."""
        return decompressed(raw, kind(self.location)[1])


def with_content(files: list[InputFile]) -> list[InputFile]:
    """Return the files with their ``content``.

    It is the checksum that a bucket keeps (``md5Hash:...`` of gs://), and where there is none the SHA-256 of what lies
    there, which takes reading every file once, several at a time.

    Raises:
      ConfigError: where a file cannot be read.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            found = pool.map(lambda file: file.content or _content(file, stop), files)
            return [dataclasses.replace(file, content=each) for file, each in zip(files, found, strict=True)]
        finally:
            stop.set()  # where one cannot be read, or at Ctrl-C, no other is read to its end
            pool.shutdown(cancel_futures=True)


def check_unchanged(file: InputFile) -> None:
    """Raise :class:`DataError` where a local file has grown or shrunk since it was found."""
    fs, path = filesystem(file.location, file.location)
    if isinstance(fs, LocalFileSystem) and (size := os.stat(path).st_size) != file.size:
        raise DataError(
            f"{file.location}: has changed while it was read ({counted(file.size, 'byte')}, now {size:,}); the same "
            "command goes on, once the file is complete"
        )


def _content(file: InputFile, stop: threading.Event) -> str:
    with explained(f"--{file.split} {file.location}"):
        fs, path = filesystem(file.location, file.location)
        if not isinstance(fs, LocalFileSystem):
            info = fs.info(path)
            for key in _CHECKSUMS:
                if info.get(key) and not file.location.startswith("http"):  # whose servers may disagree about ETags
                    return f"{key}:{info[key]}"
        digest = hashlib.sha256()
        with fs.open(path, "rb") as raw:
            while (block := raw.read(1 << 20)) and not stop.is_set():
                digest.update(block)
        return f"sha256:{digest.hexdigest()}"


def size(fs: Any, path: str) -> int:
    if isinstance(fs, LocalFileSystem):
        status = os.stat(path)  # which fails for a link to nowhere
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is a pipe or a device; expected a file")
        return status.st_size
    return fs.info(path)["size"]


def read(location: str, option: str) -> bytes:
    """Return the content of a small file; ``option`` is what named it, for messages."""
    fs, path = filesystem(location, f"{option} {location}")
    with explained(f"{option} {location}"):
        return fs.cat_file(path)


def exists(location: str) -> bool:
    """Whether there is such a file."""
    fs, path = filesystem(location, location)
    return fs.exists(path)


def filesystem(location: str, what: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and what it calls it there: of this machine, an absolute path."""
    with explained(what):
        if "://" in location:
            fs, path = fsspec.core.url_to_fs(location)
            return fs, path
        if location.startswith("~") and not os.path.lexists(location.partition("/")[0]):
            location = os.path.expanduser(location)
        path = os.path.join(os.getcwd(), "" if location == "." else location.removeprefix("./"))
        return LocalFileSystem(), path.rstrip("/") or "/"


@contextmanager
def explained(what: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (ImportError, ValueError) as error:  # a protocol that fsspec does not know, or without its package
        raise ConfigError(f"{what}: {error}") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: no such file") from error
    except OSError as error:
        inside = f"{error.filename}: " if error.filename and not what.endswith(str(error.filename)) else ""
        raise ConfigError(f"{what}: {inside}{error.strerror or error}") from error


def kind(location: str) -> tuple[str, str]:
    """Return the kind of a file and the ending of its compression, by its name; empty where there is none."""
    stem, suffix = os.path.splitext(location.lower())
    compression = suffix[1:] if suffix[1:] in ENDINGS else ""
    kind = os.path.splitext(stem)[1][1:] if compression else suffix[1:]
    kind = {"ndjson": "jsonl"}.get(kind, kind)
    return (kind, compression) if kind in KINDS and not (kind == "parquet" and compression) else ("", "")


# ---- Compressed files


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

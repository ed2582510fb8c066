"""Open, decompress, hash and read files that are named by a path or by any URL that fsspec knows."""

import bz2
import dataclasses
import gzip
import hashlib
import io
import lzma
import os
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
COMPRESSIONS = {"zst": "zst", "zstd": "zst", "gz": "gz", "xz": "xz", "bz2": "bz2"}  # formats by endings
_CHECKSUMS = ("md5Hash", "crc32c", "ETag", "blob_id")  # of gs:// (two), s3:// and hf://
_HASHING_THREADS = 8
_WIDEST_WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}  # what `zstd --long=31` needs
_BLOCK = 1 << 18  # bytes


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file of documents.

    Attributes:
      split: the split of its documents.
      location: path or URL.
      size: bytes, before decompression.
      digest: a checksum of its content, such as ``sha256:...``; empty until :func:`with_digests` fills it in.
    """

    split: str
    location: str
    size: int
    digest: str = ""

    @property
    def kind(self) -> str:
        """Return one of :data:`KINDS`."""
        return kind_and_compression(self.location)[0]

    @property
    def compressed(self) -> bool:
        """Return whether the file is compressed."""
        return bool(kind_and_compression(self.location)[1])

    def open(self) -> Any:
        """Open the file without decompressing it."""
        fs, path = filesystem(self.location, self.location)
        return fs.open(path, "rb")

    def decompressed(self, raw: Any) -> Any:
        """Return the content of the file that :meth:`open` opened, as a seekable stream."""
        return decompressed(raw, kind_and_compression(self.location)[1])


def kind_and_compression(name: str) -> tuple[str, str]:
    """Return the kind of a file and the ending of its compression, by its name; empty if the kind is unknown."""
    stem, suffix = os.path.splitext(name.lower())
    compression = suffix[1:] if suffix[1:] in COMPRESSIONS else ""
    kind = os.path.splitext(stem)[1][1:] if compression else suffix[1:]
    kind = {"ndjson": "jsonl"}.get(kind, kind)
    return (kind, compression) if kind in KINDS and not (kind == "parquet" and compression) else ("", "")


def with_digests(files: list[InputFile]) -> list[InputFile]:
    """Return the files with their ``digest``.

    The digest is the checksum that a bucket keeps (``md5Hash:...`` of gs://). Without one it is the SHA-256 of the
    file, for which every file is read once, several at a time.

    Raises:
      ConfigError: if a file cannot be read.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        try:
            digests = pool.map(lambda file: file.digest or _digest(file, stop), files)
            return [dataclasses.replace(file, digest=digest) for file, digest in zip(files, digests, strict=True)]
        finally:
            stop.set()  # if a file cannot be read, or at Ctrl-C, no other file is read to its end
            pool.shutdown(cancel_futures=True)


def check_unchanged(file: InputFile) -> None:
    """Raise :class:`DataError` if a local file has grown or shrunk since it was listed."""
    fs, path = filesystem(file.location, file.location)
    if isinstance(fs, LocalFileSystem) and (size := os.stat(path).st_size) != file.size:
        raise DataError(
            f"{file.location}: has changed while it was read ({counted(file.size, 'byte')}, now {size:,}); the same "
            "command continues, once the file is complete"
        )


def _digest(file: InputFile, stop: threading.Event) -> str:
    with as_config_error(f"--{file.split} {file.location}"):
        fs, path = filesystem(file.location, file.location)
        if not isinstance(fs, LocalFileSystem):
            info = fs.info(path)
            for key in _CHECKSUMS:
                if info.get(key) and not file.location.startswith("http"):  # two servers may disagree about an ETag
                    return f"{key}:{info[key]}"
        digest = hashlib.sha256()
        with fs.open(path, "rb") as raw:
            while (block := raw.read(1 << 20)) and not stop.is_set():
                digest.update(block)
        return f"sha256:{digest.hexdigest()}"


def read(location: str, option: str) -> bytes:
    """Return the content of a small file; ``option`` names it in messages."""
    fs, path = filesystem(location, f"{option} {location}")
    with as_config_error(f"{option} {location}"):
        return fs.cat_file(path)


def exists(location: str) -> bool:
    """Return whether there is such a file."""
    fs, path = filesystem(location, location)
    return fs.exists(path)


def filesystem(location: str, what: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and its path there; on this machine the path is absolute.

    Args:
      what: names the location in messages.
    """
    with as_config_error(what):
        if "://" in location:
            fs, path = fsspec.core.url_to_fs(location)
            return fs, path
        if location.startswith("~") and not os.path.lexists(location.partition("/")[0]):
            location = os.path.expanduser(location)
        path = os.path.join(os.getcwd(), "" if location == "." else location.removeprefix("./"))
        return LocalFileSystem(), path.rstrip("/") or "/"


@contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """Raise errors of a file system as :class:`ConfigError`; ``what`` begins the message."""
    try:
        yield
    except ConfigError:
        raise
    except (ImportError, ValueError) as error:  # fsspec does not know the protocol, or lacks its package
        raise ConfigError(f"{what}: {error}") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: no such file") from error
    except OSError as error:
        inside = f"{error.filename}: " if error.filename and not what.endswith(str(error.filename)) else ""
        raise ConfigError(f"{what}: {inside}{error.strerror or error}") from error


# ---- Compressed files
#
# A file is one compressed stream, or several, one after another. Damage in any of them is an error: the readers of the
# standard library take damage after the first stream of an .xz or .bz2 file for its end.


class DamagedStreamError(Exception):
    """A compressed stream cannot be decompressed."""


CORRUPT = (EOFError, zlib.error, zstd.ZstdError, gzip.BadGzipFile, DamagedStreamError)


def decompressed(raw: Any, ending: str) -> Any:
    """Return the content of an open file as a seekable stream. If it is damaged, reading raises one of ``CORRUPT``.

    Args:
      ending: one of :data:`COMPRESSIONS`, or empty for a file that is not compressed.
    """
    compression = COMPRESSIONS.get(ending, "")
    if compression == "zst":
        return zstd.ZstdFile(raw, "rb", options=_WIDEST_WINDOW)
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if compression == "xz":
        raw = _Streams(raw, lzma.LZMADecompressor, padding=b"\0")
    elif compression == "bz2":
        raw = _Streams(raw, bz2.BZ2Decompressor)
    return io.BufferedReader(raw, 1 << 20)


class _Streams(io.RawIOBase):
    """The content of one or more compressed streams.

    Args:
      decompressor: called for each stream; returns its decompressor.
      padding: bytes that may lie between streams.
    """

    def __init__(self, raw: Any, decompressor: Callable[[], Any], padding: bytes = b""):
        self._raw, self._decompressor, self._padding = raw, decompressor, padding
        self._stream, self._offset = decompressor(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset from the beginning. Going back decompresses again from the beginning."""
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("expected an offset from the beginning")
        if offset < self._offset:
            self._raw.seek(0)
            self._stream, self._offset = self._decompressor(), 0
        while self._offset < offset and self.read(min(_BLOCK, offset - self._offset)):
            pass
        return self._offset

    def readinto(self, buffer: Any) -> int:
        found = self._next(len(buffer))
        buffer[: len(found)] = found
        self._offset += len(found)
        return len(found)

    def _next(self, size: int) -> bytes:
        """Return at most ``size`` bytes; none at the end of the file."""
        while True:
            more = b""
            if self._stream.eof:
                more = self._stream.unused_data.lstrip(self._padding)
                while not more:
                    if not (block := self._raw.read(_BLOCK)):
                        return b""
                    more = block.lstrip(self._padding)
                self._stream = self._decompressor()
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

"""The files that a user names: by path, glob, folder or any URL that fsspec knows."""

import dataclasses
import gzip
import hashlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import fsspec
from backports import zstd
from fsspec.implementations.local import LocalFileSystem

from ttt_jax.config import ConfigError

KINDS = ("jsonl", "json", "txt", "parquet")
_COMPRESSIONS = ("zst", "gz")
_CHECKSUMS = ("md5Hash", "crc32c", "ETag", "blob_id")  # of gs:// (two), s3:// and hf://
_READERS = 8  # threads that read files for their hashes
_WIDEST_WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}  # what `zstd --long=31` needs


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
        """One of :data:`KINDS`."""
        return _kind(self.location)[0]

    @property
    def compressed(self) -> bool:
        """Whether it has to be decompressed."""
        return bool(_kind(self.location)[1])

    def open(self) -> Any:
        """The file as it lies there."""
        fs, path = _filesystem(self.location, self.location)
        return fs.open(path, "rb")

    def decompressed(self, raw: Any) -> Any:
        """The content of the file that :meth:`open` opened; seekable."""
        compression = _kind(self.location)[1]
        if compression == "zst":
            return zstd.ZstdFile(raw, "rb", options=_WIDEST_WINDOW)
        return gzip.GzipFile(fileobj=raw, mode="rb") if compression == "gz" else io.BufferedReader(raw, 1 << 20)


def find(split: str, patterns: list[str], output: str = "") -> list[InputFile]:
    """The files that paths, globs and folders name, in this order; those of one pattern sorted by name.

    Of a folder, all files that can be read, at any depth; hidden ones are left out.

    Raises:
      ConfigError: where a pattern names nothing, or something that cannot be read.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        option = f"--{split} {pattern}"
        fs, path = _filesystem(pattern, option)
        with _explained(option):
            if fs.isdir(path):
                root = fs._strip_protocol(path)
                below = _below(path, output) if isinstance(fs, LocalFileSystem) else fs.find(path)
                paths = [p for p in below if _kind(p)[0] and "/." not in p.removeprefix(root)]
                _name_left_out(option, [p.removeprefix(root).lstrip("/") for p in below if p not in set(paths)])
            elif fs.exists(path):
                paths = [path]
            else:
                paths = [p for p in fs.glob(path) if not fs.isdir(p)]
            if not paths:
                raise ConfigError(f"{option}: no such file; expected files named {_expected()}")
            for each in sorted(paths):
                location = fs.unstrip_protocol(each) if "://" in pattern else each
                if not _kind(location)[0]:
                    raise ConfigError(
                        f"--{split} {location}: cannot be read; expected a name that ends in {_expected()}"
                    )
                with _explained(f"--{split} {location}"):
                    found.append(InputFile(split, location, _size(fs, each)))
    return found


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


def _content(file: InputFile, stop: threading.Event) -> str:
    with _explained(f"--{file.split} {file.location}"):
        fs, path = _filesystem(file.location, file.location)
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


def _size(fs: Any, path: str) -> int:
    if isinstance(fs, LocalFileSystem):
        return os.stat(path).st_size  # which fails for a link to nowhere
    return fs.info(path)["size"]


def _below(folder: str, output: str) -> list[str]:
    """Return all files below a local folder; links are followed, but no folder is entered twice."""
    found, entered = [], set()
    target = os.path.realpath(output) if output and "://" not in output else ""
    if target.startswith(f"{os.path.realpath(folder)}/"):
        print(f"--output {output}: lies in {folder}, of which it is no input", file=sys.stderr)
        entered.add(target)
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            if real == target:
                continue
            print(f"{place}: left out; it leads to a folder that is read already, {real}", file=sys.stderr)
            continue
        entered.add(real)
        folders.sort()
        found += [os.path.join(place, name) for name in sorted(names)]
    return found


def _name_left_out(option: str, names: list[str]) -> None:
    if names:
        some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        print(f"{option}: left out {len(names)} files that are hidden or of unknown endings: {some}", file=sys.stderr)


def read(location: str, option: str) -> bytes:
    """The content of a small file; ``option`` is what named it, for messages."""
    fs, path = _filesystem(location, f"{option} {location}")
    with _explained(f"{option} {location}"):
        return fs.cat_file(path)


def exists(location: str) -> bool:
    """Whether there is such a file."""
    fs, path = _filesystem(location, location)
    return fs.exists(path)


def _filesystem(location: str, what: str):
    with _explained(what):
        fs, path = fsspec.core.url_to_fs(location)
        return fs, path


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (ImportError, ValueError) as error:  # a protocol that fsspec does not know, or without its package
        raise ConfigError(f"{what}: {error}") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror or error}") from error


def _kind(location: str) -> tuple[str, str]:
    """Kind and compression by the name; empty where there is none."""
    stem, suffix = os.path.splitext(location.lower())
    compression = {"zstd": "zst"}.get(suffix[1:], suffix[1:])
    compression = compression if compression in _COMPRESSIONS else ""
    kind = os.path.splitext(stem)[1][1:] if compression else suffix[1:]
    kind = {"ndjson": "jsonl"}.get(kind, kind)
    return (kind, compression) if kind in KINDS and not (kind == "parquet" and compression) else ("", "")


def _expected() -> str:
    return ", ".join(f".{kind}" for kind in KINDS) + ", or these but the last with .zst or .gz"

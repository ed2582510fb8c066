"""The files that a user names: by path, glob, folder or any URL that fsspec knows."""

import dataclasses
import hashlib
import os
import stat
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ttt_jax.data.prepare import decompression, listing
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.terminal.console import counted, first_few

KINDS = ("jsonl", "json", "txt", "parquet")
_CHECKSUMS = ("md5Hash", "crc32c", "ETag", "blob_id")  # of gs:// (two), s3:// and hf://
_READERS = 8  # threads that read files for their hashes


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
        return _kind(self.location)[0]

    @property
    def compressed(self) -> bool:
        """Return whether it has to be decompressed."""
        return bool(_kind(self.location)[1])

    def open(self) -> Any:
        """Open the file as it lies there."""
        fs, path = _filesystem(self.location, self.location)
        return fs.open(path, "rb")

    def decompressed(self, raw: Any) -> Any:
        """Return the content of the file that :meth:`open` opened; seekable."""
        return decompression.decompressed(raw, _kind(self.location)[1])


def find(split: str, patterns: list[str], output: str = "") -> list[InputFile]:
    """Return the files that paths, globs and folders name, in this order; those of one pattern sorted by name.

    Of a folder, these are all files that can be read, at any depth, but hidden ones. What else a folder or a glob names
    is left out, counted, and named on standard error.

    Args:
      output: the folder of the dataset that is made of them, which is none of them.

    Raises:
      ConfigError: where a pattern names nothing, or nothing that can be read.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        option = f"--{split} {pattern}"
        if not pattern:
            raise ConfigError(f"--{split}: an empty name; expected a path, a folder, a glob or a URL")
        fs, path = _filesystem(pattern, option)
        with _explained(option):
            names = listing.named(fs, path)
            target = _filesystem(output, "--output")[1] if _is_on(fs, output) else ""
            paths = listing.of_text(fs, names, output, target)
            hidden = {p for p in paths if names.is_folder and "/." in f"/{_inside(names.root, p)}"}
            readable = [p for p in paths if _kind(p)[0] and p not in hidden]
            _check_some(split, option, names, paths, readable)
            for each in sorted(set(readable)):
                location = fs.unstrip_protocol(each) if "://" in pattern else each
                with _explained(f"--{split} {location}"):
                    found.append(InputFile(split, location, _size(fs, each)))
    if patterns and not found:
        raise ConfigError(f"--{split} {' '.join(patterns)}: holds tokens; expected files of text, named {_expected()}")
    return found


def _check_some(split: str, option: str, names: listing.Named, paths: list[str], readable: list[str]) -> None:
    """Say what of a pattern is not read; raise :class:`ConfigError` where nothing is."""
    others = sorted(_inside(names.root, path) for path in set(paths) - set(readable))
    folders = sorted(_inside(names.root, folder) for folder in names.folders)
    left_out = []
    if others:
        left_out.append(f"{counted(len(others), 'file')}, hidden or of unknown endings: {first_few(others)}")
    if folders:
        left_out.append(f"{counted(len(folders), 'folder')}, read with /** behind: {first_few(folders)}")
    if readable or (names.files and not paths):  # that all are of datasets has been said
        for what in left_out:
            print(f"{option}: left out {what}", file=sys.stderr)
    elif len(paths) == 1 and not names.is_folder:
        raise ConfigError(f"--{split} {paths[0]}: cannot be read; expected a name that ends in {_expected()}")
    else:
        what = f"nothing that can be read ({'; '.join(left_out)})" if left_out else "no such file"
        raise ConfigError(f"{option}: {what}; expected files named {_expected()}")


def _inside(folder: str, path: str) -> str:
    return path.removeprefix(folder).lstrip("/")


def distinct(files: list[InputFile]) -> list[InputFile]:
    """Return the files without those that are others of them by another name (a link), and say which these are.

    Raises:
      ConfigError: where a file is in two splits.
    """
    first: dict[Any, InputFile] = {}
    again = []
    for file in files:
        other = first.setdefault(_identity(file.location), file)
        if other.split != file.split:
            raise ConfigError(f"--{file.split} {file.location}: is in --{other.split} already")
        if other is not file:
            same = "named twice" if file.location == other.location else f"the same file as {other.location}"
            again.append(f"--{file.split} {file.location} ({same})")
    if again:
        print(f"{counted(len(again), 'file')} left out, read already: {first_few(again)}", file=sys.stderr)
    return list(first.values())


def _identity(location: str) -> Any:
    """Return what is equal for two names of one file."""
    fs, path = _filesystem(location, location)
    if not isinstance(fs, LocalFileSystem):
        return location
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def tell_copies(files: list[InputFile]) -> None:
    """Say which files hold the same as others before them, so that their documents are in the dataset twice."""
    first: dict[str, InputFile] = {}
    copies = []
    for file in files:
        other = first.setdefault(file.content, file)
        if other is not file and file.size:
            copies.append(f"--{file.split} {file.location} (that of --{other.split} {other.location})")
    if copies:
        print(f"{counted(len(copies), 'file')} of the same content as another: {first_few(copies)}", file=sys.stderr)


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
    fs, path = _filesystem(file.location, file.location)
    if isinstance(fs, LocalFileSystem) and (size := os.stat(path).st_size) != file.size:
        raise DataError(
            f"{file.location}: has changed while it was read ({counted(file.size, 'byte')}, now {size:,}); the same "
            "command goes on, once the file is complete"
        )


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
        status = os.stat(path)  # which fails for a link to nowhere
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is a pipe or a device; expected a file")
        return status.st_size
    return fs.info(path)["size"]


def read(location: str, option: str) -> bytes:
    """Return the content of a small file; ``option`` is what named it, for messages."""
    fs, path = _filesystem(location, f"{option} {location}")
    with _explained(f"{option} {location}"):
        return fs.cat_file(path)


def exists(location: str) -> bool:
    """Whether there is such a file."""
    fs, path = _filesystem(location, location)
    return fs.exists(path)


def _filesystem(location: str, what: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and what it calls it there: of this machine, an absolute path."""
    with _explained(what):
        if "://" in location:
            fs, path = fsspec.core.url_to_fs(location)
            return fs, path
        if location.startswith("~") and not os.path.lexists(location.partition("/")[0]):
            location = os.path.expanduser(location)
        path = os.path.join(os.getcwd(), "" if location == "." else location.removeprefix("./"))
        return LocalFileSystem(), path.rstrip("/") or "/"


def _is_on(fs: Any, location: str) -> bool:
    """Return whether a folder is on a file system."""
    protocol = location.partition("://")[0] if "://" in location else "file"
    return bool(location) and protocol in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


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
        inside = f"{error.filename}: " if error.filename and not what.endswith(str(error.filename)) else ""
        raise ConfigError(f"{what}: {inside}{error.strerror or error}") from error


def _kind(location: str) -> tuple[str, str]:
    """Return the kind of a file and the ending of its compression, by its name; empty where there is none."""
    stem, suffix = os.path.splitext(location.lower())
    compression = suffix[1:] if suffix[1:] in decompression.ENDINGS else ""
    kind = os.path.splitext(stem)[1][1:] if compression else suffix[1:]
    kind = {"ndjson": "jsonl"}.get(kind, kind)
    return (kind, compression) if kind in KINDS and not (kind == "parquet" and compression) else ("", "")


def _expected() -> str:
    *most, last = (f".{ending}" for ending in decompression.ENDINGS)
    return f".jsonl, .ndjson, .json, .txt, .parquet, or these but the last with {', '.join(most)} or {last}"

"""List the files that paths, folders, globs and URLs name, without those that belong to datasets of tokens."""

import collections
import fnmatch
import functools
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from ttt_jax.data import dataset
from ttt_jax.data.prepare import files
from ttt_jax.data.prepare.files import InputFile
from ttt_jax.errors import ConfigError
from ttt_jax.terminal.console import counted, first_few

_DATASET_FILES = (dataset.DESCRIPTION, dataset.PROBLEMS, "state.json", "tokenizer.json", "zarr.json")


class Matches(NamedTuple):
    """The files and folders that a pattern names.

    Attributes:
      root: the folder that was searched.
      files: paths of files of any kind.
      folders: paths of folders that match a glob, but in which no file does.
      is_folder: whether the pattern is the path of a folder.
      is_deep: whether folders were searched at any depth.
    """

    root: str
    files: list[str]
    folders: list[str]
    is_folder: bool = False
    is_deep: bool = False


def find(split: str, patterns: list[str], output: str = "") -> list[InputFile]:
    """Return the files that patterns name, in their order; the files of one pattern are sorted by name.

    A folder stands for all its files of a known kind, at any depth, without hidden ones. Other files in a folder or a
    glob are left out, counted, and named on standard error.

    Args:
      patterns: paths, globs, folders and URLs.
      output: the folder of the dataset that is made of the files; nothing in it is listed.

    Raises:
      ConfigError: if a pattern names no file of a known kind.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        option = f"--{split} {pattern}"
        if not pattern:
            raise ConfigError(f"--{split}: an empty name; expected a path, a folder, a glob or a URL")
        fs, path = files.filesystem(pattern, option)
        with files.as_config_error(option):
            matches = _match(fs, path)
            target = files.filesystem(output, "--output")[1] if _is_on(fs, output) else ""
            paths = _without_datasets(fs, matches, output, target)
            hidden = {p for p in paths if matches.is_folder and "/." in f"/{_relative(p, matches.root)}"}
            readable = [p for p in paths if files.kind_and_compression(p)[0] and p not in hidden]
            _report_left_out(split, option, matches, paths, readable)
            for each in sorted(set(readable)):
                location = fs.unstrip_protocol(each) if "://" in pattern else each
                with files.as_config_error(f"--{split} {location}"):
                    found.append(InputFile(split, location, _size(fs, each)))
    if patterns and not found:
        raise ConfigError(f"--{split} {' '.join(patterns)}: holds tokens; expected files of text, named {_expected()}")
    return found


def _size(fs: Any, path: str) -> int:
    if isinstance(fs, LocalFileSystem):
        status = os.stat(path)  # which fails for a broken link
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is a pipe or a device; expected a file")
        return status.st_size
    return fs.info(path)["size"]


def _report_left_out(split: str, option: str, matches: Matches, paths: list[str], readable: list[str]) -> None:
    """Report which matches of a pattern are not read; raise :class:`ConfigError` if none is."""
    others = sorted(_relative(path, matches.root) for path in set(paths) - set(readable))
    folders = sorted(_relative(folder, matches.root) for folder in matches.folders)
    left_out = []
    if others:
        left_out.append(f"{counted(len(others), 'file')}, hidden or with unknown endings: {first_few(others)}")
    if folders:
        left_out.append(f"{counted(len(folders), 'folder')}, read only if the glob ends in /**: {first_few(folders)}")
    if readable or (matches.files and not paths):  # without paths, all files are of datasets, which is reported
        for what in left_out:
            print(f"{option}: left out {what}", file=sys.stderr)
    elif len(paths) == 1 and not matches.is_folder:
        raise ConfigError(f"--{split} {paths[0]}: cannot be read; expected a name that ends in {_expected()}")
    else:
        what = f"nothing that can be read ({'; '.join(left_out)})" if left_out else "no such file"
        raise ConfigError(f"{option}: {what}; expected files named {_expected()}")


def _relative(path: str, folder: str) -> str:
    return path.removeprefix(folder).lstrip("/")


def without_duplicates(inputs: list[InputFile]) -> list[InputFile]:
    """Return each file once, whatever names (links) it has, and report the names that are left out.

    Raises:
      ConfigError: if a file is in two splits.
    """
    first: dict[Any, InputFile] = {}
    duplicates = []
    for file in inputs:
        other = first.setdefault(_identity(file.location), file)
        if other.split != file.split:
            raise ConfigError(f"--{file.split} {file.location}: is in --{other.split} already")
        if other is not file:
            same = "named twice" if file.location == other.location else f"the same file as {other.location}"
            duplicates.append(f"--{file.split} {file.location} ({same})")
    if duplicates:
        print(f"{counted(len(duplicates), 'file')} left out, read already: {first_few(duplicates)}", file=sys.stderr)
    return list(first.values())


def _identity(location: str) -> Any:
    """Return a value that is equal for two names of one file."""
    fs, path = files.filesystem(location, location)
    if not isinstance(fs, LocalFileSystem):
        return location
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def report_copies(inputs: list[InputFile]) -> None:
    """Report files with the same content as an earlier one, whose documents are in the dataset twice."""
    first: dict[str, InputFile] = {}
    copies = []
    for file in inputs:
        other = first.setdefault(file.digest, file)
        if other is not file and file.size:
            copies.append(f"--{file.split} {file.location} (same as --{other.split} {other.location})")
    if copies:
        print(f"{counted(len(copies), 'file')} with the same content as another: {first_few(copies)}", file=sys.stderr)


def _expected() -> str:
    *most, last = (f".{ending}" for ending in files.COMPRESSIONS)
    return f".jsonl, .ndjson, .json, .txt, .parquet, or these but the last with {', '.join(most)} or {last}"


def _is_on(fs: Any, location: str) -> bool:
    """Return whether a folder is on a file system."""
    protocol = location.partition("://")[0] if "://" in location else "file"
    return bool(location) and protocol in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


# ---- Patterns


def _match(fs: Any, path: str) -> Matches:
    """Return the files and folders that a path, a folder or a glob names.

    On this machine links are followed, but no folder is entered twice; and a file whose name looks like a glob is found
    by its name.
    """
    if isinstance(fs, LocalFileSystem):
        return _match_locally(path)
    if fs.isdir(path):
        return Matches(fs._strip_protocol(path), fs.find(path), [], is_folder=True, is_deep=True)
    if fs.exists(path):
        return Matches(os.path.dirname(path), [path], [])
    found = fs.glob(path, detail=True)
    folders = [each for each, info in found.items() if info["type"] == "directory"]
    files = [each for each, info in found.items() if info["type"] != "directory"]
    root = os.path.dirname(path.partition("*")[0])
    return Matches(root, files, _without_files(folders, files), is_deep="**" in path)


def _without_datasets(fs: Any, matches: Matches, output: str, target: str) -> list[str]:
    """Return the matching files that belong to no dataset of tokens, finished or not, and report these datasets.

    Args:
      output: the folder of the dataset that is being made; it is left out also before it exists.
      target: its path; empty if it is on another file system.
    """
    is_local = isinstance(fs, LocalFileSystem)

    @functools.cache
    def canonical(path: str) -> str:
        return os.path.realpath(path) if is_local else path

    root, target = canonical(matches.root), canonical(target) if target else ""
    if matches.is_deep and target.startswith(f"{root.rstrip('/')}/"):
        print(f"--output {output}: lies in {matches.root}; its files are not read", file=sys.stderr)
    left_out = {target} if target != root else set()
    for folder in sorted({*matches.folders, *_possible_datasets(matches)}):
        if not _is_dataset(fs, folder):
            continue
        if canonical(folder) != target or not matches.is_deep:
            print(f"{folder}: left out; it holds tokens that ttt tokenize made, not text", file=sys.stderr)
        left_out.add(canonical(folder))
    matches.folders[:] = [folder for folder in matches.folders if canonical(folder) not in left_out]
    inside = tuple(f"{folder}/" for folder in left_out if folder)
    return [path for path in matches.files if not f"{canonical(os.path.dirname(path))}/".startswith(inside)]


def _possible_datasets(matches: Matches) -> set[str]:
    above = {os.path.dirname(path) for path in matches.files if os.path.basename(path) in _DATASET_FILES}
    above |= {os.path.dirname(folder) for folder in above}
    return {folder for folder in above if f"{folder}/".startswith(f"{matches.root.rstrip('/')}/")}


def _is_dataset(fs: Any, folder: str) -> bool:
    try:
        with fs.open(f"{folder}/{dataset.DESCRIPTION}", "rb") as file:
            if dataset.FORMAT.encode() in file.read(1024):
                return True
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        pass
    return any(fs.exists(f"{folder}/{dataset.UNFINISHED}/{name}") for name in ("state.json", "tokenizer.json"))


def _without_files(folders: Iterable[str], files: list[str]) -> list[str]:
    """Return the folders that contain none of the files."""
    return [folder for folder in folders if not any(file.startswith(f"{folder}/") for file in files)]


# ---- This machine


def _match_locally(path: str) -> Matches:
    if os.path.isdir(path):
        return Matches(path, _files_below([path]), [], is_folder=True, is_deep=True)
    if os.path.lexists(path):
        return Matches(os.path.dirname(path), [path], [])
    root, parts = "/", [part for part in path.split("/") if part]
    while os.path.isdir(os.path.join(root, parts[0])):
        root = os.path.join(root, parts.pop(0))
    folders = [root]
    for part in parts[:-1]:
        if part == "**":
            folders = [folder for folder, _ in _walk(folders)]
        else:
            folders = list(filter(os.path.isdir, _matching(folders, part)))
    if parts[-1] == "**":
        return Matches(root, _files_below(folders), [], is_deep=True)
    found = _matching(folders, parts[-1])
    files = [each for each in found if not os.path.isdir(each)]
    nonempty = (each for each in found if os.path.isdir(each) and os.listdir(each))
    return Matches(root, files, _without_files(nonempty, files), is_deep="**" in parts)


def _matching(folders: list[str], part: str) -> list[str]:
    """Return the entries of folders that match a part of a glob; only the entry of that very name, if it exists."""
    found = []
    for folder in folders:
        exact = os.path.lexists(os.path.join(folder, part))
        found += [os.path.join(folder, n) for n in ([part] if exact else fnmatch.filter(os.listdir(folder), part))]
    return found


def _files_below(folders: list[str]) -> list[str]:
    return [os.path.join(folder, name) for folder, names in _walk(folders) for name in names]


def _walk(folders: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield all folders at any depth with the names of their files; folders behind links come last, and only once."""
    entered: dict[str, str] = {}
    waiting = collections.deque(folders)
    while waiting:
        for folder, inner, names in os.walk(waiting.popleft(), onerror=_raise):
            real = os.path.realpath(folder)
            if real in entered:
                if entered[real] != folder:
                    print(f"{folder}: left out; it leads to a folder that is read already, {real}", file=sys.stderr)
                inner.clear()
                continue
            entered[real] = folder
            inner.sort()
            waiting += [link for link in (os.path.join(folder, each) for each in inner) if os.path.islink(link)]
            yield folder, sorted(names)


def _raise(error: OSError) -> None:
    raise error

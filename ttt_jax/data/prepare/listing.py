"""Which files a path, a folder or a glob names, and which of them belong to datasets of tokens."""

import collections
import fnmatch
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from ttt_jax.data import dataset
from ttt_jax.data.prepare import files
from ttt_jax.data.prepare.files import InputFile
from ttt_jax.errors import ConfigError
from ttt_jax.terminal.console import counted, first_few

_OF_DATASET = (dataset.DESCRIPTION, dataset.PROBLEMS, "state.json", "tokenizer.json", "zarr.json")


class Named(NamedTuple):
    """What a pattern names.

    Attributes:
      root: the folder in which it was searched.
      files: paths, whether the files can be read or not.
      folders: those that a glob matches without any file in them.
      is_folder: whether the pattern is the path of a folder.
      is_deep: whether files were searched at any depth.
    """

    root: str
    files: list[str]
    folders: list[str]
    is_folder: bool = False
    is_deep: bool = False


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
        fs, path = files.filesystem(pattern, option)
        with files.explained(option):
            names = named(fs, path)
            target = files.filesystem(output, "--output")[1] if _is_on(fs, output) else ""
            paths = of_text(fs, names, output, target)
            hidden = {p for p in paths if names.is_folder and "/." in f"/{_inside(names.root, p)}"}
            readable = [p for p in paths if files.kind(p)[0] and p not in hidden]
            _check_some(split, option, names, paths, readable)
            for each in sorted(set(readable)):
                location = fs.unstrip_protocol(each) if "://" in pattern else each
                with files.explained(f"--{split} {location}"):
                    found.append(InputFile(split, location, files.size(fs, each)))
    if patterns and not found:
        raise ConfigError(f"--{split} {' '.join(patterns)}: holds tokens; expected files of text, named {_expected()}")
    return found


def _check_some(split: str, option: str, names: Named, paths: list[str], readable: list[str]) -> None:
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


def distinct(inputs: list[InputFile]) -> list[InputFile]:
    """Return the files without those that are others of them by another name (a link), and say which these are.

    Raises:
      ConfigError: where a file is in two splits.
    """
    first: dict[Any, InputFile] = {}
    again = []
    for file in inputs:
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
    fs, path = files.filesystem(location, location)
    if not isinstance(fs, LocalFileSystem):
        return location
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def tell_copies(inputs: list[InputFile]) -> None:
    """Say which files hold the same as others before them, so that their documents are in the dataset twice."""
    first: dict[str, InputFile] = {}
    copies = []
    for file in inputs:
        other = first.setdefault(file.content, file)
        if other is not file and file.size:
            copies.append(f"--{file.split} {file.location} (that of --{other.split} {other.location})")
    if copies:
        print(f"{counted(len(copies), 'file')} of the same content as another: {first_few(copies)}", file=sys.stderr)


def _expected() -> str:
    *most, last = (f".{ending}" for ending in files.ENDINGS)
    return f".jsonl, .ndjson, .json, .txt, .parquet, or these but the last with {', '.join(most)} or {last}"


def _is_on(fs: Any, location: str) -> bool:
    """Return whether a folder is on a file system."""
    protocol = location.partition("://")[0] if "://" in location else "file"
    return bool(location) and protocol in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


# ---- Patterns


def named(fs: Any, path: str) -> Named:
    """Return what a path, a folder or a glob names.

    On this machine links are followed, but no folder is entered twice, and what has a name that looks like a glob is
    found by that name.
    """
    if isinstance(fs, LocalFileSystem):
        return _named_here(path)
    if fs.isdir(path):
        return Named(fs._strip_protocol(path), fs.find(path), [], is_folder=True, is_deep=True)
    if fs.exists(path):
        return Named(os.path.dirname(path), [path], [])
    found = fs.glob(path, detail=True)
    folders = [each for each, info in found.items() if info["type"] == "directory"]
    files = [each for each, info in found.items() if info["type"] != "directory"]
    root = os.path.dirname(path.partition("*")[0])
    return Named(root, files, _without_files(folders, files), is_deep="**" in path)


def of_text(fs: Any, names: Named, output: str, target: str) -> list[str]:
    """Return the files but those of datasets, and say which datasets are left out, finished or not.

    Args:
      output: the folder of the dataset that is being made; it is left out before it exists, too.
      target: its path; empty where it is on another file system.
    """
    is_here = isinstance(fs, LocalFileSystem)

    @functools.cache
    def canonical(path: str) -> str:
        return os.path.realpath(path) if is_here else path

    root, target = canonical(names.root), canonical(target) if target else ""
    if names.is_deep and target.startswith(f"{root.rstrip('/')}/"):
        print(f"--output {output}: lies in {names.root}, of which it is no input", file=sys.stderr)
    left_out = {target} if target != root else set()
    for folder in sorted({*names.folders, *_perhaps_datasets(names)}):
        if not _is_dataset(fs, folder):
            continue
        if canonical(folder) != target or not names.is_deep:
            print(f"{folder}: left out; it holds tokens that ttt tokenize has made, not text", file=sys.stderr)
        left_out.add(canonical(folder))
    names.folders[:] = [folder for folder in names.folders if canonical(folder) not in left_out]
    inside = tuple(f"{folder}/" for folder in left_out if folder)
    return [path for path in names.files if not f"{canonical(os.path.dirname(path))}/".startswith(inside)]


def _perhaps_datasets(names: Named) -> set[str]:
    above = {os.path.dirname(path) for path in names.files if os.path.basename(path) in _OF_DATASET}
    above |= {os.path.dirname(folder) for folder in above}
    return {folder for folder in above if f"{folder}/".startswith(f"{names.root.rstrip('/')}/")}


def _is_dataset(fs: Any, folder: str) -> bool:
    try:
        with fs.open(f"{folder}/{dataset.DESCRIPTION}", "rb") as file:
            if dataset.FORMAT.encode() in file.read(1024):
                return True
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        pass
    return any(fs.exists(f"{folder}/{dataset.UNFINISHED}/{name}") for name in ("state.json", "tokenizer.json"))


def _without_files(folders: Iterable[str], files: list[str]) -> list[str]:
    """Return the folders in which none of the files is."""
    return [folder for folder in folders if not any(file.startswith(f"{folder}/") for file in files)]


# ---- This machine


def _named_here(path: str) -> Named:
    if os.path.isdir(path):
        return Named(path, _files_below([path]), [], is_folder=True, is_deep=True)
    if os.path.lexists(path):
        return Named(os.path.dirname(path), [path], [])
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
        return Named(root, _files_below(folders), [], is_deep=True)
    found = _matching(folders, parts[-1])
    files = [each for each in found if not os.path.isdir(each)]
    with_content = (each for each in found if os.path.isdir(each) and os.listdir(each))
    return Named(root, files, _without_files(with_content, files), is_deep="**" in parts)


def _matching(folders: list[str], part: str) -> list[str]:
    """Return what is called like a part of a glob: that of the very name, where it exists."""
    found = []
    for folder in folders:
        exact = os.path.lexists(os.path.join(folder, part))
        found += [os.path.join(folder, n) for n in ([part] if exact else fnmatch.filter(os.listdir(folder), part))]
    return found


def _files_below(folders: list[str]) -> list[str]:
    return [os.path.join(place, name) for place, names in _walk(folders) for name in names]


def _walk(folders: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield all folders below some, with the names of their files; what links lead to comes last, and only once."""
    entered: dict[str, str] = {}
    waiting = collections.deque(folders)
    while waiting:
        for place, inner, names in os.walk(waiting.popleft(), onerror=_raise):
            real = os.path.realpath(place)
            if real in entered:
                if entered[real] != place:
                    print(f"{place}: left out; it leads to a folder that is read already, {real}", file=sys.stderr)
                inner.clear()
                continue
            entered[real] = place
            inner.sort()
            waiting += [link for link in (os.path.join(place, each) for each in inner) if os.path.islink(link)]
            yield place, sorted(names)


def _raise(error: OSError) -> None:
    raise error

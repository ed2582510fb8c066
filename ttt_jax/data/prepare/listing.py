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

"""Read and write the files of evaluations and inspections: of finished results, and of unfinished evaluations.

A result is ``NAME.npz`` with arrays, ``NAME.json``, and a table as CSV. The ``.json`` holds the hash of its own content
and of the ``.npz``, so that files of different results are not mixed. Files of earlier versions have no hashes and are
read without the check. An unfinished evaluation keeps its arrays in a folder, so that it resumes where it was stopped.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from ttt_jax import finite
from ttt_jax.config import renamed
from ttt_jax.errors import ConfigError
from ttt_jax.storage import json_files
from ttt_jax.storage.workdir import Workdir, explained, is_local
from ttt_jax.storage.writing import write_atomically

T = TypeVar("T")
_ARRAYS = "npz_sha256"  # key of the hash of the .npz in the .json
_KNOWN = {_ARRAYS, "model", "step", "context", "split", "source", "fingerprint", "loss"}
_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("workdir", "model", "source", "source_path", "fingerprint", "split", "of"), (str,)),
    **dict.fromkeys(("step", "context", "training_context", "windows", "tokens", "documents", "chains"), (int,)),
    **dict.fromkeys(("parameters", "training_tokens", "training_flops", "not_finite", "skipped"), _NUMBER),
    **dict.fromkeys(("loss", "loss_standard_error", "perplexity"), (*_NUMBER, type(None))),
    "carried": (bool,),
    "config": (dict,),
}
_SECONDS_BETWEEN_PARTS = 10.0
_PLAN = "plan.json"  # the identity of the evaluation


def write(
    folder: Workdir, stem: str, found: Any, about: dict[str, Any], columns: Sequence[str], rows: Iterable[Sequence]
) -> Workdir:
    """Write the three files, the ``.json`` last; return the path of the ``.npz``.

    Args:
      found: a dataclass; all of its fields but the first are arrays, or None.
      about: the content of the ``.json``; numbers that are not finite become null.
      columns, rows: of the table.
    """
    arrays = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)[1:]}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    table, content = io.StringIO(newline=""), io.BytesIO()
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows(rows)
    np.savez_compressed(content, allow_pickle=False, **arrays)
    about = {**finite.for_json(about)[0], _ARRAYS: hashlib.sha256(content.getvalue()).hexdigest()}
    with explained(folder):
        if is_local(folder):
            folder.mkdir(parents=True, exist_ok=True)
    for suffix, part in ((".csv", table.getvalue().encode()), (".npz", content.getvalue())):
        write_atomically(folder / f"{stem}{suffix}", part)
    json_files.write_object(folder / f"{stem}.json", about)
    return folder / f"{stem}.npz"


def about(path: Workdir) -> dict[str, Any]:
    """Return the content of a ``.json`` without the hashes.

    Raises:
      FileNotFoundError: if it does not exist.
      DamagedFile: if it is not as it was written.
    """
    found = _read(path)
    found.pop(_ARRAYS, None)
    return found


def check(about: dict[str, Any], path: Workdir, needed: Iterable[str]) -> None:
    """Raise :class:`DamagedFile` if keys are missing in a ``.json``."""
    if missing := [key for key in needed if key not in about]:
        raise json_files.DamagedFile(
            f"{path}: has no {', '.join(missing)}; expected the keys that ttt eval or ttt inspect writes"
        )


def read(path: Workdir, kind: Callable[..., T], verb: str) -> T:
    """Return a dataclass: its first field is the content of the ``.json``, the others are the arrays of the ``.npz``.

    Fields with a default may be missing in the ``.npz``.

    Args:
      path: of the ``.npz``.
      verb: the command that writes such files.

    Raises:
      ConfigError: if one of the files is missing or damaged, or holds other arrays.
    """
    try:
        with explained(path):
            about = _read(path.with_suffix(".json"))
            content = path.read_bytes()
        expected = about.pop(_ARRAYS, None)
        if expected not in (None, hashlib.sha256(content).hexdigest()):
            raise ConfigError(f"{path}: damaged, or not of the .json beside it; run {verb} again")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays: dict[str, Any] = dict(file)
    except json_files.DamagedFile as error:
        raise ConfigError(f"{error}; or run {verb} again") from error
    except ConfigError:
        raise
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: missing or damaged, or the .json beside it; expected what {verb} wrote") from error
    _, *fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # any dataclass
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not needed <= arrays.keys() <= {field.name for field in fields}:
        raise ConfigError(f"{path}: not of this version of ttt_jax; expected the arrays that {verb} writes now")
    return kind(about, **arrays)


def _read(path: Workdir) -> dict[str, Any]:
    found = json_files.read_object(path)
    if not _KNOWN & set(found):
        raise json_files.DamagedFile(f"{path}: holds no results; expected what ttt eval or ttt inspect writes")
    for key, types in _TYPES.items():
        if key in found and type(found[key]) not in types:
            shown = json.dumps(found[key])[:40]
            raise json_files.DamagedFile(f"{path}: {key} is {shown}; expected what ttt eval or ttt inspect writes")
    if "config" in found:
        found["config"] = renamed.current(found["config"])
    return found


class PartialResults:
    """The arrays that an evaluation has computed so far, in order, in a folder that :meth:`remove` deletes.

    Args:
      folder: where the arrays are; the files of another evaluation in it are removed.
      identity: JSON that contains everything the arrays depend on.
      lengths: of all arrays of the finished evaluation.
      check: called before a file is written; raises if none may be written.
    """

    def __init__(
        self,
        folder: Workdir,
        identity: dict[str, Any],
        lengths: Sequence[int],
        check: Callable[[], None] = lambda: None,
    ):
        self._check = check
        self._folder, self._identity, self._lengths = folder, json.loads(json.dumps(identity)), lengths
        self._waiting: list[np.ndarray] = []
        self._written, self._clock = 0, -math.inf  # write the first array at once

    def restore(self) -> list[np.ndarray]:
        """Return the arrays on disk, up to the first damaged one."""
        found: list[np.ndarray] = []
        with explained(self._folder):
            if self._has_same_identity():
                for path in sorted(self._folder.glob("*.npy")):
                    found += self._read(path, len(found))
            else:
                self.remove()
        self._written = len(found)
        return found

    def add(self, array: np.ndarray) -> None:
        """Add the next array; write it within some seconds."""
        self._waiting.append(array)
        if time.monotonic() - self._clock > _SECONDS_BETWEEN_PARTS:
            self.flush()

    def flush(self) -> None:
        """Write the arrays that are not on disk yet."""
        if not self._waiting:
            return
        self._check()
        content = io.BytesIO()
        np.save(content, np.concatenate(self._waiting), allow_pickle=False)
        crc = zlib.crc32(content.getvalue())
        name = f"{self._written:08}-{self._written + len(self._waiting):08}-{crc:08x}.npy"
        with explained(self._folder):
            if is_local(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            if not self._written:
                json_files.write_object(self._folder / _PLAN, self._identity)
            write_atomically(self._folder / name, content.getvalue())
        self._written += len(self._waiting)
        self._waiting, self._clock = [], time.monotonic()

    def remove(self) -> None:
        """Remove the folder."""
        with explained(self._folder):
            if self._folder.is_dir():
                for path in self._folder.glob("*"):
                    path.unlink()
                if is_local(self._folder):  # in a bucket, the folder vanishes with its last file
                    self._folder.rmdir()

    def _has_same_identity(self) -> bool:
        path = self._folder / _PLAN
        try:
            if json_files.read_object(path) == self._identity:
                return True
            problem = f"{path}: is of another evaluation, such as one of an earlier checkpoint"
        except (FileNotFoundError, NotADirectoryError):
            return False
        except json_files.DamagedFile as error:
            problem = str(error)
        json_files.warn_once(f"{problem}; this evaluation begins anew")
        return False

    def _read(self, path: Workdir, first: int) -> Iterator[np.ndarray]:
        """Yield the arrays of one file, if it is the next one and whole."""
        match = re.fullmatch(r"(\d{8})-(\d{8})(?:-([0-9a-f]{8}))?", path.stem)  # earlier versions wrote no checksum
        if match is None or int(match[1]) != first:
            return
        lengths, content = self._lengths[first : int(match[2])], path.read_bytes()
        try:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError):
            array = np.empty(0)
        if array.shape != (sum(lengths),) or (match[3] and int(match[3], 16) != zlib.crc32(content)):
            json_files.warn_once(f"{path}: damaged; its losses, and those after them, are computed again")
            return
        yield from np.split(array, np.cumsum(lengths)[:-1])


def short_hash(identity: Any) -> str:
    """Return a hash of JSON, eight hexadecimal digits."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()


def partial_folder(parent: Workdir, name: str, identity: dict[str, Any], of_tokens: Sequence[str]) -> Workdir:
    """Return the folder of an unfinished evaluation: ``.NAME.unfinished``, or ``.NAME-HASH.unfinished``.

    Args:
      identity: as of :class:`PartialResults`.
      of_tokens: keys of the identity. If ``.NAME.unfinished`` is of an evaluation that differs in one of them, it is
        kept, and the other folder is used.
    """
    plain = parent / f".{name}.unfinished"
    own = parent / f".{name}-{short_hash([identity[key] for key in of_tokens])}.unfinished"
    with explained(parent):
        if own.is_dir():
            return own
        try:
            present = json_files.read_object(plain / _PLAN)
            return plain if all(present[key] == identity[key] for key in of_tokens) else own
        except (OSError, json_files.DamagedFile, KeyError):
            return plain

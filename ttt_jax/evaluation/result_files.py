"""Read and write the files of evaluations and inspections: ``NAME.npz`` with arrays, ``NAME.json``, a table as CSV.

The ``.json`` holds the hash of its own content and of the ``.npz``, so that files of different results are not mixed.
Files of earlier versions have no hashes and are read without the check.
"""

import csv
import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
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

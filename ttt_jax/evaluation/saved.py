"""Reads what evaluations and inspections have written: an ``.npz`` of arrays, and a ``.json`` beside it."""

import dataclasses
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from ttt_jax.config import ConfigError
from ttt_jax.workdir import Workdir, explained

T = TypeVar("T")


def read(path: Workdir, kind: Callable[..., T], verb: str) -> T:
    """A dataclass whose first field, ``about``, is in the ``.json``, and whose others are the arrays of the ``.npz``.

    Args:
      path: of the ``.npz``.
      verb: the command that writes such files.

    Raises:
      ConfigError: where one of the files is missing or damaged, or holds other arrays.
    """
    try:
        with explained(path):
            about = json.loads(path.with_suffix(".json").read_text())
            content = io.BytesIO(path.read_bytes())
        with np.load(content, allow_pickle=False) as file:
            arrays: dict[str, Any] = dict(file)
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: missing or damaged, or the .json beside it; expected what {verb} wrote") from error
    _, *fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # any dataclass
    if arrays.keys() != {field.name for field in fields}:
        raise ConfigError(f"{path}: not of this version of ttt_jax; expected the arrays that {verb} writes now")
    return kind(about, **arrays)

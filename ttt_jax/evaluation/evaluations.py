"""What ``ttt eval`` has written about a run."""

import io
import json
import os
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import workdir as workdir_lib
from ttt_jax.config import ConfigError


class Evaluation(NamedTuple):
    """A saved evaluation of one run."""

    about: dict
    position: np.ndarray  # [T], from 1
    loss: np.ndarray  # [T]
    standard_error: np.ndarray  # [T]
    bin_first: Any = None  # [K]
    bin_last: Any = None
    bin_loss: Any = None
    bin_low: Any = None
    bin_high: Any = None
    document_sums: Any = None  # [documents, K]
    document_counts: Any = None


def read(workdir: str | os.PathLike, split: str, context: int | None = None, by_document: bool = False) -> Evaluation:
    """The evaluation of a run on a split; of the longest context that was evaluated, where none is given.

    Raises:
      ConfigError: where there is none.
    """
    workdir = workdir_lib.at(workdir)
    kind = f"{split}-documents-" if by_document else f"{split}-"
    with workdir_lib.explained(workdir):
        files = {p.stem.removeprefix(kind): p for p in (workdir / "eval").glob(f"{kind}*.npz")}
    found = {int(name): path for name, path in files.items() if name.isdecimal()}
    chosen = max(found, default=None) if context is None else context
    if chosen is None or chosen not in found:
        length = "" if context is None else f" with context {context}"
        raise ConfigError(
            f"{workdir}: no evaluation of the {split} split{length}; run: "
            f"ttt eval --workdir {workdir} --split {split} --context {context or 2048}"
            + (" --by-document" if by_document else "")
        )
    with workdir_lib.explained(workdir):
        about = json.loads(found[chosen].with_suffix(".json").read_text())
        content = io.BytesIO(found[chosen].read_bytes())
    with np.load(content, allow_pickle=False) as file:
        names = [name for name in Evaluation._fields[1:] if name in file]
        return Evaluation(about, **{name: file[name] for name in names})


def listed(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """What all evaluations of a run say about themselves."""
    workdir = workdir_lib.at(workdir)
    with workdir_lib.explained(workdir):
        return [json.loads(path.read_text()) for path in sorted((workdir / "eval").glob("*.json"))]

"""The file of a probe: cells of its table, each with all that it depends on, as JSON and as CSV.

Cells are added one by one and stay: those of another step or seed stand beside one another.
"""

import contextlib
import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from ttt_jax import finite
from ttt_jax.errors import ConfigError
from ttt_jax.storage.json_files import DamagedFile, read_object, write_atomically, write_object
from ttt_jax.storage.workdir import Workdir, is_local
from ttt_jax.storage.workdir_lock import WorkdirLock
from ttt_jax.terminal import console

Cell = dict[str, Any]


class Cells:
    """The cells that a run has of one probe.

    Args:
      workdir: of the run.
      name: of the probe, and of the files ``WORKDIR/probe/NAME.json`` and ``.csv``.
      keys: what of a cell says which cell it is.
      of_old: values of keys in cells of earlier versions, which do not have them.
    """

    def __init__(self, workdir: Workdir, name: str, keys: Sequence[str], of_old: Cell | None = None):
        self._path, self._keys = workdir / "probe" / f"{name}.json", tuple(keys)
        self._of_old = of_old or {}
        self._lock: WorkdirLock | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other probes from adding cells to the same file meanwhile."""
        with WorkdirLock(self._path.parent, "ttt probe", name=f".{self._path.stem}.running") as self._lock:
            yield

    def read(self) -> dict[str, Any]:
        """What is known of the run, with its ``cells``, oldest first; none where the probe has not been run.

        Raises:
          ConfigError: where the file is something else.
        """
        try:
            found = read_object(self._path)
            if all(key in {**self._of_old, **cell} for cell in found["cells"] for key in self._keys):
                return found
        except (FileNotFoundError, NotADirectoryError):
            return {"cells": []}
        except DamagedFile as error:
            raise ConfigError(f"{error}; expected what ttt probe wrote, or no file") from error
        except (KeyError, TypeError):
            pass
        raise ConfigError(f"{self._path}: does not hold cells of a probe; expected what ttt probe wrote, or no file")

    def find(self, **which: Any) -> list[Cell]:
        """The cells whose values are these, oldest first."""
        return [cell for cell in self.read()["cells"] if self._is(which, cell)]

    def add(self, cell: Cell, about: dict[str, Any]) -> None:
        """Writes a cell beside the others, or in the place of the one with the same keys.

        Args:
          about: what is known of the run.
        """
        if self._lock is not None:
            self._lock.check()
        which = {key: cell[key] for key in self._keys}
        cells = [other for other in self.read()["cells"] if not self._is(which, other)] + [cell]
        if is_local(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        # Cells of earlier versions may hold NaN.
        write_object(self._path, finite.for_json({**about, "cells": cells})[0])
        write_atomically(self._path.with_suffix(".csv"), _table(cells))
        for part in sorted(key for key in cell if isinstance(cell[key], list)):
            rows = [{**{k: c.get(k) for k in self._keys}, **entry} for c in cells for entry in c[part]]
            write_atomically(self._path.with_name(f"{self._path.stem}-{part}.csv"), _table(rows))

    def _is(self, which: dict[str, Any], cell: Cell) -> bool:
        return which.items() <= {**self._of_old, **{k: v for k, v in cell.items() if not isinstance(v, list)}}.items()


def _table(rows: Sequence[Cell]) -> str:
    """Rows as CSV, without what of them is a list."""
    columns = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list)))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_Z = 1.959964  # of 95 %


def wilson(correct: int, samples: int) -> tuple[float, float]:
    """The 95 % interval of a share after Wilson, which is of use also where all or none are correct."""
    share, z2 = correct / samples, _Z**2 / samples
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / samples + z2 / 4 / samples)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(correct: int | None, samples: int) -> tuple[float | None, float | None, float | None]:
    """Return a share and its 95 % interval; None where the model gave NaN or infinity, so that nobody knows it."""
    return (None, None, None) if correct is None else (correct / samples, *wilson(correct, samples))


def finite_or_none(value: float) -> float | None:
    """Return a float that JSON can hold: None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def show(
    cells: Sequence[Cell], title: str, row: str, row_name: Callable[[Any], str], measures: Sequence[str], caption: str
) -> None:
    """Prints :func:`table` between a title and a caption: as wide as the terminal, or as wide as it takes."""
    output = console.output()
    output.print(title, soft_wrap=True)
    output.print(table(cells, row, row_name, measures))
    output.print(caption, soft_wrap=True, end="\n\n")


def table(cells: Sequence[Cell], row: str, row_name: Callable[[Any], str], measures: Sequence[str]) -> Table:
    """Cells by context, a row for each value of ``row``, and the means of the columns.

    Args:
      measures: shares that stand in a cell, the second in brackets.
    """
    contexts = sorted({cell["context"] for cell in cells})
    rows = sorted({cell[row] for cell in cells})
    found = Table(box=box.SIMPLE_HEAD)
    found.add_column(row)
    for context in contexts:
        found.add_column(f"{context:,}", justify="right", no_wrap=True)

    def shown(some: Sequence[Cell]) -> str:
        if not some:
            return "-"
        first, *rest = (_mean([cell[measure] for cell in some]) for measure in measures)
        return f"{first:.2f}" + "".join(f" ({share:.2f})" for share in rest)

    for value in rows:
        here = [cell for cell in cells if cell[row] == value]
        found.add_row(row_name(value), *(shown([c for c in here if c["context"] == context]) for context in contexts))
    if len(rows) > 1:
        found.add_section()
        found.add_row("mean", *(shown([c for c in cells if c["context"] == context]) for context in contexts))
    return found


def _mean(shares: Sequence[float | None]) -> float:
    """Return the mean of shares, NaN where one of them is not known because the model gave NaN or infinity."""
    return sum(math.nan if share is None else share for share in shares) / len(shares)

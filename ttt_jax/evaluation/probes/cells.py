"""Keep the cells of a probe's table in files, estimate their errors, and print them.

A cell holds all that its numbers depend on. Cells are added one by one, and cells of other steps or seeds are kept.
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
    """The cells of one probe of a run, in ``WORKDIR/probe/NAME.json`` and ``.csv``.

    Args:
      workdir: of the run.
      name: of the probe and its files.
      keys: the keys that identify a cell.
      defaults: values of keys that cells of earlier versions do not have.
    """

    def __init__(self, workdir: Workdir, name: str, keys: Sequence[str], defaults: Cell | None = None):
        self._path, self._keys = workdir / "probe" / f"{name}.json", tuple(keys)
        self._defaults = defaults or {}
        self._lock: WorkdirLock | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other probes from adding cells to the same file."""
        with WorkdirLock(self._path.parent, "ttt probe", name=f".{self._path.stem}.running") as self._lock:
            yield

    def read(self) -> dict[str, Any]:
        """Return the content of the file, with ``cells`` oldest first; no cells if the file does not exist.

        Raises:
          ConfigError: if the file does not hold cells.
        """
        try:
            found = read_object(self._path)
            if all(key in {**self._defaults, **cell} for cell in found["cells"] for key in self._keys):
                return found
        except (FileNotFoundError, NotADirectoryError):
            return {"cells": []}
        except DamagedFile as error:
            raise ConfigError(f"{error}; expected what ttt probe wrote, or no file") from error
        except (KeyError, TypeError):
            pass
        raise ConfigError(f"{self._path}: does not hold cells of a probe; expected what ttt probe wrote, or no file")

    def find(self, **which: Any) -> list[Cell]:
        """Return the cells that have these values, oldest first."""
        return [cell for cell in self.read()["cells"] if self._is(which, cell)]

    def add(self, cell: Cell, about: dict[str, Any]) -> None:
        """Write a cell beside the others, or in place of the cell with the same keys.

        Args:
          about: the description of the run, which the file holds beside the cells.
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
        return which.items() <= {**self._defaults, **{k: v for k, v in cell.items() if not isinstance(v, list)}}.items()


def _table(rows: Sequence[Cell]) -> str:
    """Return rows as CSV, without values that are lists."""
    columns = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list)))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_Z = 1.959964  # of 95 %


def wilson(correct: int, samples: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, which is also useful where all or none are correct."""
    share, z2 = correct / samples, _Z**2 / samples
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / samples + z2 / 4 / samples)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(correct: int | None, samples: int) -> tuple[float | None, float | None, float | None]:
    """Return a share and its 95 % interval; all None if ``correct`` is None, as the model gave NaN or infinity."""
    return (None, None, None) if correct is None else (correct / samples, *wilson(correct, samples))


def finite_or_none(value: float) -> float | None:
    """Return a float that JSON can hold: None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def show(
    cells: Sequence[Cell], title: str, row: str, row_name: Callable[[Any], str], measures: Sequence[str], caption: str
) -> None:
    """Print :func:`table` between a title and a caption, as wide as the terminal, or as necessary in a file."""
    output = console.output()
    output.print(title, soft_wrap=True)
    output.print(table(cells, row, row_name, measures))
    output.print(caption, soft_wrap=True, end="\n\n")


def table(cells: Sequence[Cell], row: str, row_name: Callable[[Any], str], measures: Sequence[str]) -> Table:
    """Return a table of cells by context, with a row for each value of ``row`` and a row of means.

    Args:
      measures: the shares to show, all but the first in brackets. A mean is "not finite" if one of its shares is None.
    """
    contexts = sorted({cell["context"] for cell in cells})
    rows = sorted({cell[row] for cell in cells})
    found = Table(box=box.SIMPLE_HEAD)
    found.add_column(row)
    for context in contexts:
        found.add_column(f"{context:,}", justify="right", no_wrap=True)

    def by_context(some: Sequence[Cell]) -> list[str]:
        return [_means([cell for cell in some if cell["context"] == context], measures) for context in contexts]

    for value in rows:
        found.add_row(row_name(value), *by_context([cell for cell in cells if cell[row] == value]))
    if len(rows) > 1:
        found.add_section()
        found.add_row("mean", *by_context(cells))
    return found


def _means(cells: Sequence[Cell], measures: Sequence[str]) -> str:
    """Return the means of shares in words: "0.50 (0.75)", "not finite", or "-" if there are no cells."""
    if not cells:
        return "-"
    means = [finite.mean(math.nan if cell[key] is None else cell[key] for cell in cells) for key in measures]
    if not any(map(finite.is_finite, means)):
        return finite.NOT_FINITE
    first, *rest = (finite.format_number(mean, ".2f") for mean in means)
    return first + "".join(f" ({each})" for each in rest)

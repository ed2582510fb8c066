"""Tables of probes, for people."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from ttt_jax.evaluation.probes.cells import Cell
from ttt_jax.terminal import console


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

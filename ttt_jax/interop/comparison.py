"""Load numbers that other code computed, and measure how far ours are from them."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Oracle = Mapping[str, Any]  # name to array


@dataclasses.dataclass(frozen=True)
class Report:
    """The largest error of each kind of number in a file.

    Attributes:
      errors: from kind to error.
      tolerance: from kind to the largest error allowed.
    """

    errors: dict[str, float]
    tolerance: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Return whether something was compared and every error is within tolerance; NaN is not."""
        return bool(self.errors) and all(error <= self.tolerance[kind] for kind, error in self.errors.items())

    def __str__(self) -> str:
        return "  ".join(
            f"{kind} {error:.1e}" + ("" if error <= self.tolerance[kind] else f" (beyond {self.tolerance[kind]:.0e}!)")
            for kind, error in self.errors.items()
        )


def load(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a file."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def largest(ours: Any, theirs: Any) -> float:
    """Return the largest absolute difference."""
    return float(np.abs(_difference(ours, theirs)).max(initial=0.0))


def relative(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two numbers, relative to theirs."""
    size = np.maximum(np.abs(np.asarray(theirs, np.float64)), 1e-30)
    return largest(ours / size, theirs / size)


def relative_norm(ours: Any, theirs: Any) -> float:
    """Return the norm of the difference, relative to the norm of their array."""
    size = float(np.linalg.norm(np.asarray(theirs, np.float64)))
    return float(np.linalg.norm(_difference(ours, theirs))) / max(size, 1e-30)


def worst(errors: Iterable[float]) -> float:
    """Return the largest error, NaN where one is NaN (which Python's max may pass over), 0 of none."""
    return float(np.max(list(errors), initial=0.0))


def _difference(ours: Any, theirs: Any) -> np.ndarray:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shape {ours.shape} here, {theirs.shape} in the file")
    return ours - theirs

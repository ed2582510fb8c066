"""Shares of examples, and how sure they are."""

import math

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

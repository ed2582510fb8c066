"""How sure an accuracy is."""

import math

_Z = 1.959964  # of 95 %


def wilson(correct: int, samples: int) -> tuple[float, float]:
    """The 95 % interval of a share after Wilson, which is of use also where all or none are correct."""
    share, z2 = correct / samples, _Z**2 / samples
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / samples + z2 / 4 / samples)
    return max(0.0, centre - half), min(1.0, centre + half)

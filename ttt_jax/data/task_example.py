"""A sequence of a synthetic task."""

from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """Tokens, and which of them are answers.

    Attributes:
      tokens: [N], int32.
      answers: [n], places of the tokens that can be known from those before them.
      sources: [n], where what they repeat has been read last.
    """

    tokens: np.ndarray
    answers: np.ndarray
    sources: np.ndarray

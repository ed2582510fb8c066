"""Selective copying: symbols among noise at random places, then a marker, then the symbols in their order.

    . . c . . . a . . b . a . . . . | c a b a        answers are what follows the marker

After "Mamba" (arXiv:2312.00752), where the marker is repeated in the place of the answers; here they are read as they
are told, so that targets are the inputs one token later, as of any text.

Token 0 is noise, 1 the marker, the others are symbols.
"""

import numpy as np

from ttt_jax.data.task_example import Example

NAME, ITEMS = "selective_copying", "symbols"
MARKER = 1


def least_length(symbols: int) -> int:
    """Tokens that a sequence needs."""
    return 2 * symbols + 1


def least_vocab_size(symbols: int) -> int:
    """Noise, marker, and two symbols to tell apart."""
    del symbols
    return 4


def draw(rng: np.random.Generator, length: int, symbols: int, vocab_size: int) -> Example:
    """A sequence of ``length`` tokens; symbols may repeat."""
    tokens = np.zeros(length, np.int32)
    marker = length - symbols - 1
    places = np.sort(rng.permutation(marker)[:symbols])
    tokens[places] = rng.integers(MARKER + 1, vocab_size, symbols)
    tokens[marker] = MARKER
    tokens[marker + 1 :] = tokens[places]
    return Example(tokens, np.arange(marker + 1, length), places)

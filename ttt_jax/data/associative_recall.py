"""Associative recall with several queries: key-value pairs, then each key once more, somewhere, and its value.

    k1 v1 k2 v2 k3 v3 . . k2 v2 . . . . k3 v3 k1 v1 . .        answers are the values of the second half

After MQAR of "Zoology" (arXiv:2312.04927), with two differences: queries lie uniformly in what follows the pairs, and a
query is followed by its value, so that targets are the inputs one token later, as of any text.

Token 0 is filler; the lower half of the others are keys, the upper half values.
"""

import numpy as np

from ttt_jax.data.task_example import Example

NAME, ITEMS = "associative_recall", "pairs"


def least_length(pairs: int) -> int:
    """Tokens that a sequence needs."""
    return 4 * pairs


def least_vocab_size(pairs: int) -> int:
    """Filler, as many keys as pairs, and as many values."""
    return 2 * max(pairs, 2) + 1


def draw(rng: np.random.Generator, length: int, pairs: int, vocab_size: int) -> Example:
    """A sequence of ``length`` tokens. Keys are distinct; values need not be."""
    keys = (vocab_size - 1) // 2
    key = rng.permutation(keys)[:pairs] + 1
    value = rng.integers(keys + 1, vocab_size, pairs)
    tokens = np.zeros(length, np.int32)
    tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = key, value
    slots = (length - 2 * pairs) // 2
    places = 2 * (pairs + rng.permutation(slots)[:pairs])  # of the query of each pair
    tokens[places], tokens[places + 1] = key, value
    order = np.argsort(places)
    return Example(tokens, places[order] + 1, 2 * order + 1)

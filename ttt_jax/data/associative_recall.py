"""Associative recall with several queries: key-value pairs, then as many queries, a key and its value each.

    k1 v1 k2 v2 k3 v3 . . k2 v2 . . . . k1 v1 k2 v2 . .        answers are the values of the queries

After MQAR of "Zoology" (arXiv:2312.04927), with three differences. A query is followed by its value, so that targets
are the inputs one token later, as of any text. Queries lie uniformly in what follows the pairs. And their keys are
drawn with replacement: were each asked for once, a model would do well by knowing which values are left.

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
    places = 2 * (pairs + np.sort(rng.permutation(slots)[:pairs]))  # of queries
    asked = rng.integers(0, pairs, pairs)
    tokens[places], tokens[places + 1] = key[asked], value[asked]
    latest, sources = 2 * np.arange(pairs) + 1, np.zeros(pairs, np.int64)
    for query, (pair, place) in enumerate(zip(asked, places, strict=True)):
        sources[query], latest[pair] = latest[pair], place + 1
    return Example(tokens, places + 1, sources)

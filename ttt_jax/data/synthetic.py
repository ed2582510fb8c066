"""Tokens that look random and cost nothing to store: for benchmarks of everything but the data."""

import numpy as np

from ttt_jax.data.token_source import TokenSource

VOCAB_SIZE = 32000
BOS = 1
_DOCUMENT = 4096  # tokens; each begins with BOS
_LENGTHS = {"train": 1 << 40, "validation": 1 << 30, "test": 1 << 30}


class _Tokens:
    """Token i is a hash of i (the finaliser of splitmix64), modulo the vocabulary."""

    def __init__(self, length: int, vocab_size: int, salt: int):
        self._length, self._vocab_size, self._salt = length, vocab_size, salt

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice, /) -> np.ndarray:
        start, stop, _ = where.indices(self._length)
        places = np.arange(start, stop, dtype=np.uint64)
        x = places + np.uint64(self._salt << 48)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        tokens = ((x ^ (x >> np.uint64(31))) % np.uint64(self._vocab_size)).astype(np.uint32)
        tokens[places % np.uint64(_DOCUMENT) == 0] = BOS
        return tokens


class _Documents:
    """Where documents begin."""

    def __init__(self, length: int):
        self._starts = range(0, length, _DOCUMENT)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, where: slice, /) -> np.ndarray:
        part = self._starts[where]
        return np.arange(part.start, part.stop, part.step)


def source(split: str, vocab_size: int) -> TokenSource:
    """A split without end, nearly: 2^40 tokens to train on."""
    salt = 1 + list(_LENGTHS).index(split)
    tokens, documents = _Tokens(_LENGTHS[split], vocab_size, salt), _Documents(_LENGTHS[split])
    fingerprint = f"synthetic-{split}-{vocab_size}"
    return TokenSource(f"synthetic/{split}", tokens, vocab_size, BOS, documents, ("synthetic",), fingerprint)

"""Read a split of a dataset as one long row of N tokens, cut into windows of T tokens.

Window i is tokens [i T, i T + T + 1): the inputs are all but its last token, the targets all but its first. The tokens
after the last whole window, fewer than T + 1, are in no window.
"""

import dataclasses
import hashlib
from typing import Protocol

import numpy as np

from ttt_jax.errors import ConfigError, DataError

_HASHED_WHOLE = 1 << 26  # tokens; a longer row is hashed in blocks
_BLOCKS, _BLOCK = 64, 1 << 12  # their number, and the tokens in each


class Tokens(Protocol):
    """Integers [N], read by slices: a NumPy array, or one on a disk or in a bucket."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """One split of a dataset.

    Attributes:
      name: the dataset and split, or the file, for messages.
      tokens: [N]; documents one after another.
      vocab_size: all tokens are below it; a token that is not raises an error when it is read.
      bos: the token that begins a document, which is no target; None for none.
      documents: [documents], the offset at which each document begins; None if only ``bos`` tells.
      tokenizer: names of the tokenizer that the config may use: kind, name, hash. Empty if unknown.
      known_fingerprint: hash of the tokens, if it is known without reading them.
    """

    name: str
    tokens: Tokens
    vocab_size: int
    bos: int | None
    documents: Tokens | None = None
    tokenizer: tuple[str, ...] = ()
    known_fingerprint: str = ""

    def windows(self, sequence_length: int) -> int:
        """Return the number of windows; each has ``sequence_length`` tokens and one more."""
        return max(0, len(self.tokens) - 1) // sequence_length

    def window(self, index: int, sequence_length: int) -> dict[str, np.ndarray]:
        """Return window ``index``: int32 ``inputs`` and ``targets`` [T], float32 ``mask`` [T]."""
        start = index * sequence_length
        return self.piece(start, start + sequence_length)

    def piece(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return inputs ``[start, stop)`` with their targets and mask, as :meth:`window` does.

        Raises:
          DataError: for a token that is not in the vocabulary.
        """
        tokens = np.asarray(self.tokens[start : stop + 1])
        if tokens.max(initial=0) >= self.vocab_size or tokens.min(initial=0) < 0:
            place = int(np.argmax((tokens >= self.vocab_size) | (tokens < 0)))
            raise DataError(
                f"{self.name}: token {tokens[place]} at offset {start + place}; expected ids below the vocabulary of "
                f"{self.vocab_size}"
            )
        tokens = tokens.astype(np.int32)
        targets = tokens[1:]
        mask = np.ones(len(targets), np.float32) if self.bos is None else (targets != self.bos).astype(np.float32)
        return {"inputs": tokens[:-1], "targets": targets, "mask": mask}

    def fingerprint(self) -> str:
        """Return a short hash of the tokens: equal data, equal fingerprint.

        Of a row that is too long to be hashed whole, blocks are hashed, spread evenly over it.
        """
        if self.known_fingerprint:
            return self.known_fingerprint
        digest, length = hashlib.blake2b(digest_size=8), len(self.tokens)
        if length <= _HASHED_WHOLE:
            digest.update(np.ascontiguousarray(self.tokens[0:length]).data)
        else:
            digest.update(str(length).encode())
            for i in range(_BLOCKS):
                start = i * (length - _BLOCK) // (_BLOCKS - 1)
                digest.update(np.ascontiguousarray(self.tokens[start : start + _BLOCK]).data)
        return digest.hexdigest()


def check(
    source: TokenSource,
    vocab_size: int,
    sequence_length: int,
    windows: int = 1,
    *,
    length_key: str = "data.sequence_length=",
) -> None:
    """Raise :class:`ConfigError` if a source cannot feed a model.

    Args:
      windows: the least number of windows that is needed.
      length_key: the key or option that set the length, for messages.
    """
    if source.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: {source.name} has {source.vocab_size} tokens; "
            f"expected {source.vocab_size} or more"
        )
    if source.windows(sequence_length) < windows:
        raise ConfigError(
            f"{length_key}{sequence_length}: {source.name} has {len(source.tokens)} tokens, which is "
            f"{source.windows(sequence_length)} windows; expected at least {windows}"
        )

"""A split of a dataset as one long row of tokens, and its windows.

Window i of T tokens is tokens [i T, i T + T + 1): the inputs are all but its last token, the targets all but its first.
The tokens behind the last whole window, fewer than T + 1, are in none.
"""

import dataclasses
import hashlib
from typing import Protocol

import numpy as np

from ttt_jax.errors import ConfigError, DataError

_HASHED_WHOLE = 1 << 26  # tokens; of more, blocks are hashed
_BLOCKS, _BLOCK = 64, 1 << 12


class Tokens(Protocol):
    """Integers [N], read by slices: a NumPy array, or one that lies on a disk or in a cloud."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """One split of a dataset.

    Attributes:
      name: the dataset and split, or the file, for messages.
      tokens: [N]; documents one after another.
      vocab_size: all tokens are below it; one that is not is an error where it is met.
      bos: the token that begins a document, not a target; None for none.
      documents: [documents], where each document begins; None where that is not known but by ``bos``.
      tokenizer: names by which the config may call what made the tokens: kind, name, hash. Empty: not known.
      known_fingerprint: hash of the tokens, where one is at hand.
    """

    name: str
    tokens: Tokens
    vocab_size: int
    bos: int | None
    documents: Tokens | None = None
    tokenizer: tuple[str, ...] = ()
    known_fingerprint: str = ""

    def windows(self, sequence_length: int) -> int:
        """Number of windows of ``sequence_length`` tokens and one more."""
        return max(0, len(self.tokens) - 1) // sequence_length

    def window(self, index: int, sequence_length: int) -> dict[str, np.ndarray]:
        """Window ``index``: int32 ``inputs`` and ``targets`` [T], float32 ``mask`` [T]."""
        start = index * sequence_length
        return self.piece(start, start + sequence_length)

    def piece(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Inputs ``[start, stop)`` with the targets that follow them; as :meth:`window`.

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
        """Short hash: equal data, equal fingerprint. Of a very long row that nobody has hashed, blocks all over it."""
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
    length_is: str = "data.sequence_length=",
) -> None:
    """Raises :class:`ConfigError` where a source cannot feed a model; ``length_is`` says where the length is from."""
    if source.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: {source.name} has {source.vocab_size} tokens; "
            f"expected {source.vocab_size} or more"
        )
    if source.windows(sequence_length) < windows:
        raise ConfigError(
            f"{length_is}{sequence_length}: {source.name} has {len(source.tokens)} tokens, which is "
            f"{source.windows(sequence_length)} windows; expected at least {windows}"
        )

"""A split of a dataset as one long row of tokens, and its windows.

Window i of T tokens is tokens [i T, i T + T + 1): the inputs are all but its last token, the targets all but its first.
"""

import dataclasses
import hashlib

import numpy as np

from ttt_jax.config import ConfigError
from ttt_jax.data import embedded

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """One split of a dataset.

    Attributes:
      name: the dataset and split, for messages.
      tokens: [N], unsigned integers; documents one after another, each beginning with ``bos``.
      vocab_size: all tokens are below it.
      bos: the token that begins a document; not a target.
    """

    name: str
    tokens: np.ndarray
    vocab_size: int
    bos: int

    def windows(self, sequence_length: int) -> int:
        """Number of windows of ``sequence_length`` tokens and one more."""
        return (len(self.tokens) - 1) // sequence_length

    def window(self, index: int, sequence_length: int) -> dict[str, np.ndarray]:
        """Window ``index``: int32 ``inputs`` and ``targets`` [T], float32 ``mask`` [T]."""
        start = index * sequence_length
        tokens = np.asarray(self.tokens[start : start + sequence_length + 1], np.int32)
        targets = tokens[1:]
        return {"inputs": tokens[:-1], "targets": targets, "mask": (targets != self.bos).astype(np.float32)}

    def fingerprint(self) -> str:
        """Short hash of every token: equal data, equal fingerprint."""
        return hashlib.blake2b(np.ascontiguousarray(self.tokens).data, digest_size=8).hexdigest()


def load(name: str, split: str) -> TokenSource:
    """The split of the dataset that ``config.data.source`` names.

    Raises:
      ConfigError: for an unknown source or split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if name != "embedded":
        raise ConfigError(f"data.source={name!r}: expected embedded")
    return TokenSource(f"embedded/{split}", embedded.tokens(split), embedded.VOCAB_SIZE, embedded.BOS)


def check(source: TokenSource, vocab_size: int, sequence_length: int, windows: int = 1) -> None:
    """Raises :class:`ConfigError` where a source cannot feed a model."""
    if source.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: {source.name} has {source.vocab_size} tokens; "
            f"expected {source.vocab_size} or more"
        )
    if source.windows(sequence_length) < windows:
        raise ConfigError(
            f"data.sequence_length={sequence_length}: {source.name} has {len(source.tokens)} tokens, which is "
            f"{source.windows(sequence_length)} windows; expected at least {windows}"
        )

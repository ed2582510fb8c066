"""Tokenize one unit of records: a pure function of a job and a unit, which any process or machine can call."""

import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.data.prepare import records
from ttt_jax.data.prepare.tokenizer import Encode, Tokenizer


@dataclasses.dataclass(frozen=True)
class Job:
    """How texts become tokens, the same for all units.

    Attributes:
      bos, eos: ids put before and after every document; None for none. If both are one token, as in GPT-2, it is put
        only after documents, and ``bos`` is None: documents are separated once, and their ends are targets.
      text_key: the key of the text in a record.
      validation_fraction, test_fraction: fractions of the documents of train files that go to these splits instead, by
        a hash of their text and ``split_seed``.
    """

    tokenizer: Tokenizer
    bos: int | None
    eos: int | None
    text_key: str = "text"
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Leave out a BOS that is the EOS."""
        if self.bos is not None and self.bos == self.eos:
            object.__setattr__(self, "bos", None)

    @property
    def dtype(self) -> str:
        """Return the smallest type that holds all tokens: uint16 or uint32."""
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    @functools.cached_property
    def encode(self) -> Encode:
        """Return the tokenizer's encoder, which is loaded once in each process."""
        return self.tokenizer.encoder()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def split_of(self, split: str, text: bytes) -> str:
        """Return the split of a document in a file of ``split``.

        The hash depends on the document and the seed alone, so that a document stays in its split whatever others come
        or go, and copies of a document are in one split.
        """
        if split != "train" or not self.validation_fraction + self.test_fraction:
            return split
        seeded = hashlib.blake2b(text, digest_size=8, salt=self.split_seed.to_bytes(16))
        place = int.from_bytes(seeded.digest()) / 2**64
        if place < self.validation_fraction:
            return "validation"
        return "test" if place < self.validation_fraction + self.test_fraction else "train"


class Piece(NamedTuple):
    """Documents of one split, one after another.

    Attributes:
      tokens: [N].
      lengths: [documents], the number of tokens of each.
      text_bytes: size of the texts.
      unknown: number of tokens that stand for characters without a token.
      empty: number of documents whose text has no tokens.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    unknown: int = 0
    empty: int = 0


class Part(NamedTuple):
    """The tokens of a unit by split, and the records that could not be read."""

    pieces: dict[str, Piece]
    problems: list[records.Problem]


def tokenize(job: Job, split: str, unit: records.Unit) -> Part:
    """Return the tokens of the documents of a unit, by split."""
    found: dict[str, tuple[list[np.ndarray], list[int], list[int], list[int], list[bool]]] = {}
    problems = []
    encode, unknown = job.encode, job.tokenizer.unknown
    first, last = ([] if token is None else [np.array([token], job.dtype)] for token in (job.bos, job.eos))
    for record in records.texts(unit, job.text_key):
        if isinstance(record, records.Problem):
            problems.append(record)
            continue
        number, content = record
        try:
            encoded = encode(content).astype(job.dtype)
        except MemoryError:
            raise
        except Exception as error:  # tokenizers raise errors of many types
            problems.append(records.Problem(number, f"the tokenizer failed: {error}"))
            continue
        text = content.encode()
        tokens, lengths, sizes, unknowns, empty = found.setdefault(job.split_of(split, text), ([], [], [], [], []))
        document = [*first, encoded, *last]
        tokens += document
        lengths.append(sum(map(len, document)))
        sizes.append(len(text))
        unknowns.append(0 if unknown is None else int(np.count_nonzero(encoded == unknown)))
        empty.append(not len(encoded))
    pieces = {
        name: Piece(np.concatenate(tokens), np.array(lengths, np.int64), sum(sizes), sum(unknowns), sum(empty))
        for name, (tokens, lengths, sizes, unknowns, empty) in found.items()
        if lengths
    }
    return Part(pieces, problems)

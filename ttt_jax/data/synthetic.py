"""Draw synthetic data, which needs no files: random tokens, and tasks with one right answer.

Both are long rows of tokens that are computed when they are read. Random tokens, ``synthetic``, are for benchmarks of
everything but the data. The tasks, ``associative_recall`` and ``selective_copying``, are sequences of equal length, of
which only the answers count as targets.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import ConfigError

RANDOM_VOCAB_SIZE, RANDOM_BOS = 32000, 1
TASK_VOCAB_SIZE, DEFAULT_ITEMS, DEFAULT_LENGTH = 64, 8, 64
_DOCUMENT = 4096  # random tokens in a document; each document begins with BOS
_LENGTHS = {"train": 1 << 40, "validation": 1 << 30, "test": 1 << 30}  # tokens
_MARKER = 1  # of selective copying


# ---- Random tokens


class _RandomTokens:
    """Token i is a hash of i (the finaliser of splitmix64), modulo the vocabulary."""

    def __init__(self, length: int, vocab_size: int, salt: int):
        self._length, self._vocab_size, self._salt = length, vocab_size, salt

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice, /) -> np.ndarray:
        start, stop, _ = index.indices(self._length)
        indices = np.arange(start, stop, dtype=np.uint64)
        x = indices + np.uint64(self._salt << 48)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        tokens = ((x ^ (x >> np.uint64(31))) % np.uint64(self._vocab_size)).astype(np.uint32)
        tokens[indices % np.uint64(_DOCUMENT) == 0] = RANDOM_BOS
        return tokens


class _RandomDocuments:
    """The offsets at which random documents begin."""

    def __init__(self, length: int):
        self._starts = range(0, length, _DOCUMENT)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: slice, /) -> np.ndarray:
        part = self._starts[index]
        return np.arange(part.start, part.stop, part.step)


def random_source(split: str, vocab_size: int) -> TokenSource:
    """Return a split of random tokens."""
    salt = 1 + list(_LENGTHS).index(split)
    tokens, documents = _RandomTokens(_LENGTHS[split], vocab_size, salt), _RandomDocuments(_LENGTHS[split])
    fingerprint = f"synthetic-{split}-{vocab_size}"
    return TokenSource(f"synthetic/{split}", tokens, vocab_size, RANDOM_BOS, documents, ("synthetic",), fingerprint)


# ---- Tasks


class Example(NamedTuple):
    """A sequence of a task.

    Attributes:
      tokens: [N], int32.
      answers: [n], indices of the tokens that can be known from those before them.
      sources: [n], for each answer the latest index before it at which the same item was read.
    """

    tokens: np.ndarray
    answers: np.ndarray
    sources: np.ndarray


class Task(NamedTuple):
    """A kind of sequence, of so many items.

    Attributes:
      draw: ``draw(rng, length, items, vocab_size)`` returns a sequence of ``length`` tokens.
      least_length: ``least_length(items)``, the fewest tokens that hold so many items.
      least_vocab_size: ``least_vocab_size(items)``.
      items: what the items are, in the plural.
    """

    draw: Callable[[np.random.Generator, int, int, int], Example]
    least_length: Callable[[int], int]
    least_vocab_size: Callable[[int], int]
    items: str


def _draw_recall(rng: np.random.Generator, length: int, pairs: int, vocab_size: int) -> Example:
    """Draw key-value pairs, then as many queries, each a key followed by its value. The answers are these values.

        k1 v1 k2 v2 k3 v3 . . k2 v2 . . . . k1 v1 k2 v2 . .

    This is MQAR of "Zoology" (arXiv:2312.04927) with three differences. A query is followed by its value, so that
    targets are the inputs one token later, as in text. Queries lie uniformly in what follows the pairs. Their keys are
    drawn with replacement: were each asked for once, a model would do well by knowing which values are left.

    Token 0 is filler, the lower half of the other tokens are keys, the upper half are values. Keys are distinct; values
    need not be.
    """
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


def _draw_copying(rng: np.random.Generator, length: int, symbols: int, vocab_size: int) -> Example:
    """Draw symbols among noise at random places, then a marker, then the same symbols in order. These are the answers.

        . . c . . . a . . b . a . . . . | c a b a

    This is selective copying of "Mamba" (arXiv:2312.00752), where the marker is repeated in the place of the answers;
    here the answers are read, too, so that targets are the inputs one token later, as in text.

    Token 0 is noise, 1 the marker, the others are symbols, which may repeat.
    """
    tokens = np.zeros(length, np.int32)
    marker = length - symbols - 1
    places = np.sort(rng.permutation(marker)[:symbols])
    tokens[places] = rng.integers(_MARKER + 1, vocab_size, symbols)
    tokens[marker] = _MARKER
    tokens[marker + 1 :] = tokens[places]
    return Example(tokens, np.arange(marker + 1, length), places)


TASKS = {
    # Filler, as many keys as pairs, and as many values.
    "associative_recall": Task(_draw_recall, lambda pairs: 4 * pairs, lambda pairs: 2 * max(pairs, 2) + 1, "pairs"),
    # Noise, marker, and two symbols to tell apart.
    "selective_copying": Task(_draw_copying, lambda symbols: 2 * symbols + 1, lambda symbols: 4, "symbols"),
}


class _Row:
    """Sequences of equal length, one after another; each is drawn when it is read."""

    def __init__(self, draw: Callable[[int], Example], sequence_length: int, length: int):
        self._draw, self._sequence_length, self._length = draw, sequence_length, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice, /) -> np.ndarray:
        start, stop, _ = index.indices(self._length)
        return self.read(start, stop)[0]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens ``[start, stop)``, and for each whether it is an answer, 0 or 1."""
        first, last = start // self._sequence_length, -(-stop // self._sequence_length)
        examples = [self._draw(index) for index in range(first, max(last, first + 1))]
        tokens = np.concatenate([example.tokens for example in examples])
        answers = np.zeros(len(tokens), np.float32)
        for i, example in enumerate(examples):
            answers[i * self._sequence_length + example.answers] = 1
        part = slice(start - first * self._sequence_length, stop - first * self._sequence_length)
        return tokens[part], answers[part]


@dataclasses.dataclass(frozen=True)
class TaskSource(TokenSource):
    """One split of a task: sequences of equal length in a row, of which only answers count as targets.

    A window of that length is one sequence; a longer window is several sequences, one after another.
    """

    task: str = ""
    items: int = DEFAULT_ITEMS
    sequence_length: int = DEFAULT_LENGTH
    split: str = "train"

    def example(self, index: int) -> Example:
        """Return sequence ``index``, with the indices of its answers."""
        seed = list(_LENGTHS).index(self.split), self.items, self.sequence_length, index
        return TASKS[self.task].draw(np.random.default_rng(seed), self.sequence_length, self.items, self.vocab_size)

    def piece(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return what any source does; the ``mask`` is 1 where the target is an answer."""
        assert isinstance(self.tokens, _Row)
        tokens, answers = self.tokens.read(start, stop + 1)
        return {"inputs": tokens[:-1], "targets": tokens[1:], "mask": answers[1:]}


def is_task(location: str) -> bool:
    """Return whether a ``data.source`` is a task: its name, and after a colon the number of items if it is not 8."""
    return location.partition(":")[0] in TASKS


def task_source(location: str, split: str, vocab_size: int, sequence_length: int = DEFAULT_LENGTH) -> TaskSource:
    """Return a split of a task. Splits are drawn from different seeds.

    Args:
      location: ``associative_recall``, ``selective_copying``, or with the number of items, ``selective_copying:16``.
      vocab_size: of the model; all of it is used.
      sequence_length: tokens of each sequence.

    Raises:
      ConfigError: for a number of items that is not a number, or does not fit the vocabulary or the sequences.
    """
    name, _, number = location.partition(":")
    task = TASKS[name]
    if number and not (number.isdecimal() and 1 <= int(number) < 1 << 20):
        raise ConfigError(f"data.source={location!r}: expected a number of {task.items} after the colon, such as 8")
    items = int(number) if number else DEFAULT_ITEMS
    needs = f"{name} of {items} {task.items} needs"
    if vocab_size < task.least_vocab_size(items):
        raise ConfigError(f"model.vocab_size={vocab_size}: {needs} {task.least_vocab_size(items)} or more")
    if sequence_length < task.least_length(items):
        raise ConfigError(f"data.sequence_length={sequence_length}: {needs} {task.least_length(items)} or more")
    found = TaskSource(
        name=f"{name}:{items}/{split}",
        tokens=np.zeros(0),
        vocab_size=vocab_size,
        bos=None,
        tokenizer=(name,),
        known_fingerprint=f"{name}:{items}-{split}-{sequence_length}-{vocab_size}",
        task=name,
        items=items,
        sequence_length=sequence_length,
        split=split,
    )
    return dataclasses.replace(found, tokens=_Row(found.example, sequence_length, _LENGTHS[split]))

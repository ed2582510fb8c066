"""Synthetic tasks to train on: sequences without end, each a function of its index; only answers count."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ttt_jax.data import associative_recall, selective_copying
from ttt_jax.data.task_example import Example
from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import ConfigError


class Task(NamedTuple):
    """A kind of sequence.

    Attributes:
      draw: ``draw(rng, length, items, vocab_size)``, a sequence of that many tokens.
      least_length: ``least_length(items)``, tokens that it needs.
      least_vocab_size: ``least_vocab_size(items)``.
      items: what there are several of, in words.
    """

    draw: Callable[[np.random.Generator, int, int, int], Example]
    least_length: Callable[[int], int]
    least_vocab_size: Callable[[int], int]
    items: str


TASKS = {
    module.NAME: Task(module.draw, module.least_length, module.least_vocab_size, module.ITEMS)
    for module in (associative_recall, selective_copying)
}
DEFAULT_ITEMS, DEFAULT_LENGTH, VOCAB_SIZE = 8, 64, 64
_LENGTHS = {"train": 1 << 40, "validation": 1 << 30, "test": 1 << 30}  # tokens


class _Row:
    """Sequences of equal length, one after another; each is drawn when it is read."""

    def __init__(self, draw: Callable[[int], Example], sequence_length: int, length: int):
        self._draw, self._sequence_length, self._length = draw, sequence_length, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice, /) -> np.ndarray:
        start, stop, _ = where.indices(self._length)
        return self.read(start, stop)[0]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens ``[start, stop)``, and which of them are answers, 0 or 1."""
        first, last = start // self._sequence_length, -(-stop // self._sequence_length)
        examples = [self._draw(index) for index in range(first, max(last, first + 1))]
        tokens = np.concatenate([example.tokens for example in examples])
        answers = np.zeros(len(tokens), np.float32)
        for i, example in enumerate(examples):
            answers[i * self._sequence_length + example.answers] = 1
        here = slice(start - first * self._sequence_length, stop - first * self._sequence_length)
        return tokens[here], answers[here]


@dataclasses.dataclass(frozen=True)
class TaskSource(TokenSource):
    """One split of a synthetic task: sequences of equal length in a row, of which only answers count as targets.

    Windows of that length are a sequence each; longer windows are several sequences, one after another.
    """

    task: str = ""
    items: int = DEFAULT_ITEMS
    sequence_length: int = DEFAULT_LENGTH
    split: str = "train"

    def example(self, index: int) -> Example:
        """Sequence ``index``, with the places of its answers."""
        key = list(_LENGTHS).index(self.split), self.items, self.sequence_length, index
        return TASKS[self.task].draw(np.random.default_rng(key), self.sequence_length, self.items, self.vocab_size)

    def piece(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """As of any source; the ``mask`` is 1 where the target is an answer."""
        assert isinstance(self.tokens, _Row)
        tokens, answers = self.tokens.read(start, stop + 1)
        return {"inputs": tokens[:-1], "targets": tokens[1:], "mask": answers[1:]}


def named(location: str) -> bool:
    """Whether a ``data.source`` is a task: its name, and after a colon how many items if not 8."""
    return location.partition(":")[0] in TASKS


def source(location: str, split: str, vocab_size: int, sequence_length: int = DEFAULT_LENGTH) -> TaskSource:
    """A split of a task. Splits are drawn from different seeds.

    Args:
      location: ``associative_recall``, ``selective_copying``, or with the number of items, ``selective_copying:16``.
      vocab_size: of the model; all of it is used.
      sequence_length: tokens of each sequence.

    Raises:
      ConfigError: for a number of items that is none, or does not fit the vocabulary or the sequences.
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

"""Synthetic tasks to train on: sequences without end, each a function of its index, with loss on the answers alone."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np

from ttt_jax.config import ConfigError
from ttt_jax.data import associative_recall, selective_copying
from ttt_jax.data.source import TokenSource
from ttt_jax.data.task_example import Example


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
DEFAULT_ITEMS, VOCAB_SIZE = 8, 64
_LENGTHS = {"train": 1 << 40, "validation": 1 << 30, "test": 1 << 30}  # tokens


class _Nothing:
    """The tokens of a source that has sequences only: so many, and none of them in a row."""

    def __init__(self, name: str, length: int):
        self._name, self._length = name, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice, /) -> np.ndarray:
        raise ConfigError(f"{self._name}: is sequences, not one long row of tokens; expected windows to be asked for")


@dataclasses.dataclass(frozen=True)
class TaskSource(TokenSource):
    """One split of a synthetic task: a source whose window ``index`` of T tokens is a sequence drawn for it.

    A longer window is a longer sequence of as many items, so a model can be evaluated on contexts beyond those it was
    trained on. Splits draw from different seeds.
    """

    task: str = ""
    items: int = DEFAULT_ITEMS
    split: str = "train"

    _SEEDS: ClassVar = {split: i for i, split in enumerate(_LENGTHS)}

    def example(self, index: int, sequence_length: int) -> Example:
        """The sequence of a window, with the places of its answers: T + 1 tokens.

        Raises:
          ConfigError: where T is too short for the items.
        """
        task, length = TASKS[self.task], sequence_length + 1
        if length < task.least_length(self.items):
            raise ConfigError(
                f"{self.name}: {self.items} {task.items} do not fit {sequence_length} tokens; "
                f"expected {task.least_length(self.items) - 1} tokens or more"
            )
        rng = np.random.default_rng([self._SEEDS[self.split], self.items, sequence_length, index])
        return task.draw(rng, length, self.items, self.vocab_size)

    def window(self, index: int, sequence_length: int) -> dict[str, np.ndarray]:
        """Window ``index``: int32 ``inputs`` and ``targets`` [T], float32 ``mask`` [T], 1 where the target is an
        answer."""
        tokens, answers, _ = self.example(index, sequence_length)
        mask = np.zeros(sequence_length, np.float32)
        mask[answers - 1] = 1
        return {"inputs": tokens[:-1], "targets": tokens[1:], "mask": mask}


def named(location: str) -> bool:
    """Whether a ``data.source`` is a task: its name, and after a colon how many items if not 8."""
    return location.partition(":")[0] in TASKS


def source(location: str, split: str, vocab_size: int) -> TaskSource:
    """A split of a task.

    Args:
      location: ``associative_recall``, ``selective_copying``, or with the number of items, ``selective_copying:16``.
      vocab_size: of the model; all of it is used.

    Raises:
      ConfigError: for a number of items that is none, or does not fit the vocabulary.
    """
    name, _, number = location.partition(":")
    task = TASKS[name]
    if number and not (number.isdecimal() and 1 <= int(number) < 1 << 20):
        raise ConfigError(f"data.source={location!r}: expected a number of {task.items} after the colon, such as 8")
    items = int(number) if number else DEFAULT_ITEMS
    if vocab_size < task.least_vocab_size(items):
        raise ConfigError(
            f"model.vocab_size={vocab_size}: {name} of {items} {task.items} needs {task.least_vocab_size(items)} "
            "tokens or more"
        )
    full_name = f"{name}:{items}"
    return TaskSource(
        name=f"{full_name}/{split}",
        tokens=_Nothing(f"{full_name}/{split}", _LENGTHS[split]),
        vocab_size=vocab_size,
        bos=None,
        tokenizer=(name,),
        known_fingerprint=f"{full_name}-{split}-{vocab_size}",
        task=name,
        items=items,
        split=split,
    )

"""What a needle and its question are: the single-needle tasks of RULER (arXiv:2404.06654), as text.

A special magic number is hidden within the following text. ...          INTRODUCTION
... haystack ... One of the special magic numbers for KEY is: VALUE. ... haystack ...
What is the special magic number for KEY mentioned in the provided text?
The special magic number for KEY mentioned in the provided text is VALUE
"""

import uuid
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = """able ancient bitter brave bright calm careful cheap clean clever cold curious deep dull eager early
    faint fair famous fierce gentle grand happy heavy honest humble jolly kind lazy light lively lonely loud lucky mild
    modest narrow noble odd patient plain polite proud quick quiet rapid rare rough sharp shy silent sleepy smooth soft
    solid steady strange strict sudden sweet tall thick tiny warm""".split()
_NOUNS = """anchor apple arrow basket bell bird boat bottle branch bridge bucket button candle carpet castle chair clock
    cloud coat corner cottage cousin curtain desk door engine farmer feather fence field finger flower forest garden
    glove hammer harbor hat horse hospital island jacket kettle kitchen ladder lamp lantern letter market mirror
    mountain needle ocean orchard paper pencil pillow pocket river road saddle shadow spoon valley window""".split()


class Task(NamedTuple):
    """One of RULER's single-needle tasks.

    Attributes:
      name: what RULER calls it.
      kind: of what is hidden, in a sentence.
      noise: whether the haystack is :data:`NOISE` over and over; else prose.
      value: draws what is hidden.
    """

    name: str
    kind: str
    noise: bool
    value: Callable[[np.random.Generator], str]


class Needle(NamedTuple):
    """What is hidden in one example.

    Attributes:
      task: what kind of needle it is.
      key: what is asked for, a word.
      values: what could be the answer, all different; the first of them is.
    """

    task: Task
    key: str
    values: tuple[str, ...]

    @property
    def introduction(self) -> str:
        """What the prompt begins with."""
        kind = self.task.kind
        return (
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards."
        )

    @property
    def sentence(self) -> str:
        """What is hidden in the haystack."""
        return f"One of the special magic {self.task.kind}s for {self.key} is: {self.values[0]}."

    @property
    def question(self) -> str:
        """What the prompt ends with, up to the answer."""
        kind, key = self.task.kind, self.key
        return (
            f"What is the special magic {kind} for {key} mentioned in the provided text? "
            f"The special magic {kind} for {key} mentioned in the provided text is"
        )


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(1_000_000, 10_000_000))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


TASKS = {
    "passkey": Task("S-NIAH-1", "number", True, _number),
    "number": Task("S-NIAH-2", "number", False, _number),
    "uuid": Task("S-NIAH-3", "uuid", False, _uuid),
}


def draw(rng: np.random.Generator, task: Task, candidates: int) -> Needle:
    """A needle and so many values that it could have, its own among them."""
    key = f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"
    values: dict[str, None] = {}
    while len(values) < candidates:
        values[task.value(rng)] = None
    return Needle(task, key, tuple(values))

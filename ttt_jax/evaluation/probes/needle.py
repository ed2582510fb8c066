"""Draw needles and cut haystacks, as text: the single-needle tasks of RULER (arXiv:2404.06654).

A special magic number is hidden within the following text. ...          INTRODUCTION
... haystack ... One of the special magic numbers for KEY is: VALUE. ... haystack ...
What is the special magic number for KEY mentioned in the provided text?
The special magic number for KEY mentioned in the provided text is VALUE
"""

import hashlib
import re
import uuid
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ttt_jax.data.prepare import files
from ttt_jax.data.prepare.tokenizer import Decode
from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import ConfigError

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
      name: the name in RULER.
      kind: the word for the hidden value in a sentence.
      noise: whether the haystack is :data:`NOISE`, repeated; otherwise it is prose.
      value: draws the hidden value.
    """

    name: str
    kind: str
    noise: bool
    value: Callable[[np.random.Generator], str]


class Needle(NamedTuple):
    """The needle of one example.

    Attributes:
      task: of the needle.
      key: the word that the question asks for.
      values: the candidates, all different; the first is the answer.
    """

    task: Task
    key: str
    values: tuple[str, ...]

    @property
    def introduction(self) -> str:
        """Return the beginning of the prompt."""
        kind = self.task.kind
        return (
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards."
        )

    @property
    def sentence(self) -> str:
        """Return the sentence that is hidden in the haystack."""
        return f"One of the special magic {self.task.kind}s for {self.key} is: {self.values[0]}."

    @property
    def question(self) -> str:
        """Return the end of the prompt, up to the answer."""
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
    """Draw a needle with a number of candidates, its own value first."""
    key = f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"
    values: dict[str, None] = {}
    while len(values) < candidates:
        values[task.value(rng)] = None
    return Needle(task, key, tuple(values))


# A unit ends with a sentence or a paragraph, and begins with the white space before it.
_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*(?=\s)|[^\n](?=\n\s*\n)")
_PROBED = 1 << 16  # tokens per read while searching for text
_LONGEST = 300  # characters of a unit; longer ones are cut between words


class Haystack(NamedTuple):
    """Text to hide needles in.

    Attributes:
      name: a description in words.
      fingerprint: a short hash of the text.
      before_needle: the white space before a needle.
      units: ``units(place, size)`` returns at least ``size`` tokens or characters of text, from the position ``place``
        (0 to 1) on. The text repeats after its end.
    """

    name: str
    fingerprint: str
    before_needle: str
    units: Callable[[float, int], list[str]]


def noise_haystack() -> Haystack:
    """Return RULER's five sentences, repeated."""

    def units(place: float, size: int) -> list[str]:
        return ["\n" + NOISE] * (1 + size)  # a unit is more than a token

    return Haystack("noise", "noise", "\n", units)


def haystack_of_source(source: TokenSource, decode: Decode) -> Haystack:
    """Return the text of a split of a dataset, documents one after another.

    Raises:
      ConfigError: if it has no text.
    """

    def read(start: int, stop: int) -> str:
        return decode(np.asarray(source.tokens[start:stop]))

    if not any(read(start, start + _PROBED).strip() for start in range(0, len(source.tokens), _PROBED)):
        raise ConfigError(f"{source.name}: no text in it; expected --haystack FILE, or a --split that has some")
    return _prose(source.name, source.fingerprint(), len(source.tokens), read)


def haystack_of_file(location: str) -> Haystack:
    """Return the text of a file in UTF-8.

    Raises:
      ConfigError: if the file does not exist, or is not text.
    """
    try:
        text = files.read(location, "--haystack").decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--haystack {location}: not UTF-8 text; expected a text file") from error
    if not text.strip():
        raise ConfigError(f"--haystack {location}: no text in it")
    fingerprint = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return _prose(location.rsplit("/", 1)[-1], fingerprint, len(text), lambda start, stop: text[start:stop])


def _prose(name: str, fingerprint: str, length: int, read: Callable[[int, int], str]) -> Haystack:
    def units(place: float, size: int) -> list[str]:
        start = int(place * length)
        stop = min(start + size, length)
        again, rest = divmod(size - (stop - start), length)
        parts = [read(start, stop), read(0, length) * again if again else "", read(0, rest) if rest else ""]
        return split_into_units("".join(parts))[1:]  # the first unit has lost its beginning

    return Haystack(name, fingerprint, " ", units)


def split_into_units(text: str) -> list[str]:
    """Split a text into units, which together are the whole text."""
    ends = [match.end() for match in _END.finditer(text)]
    units = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if end > start]
    return [part for unit in units for part in re.findall(rf"(?s).{{1,{_LONGEST}}}(?=\s|$)|.{{1,{_LONGEST}}}", unit)]

"""Haystacks: text without end to hide needles in, in units that a needle may stand between."""

import hashlib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ttt_jax.data.prepare import files
from ttt_jax.data.prepare.tokenizer import Decode
from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation.probes import needle

# A unit ends with a sentence or a paragraph, and begins with the white space before it.
_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*(?=\s)|[^\n](?=\n\s*\n)")
_LOOKED_AT = 1 << 16  # tokens at a time, until some text is found
_LONGEST = 300  # characters; longer ones are cut between words


class Haystack(NamedTuple):
    """Text to hide needles in.

    Attributes:
      name: what it is, in words.
      fingerprint: short hash: equal text, equal fingerprint.
      before_needle: white space.
      units: ``units(place, size)``: text of at least so many tokens or characters, from a place in it (0 to 1) on.
        Where it ends it begins anew.
    """

    name: str
    fingerprint: str
    before_needle: str
    units: Callable[[float, int], list[str]]


def noise() -> Haystack:
    """RULER's five sentences, over and over."""

    def units(place: float, size: int) -> list[str]:
        return ["\n" + needle.NOISE] * (1 + size)  # a unit is more than a token

    return Haystack("noise", "noise", "\n", units)


def of_source(source: TokenSource, decode: Decode) -> Haystack:
    """Return the text of a split of a dataset, documents one after another.

    Raises:
      ConfigError: where there is no text in it.
    """

    def read(start: int, stop: int) -> str:
        return decode(np.asarray(source.tokens[start:stop]))

    if not any(read(start, start + _LOOKED_AT).strip() for start in range(0, len(source.tokens), _LOOKED_AT)):
        raise ConfigError(f"{source.name}: no text in it; expected --haystack FILE, or a --split that has some")
    return _prose(source.name, source.fingerprint(), len(source.tokens), read)


def of_file(location: str) -> Haystack:
    """The text of a file, UTF-8.

    Raises:
      ConfigError: where there is no such file, or it is no text.
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
        return split("".join(parts))[1:]  # the first one has lost its beginning

    return Haystack(name, fingerprint, " ", units)


def split(text: str) -> list[str]:
    """A text in its units; nothing is left out."""
    ends = [match.end() for match in _END.finditer(text)]
    units = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if end > start]
    return [part for unit in units for part in re.findall(rf"(?s).{{1,{_LONGEST}}}(?=\s|$)|.{{1,{_LONGEST}}}", unit)]

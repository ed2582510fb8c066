"""Declare the keys of a config section: each field of a dataclass has a default, a meaning and what it accepts.

    @dataclasses.dataclass(frozen=True)
    class Sliding:
        window: int = setting(1024, "tokens that a token sees, itself included", least=1)

A field whose type is ``int | None`` or the like is unset until it is set.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any

from ttt_jax.errors import ConfigError


def setting(
    default: Any,
    meaning: str,
    *,
    among: Collection[Any] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    changes_results: bool = True,
) -> Any:
    """Return a dataclass field of a config section.

    Args:
      default: of its key; None where the key is unset at first.
      meaning: one line for ``ttt config --help`` and the docs.
      among: the only values that are accepted, where it is not empty.
      least, above, below: bounds of a number: at least, more than, less than.
      changes_results: whether another value would compute other numbers, so that a run cannot go on with it.
    """
    accepts = Accepts(tuple(among), least, above, below)
    return dataclasses.field(
        default=default, metadata={"meaning": meaning, "accepts": accepts, "changes_results": changes_results}
    )


class Accepts(typing.NamedTuple):
    """What a key accepts; all values of its type where nothing is said."""

    among: tuple[Any, ...] = ()
    least: float | None = None
    above: float | None = None
    below: float | None = None

    def check(self, key: str, value: Any) -> None:
        """Raise :class:`ConfigError` where ``value`` is not accepted; None stands for an unset key, and is."""
        if value is None:
            return
        if self.among and value not in self.among:
            raise ConfigError(f"{key}={value!r}: expected one of {', '.join(map(str, self.among))}")
        bounds = (self.least, self.above, self.below)
        if all(bound is None for bound in bounds):
            return
        fits = math.isfinite(value)
        fits = fits and (self.least is None or value >= self.least)
        fits = fits and (self.above is None or value > self.above)
        fits = fits and (self.below is None or value < self.below)
        if not fits:
            raise ConfigError(f"{key}={value}: expected {self.in_words()}")

    def in_words(self) -> str:
        """Return the bounds as a phrase, such as ``1 or more``."""
        if self.below is not None:
            return f"a number from {self.least:g} to below {self.below:g}"
        if self.above is not None:
            return "a positive number" if self.above == 0 else f"a number above {self.above:g}"
        return f"{self.least:g} or more"


class Setting(typing.NamedTuple):
    """A field of a config section, as :func:`of` finds it."""

    name: str
    default: Any  # None where it is unset
    kind: type  # of its values, also of one that is unset
    meaning: str
    accepts: Accepts
    changes_results: bool


def of(section: type) -> Iterator[Setting]:
    """Yield the settings of a section, in order."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            (kind,) = (each for each in kind.__args__ if each is not types.NoneType)
        meta = field.metadata
        yield Setting(field.name, field.default, kind, meta["meaning"], meta["accepts"], meta["changes_results"])


def differing_keys(a: dict, b: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ between two nested dicts, with both values; None is a missing key."""
    found = {}
    for key in sorted(a.keys() | b.keys()):
        left, right, name = a.get(key), b.get(key), f"{prefix}{key}"
        if isinstance(left, dict) and isinstance(right, dict):
            found.update(differing_keys(left, right, name + "."))
        elif left != right:
            found[name] = (left, right)
    return found

"""Declare the keys of a config section: each field of a dataclass has a default, a meaning and what it accepts.

    @dataclasses.dataclass(frozen=True)
    class Sliding:
        window: int = setting(1024, "tokens that a token sees, itself included", least=1)

The type of a field is bool, int, float, str or :class:`Duration` (a text). A field of type ``int | None`` or the like
may be unset, which is None.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any

from ttt_jax.errors import ConfigError


class Duration(str):
    """The type of a key whose text is a duration, such as ``"300 steps"`` (:func:`ttt_jax.config.steps`)."""


def setting(
    default: Any,
    meaning: str,
    *,
    among: Collection[Any] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    changes_results: bool = True,
    may_change: bool | None = None,
    takes_function: bool = False,
) -> Any:
    """Return a dataclass field of a config section.

    Args:
      default: the value of the key where none is given; None where the key is unset by default.
      meaning: one line for ``ttt config --help`` and the docs.
      among: the values that are accepted; any where it is empty.
      least, above, below: bounds of a number: at least, more than, less than.
      changes_results: whether training with another value gives another model, apart from rounding.
      may_change: whether a run may be continued with another value; by default where it changes no results.
      takes_function: whether the value may be the import path of a function of the user's own
        (:mod:`ttt_jax.import_path`).
    """
    metadata = {
        "meaning": meaning,
        "accepts": Accepts(tuple(among), least, above, below),
        "changes_results": changes_results,
        "may_change": not changes_results if may_change is None else may_change,
        "takes_function": takes_function,
    }
    return dataclasses.field(default=default, metadata=metadata)


class Accepts(typing.NamedTuple):
    """The values that a key accepts: all of its type, unless a choice or bounds are given."""

    among: tuple[Any, ...] = ()
    least: float | None = None
    above: float | None = None
    below: float | None = None

    def check(self, key: str, value: Any) -> None:
        """Raise :class:`ConfigError` where ``value`` is not accepted."""
        if self.among and value not in self.among:
            raise ConfigError(f"{key}={value!r}: expected one of {', '.join(map(str, self.among))}")
        bounds = (self.least, self.above, self.below)
        if all(bound is None for bound in bounds):
            return
        fits = isinstance(value, int) or math.isfinite(value)
        fits = fits and (self.least is None or value >= self.least)
        fits = fits and (self.above is None or value > self.above)
        fits = fits and (self.below is None or value < self.below)
        if not fits:
            raise ConfigError(f"{key}={value}: expected {self.in_words()}")

    def in_words(self) -> str:
        """Return the bounds as a phrase, such as ``1 or more``."""
        if self.below is None and self.above is None:
            return f"{self.least:g} or more"
        if self.below is None:
            return "a positive number" if self.above == 0 else f"a number above {self.above:g}"
        if self.least is not None:
            return f"a number from {self.least:g} to below {self.below:g}"
        return f"a number {'' if self.above is None else f'above {self.above:g} and '}below {self.below:g}"


class Setting(typing.NamedTuple):
    """A field of a config section, as :func:`settings_of` finds it."""

    name: str
    default: Any  # None where the key is unset by default
    kind: type  # of the values; not None for a key that may be unset
    meaning: str
    accepts: Accepts
    changes_results: bool
    may_change: bool
    takes_function: bool

    def check(self, key: str, value: Any) -> None:
        """Raise :class:`ConfigError` where ``value`` has the wrong type or is not accepted."""
        if value is None and self.default is None:
            return
        if not isinstance(value, _TYPES[self.kind]) or (self.kind is not bool and isinstance(value, bool)):
            raise ConfigError(f"{key}={value!r}: expected {kind_in_words(self.kind.__name__)}")
        self.accepts.check(key, value)


_TYPES: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,), Duration: (str,)}


def kind_in_words(name: str) -> str:
    """Return what messages call a type, by its name."""
    kinds = {"bool": "true or false", "int": "an integer", "float": "a number", "ConfigDict": "a section"}
    kinds["Duration"] = 'a text such as "300 steps"'
    return kinds.get(name, "a text")


def settings_of(section: type) -> Iterator[Setting]:
    """Yield the settings of a section, in order."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            (kind,) = (each for each in kind.__args__ if each is not types.NoneType)
        yield Setting(field.name, field.default, kind, **field.metadata)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dicts, by dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found


def value_of(tree: Any, key: str) -> Any:
    """Return the value of a dotted key in nested mappings, such as a config or the JSON of one.

    Raises:
      KeyError: where a part of the key does not exist.
    """
    for part in key.split("."):
        tree = tree[part]
    return tree


def set_value(tree: Any, key: str, value: Any) -> None:
    """Set the value of a dotted key in nested mappings.

    Unlike assignment to an attribute, this also reaches keys that a method of the config hides, such as ``update``.

    Raises:
      KeyError: where a section of the key does not exist.
    """
    section, _, name = key.rpartition(".")
    (value_of(tree, section) if section else tree)[name] = value


def differing_keys(a: dict, b: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ between two nested dicts, with both values: None for a missing key."""
    found = {}
    for key in sorted(a.keys() | b.keys()):
        left, right, name = a.get(key), b.get(key), f"{prefix}{key}"
        if isinstance(left, dict) and isinstance(right, dict):
            found.update(differing_keys(left, right, name + "."))
        elif left != right:
            found[name] = (left, right)
    return found


def parse(where: str, kind: type, text: str) -> Any:
    """Return the value that a text stands for. The text is matched, never run.

    Args:
      where: the text with its key, for the message.

    Raises:
      ConfigError: where the text is no value of this kind.
    """
    try:
        if kind is bool:
            return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}[text.lower()]
        if kind is int:
            return int(text, 16 if text.startswith("0x") else 10)
        return float(text) if kind is float else text
    except (KeyError, ValueError):
        raise ConfigError(f"{' '.join(where.split())}: expected {kind_in_words(kind.__name__)}") from None

"""From ``--config FILE[:ARG] --config.KEY=VALUE ...`` to a validated config."""

import re
from collections.abc import Iterator, Sequence

import ml_collections

from ttt_jax.config import files, renamed, tree
from ttt_jax.errors import ConfigError
from ttt_jax.settings import Setting, parse


def from_arguments(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Return the config of the file that the arguments name, with their overrides, validated.

    Values are parsed by the type of their key, and never run. A key that is true or false may stand without a value:
    ``--config.KEY`` is true and ``--noconfig.KEY`` false. Of all others, the value may be the next argument. The last
    value of a key counts.

    Raises:
      ConfigError: one line, for whatever is wrong with the arguments, the file or the values.
    """
    named, overrides = "", []
    for key, text in pairs(arguments):
        if key:
            overrides.append((key, text))
        else:
            named = text
    if not named:
        raise ConfigError("--config: missing; expected a config file, such as --config configs/quickstart.py")
    config = files.load(named)
    for key, text in overrides:
        tree.set_value(config, key, parse(f"{key}={text}", tree.setting(key, text).kind, text))
    tree.validate(config)
    return config


def pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the key and the value of each argument; the key of the config file is empty."""
    left = list(arguments)
    while left:
        first = left.pop(0)
        flag, equals, text = first.partition("=")
        match = re.fullmatch(r"--?(?:config|(no)?config[.](.*))", flag, re.DOTALL)
        if match is None:
            raise ConfigError(f"{first!r}: unexpected argument; expected --config.KEY=VALUE")
        no, key = match.groups()
        if key is None:
            yield "", text if equals else (left.pop(0) if left else "")
            continue
        kind = _known(key, text).kind
        if kind is bool and not equals:
            yield key, "false" if no else "true"
        elif no:
            raise ConfigError(f"{first!r}: unexpected argument; expected --config.{key}=VALUE")
        elif equals or left:
            yield key, text if equals else left.pop(0)
        else:
            raise ConfigError(f"{key}: expected a value, as in --config.{key}=VALUE")


def _known(key: str, text: str) -> Setting:
    """Return the setting of a key, or say what it is called now."""
    if advice := renamed.advice(key, text):
        raise ConfigError(advice)
    return tree.setting(key, text)

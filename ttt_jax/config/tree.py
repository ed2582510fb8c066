"""Assemble the tree of all sections, check its values, and convert durations to steps.

Sections are those of :mod:`ttt_jax.config.sections` and those of the registered mixers.
"""

import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import config_dict

from ttt_jax import import_path
from ttt_jax import settings as settings_lib
from ttt_jax.config import sections
from ttt_jax.config.sections import SECTIONS
from ttt_jax.errors import ConfigError
from ttt_jax.settings import Duration, Setting, value_of

if TYPE_CHECKING:
    from ttt_jax.mixers.mixer import Mixer

_LONGEST = 1e18  # steps or tokens; longer durations are typing errors, and would overflow


def default() -> ml_collections.ConfigDict:
    """Return a locked config with the default of every key; keys that do not exist cannot be set."""
    config = ml_collections.ConfigDict()
    for key, each in settings().items():
        section = config
        for part in key.split(".")[:-1]:
            if part not in section:
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        section[each.name] = config_dict.placeholder(each.kind) if each.default is None else each.default
    return config.lock()


def validate(config: ml_collections.ConfigDict) -> None:
    """Raise :class:`ConfigError` for the first value that is not accepted or does not go with the others."""
    for key, each in settings().items():
        each.check(key, value_of(config, key))
    for section in SECTIONS.values():
        section.check(config)
    _pattern().check(config.model)
    _check_durations(config)


def check_keys(config: ml_collections.ConfigDict) -> None:
    """Raise :class:`ConfigError` where a config does not have exactly the keys of :func:`default`."""
    present = settings_lib.flat(config.to_dict())
    for key, value in present.items():
        setting(key, value)
    if missing := [key for key in settings() if key not in present]:
        raise ConfigError(f"{missing[0]}: missing; expected a config that starts from ttt_jax.config.default()")


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Return all settings by their dotted keys, in order."""
    return {f"{section}.{each.name}" if section else each.name: each for section, each in _settings()}


def setting(key: str, value: Any = "") -> Setting:
    """Return the setting of a dotted key.

    Args:
      value: the value that the key was to have, for the message.

    Raises:
      ConfigError: where the key does not exist, or is a section.
    """
    if key in settings():
        return settings()[key]
    if inside := [known for known in settings() if known.startswith(f"{key}.")]:
        assignment = " ".join(f"{key}={value}".split())  # in one line
        raise ConfigError(f"{assignment}: is a section; expected one of its keys, such as {inside[0]}")
    (close,) = difflib.get_close_matches(key, settings(), 1, 0)
    raise ConfigError(f"{' '.join(key.split())}: unknown key; did you mean {close}?")


def nearest(name: str) -> str:
    """Return the dotted key, or section, whose last part is most similar to a name."""
    ends: dict[str, str] = {}
    for key in settings():
        parts = key.split(".")
        for n, part in enumerate(parts):
            ends.setdefault(part, ".".join(parts[: n + 1]))
    return ends[difflib.get_close_matches(name, ends, 1, 0)[0]]


def may_change(key: str) -> bool:
    """Return whether a run may be continued with another value of a key; False for a key that does not exist."""
    return key in settings() and settings()[key].may_change


def changes_results(key: str) -> bool:
    """Return whether training with another value of a key gives another model, apart from rounding."""
    return key not in settings() or settings()[key].changes_results


def own_functions(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Return the import paths of the user's own functions, by the keys whose values they are."""
    values = {key: value_of(config, key) for key, each in settings().items() if each.takes_function}
    return {key: value for key, value in values.items() if value is not None and import_path.is_import_path(value)}


def mesh_shape(config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """Return the number of devices along each axis of the mesh, with -1 resolved.

    Raises:
      ConfigError: where the mesh does not fit the number of devices, or heads or batch do not fit the mesh.
    """
    shape = sections.mesh_shape(config, devices)
    for kind in _pattern().kinds(config.model):
        if (heads := _mixers()[kind.model.mixer].heads(kind.model)) % shape["tensor"]:
            raise ConfigError(
                f"mesh.tensor={shape['tensor']}: does not divide the {heads} heads of keys of {kind.text}; "
                "expected a divisor"
            )
    return shape


def steps(config: ml_collections.ConfigDict, key: str) -> int:
    """Return the duration of a key in optimizer steps: at least 1, and 0 where it is empty.

    A duration is a text: ``"300"`` or ``"300 steps"``, ``"2.5e9 tokens"`` (also ``k``, ``M``, ``B``). Every duration
    but that of the run itself may also be a part of the run, such as ``"10%"``. A key that is empty by default may be
    empty.

    Raises:
      ConfigError: where the text is no duration.
    """
    text = str(value_of(config, key)).strip()
    if not text and not setting(key).default:
        return 0
    match = re.fullmatch(r"([0-9.]+(?:e\+?[0-9]+)?)\s*([kMB]?)\s*(|%|steps?|tokens?)", text)
    try:
        amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else math.nan
    except ValueError:
        amount = math.nan
    unit = match[3] if match else ""
    of_run = key == "training.duration"
    if not amount > 0 or not math.isfinite(amount) or (unit == "%" and (of_run or amount > 100)):
        examples = '"300 steps" or "2.5e9 tokens"' if of_run else '"300 steps", "2.5e9 tokens", or "10%" of the run'
        raise ConfigError(f"{key}={text!r}: expected a duration such as {examples}")
    if unit != "%" and amount > _LONGEST:
        raise ConfigError(f"{key}={text!r}: expected a duration of at most {_LONGEST:.0e} steps or tokens")
    if unit == "%":
        return max(1, round(steps(config, "training.duration") * amount / 100))
    if unit.startswith("token"):
        amount /= config.data.batch_size * config.data.sequence_length
    return max(1, round(amount))


def _check_durations(config: ml_collections.ConfigDict) -> None:
    """Raise :class:`ConfigError` for texts that are no durations, and for a warm-up as long as the run."""
    for key, each in settings().items():
        if each.kind is Duration:
            steps(config, key)
    if steps(config, "optimizer.warmup") >= steps(config, "training.duration") > 1:
        raise ConfigError(
            f"optimizer.warmup={config.optimizer.warmup!r}: expected less than "
            f"training.duration={config.training.duration!r}"
        )


def _settings() -> Iterator[tuple[str, Setting]]:
    """Yield the section and the setting of each key."""
    for name, section in SECTIONS.items():
        for each in settings_lib.settings_of(section.settings):
            if (name, each.name) == ("model", "mixer"):
                each = each._replace(
                    meaning=f"{each.meaning}: {', '.join(_mixers())}; or a pattern of them that is repeated, such as "
                    "'ttt_linear*5 + attention' (docs/recipes.md)"
                )
            yield name, each
        if name == "model":
            of_mixers = {mixer.section: mixer.settings for mixer in _mixers().values() if mixer.settings is not None}
            for section_of_mixer, theirs in of_mixers.items():
                for each in settings_lib.settings_of(theirs):
                    yield f"{name}.{section_of_mixer}", each


def _mixers() -> Mapping[str, "Mixer"]:
    """Return the registry of mixers, imported late because it loads JAX, which takes seconds."""
    from ttt_jax.mixers import MIXERS

    return MIXERS


def _pattern() -> ModuleType:
    """Return the module that reads ``model.mixer``, imported late because it loads JAX too."""
    from ttt_jax.models import pattern

    return pattern

"""Keys of configs that have other names now: the one table by which configs of earlier versions are read.

A key that an earlier version did not know has its default, so a new key's default has to be what was done before it.
"""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from ttt_jax.config import tree
from ttt_jax.settings import value_of

# Of each key that is gone: its value, to the keys and values that mean the same now.
RENAMED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model.ttt.norm_residual": lambda value: {
        "model.ttt.output": "residual_norm" if value else "none",
        "model.ttt.bias": value,
    },
}


def current(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config, as JSON holds it, by the keys of this version, with the defaults of those that it lacks.

    What it holds else is left as it is; so is one that is empty.
    """
    if not isinstance(config, dict) or not config:
        return config
    config = copy.deepcopy(config)
    for key, meaning in RENAMED.items():
        section, name = _holder(config, key)
        if section is not None and name in section:
            for new, value in meaning(section.pop(name)).items():
                section_of_new, name_of_new = _holder(config, new)
                if section_of_new is not None:
                    section_of_new.setdefault(name_of_new, value)
    return _filled(config, tree.default().to_dict())


def current_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted keys, such as a point of a sweep, by the keys of this version."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(RENAMED[key](value) if key in RENAMED else {key: value})
    return found


def advice(key: str, text: str = "false") -> str | None:
    """Return a line that says what a key is called now; None where it is called so.

    Args:
      text: the value that was to be set.
    """
    if key not in RENAMED:
        return None
    try:
        value = json.loads(text.lower())
    except ValueError:
        value = text
    settings = " ".join(
        f"--config.{new}={json.dumps(each).strip(chr(34))}" for new, each in RENAMED[key](value).items()
    )
    return f"{key}: is now {' and '.join(RENAMED[key](value))}; expected {settings}"


def advice_for_name(name: str) -> str | None:
    """Return as :func:`advice`, for the last part of a key."""
    return next((advice(key) for key in RENAMED if key.rpartition(".")[2] == name), None)


def _filled(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(config.get(key), dict):
            _filled(config[key], default)
        else:
            config.setdefault(key, default)
    return config


def _holder(config: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    """Return the section that holds a key, None where JSON of another shape has none, and the key's last part."""
    section, _, name = key.rpartition(".")
    try:
        found = value_of(config, section) if section else config
    except (KeyError, TypeError):
        found = None
    return (found if isinstance(found, dict) else None), name

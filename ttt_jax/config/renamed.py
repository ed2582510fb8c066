"""Read configs of earlier versions, by one table of the keys that have been renamed.

A key that an earlier version did not have gets its default, so the default of a new key must keep the old behaviour.
"""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from ttt_jax.config import tree

# For each old key, a function from its value to the new keys and values that mean the same.
RENAMED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model.sliding.window": lambda value: {"model.attention.window": value},
    "model.ttt.norm_residual": lambda value: {
        "model.ttt.output": "residual_norm" if value else "none",
        "model.ttt.bias": value,
    },
}


def current(config: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of a config with the keys of this version, and with defaults for the keys that it lacks.

    Everything else in it is left as it is, and so is an empty config.
    """
    if not isinstance(config, dict) or not config:
        return config
    config = copy.deepcopy(config)
    for key, meaning in RENAMED.items():
        section, name = _holder(config, key)
        if section is not None and name in section:
            value_of_old = section.pop(name)
            if not section:
                parent, last = _holder(config, key.rpartition(".")[0])
                assert parent is not None
                del parent[last]  # a section that had no other key; where it has new ones, they get their defaults
            for new, value in meaning(value_of_old).items():
                section_of_new, name_of_new = _holder(config, new, make=True)
                if section_of_new is not None:
                    section_of_new.setdefault(name_of_new, value)
    return _filled(config, tree.default().to_dict())


def current_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted keys, such as those of a point of a sweep, with the keys of this version."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(RENAMED[key](value) if key in RENAMED else {key: value})
    return found


def advice(key: str, text: str = "false") -> str | None:
    """Return a message with the new name of a renamed key; None for any other key.

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
    """Return the :func:`advice` for the renamed key whose last part is ``name``; None where there is none."""
    return next((advice(key) for key in RENAMED if key.rpartition(".")[2] == name), None)


def _filled(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(config.get(key), dict):
            _filled(config[key], default)
        else:
            config.setdefault(key, default)
    return config


def _holder(config: dict[str, Any], key: str, make: bool = False) -> tuple[dict[str, Any] | None, str]:
    """Return the section that holds a key, None where JSON of another shape has none, and the key's last part.

    Args:
      make: whether to make sections that do not exist.
    """
    *sections, name = key.split(".")
    found: Any = config
    for section in sections:
        if not isinstance(found, dict):
            break
        found = found.setdefault(section, {}) if make else found.get(section)
    return (found if isinstance(found, dict) else None), name

"""Describe errors that are raised while a config file runs.

Errors of ml_collections carry nothing but a long message that calls a key by its last part. This is the only module
that reads these messages. It is tested with ml_collections 1.1; a message in other words is passed on as it is.
"""

import re

from ttt_jax.config import renamed, tree
from ttt_jax.settings import kind_in_words

_UNKNOWN_KEY = re.compile(r"(?:Key )?[\"'](\w+)[\"'](?: does not exist|\n|$)")
_WRONG_TYPE = re.compile(r"Could not override field '(\w+)'.*?\. (.*) is of original type.*<class '([\w.]+)'>$")


def describe(error: Exception) -> str:
    """Return an error in one line, with what was expected where the error is about a key of the config."""
    if isinstance(error, SyntaxError):
        return error.msg
    inner = error
    while inner.args and isinstance(inner.args[0], Exception):  # ml_collections wraps a KeyError in an AttributeError
        inner = inner.args[0]
    text = str(inner.args[0] if inner.args else inner)
    if match := _UNKNOWN_KEY.match(text):
        name = match[1]
        return renamed.advice_for_name(name) or f"{name}: unknown key; did you mean {tree.nearest(name)}?"
    if match := _WRONG_TYPE.match(text):
        name, value, kind = match.groups()
        keys = [key for key in tree.settings() if key.rpartition(".")[2] == name]
        if len(keys) == 1:  # else the message does not say which key it is
            return f"{keys[0]}={value}: expected {kind_in_words(tree.setting(keys[0]).kind.__name__)}"
        return f"{name}={value}: expected {kind_in_words(kind.rpartition('.')[2])}"
    return f"{type(error).__name__}: {' '.join(text.split())}"

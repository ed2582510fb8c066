"""Register the sequence mixers, [B, T, D] to [B, T, D].

This is the only list of them. A mixer's file holds everything that is special about it and ends with a table
``MIXERS``, from the names in ``model.mixer`` to a :class:`ttt_jax.mixers.mixer.Mixer` each. To add a mixer, write its
file and list it here.
"""

import importlib

from ttt_jax.mixers.mixer import Mixer

_FILES = (
    "ttt",
    "attention",
    "linear_attention",
)

MIXERS: dict[str, Mixer] = {
    name: mixer for file in _FILES for name, mixer in importlib.import_module(f"{__name__}.{file}").MIXERS.items()
}

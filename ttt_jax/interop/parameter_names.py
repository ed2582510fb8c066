"""Rename and reshape parameters between our tree and the flat names of another code base, by a table.

Ours are a tree with equal layers stacked on the first axis; theirs have one name and one array for each layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np


class Entry(NamedTuple):
    """A parameter: its name there, its path here, and how its array is converted."""

    theirs: str
    ours: str
    to_ours: Callable[[np.ndarray], np.ndarray] = lambda x: x
    to_theirs: Callable[[np.ndarray], np.ndarray] = lambda x: x


class Names(NamedTuple):
    """The parameters of a code base.

    Attributes:
      whose: the code base, for messages.
      layer: what the names of layer i begin with, such as ``model/h/{}/``.
      top: the parameters outside of layers.
      in_layers: the parameters of each layer, named without ``layer``; ours are below ``layers``.
    """

    whose: str
    layer: str
    top: Sequence[Entry]
    in_layers: Sequence[Entry]

    def to_ours(self, theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Convert their parameters, or gradients, to our tree.

        Raises:
          ValueError: for names that are not parameters of their models, or that some layers lack.
        """
        rest = dict(theirs)
        before, after = self.layer.split("{}")
        inside = [name.removeprefix(before).split(after)[0] for name in rest if name.startswith(before)]
        layers = 1 + max((int(number) for number in inside if number.isdecimal()), default=-1)
        flat = {e.ours: e.to_ours(rest.pop(e.theirs)) for e in self.top if e.theirs in rest}
        for e in self.in_layers:
            names = [self.layer.format(i) + e.theirs for i in range(layers)]
            if names and all(name in rest for name in names):
                flat[f"layers/{e.ours}"] = np.stack([e.to_ours(rest.pop(name)) for name in names])
        if rest:
            raise ValueError(f"not parameters of {self.whose}, or missing in some layers: {sorted(rest)}")
        return flax.traverse_util.unflatten_dict(flat, sep="/")

    def to_theirs(self, ours: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Convert our tree, of parameters or gradients, to their names, with one array for each layer."""
        flat = {key: np.asarray(x) for key, x in flax.traverse_util.flatten_dict(dict(ours), sep="/").items()}
        theirs = {e.theirs: e.to_theirs(flat[e.ours]) for e in self.top if e.ours in flat}
        for e in self.in_layers:
            for i, x in enumerate(flat.get(f"layers/{e.ours}", ())):
                theirs[self.layer.format(i) + e.theirs] = e.to_theirs(x)
        return theirs

"""Parameters whose axes have names, where there are rules for names.

Within ``flax.linen.logical_axis_rules`` the initial parameters come in boxes that carry the names of their axes
(``flax.linen.LogicallyPartitioned``), from which a program for a mesh reads what lies where. Elsewhere they are arrays.
"""

from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax


def parameter(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """Return a float32 parameter of ``module``; ``axes`` are the names of its dimensions in ``parallel.sharding``."""
    return cast(jax.Array, module.param(name, named(init, axes), shape))


def named(init: Callable, axes: tuple[str | None, ...]) -> Callable:
    """Return the initializer of a parameter with these axes."""
    return nn.with_logical_partitioning(init, axes) if nn.get_logical_axis_rules() else init

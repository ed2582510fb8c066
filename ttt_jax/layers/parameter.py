"""A parameter whose axes have names."""

from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax


def parameter(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """A float32 parameter of ``module``; ``axes`` gives each dimension its logical name (see ``parallel.sharding``)."""
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape))

"""Where arrays lie while a model computes, said by the names of their axes.

Layers call these functions at the places that matter; a program for a mesh traces them within
:func:`ttt_jax.distributed.sharding.on_mesh`. Without one they do nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """``x``, its dimensions laid out as the rules say for these names; None is replicated."""
    return jax.lax.with_sharding_constraint(x, _spec(axes)) if _on_mesh() else x


def gathered(parameter: jax.Array, *axes: str | None) -> jax.Array:
    """A parameter of these axes as it is computed with: whole along the mesh axes that split the batch.

    The gradient of what this returns has the same layout; :func:`constrain` takes it back to that of the parameter, so
    that each device receives the sum of its own part only.
    """
    if not _on_mesh():
        return parameter
    rows = _mesh_axes("batch")
    spec = PartitionSpec(*(None if axis in rows else axis for axis in _spec(axes)))
    return jax.lax.with_sharding_constraint(parameter, spec)


def locally(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """Return ``function``, run by each device on its own parts of the arguments; nothing in it communicates.

    The gradient of an argument that is replicated is summed over the devices once, after the whole of ``function``.

    Args:
      in_axes, out_axes: trees of ``PartitionSpec`` of the arguments and of the result, each for a whole tree of arrays,
        with logical names of dimensions, as in ``ShardingRules``.
    """
    if not _on_mesh():
        return function
    in_specs, out_specs = (jax.tree.map(_spec, axes) for axes in (in_axes, out_axes))
    # The check of replication would want every constant in the function declared as varying.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def device_kind() -> str:
    """What is traced now is compiled for, as JAX calls it: ``TPU v5 lite``, ``NVIDIA H200``, ``cpu``. Devices of a mesh
    need not be those that are here."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind


def sum_over_rows(x: jax.Array, *axes: str | None) -> jax.Array:
    """Within :func:`locally`: the sum of ``x`` over the devices that split the batch; each keeps its part of a sum that
    has these axes."""
    if not _on_mesh():
        return x
    rows, spec = _mesh_axes("batch"), _spec(axes)
    for dimension, axis in enumerate(spec):
        if axis in rows:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, tuple(axis for axis in rows if axis not in spec))


def _on_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().size > 1


def _mesh_axes(*axes: str) -> tuple[str, ...]:
    return tuple(jax.tree.leaves(tuple(_spec(axes))))


def _spec(axes: Iterable[str | None]) -> PartitionSpec:
    return nn.logical_to_mesh_axes(tuple(axes)) or PartitionSpec()

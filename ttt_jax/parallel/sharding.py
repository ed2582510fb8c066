"""Meshes, and the one table that says which logical axis of a parameter goes to which mesh axis."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ttt_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis to mesh axis; None is replicated."""

    layers: str | None = None
    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    mlp: str | None = "tensor"
    heads: str | None = "tensor"  # the width of all heads together
    num_heads: str | None = "tensor"
    batch: tuple[str, ...] = ("data", "fsdp")


def make_mesh(shape: Mapping[str, int]) -> Mesh:
    """A mesh over all devices; ``shape`` gives the size of each of :data:`MESH_AXES`."""
    return jax.make_mesh(tuple(shape[a] for a in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_sharding(mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """Rows of a batch over the data axes."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def global_batch(rows: Mapping[str, np.ndarray], where: NamedSharding) -> dict[str, jax.Array]:
    """The batch of all hosts, of which this one has these rows: arrays [B, T] from [B / hosts, T].

    Of a copy: rows from worker processes lie in shared memory, and XLA on CPUs would hold on to it.
    """
    return {name: jax.make_array_from_process_local_data(where, np.array(x)) for name, x in rows.items()}


def state_sharding(abstract_state: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """A sharding for every array of a state whose parameters carry logical axis names.

    Raises:
      ConfigError: where a dimension does not divide, or two dimensions of an array ask for one mesh axis.
    """

    def place(path, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        axes = [None if name is None else getattr(rules, name) for name in leaf.names]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        used = [axis for axis in axes if axis is not None and mesh.shape[axis] > 1]
        if len(used) != len(set(used)):
            raise ConfigError(f"{name}: its axes {leaf.names} ask twice for mesh axis {max(used, key=used.count)}")
        for size, logical, axis in zip(leaf.value.shape, leaf.names, axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"mesh.{axis}={mesh.shape[axis]}: does not divide the {logical} axis of {name}, {size}; "
                    "expected a divisor"
                )
        return NamedSharding(mesh, PartitionSpec(*(axis if axis in used else None for axis in axes)))

    boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(place, abstract_state, is_leaf=boxed)

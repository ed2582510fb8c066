"""Meshes, and the one table that says which logical axis of a parameter goes to which mesh axis."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ttt_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis to mesh axis; None is replicated. ``batch`` is of activations and states, ``time`` and ``window`` of
    states, the others of parameters too."""

    layers: str | None = None
    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    channels: str | None = None  # width of small parameters, not worth a message each
    mlp: str | None = "tensor"
    heads: str | None = "tensor"  # the width of all heads together
    num_heads: str | None = "tensor"
    learner_hidden: str | None = "fsdp"
    batch: tuple[str, ...] = ("data", "fsdp")
    time: str | None = None  # tokens that a state keeps, all that were read
    window: str | None = None  # or so many at most


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh; ``shape`` gives the size of each of :data:`MESH_AXES`.

    Devices of several slices (TPU pods joined by a data center network) are laid out so that only the data axis crosses
    from slice to slice: what goes over that network is one sum of gradients per step.

    Args:
      devices: all of them that there are, unless given (of a topology that is only described, for example).

    Raises:
      ConfigError: where the data axis is no multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(shape[axis] for axis in MESH_AXES)
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        grid = _grid(mesh_utils.create_device_mesh, sizes, devices)
        return Mesh(grid, MESH_AXES, axis_types=types)
    data, *others = sizes
    if data % slices:
        raise ConfigError(
            f"mesh.data={data}: expected a multiple of {slices}, the number of slices; only this axis may cross "
            "from slice to slice"
        )
    within, across = (data // slices, *others), (slices,) + (1,) * len(others)
    grid = _grid(mesh_utils.create_hybrid_device_mesh, within, across, devices)
    return Mesh(grid, MESH_AXES, axis_types=types)


def _grid(create: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
    """Devices in the order that suits their network; an axis of the network is split only where it has to be."""
    try:
        return create(*arguments)
    except NotImplementedError:
        return create(*arguments, allow_split_physical_axes=True)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: ShardingRules) -> Iterator[None]:
    """What is traced within lies where ``rules`` put it on ``mesh`` (see :mod:`ttt_jax.distributed.activations`)."""
    with jax.set_mesh(mesh), axis_names(rules):
        yield


def axis_names(rules: ShardingRules) -> contextlib.AbstractContextManager[None]:
    """Return a context in which initial parameters carry the names of their axes."""
    return nn.logical_axis_rules(tuple(dataclasses.asdict(rules).items()))


def batch_sharding(mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """Rows of a batch over the data axes."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def rows_here(where: NamedSharding, batch_size: int) -> list[int]:
    """Rows of a batch that devices of this process hold, in order. They need not be neighbours, and processes share
    rows where an axis runs across them that does not split the batch."""
    parts = where.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts for row in range(batch_size)[part[0]]})  # type: ignore[index]


def global_batch(
    local: Mapping[str, np.ndarray], rows: Sequence[int], batch_size: int, where: NamedSharding
) -> dict[str, jax.Array]:
    """The batch of all processes, arrays [B, T], from the rows of this one, [len(rows), T].

    Of a copy: rows from worker processes lie in shared memory, and XLA on CPUs would hold on to it.
    """
    place = {row: i for i, row in enumerate(rows)}

    def array(x: np.ndarray) -> jax.Array:
        def part(index):
            first, end, _ = index[0].indices(batch_size)
            return np.array(x[place[first] : place[first] + end - first])

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), where, part)

    return {name: array(x) for name, x in local.items()}


def by_axes(axes: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Return a sharding for each ``PartitionSpec`` of names of axes in a tree, such as a model's ``state_axes()``."""

    def place(names: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(None if name is None else getattr(rules, name) for name in names)))

    return jax.tree.map(place, axes)


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

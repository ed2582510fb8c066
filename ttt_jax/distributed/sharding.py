"""Lay arrays out over the devices of a mesh, by the names of their axes and one table of rules.

Layers say with :func:`constrain`, :func:`gathered` and :func:`locally` where arrays lie while a model computes. A
program for a mesh is traced within :func:`on_mesh`; without a mesh these functions do nothing.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """The mesh axis of each logical axis; None is replicated.

    ``batch`` is an axis of activations and states, ``time`` and ``window`` are axes of states, the others of parameters
    too.
    """

    layers: str | None = None
    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    channels: str | None = None  # the width of small parameters, which are not worth the messages
    mlp: str | None = "tensor"
    heads: str | None = "tensor"  # the width of all heads together
    num_heads: str | None = "tensor"
    learner_hidden: str | None = "fsdp"
    batch: tuple[str, ...] = ("data", "fsdp")
    time: str | None = None  # tokens in a state that grows with the tokens read
    window: str | None = None  # tokens in a state of bounded size


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of devices.

    Devices of several slices (TPU pods joined by a data center network) are laid out so that only the data axis crosses
    from slice to slice: one sum of gradients per step goes over that network.

    Args:
      shape: the size of each of :data:`MESH_AXES`.
      devices: the devices, such as those of a topology that is only described; None: all devices of JAX.

    Raises:
      ConfigError: where the size of the data axis is not a multiple of the number of slices.
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
    """Return devices in the order that suits their network, whose axes are split only where necessary."""
    try:
        return create(*arguments)
    except NotImplementedError:
        return create(*arguments, allow_split_physical_axes=True)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: ShardingRules) -> Iterator[None]:
    """Enter a context in which arrays of traced programs are laid out over ``mesh`` by ``rules``."""
    with jax.set_mesh(mesh), axis_names(rules):
        yield


def axis_names(rules: ShardingRules) -> contextlib.AbstractContextManager[None]:
    """Return a context in which initial parameters carry the names of their axes."""
    return nn.logical_axis_rules(tuple(dataclasses.asdict(rules).items()))


def batch_sharding(mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """Return the sharding of a batch: its rows over the data axes."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def rows_of_this_process(where: NamedSharding, batch_size: int) -> list[int]:
    """Return the rows of a batch that devices of this process hold, in order.

    The rows need not be adjacent, and processes share rows where a mesh axis that does not split the batch runs across
    processes.
    """
    parts = where.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts for row in range(batch_size)[part[0]]})  # type: ignore[index]


def global_batch(
    local: Mapping[str, np.ndarray], rows: Sequence[int], batch_size: int, where: NamedSharding
) -> dict[str, jax.Array]:
    """Return the batch of all processes, global arrays [B, T], from the rows of this process, [len(rows), T].

    The rows are copied: those from worker processes lie in shared memory, which XLA on CPUs would keep in use.
    """
    place = {row: i for i, row in enumerate(rows)}

    def array(x: np.ndarray) -> jax.Array:
        def part(index):
            first, end, _ = index[0].indices(batch_size)
            return np.array(x[place[first] : place[first] + end - first])

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), where, part)

    return {name: array(x) for name, x in local.items()}


def shardings_of_axes(axes: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Return a sharding for each ``PartitionSpec`` of names of axes in a tree, such as a model's ``state_axes()``."""

    def place(names: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(None if name is None else getattr(rules, name) for name in names)))

    return jax.tree.map(place, axes)


def state_sharding(abstract_state: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Return a sharding for each array of a state whose parameters carry the names of their axes.

    Raises:
      ConfigError: where a mesh axis does not divide a dimension, or two dimensions of an array have one mesh axis.
    """

    def place(path, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        axes = [None if name is None else getattr(rules, name) for name in leaf.names]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        used = [axis for axis in axes if axis is not None and mesh.shape[axis] > 1]
        if len(used) != len(set(used)):
            raise ConfigError(f"{name}: two of its axes {leaf.names} lie along mesh axis {max(used, key=used.count)}")
        for size, logical, axis in zip(leaf.value.shape, leaf.names, axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"mesh.{axis}={mesh.shape[axis]}: does not divide the {logical} axis of {name}, {size}; "
                    "expected a divisor"
                )
        return NamedSharding(mesh, PartitionSpec(*(axis if axis in used else None for axis in axes)))

    boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(place, abstract_state, is_leaf=boxed)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Return ``x`` with its dimensions laid out as the rules say for these names; None is replicated."""
    return jax.lax.with_sharding_constraint(x, _spec(axes)) if _on_mesh() else x


def gathered(parameter: jax.Array, *axes: str | None) -> jax.Array:
    """Return a parameter of these axes as it is computed with: whole along the mesh axes that split the batch.

    The gradient of the result has the same layout. :func:`constrain` takes it back to the layout of the parameter, so
    that each device receives only the sum of its own part.
    """
    if not _on_mesh():
        return parameter
    rows = _mesh_axes("batch")
    spec = PartitionSpec(*(None if axis in rows else axis for axis in _spec(axes)))
    return jax.lax.with_sharding_constraint(parameter, spec)


def locally(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """Return ``function`` as run by each device on its own parts of the arguments, without communication.

    The gradient of a replicated argument is summed over the devices once, after the whole of ``function``.

    Args:
      in_axes, out_axes: trees of ``PartitionSpec`` for the arguments and the result, each for a whole tree of arrays,
        with the names of axes in :class:`ShardingRules`.
    """
    if not _on_mesh():
        return function
    in_specs, out_specs = (jax.tree.map(_spec, axes) for axes in (in_axes, out_axes))
    # The check of replication would want every constant in the function declared as varying.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def device_kind() -> str:
    """Return the kind of device that the program being traced is for: ``TPU v5 lite``, ``NVIDIA H200``, ``cpu``.

    The devices of a mesh need not be those of this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind


def sum_over_rows(x: jax.Array, *axes: str | None) -> jax.Array:
    """Return, within :func:`locally`, the sum of ``x`` over the devices that split the batch.

    Each device keeps its own part of the sum, which has these axes.
    """
    if not _on_mesh():
        return x
    rows, spec = _mesh_axes("batch"), _spec(axes)
    for dimension, axis in enumerate(spec):
        if axis in rows:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, tuple(axis for axis in rows if axis not in spec))


def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """Return, within :func:`locally`, the sum of ``x`` over the devices that split an axis."""
    return jax.lax.psum(x, _split(axis)) if _split(axis) else x


def max_over(x: jax.Array, axis: str) -> jax.Array:
    """Return, within :func:`locally`, the maximum of ``x`` over the devices that split an axis."""
    return jax.lax.pmax(x, _split(axis)) if _split(axis) else x


def part_of(axis: str) -> jax.Array | int:
    """Return, within :func:`locally`, which part of an axis this device has."""
    return jax.lax.axis_index(_split(axis)) if _split(axis) else 0


def parts_of(axis: str) -> int:
    """Return in how many parts the devices split an axis."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in _split(axis))


def _on_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().size > 1


def _split(axis: str) -> tuple[str, ...]:
    """Return the mesh axes of more than one device that split an axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in _mesh_axes(axis) if mesh.shape[name] > 1) if _on_mesh() else ()


def _mesh_axes(*axes: str) -> tuple[str, ...]:
    return tuple(jax.tree.leaves(tuple(_spec(axes))))


def _spec(axes: Iterable[str | None]) -> PartitionSpec:
    return nn.logical_to_mesh_axes(tuple(axes)) or PartitionSpec()

"""The section ``mesh``, and the mesh that it makes of so many devices."""

import math
from dataclasses import dataclass

import ml_collections

from ttt_jax.errors import ConfigError
from ttt_jax.settings import setting


@dataclass(frozen=True)
class Mesh:
    """The section ``mesh``: axes in the order of the mesh."""

    data: int = setting(-1, "devices along the axis that splits batches; -1 is the rest", changes_results=False)
    fsdp: int = setting(1, "devices along the axis that splits batches and parameters", changes_results=False)
    tensor: int = setting(1, "devices along the axis that splits heads and feed-forward layers", changes_results=False)


def check(config: ml_collections.ConfigDict) -> None:
    """Refuse sizes that no number of devices has."""
    shape = config.mesh.to_dict()
    for axis, size in shape.items():
        if size != -1 and size < 1:
            raise ConfigError(f"mesh.{axis}={size}: expected a positive number of devices, or -1 for the rest")
    rest = [axis for axis, size in shape.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(f"mesh.{rest[1]}=-1: mesh.{rest[0]} is -1 too; expected one -1 at most")


def mesh_shape(config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """Return the devices along each axis, with -1 resolved.

    Raises:
      ConfigError: where the mesh does not fit the devices, or heads and batch do not fit the mesh.
    """
    check(config)
    shape = config.mesh.to_dict()
    rest = [axis for axis, size in shape.items() if size == -1]
    known = math.prod(size for size in shape.values() if size != -1)
    if devices % known or (not rest and known != devices):
        axes = ", ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
        raise ConfigError(f"{axes}: does not fit {devices} devices; expected sizes whose product is {devices}")
    if rest:
        shape[rest[0]] = devices // known
    if config.model.num_heads % shape["tensor"]:
        raise ConfigError(
            f"mesh.tensor={shape['tensor']}: does not divide model.num_heads={config.model.num_heads}; "
            "expected a divisor"
        )
    rows = shape["data"] * shape["fsdp"]
    micro_batch = config.data.batch_size // config.training.accumulation
    if micro_batch % rows:
        split = f" / training.accumulation={config.training.accumulation}" if config.training.accumulation > 1 else ""
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}{split}: not divisible by the {rows} devices of "
            f"mesh.data x mesh.fsdp; expected a multiple of {rows * config.training.accumulation}"
        )
    return shape

"""Compile programs with collectives for eight CPU devices, and write their HLO text to the given folder."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def scan(x):
    return jax.lax.scan(lambda c, _: (jnp.sin(jax.lax.psum(c, "b")) + x, None), x, None, length=7)[0]


def nested(x):
    def inner(c, _):
        return jnp.sin(jax.lax.psum(c, "a")) + x, None

    def outer(c, _):
        return jnp.cos(jax.lax.psum(jax.lax.scan(inner, c, None, length=5)[0], "b")) + x, None

    return jax.lax.scan(outer, x, None, length=3)[0]


def kinds(x):
    gathered = jnp.sin(jax.lax.all_gather(x, "a", tiled=True))
    scattered = jnp.sin(jax.lax.psum_scatter(gathered, "a", tiled=True))
    moved = jnp.sin(jax.lax.ppermute(scattered, "b", [(0, 1), (1, 0)]))
    return jax.lax.all_to_all(moved.reshape(4, 2), "b", 0, 0).reshape(8)


def none(x):
    return x + 1


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    mesh, spec = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b")), PartitionSpec(("a", "b"))
    x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, spec))
    for program in (scan, nested, kinds, none):
        sharded = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        text = jax.jit(sharded).lower(x).compile().as_text()
        (Path(sys.argv[1]) / f"{program.__name__}.hlo").write_text(text)

"""Build functions whose cycles and bytes are known, for ``ttt bench tpu-schedule --function``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def known():
    """Build a product that fills the matrix units, an array read and written, a loop of 50 and one of 200 turns."""

    def loop(x, w):
        def body(w, x):
            y = jnp.tanh(x @ w)
            return w - 0.1 * x.T @ y, y

        return jax.lax.scan(body, w, x)

    def run(a, b, c, x, y, w):
        with jax.named_scope("product"):
            product = a @ b
        with jax.named_scope("copied"):
            copied = c + 1
        with jax.named_scope("short"):
            short = loop(x, w)
        with jax.named_scope("long"):
            long = loop(y, w)
        return product, copied, short, long

    square = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    tall = jax.ShapeDtypeStruct((16384, 4096), jnp.bfloat16)
    short, long, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((50, 16, 128), (200, 16, 128), (128, 128)))
    return run, (square, square, tall, short, long, w)


def kernel(turns: int = 8, first: bool = True):
    """Build a Pallas kernel with a grid of ``turns``, whose first turn does one more matrix product than the others."""

    def body(x, w, out, sum_):
        if first:

            @pl.when(pl.program_id(0) == 0)
            def _():
                sum_[...] = jnp.dot(w[...], w[...], preferred_element_type=jnp.float32)

        out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    run = pl.pallas_call(
        body,
        grid=(turns,),
        in_specs=[pl.BlockSpec((128, 256), lambda i: (i, 0)), pl.BlockSpec((256, 256), lambda i: (0, 0))],
        out_specs=[pl.BlockSpec((128, 256), lambda i: (i, 0)), pl.BlockSpec((256, 256), lambda i: (0, 0))],
        out_shape=[f32((128 * turns, 256)), f32((256, 256))],
    )
    return run, (f32((128 * turns, 256)), f32((256, 256)))


def masked(computed: int = 4, turns: int = 16, dtype: str = "int32", static: bool = True):
    """Build a Pallas kernel that computes in the last ``computed`` of its turns only, by a mask in scalar memory.

    The mask is a constant where it is static, else an argument.
    """

    def body(mask, x, w, out):
        @pl.when(mask[pl.program_id(0)].astype(jnp.int32) > 0)
        def _():
            out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    run = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(turns,),
            in_specs=[pl.BlockSpec((128, 256), lambda i, _: (i, 0)), pl.BlockSpec((256, 256), lambda i, _: (0, 0))],
            out_specs=pl.BlockSpec((128, 256), lambda i, _: (i, 0)),
        ),
        out_shape=f32((128 * turns, 256)),
        name="masked",
    )
    mask = (np.arange(turns) >= turns - computed).astype(dtype)
    arguments = (f32((128 * turns, 256)), f32((256, 256)))
    if static:
        return functools.partial(run, mask), arguments
    return run, (jax.ShapeDtypeStruct(mask.shape, mask.dtype), *arguments)


def layers(chips: int = 1, depth: int = 6, tokens: int = 4096, width: int = 2048):
    """Build the gradient of a scanned stack of dense layers; tokens and rows of weights are split over the chips."""

    def loss(w, x):
        def layer(x, w):
            return jnp.dot(x, w.astype(jnp.bfloat16)), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2)

    def shaped(shape, dtype, *spec):
        if chips == 1:
            return jax.ShapeDtypeStruct(shape, dtype)
        mesh = jax.sharding.AbstractMesh((chips,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    w = shaped((depth, width, width), jnp.float32, None, "fsdp")
    return jax.grad(loss, argnums=(0, 1)), (w, shaped((tokens, width), jnp.bfloat16, "fsdp"))


def broken():
    raise RuntimeError("the message of the function\nin two lines")

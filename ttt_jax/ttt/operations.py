"""Count the floating point operations of an inner loop: the matrix products of one mini-batch in the dual form."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import scan
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens


@functools.lru_cache(maxsize=64)
def per_token(loop: InnerLoop, mini_batch: int) -> float:
    """Return the forward operations per token and head: two for each multiply-add of a matrix product."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    w0 = jax.eval_shape(lambda: learner_lib.init(jax.random.key(0), loop.learner, 1))
    constants = {c.name: array(1, *c.shape) for c in loop.learner.structure.constants}
    keys, values = array(1, mini_batch, 1, loop.learner.features), loop.learner.structure.features_out
    per_matrix = (len(w0),) if loop.rate.per_matrix else ()
    gates = {member.gate: array(1, mini_batch, 1) for member in loop.update if member.gate}
    tokens = Tokens(keys, keys, array(1, mini_batch, 1, values), array(1, mini_batch, 1, *per_matrix), gates)

    def read(*arguments):
        z, state, _ = scan.run(loop, *arguments)
        return z, state.weights, state.slots

    closed = jax.make_jaxpr(read)(Parameters(w0, constants, array(mini_batch)), tokens)
    return products(closed.jaxpr) / mini_batch


def products(jaxpr: Any) -> int:
    """Return the operations of the matrix products in a jaxpr whose results are used; a scan counts once per turn."""
    total, used = 0, {variable for variable in jaxpr.outvars if not hasattr(variable, "val")}
    for equation in reversed(jaxpr.eqns):
        if used.isdisjoint(equation.outvars):
            continue
        used.update(variable for variable in equation.invars if not hasattr(variable, "val"))
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(left[i] for i in contracted) * math.prod(equation.outvars[0].aval.shape)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += turns * products(inner)
    return total

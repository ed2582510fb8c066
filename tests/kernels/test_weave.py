"""Test that interleaved copies of a function compute the same as the function."""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.kernels.weave import Read, Write, weave


def function(x, pair):
    y, z = pair
    return {"sum": jnp.where(x > 0, jnp.tanh(x @ y), 0.0) + z, "turned": (z @ y).T, "as it is": x}


class Memory:
    """Arrays that weave reads and writes."""

    def __init__(self, values):
        self.values, self.reads = values, 0

    def read(self, name):
        def value():
            self.reads += 1
            return self.values[name]

        return Read(self.values[name].shape, self.values[name].dtype, value)

    def write(self, name, over=None):
        return Write(lambda x: self.values.__setitem__(name, x), over)


def test_each_copy_computes_the_function_of_its_arguments():
    rng = np.random.default_rng(0)
    drawn = [[jnp.asarray(rng.standard_normal((8, 8)), jnp.float32) for _ in "xyz"] for _ in range(3)]
    memories = [Memory(dict(zip("xyz", each, strict=True))) for each in drawn]
    arguments = [(m.read("x"), (m.read("y"), m.read("z"))) for m in memories]
    weave(function, arguments, [{x: m.write(x) for x in ("sum", "turned", "as it is")} for m in memories])
    for (x, y, z), memory in zip(drawn, memories, strict=True):
        expected = function(x, (y, z))
        for name, value in expected.items():
            np.testing.assert_allclose(memory.values[name], value, rtol=1e-6)


def test_argument_is_read_before_it_is_overwritten():
    """Overwrite an argument that is read twice, the last time late."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)
    memory = Memory({"x": x})

    def late(x):
        y = x
        for _ in range(5):
            y = jnp.tanh(y @ y)
        return x + 1, y * x

    read = memory.read("x")
    weave(late, [(read,)], [(memory.write("x", over=read), memory.write("y"))])
    np.testing.assert_allclose(memory.values["x"], x + 1)
    np.testing.assert_allclose(memory.values["y"], late(x)[1], rtol=1e-5)


def test_operations_of_copies_alternate():
    """Check for a chain of matrix products that no copy ends before another begins."""
    order = []

    def chain(x):
        for _ in range(4):
            x = x @ x
        return x

    def traced(x):
        def results(i):
            return Write(lambda value: order.append(i))

        weave(chain, [(Read(x.shape, x.dtype, lambda: x),)] * 2, [results(0), results(1)])
        return x

    jaxpr = jax.make_jaxpr(traced)(jnp.ones((8, 8))).jaxpr
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 8
    made = {v: i for i, e in enumerate(products) for v in e.outvars}
    depends = [made.get(e.invars[0], -1) for e in products]
    assert depends == [-1, -1, 0, 1, 2, 3, 4, 5]
    assert sorted(order) == [0, 1]


def test_derivatives_inside_a_function_are_scheduled_too():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (2 * x, None), lambda _, g: (g * 2,))
    memory = Memory({"x": jnp.ones((8, 8))})
    weave(jax.grad(lambda x: (twice(x) ** 2).sum()), [(memory.read("x"),)], [memory.write("d")])
    np.testing.assert_allclose(memory.values["d"], 8)

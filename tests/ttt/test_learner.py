"""Test learners against plain NumPy, in float64 where constants must be exact, and the structure of their functions.

Functions that keep the rules of learners pass the check; each way to break a rule is refused by name.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import learners, objective
from ttt_jax.ttt.learner import Affine, Constant, Learner, Matrix
from ttt_jax.ttt.learners import LEARNERS, MLP, Linear, ResidualNorm, SwiGLU

RNG = np.random.default_rng(0)
WIDTH = 5
COUNTER = itertools.count()


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape):
    return RNG.standard_normal(shape)


def weights_of(learner):
    """Draw weights of two heads."""
    return tuple(
        Affine(draw(2, m.features_in, m.features_out), draw(2, 1, m.features_out) if m.bias else None)
        for m in learner.structure.matrices
    )


def numpy_dense(x, affine):
    y = np.einsum("bhtd,hdf->bhtf", x, affine.weight)
    return y if affine.bias is None else y + affine.bias


def numpy_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_layer_norm(z, scale, bias):
    return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6) * scale + bias


def applied(learner, weights, constants, x):
    return jax.jit(learner.apply)(weights, constants, x)


@pytest.mark.usefixtures("float64")
def test_gelu_and_its_derivatives_have_exact_constants():
    """Check to 1e-13: the constants of the authors' derivative, cut to nine digits, are 1e-9 off and would fail."""
    x = jnp.linspace(-6, 6, 101)

    def exact(x):
        return jax.nn.gelu(x, approximate=True)

    @jax.jit
    def derivatives(x):
        both = [[jax.vmap(jax.grad(f))(x), jax.vmap(jax.grad(jax.grad(f)))(x)] for f in (learners.gelu, exact)]
        return *learners.gelu_and_derivative(x), learners.gelu(x), *both

    value, derivative, alone, (first, second), (exact_first, exact_second) = derivatives(x)
    np.testing.assert_allclose(value, numpy_gelu(x), rtol=0, atol=1e-14)
    np.testing.assert_array_equal(alone, value)
    np.testing.assert_allclose(derivative, exact_first, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(first, derivative)
    np.testing.assert_allclose(second, exact_second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.usefixtures("float64")
def test_mlp_within_residual_norm_equals_numpy(depth):
    learner = learners.mlp(WIDTH, depth=depth, width_factor=1.6)
    widths = (WIDTH, *(8,) * (depth - 1), WIDTH)
    assert [m[:2] for m in learner.structure.matrices] == list(itertools.pairwise(widths))
    weights, x = weights_of(learner), draw(3, 2, 4, WIDTH)
    constants = {"norm_scale": 1 + 0.3 * draw(2, 1, WIDTH), "norm_bias": 0.3 * draw(2, 1, WIDTH)}
    y = x
    for i, affine in enumerate(weights):
        y = numpy_dense(numpy_gelu(y) if i else y, affine)
    expected = x + numpy_layer_norm(y, constants["norm_scale"], constants["norm_bias"])
    np.testing.assert_allclose(applied(learner, weights, constants, x), expected, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_swiglu_of_another_width_equals_numpy():
    learner = Learner(SwiGLU(1.6, bias=True, features_out=3), WIDTH)
    assert learner.structure == ((Matrix(5, 8, True), Matrix(5, 8, True), Matrix(8, 3, True)), (), 3)
    (gate, value, out), x = weights_of(learner), draw(3, 2, 4, WIDTH)
    z = numpy_dense(x, gate)
    expected = numpy_dense(z / (1 + np.exp(-z)) * numpy_dense(x, value), out)
    np.testing.assert_allclose(applied(learner, (gate, value, out), {}, x), expected, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_objectives_are_sums_over_the_width():
    y, v = draw(3, 4, WIDTH), draw(3, 4, WIDTH)
    np.testing.assert_allclose(objective.squared_error(y, v), np.square(y - v).sum(-1) / 2, rtol=1e-12)
    np.testing.assert_allclose(objective.dot_product(y, v), -(y * v).sum(-1), rtol=1e-12)
    assert objective.OBJECTIVES.keys() >= {"squared_error", "dot_product"}


def test_layer_norm_epsilon_is_1e_6():
    """Check at a variance of 1e-6, where an epsilon of 1e-6 gives 0.71, and 1e-5 would give 0.30."""
    np.testing.assert_allclose(learners.normalise(jnp.array([-1e-3, 1e-3])), [-(0.5**0.5), 0.5**0.5], rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_derivatives_of_normalise_equal_autodiff_of_its_formula():
    z, u, t = (jnp.asarray(draw(3, WIDTH)) for _ in range(3))

    def formula(z):
        centred = z - z.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f):
        """Return the value, the first derivative in reverse and in forward mode, and the second derivative."""
        value, pullback = jax.vjp(f, z)
        second = jax.grad(lambda z: (jax.vjp(f, z)[1](u)[0] * t).sum())(z)
        return value, pullback(u)[0], jax.jvp(f, (z,), (t,))[1], second

    for actual, expected in zip(derivatives(learners.normalise), derivatives(formula), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_initial_weights_are_normal_with_zero_biases():
    @jax.jit
    def draw_all():
        key = jax.random.key(0, impl="rbg")
        bare = learner_lib.init(key, Learner(Linear(bias=False), 4), heads=1)
        return (
            learner_lib.init(key, learners.mlp(32), heads=3),
            bare,
            learner_lib.init_constants(key, learners.linear(4), heads=3),
        )

    weights, bare, constants = draw_all()
    assert [w.weight.shape for w in weights] == [(3, 32, 128), (3, 128, 32)]
    for layer in weights:
        np.testing.assert_allclose([layer.weight.mean(), layer.weight.std()], [0, 0.02], atol=1e-3)
        np.testing.assert_array_equal(layer.bias, np.zeros((3, 1, layer.weight.shape[-1])))
    assert bare[0].bias is None
    np.testing.assert_array_equal(constants["norm_scale"], np.ones((3, 1, 4)))
    np.testing.assert_array_equal(constants["norm_bias"], np.zeros((3, 1, 4)))


def test_structure_lists_the_matrices_and_parameters_of_the_function():
    def own(dense, x):
        y = dense(x, 7, bias=False) * dense.param("gain", (7,), jax.nn.initializers.zeros)
        return dense(y, 2) * dense.param("size") + dense.param("gain", (7,))[..., :2]

    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    matrices, constants, features_out = Learner(own, 4).structure
    assert matrices == (Matrix(4, 7, False), Matrix(7, 2, True))
    assert constants == (Constant("gain", (1, 7), zeros), Constant("size", (1, 1), ones))
    assert features_out == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda dense, x: x, "does not call dense"),
        (lambda dense, x: dense(x, 4).sum(-1), "expected an array [..., tokens, features]"),
        (lambda dense, x: (dense(x, 4), x), "expected an array [..., tokens, features]"),
        (lambda dense, x: dense(x, 0), "dense is called with features=0; expected 1 or more"),
        (lambda dense, x: dense(x, 4) * dense.param("a", (2, 4)), "expected a shape of at most one axis"),
        (lambda dense, x: dense(x, 4) * dense.param("a", (4,)) + dense.param("a"), "has another shape elsewhere"),
        (lambda dense, x: dense(x, 4) * dense.param("kernel_0"), "expected an identifier other than kernel_0"),
        (lambda dense, x: dense(x, 4) * dense.param("a/b"), "expected an identifier"),
        (ResidualNorm(lambda dense, x: dense(x, 3)), "makes 3 features of 4, to which a residual cannot be added"),
    ],
)
def test_structure_refuses_functions_that_are_no_learners(function, message):
    with pytest.raises(ValueError) as error:
        _ = Learner(function, 4).structure
    assert message in str(error.value)


def test_registered_learners_take_the_options_that_they_have():
    options = {"depth": 3, "width_factor": 2.0, "bias": False}
    made = {name: learners.make(kind, options) for name, kind in learners.LEARNERS.items()}
    assert made.items() >= {"linear": Linear(False), "mlp": MLP(3, 2.0, False), "swiglu": SwiGLU(2.0, False)}.items()
    assert learners.make(numpy_gelu, options) is numpy_gelu
    assert learners.mlp(4, depth=1) == learners.linear(4)


def keeps_the_rules(dense, x):
    d = x.shape[-1]
    hidden = jnp.concatenate([learners.normalise(dense(x, d)), jax.nn.silu(dense(x, 3, bias=False))], -1)
    return x * dense.param("skip") + dense(hidden * dense.param("gain", (d + 3,)), d)


def mean_over_tokens(dense, x):
    return dense(x - x.mean(-2, keepdims=True), x.shape[-1])


def hidden_mean(dense, x):
    return dense(x - jax.lax.stop_gradient(x.mean(-2, keepdims=True)), x.shape[-1])


def previous_token(dense, x):
    return dense(jnp.roll(x, 1, -2), x.shape[-1])


def largest_of_all(dense, x):
    return dense(x, x.shape[-1]) / jnp.abs(x).max()


def other_heads(dense, x):
    return dense(x, x.shape[-1]) + x.sum(1, keepdims=True)


def position(dense, x):
    return dense(x, x.shape[-1]) * jnp.arange(1.0, x.shape[-2] + 1)[:, None]


def many_tokens(dense, x):
    return dense(x, x.shape[-1]) / x.shape[-2]


def random(dense, x):
    return dense(x, x.shape[-1]) + next(COUNTER)


def another_number_of_calls(dense, x):
    for _ in range(1 + (x.shape[-2] > 1)):
        x = dense(x, x.shape[-1])
    return x


def other_widths(dense, x):
    return dense(dense(x, x.shape[-1] + (x.shape[-2] > 1)), x.shape[-1])


def within_jit(dense, x):
    return jax.jit(lambda x: dense(x, x.shape[-1]))(x)


def within_vmap(dense, x):
    return jax.vmap(lambda x: dense(x, x.shape[-1]))(x)


def within_checkpoint(dense, x):
    return jax.checkpoint(lambda x: dense(x, x.shape[-1]))(x)


def within_scan(dense, x):
    return jax.lax.scan(lambda x, _: (dense(x, x.shape[-1]), None), x, None, length=1)[0]


def fewer_rows(dense, x):
    y = dense(x.reshape(-1, x.shape[-1])[None, None], x.shape[-1])
    return y.reshape(x.shape)


def not_finite(dense, x):
    return jnp.log(dense(x, x.shape[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("f", [keeps_the_rules, ResidualNorm(keeps_the_rules), ResidualNorm(MLP(3))])
def test_learners_that_keep_the_rules_pass(f):
    learner_lib.check(Learner(f, 4))


@pytest.mark.parametrize("name", LEARNERS)
def test_registered_learners_keep_the_rules(name):
    learner_lib.check(Learner(learners.make(LEARNERS[name], {}), 4))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (mean_over_tokens, "changes the output of token"),
        (ResidualNorm(mean_over_tokens), "changes the output of token"),
        (hidden_mean, "changes the output of token"),
        (previous_token, "changes the output of token 1; expected it to act on each token alone"),
        (largest_of_all, "changes the output of"),
        (other_heads, "changes the output of another sequence or head"),
        (position, "depends on where the token is"),
        (many_tokens, "or on how many there are"),
        (random, "two calls with the same inputs differ"),
        (another_number_of_calls, "call 2 of dense differs from an earlier run of the learner"),
        (other_widths, "call 1 of dense differs"),
        (within_jit, "inside scan, vmap, checkpoint, grad or jit"),
        (within_vmap, "inside scan, vmap, checkpoint, grad or jit"),
        (within_checkpoint, "inside scan, vmap, checkpoint, grad or jit"),
        (within_scan, "inside scan, vmap, checkpoint, grad or jit"),
        (fewer_rows, "dense is called with rows (1, 1, 68); expected one row per token, (2, 2, 17)"),
        (not_finite, "not finite"),
    ],
)
def test_each_way_to_break_a_rule_is_refused(f, message):
    with pytest.raises(ValueError) as error:
        learner_lib.check(Learner(f, 4))
    assert message in str(error.value)

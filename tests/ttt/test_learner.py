"""The learner against autodiff and plain NumPy, in float64 where constants must be exact."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt.learner import Dense, LayerNormParams, Learner

RNG = np.random.default_rng(0)
WIDTH = 5


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape):
    return RNG.standard_normal(shape)


def norm_params():
    return LayerNormParams(1 + 0.3 * draw(2, 1, WIDTH), 0.3 * draw(2, 1, WIDTH))


def numpy_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_layer_norm(z, norm):
    return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6) * norm.scale + norm.bias


@pytest.mark.usefixtures("float64")
def test_gelu_and_its_derivative_have_exact_constants():
    """The constants of the authors' derivative, cut to nine digits, are 1e-9 off and would be seen."""
    x = np.linspace(-6, 6, 101)
    value, derivative = learner_lib.gelu_and_derivative(jnp.asarray(x))
    np.testing.assert_allclose(value, numpy_gelu(x), rtol=0, atol=1e-14)
    expected = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=True)))(jnp.asarray(x))
    np.testing.assert_allclose(derivative, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm_residual", [True, False])
@pytest.mark.usefixtures("float64")
def test_gradient_at_f_res_is_that_of_autodiff(quick_jit, norm_residual):
    learner = Learner((WIDTH, WIDTH), norm_residual=norm_residual)
    norm, k, v, f_res = norm_params(), draw(3, 2, 4, WIDTH), draw(3, 2, 4, WIDTH), draw(3, 2, 4, WIDTH)

    def total_loss(f_res):
        f_k = learner_lib.output(learner, norm, k, f_res)
        return 0.5 * ((f_k - v) ** 2).sum()

    gradient = quick_jit(learner_lib.loss_gradient_at_f_res, static_argnums=0)
    expected = quick_jit(jax.grad(total_loss))(f_res)
    np.testing.assert_allclose(gradient(learner, norm, k, v, f_res), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.usefixtures("float64")
def test_loss_is_half_the_squared_distance_summed_over_the_width(depth):
    learner = learner_lib.mlp(WIDTH, depth=depth, width_factor=1.6)
    widths = (WIDTH, *(8,) * (depth - 1), WIDTH)
    assert learner.widths == widths
    weights = [Dense(draw(2, m, n), draw(2, 1, n)) for m, n in pairwise(widths)]
    norm, k, v = norm_params(), draw(3, 2, 4, WIDTH), draw(3, 2, 4, WIDTH)
    x = k
    for i, layer in enumerate(weights):
        x = np.einsum("bhtd,hdf->bhtf", x if i == 0 else numpy_gelu(x), layer.weight) + layer.bias
    expected = np.square(numpy_layer_norm(x, norm) - (v - k)).sum(-1) / 2
    actual = learner_lib.loss(learner, norm, jax.tree.map(jnp.asarray, tuple(weights)), jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_output_is_residual_plus_layer_norm_or_f_res_alone():
    norm, x, f_res = norm_params(), draw(1, 2, 4, WIDTH), draw(1, 2, 4, WIDTH)
    with_norm = learner_lib.output(Learner((WIDTH, WIDTH)), norm, x, f_res)
    np.testing.assert_allclose(with_norm, x + numpy_layer_norm(f_res, norm), atol=1e-6)
    without = learner_lib.output(Learner((WIDTH, WIDTH), norm_residual=False), norm, x, f_res)
    np.testing.assert_array_equal(without, f_res)


def test_layer_norm_epsilon_is_1e_6():
    """At a variance of 1e-6 the epsilon halves the square: 1e-5 would give 0.30 instead of 0.71."""
    normalised, inverse_std = learner_lib.normalise(jnp.array([-1e-3, 1e-3]))
    np.testing.assert_allclose(normalised, [-(0.5**0.5), 0.5**0.5], rtol=1e-5)
    np.testing.assert_allclose(inverse_std, [2e-6**-0.5], rtol=1e-5)


def test_initial_weights_are_normal_with_zero_biases():
    weights = learner_lib.init(jax.random.key(0, impl="rbg"), learner_lib.mlp(32), heads=3)
    assert [w.weight.shape for w in weights] == [(3, 32, 128), (3, 128, 32)]
    for layer in weights:
        np.testing.assert_allclose([layer.weight.mean(), layer.weight.std()], [0, 0.02], atol=1e-3)
        np.testing.assert_array_equal(layer.bias, np.zeros((3, 1, layer.weight.shape[-1])))
    assert learner_lib.init(jax.random.key(0, impl="rbg"), Learner((4, 4), bias=False), heads=1)[0].bias is None


@pytest.mark.parametrize("widths", [(), (4,), (4, 8), (4, 0, 4), (-1, -1)])
def test_impossible_widths_are_refused(widths):
    with pytest.raises(ValueError, match="learner widths"):
        Learner(widths)

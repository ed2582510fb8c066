"""Check that kernels can be differentiated once, and that a second derivative is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels import run, splash
from ttt_jax.kernels.derivatives import differentiable_once

REFUSED = "this kernel has no second derivative"


def kernel(x, scale):
    """Stand for a kernel that is linear in its second argument."""
    return differentiable_once(scale * jnp.sin(differentiable_once(x, REFUSED)), REFUSED)


def in_a_scan(x, scale):
    return jax.lax.scan(lambda c, _: (jax.checkpoint(kernel)(c, scale), None), x, None, length=2)[0]


SECOND = {
    "reverse over reverse": lambda f: jax.grad(lambda x: (x * jax.grad(f)(x)).sum()),
    "forward over reverse": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,)),
    "reverse over forward": lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (x,))[1]),
}


def refusal(function, x):
    """Return the message with which tracing a function is refused."""
    with pytest.raises(NotImplementedError) as error:
        jax.eval_shape(function, x)
    return str(error.value)


@pytest.mark.parametrize("function", [kernel, in_a_scan, jax.checkpoint(kernel), jax.jit(kernel)])
@pytest.mark.parametrize("order", SECOND)
def test_second_derivatives_are_refused_in_every_order(order, function):
    assert refusal(SECOND[order](lambda x: function(x, 2.0)), 1.0) == REFUSED


def test_the_derivative_of_what_the_backward_pass_reads_is_refused():
    """Check a gradient that depends on the outer variable by the derivative of the output alone."""
    assert refusal(jax.grad(lambda a: jax.grad(lambda x: a * kernel(x, 2.0))(1.0)), 1.0) == REFUSED


def test_values_and_first_derivatives_do_not_change(assert_close):
    x = np.linspace(-1, 1, 5, dtype=np.float32)
    gradient = jax.vmap(jax.value_and_grad(lambda x: in_a_scan(x, 2.0)))
    assert_close(gradient(x), (2 * np.sin(2 * np.sin(x)), 4 * np.cos(2 * np.sin(x)) * np.cos(x)), 1e-6)


def test_nothing_of_it_is_in_a_program():
    program = jax.jit(lambda x: differentiable_once(x, REFUSED)).lower(jnp.ones(3)).as_text()
    assert "return %arg0" in program


@pytest.mark.parametrize("order", SECOND)
def test_the_kernel_of_the_inner_loop_names_the_scan(make_problem, order):
    """Differentiate with respect to queries, through both passes."""
    problem = make_problem()
    start = jax.tree.map(lambda w: w[None], problem.parameters.w0)

    def loss(q):
        tokens = problem.tokens._replace(q=q)
        return (run.run(problem.loop, problem.parameters, start, tokens, interpret=True)[0] ** 3).sum()

    found = refusal(SECOND[order](loss), problem.tokens.q)
    assert found == "the fused kernel of the inner loop has no second derivative; use model.ttt.kernel=scan"


@pytest.mark.parametrize("order", SECOND)
def test_splash_attention_names_attention_in_blocks(order):
    x = jnp.ones((1, 128, 1, 64))

    def loss(q):
        return (splash.causal_attention(q, x, x, interpret=True) ** 3).sum()

    found = refusal(SECOND[order](loss), x)
    assert found == "splash attention has no second derivative; use model.attention.kernel=xla"

"""Test the check of learners: functions that keep the rules pass; each way to break a rule is refused by name."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from ttt_jax.ttt import learners, rules
from ttt_jax.ttt.learner import Learner
from ttt_jax.ttt.learners import LEARNERS, MLP, ResidualNorm

COUNTER = itertools.count()


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


@pytest.mark.parametrize("f", [keeps_the_rules, ResidualNorm(keeps_the_rules), ResidualNorm(MLP(3))])
def test_learners_that_keep_the_rules_pass(f):
    rules.check(Learner(f, 4))


@pytest.mark.parametrize("name", LEARNERS)
def test_registered_learners_keep_the_rules(name):
    rules.check(Learner(learners.make(LEARNERS[name], {}), 4))


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
        rules.check(Learner(f, 4))
    assert message in str(error.value)

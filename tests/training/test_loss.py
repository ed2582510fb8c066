"""Compare the loss and its gradients, at once and in chunks, with NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.training import loss as loss_lib

ROWS, TOKENS, WIDTH, WORDS = 3, 5, 4, 7
CHUNKS = [
    4,
    *(pytest.param(tokens, marks=pytest.mark.slow) for tokens in (1, 15, 64)),
]  # 4 tokens need padding, 15 are all
MASKS = {
    "all": np.ones((ROWS, TOKENS)),
    "some": np.array([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
    "none": np.zeros((ROWS, TOKENS)),
}
RNG = np.random.default_rng(0)
H, HEAD = RNG.standard_normal((ROWS, TOKENS, WIDTH)), RNG.standard_normal((WIDTH, WORDS))
TARGETS = RNG.integers(0, WORDS, (ROWS, TOKENS))


def float64(h, head, mask):
    """Return the loss of each token, the mean over rows of masked means, and its gradients."""
    logits = h @ head
    odds = np.exp(logits)
    probabilities = odds / odds.sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(probabilities, TARGETS[..., None], -1))[..., 0]
    weights = mask / np.maximum(mask.sum(-1, keepdims=True), 1e-10) / ROWS
    of_logits = weights[..., None] * (probabilities - np.eye(WORDS)[TARGETS])
    return nll, (weights * nll).sum(), (of_logits @ head.T, np.einsum("btd,btv->dv", h, of_logits))


def function(mask, dtype="float32", targets=TARGETS):
    def of_arrays(h, head):
        return loss_lib.of_hidden_states(h, head, jnp.asarray(targets), jnp.asarray(mask), jnp.dtype(dtype))

    return of_arrays


@pytest.fixture(params=[None, *CHUNKS])
def chunk(request, monkeypatch):
    """Compute logits at once (None), or so many tokens at a time."""
    if request.param is not None:
        monkeypatch.setattr(loss_lib, "MOST_LOGITS", 0)
        monkeypatch.setattr(loss_lib, "_CHUNK_LOGITS", request.param * WORDS)
    return request.param


def arrays():
    return jnp.asarray(H, jnp.float32), jnp.asarray(HEAD, jnp.float32)


def test_losses_of_tokens_equal_numpy():
    nll, mean, _ = float64(H, HEAD, MASKS["some"])
    ours = loss_lib.token_nll(jnp.asarray(H @ HEAD, jnp.float32), jnp.asarray(TARGETS))
    np.testing.assert_allclose(ours, nll, rtol=1e-5)
    np.testing.assert_allclose(loss_lib.mean_over_rows(ours, jnp.asarray(MASKS["some"])), mean, rtol=1e-6)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_loss_and_gradients_equal_numpy(chunk, mask, assert_close):
    _, mean, gradients = float64(H, HEAD, mask)
    value, found = jax.value_and_grad(function(mask), (0, 1))(*arrays())
    np.testing.assert_allclose(value, mean, rtol=1e-6)
    assert_close(found, gradients, 1e-6)
    assert_close(jax.grad(lambda h, head: 3 * function(mask)(h, head))(*arrays()), 3 * gradients[0], 1e-6)


def test_gradients_of_the_head_are_summed_in_float32(chunk, assert_close):
    """Compare with products of bfloat16 that are summed in float64, for any number of chunks."""
    h, head = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (H, HEAD))
    _, mean, (_, of_head) = float64(h, head, MASKS["all"])
    value, (_, found) = jax.value_and_grad(function(MASKS["all"], "bfloat16"), (0, 1))(*arrays())
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(value, mean, rtol=1e-5)
    assert_close(found, of_head, 2e-3)  # one rounding of the gradients of logits, and none of the sum


@pytest.mark.parametrize("target", [-1, WORDS])
def test_a_target_that_is_no_word_gives_nan(chunk, target):
    targets = TARGETS.copy()
    targets[1, 2] = target
    assert np.isnan(function(MASKS["all"], targets=targets)(*arrays()))


def test_large_logits_do_not_overflow(chunk):
    h, head = (1e3 * x for x in arrays())
    value, gradients = jax.value_and_grad(function(MASKS["all"]), (0, 1))(h, head)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.slow
def test_second_derivatives_equal_those_at_once(monkeypatch, assert_close):
    def product(chunks):
        if chunks:
            monkeypatch.setattr(loss_lib, "MOST_LOGITS", 0)
            monkeypatch.setattr(loss_lib, "_CHUNK_LOGITS", 4 * WORDS)
        slope = lambda h, head: (jax.grad(function(MASKS["some"]))(h, head) * H[::-1]).sum()  # noqa: E731
        return jax.grad(slope, (0, 1))(*arrays())

    at_once = product(False)
    assert float(jnp.abs(at_once[0]).max()) > 1e-2
    assert_close(product(True), at_once, 1e-5)

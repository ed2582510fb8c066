"""Check on random numbers that a function keeps the rules of learners, which :mod:`ttt_jax.ttt.learner` states.

A function that breaks them would otherwise train silently: one that mixes tokens lets a token see later ones, and one
that calls ``dense`` inside ``vmap`` has wrong gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.ttt.learner import Affine, Dense, Learner, Weights

_BATCH, _HEADS, _TOKENS = 2, 2, 17
_SAME = 1e-4  # relative to the largest output: sums in another order


@functools.lru_cache(maxsize=64)
def check(learner: Learner) -> None:
    """Check a learner by calling it on random numbers; compiles nothing larger than single operations.

    Raises:
      ValueError: names the rule that is broken.
    """
    structure = learner.structure
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    with jax.ensure_compile_time_eval(), jax.default_matmul_precision("highest"):
        weights = tuple(
            Affine(
                normal(_HEADS, m.features_in, m.features_out) * m.features_in**-0.5,
                normal(_HEADS, 1, m.features_out) if m.bias else None,
            )
            for m in structure.matrices
        )
        constants = {c.name: 1 + 0.3 * normal(_HEADS, *c.shape) for c in structure.constants}
        x = normal(_BATCH, _HEADS, _TOKENS, learner.features)

        def f(x: jax.Array) -> jax.Array:
            return learner.apply(weights, constants, x)

        watching = _Watching(learner, weights, constants, x.shape[:-1])
        y = learner.f(watching, x)
        watching.finish()
        if y.shape != (*x.shape[:-1], structure.features_out):
            raise ValueError(f"returns shape {y.shape} for inputs {x.shape}; expected one row of features per token")
        if not jnp.array_equal(y, f(x), equal_nan=True):
            raise ValueError("two calls with the same inputs differ; expected a function that is deterministic")
        if not jnp.isfinite(y).all():
            raise ValueError("outputs are not finite; expected finite outputs for inputs and weights of ordinary size")
        _check_tokens(f, x, y, normal)


def _check_tokens(f, x: jax.Array, y: jax.Array, normal) -> None:
    """Check that the output of a token depends on that token alone, of the same sequence and head, at any index."""
    size = float(jnp.abs(y).max()) or 1.0
    for token in (0, _TOKENS // 2, _TOKENS - 1):
        other = jnp.zeros(x.shape[:-1], bool).at[0, 1, token].set(True)[..., None]
        large = jnp.where(other, 10 * normal(*x.shape), x)
        moved, slope = jax.jvp(f, (large,), (jnp.where(other, normal(*x.shape), 0.0),))
        influence = jnp.where(other, 0.0, jnp.abs(moved - y) / size + jnp.abs(slope))
        if not float(influence.max()) < _SAME:
            sequence, head, changed, _ = np.unravel_index(int(influence.argmax()), influence.shape)
            whom = f"token {changed}" if (sequence, head) == (0, 1) else "another sequence or head"
            raise ValueError(f"token {token} changes the output of {whom}; expected it to act on each token alone")
    part = f(x[:, :, 1:3])
    if not float(jnp.abs(part - y[:, :, 1:3]).max()) < _SAME * size:
        raise ValueError(
            "the output of a token depends on where the token is, or on how many there are; expected it to act on each "
            "token alone"
        )


class _Watching(Dense):
    """Apply weights; refuse calls that differ from the structure of the learner."""

    def __init__(self, learner: Learner, weights: Weights, constants, rows: tuple[int, ...]):
        super().__init__(weights, constants)
        self._matrices, self._rows = learner.structure.matrices, rows

    def __call__(self, x: jax.Array, features: int, bias: bool = True) -> jax.Array:
        """Apply the next matrix."""
        if isinstance(x, jax.core.Tracer):
            raise ValueError("dense is called inside scan, vmap, checkpoint, grad or jit; expected it outside of them")
        found, calls = (x.shape[-1], features, bool(bias)), self.calls
        if calls >= len(self._matrices) or found != tuple(self._matrices[calls]):
            raise ValueError(
                f"call {calls + 1} of dense differs from an earlier run of the learner; expected equally many calls "
                "with the same shapes each time"
            )
        if x.shape[:-1] != self._rows:
            raise ValueError(f"dense is called with rows {x.shape[:-1]}; expected one row per token, {self._rows}")
        return super().__call__(x, features, bias)

    def finish(self) -> None:
        """Refuse a run with too few calls."""
        if self.calls != len(self._matrices):
            raise ValueError(
                f"dense is called {self.calls} times, and {len(self._matrices)} times in an earlier run; expected "
                "equally many calls each time"
            )

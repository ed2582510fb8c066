"""Define what a learner is: the inner model ``f``, a function that calls ``dense`` for each of its weight matrices.

    def gated(dense, x):                                  # x: [..., d], one row per token
        d = x.shape[-1]
        return dense(jax.nn.silu(dense(x, 4 * d)) * dense(x, 4 * d), d)

``dense(x, features, bias=True)`` applies the next weight matrix, ``x W + c``. Weights and biases are the hidden state
of a TTT layer, which the inner loop changes. ``dense.param(name, shape, init)`` returns a parameter of the outer loop,
one for each head, which is constant in the inner loop. Everything else (initial weights, gradients, the dual form,
shapes, operation counts) is derived from the function.

Rules: f acts on each token alone; it is deterministic; each call of f calls ``dense`` equally often, with the same
shapes; and it never calls ``dense`` inside ``scan``, ``vmap``, ``checkpoint`` or ``jit``. :func:`check` calls a learner
on random numbers and refuses one that breaks them, which would otherwise train silently: one that mixes tokens lets a
token see later ones, and one that calls ``dense`` inside ``vmap`` has wrong gradients.

Shapes: B batch, H heads, b tokens, d_in and d_out widths of a matrix, n width of a parameter. Leading axes broadcast,
so ``...`` is [B, H] or [H].
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., jax.Array]  # (key, shape) -> array, as in jax.nn.initializers

_BATCH, _HEADS, _TOKENS = 2, 2, 17  # of the random numbers that check a learner
_SAME = 1e-4  # relative to the largest output: sums in another order


class Affine(NamedTuple):
    """A weight matrix with its bias, or a gradient of their shape."""

    weight: jax.Array  # [..., d_in, d_out]
    bias: jax.Array | None  # [..., 1, d_out]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``x W + c``, [..., b, d_in] to [..., b, d_out]."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


Weights = tuple[Affine, ...]  # in the order in which f calls dense
Constants = Mapping[str, jax.Array]  # parameters of the outer loop inside f, [H, 1, n] each


class Dense:
    """The first argument of a learner: applies given weights in the order of the calls.

    Subclasses change how one matrix is applied (:meth:`apply`).
    """

    def __init__(self, weights: Weights, constants: Constants):
        self._weights, self._constants, self.calls = weights, constants, 0

    def __call__(self, x: jax.Array, features: int, bias: bool = True) -> jax.Array:
        """Apply the next weight matrix, [..., b, d_in] to [..., b, ``features``]."""
        index, self.calls = self.calls, self.calls + 1
        return self.apply(index, self._weights[index], x)

    def apply(self, index: int, affine: Affine, x: jax.Array) -> jax.Array:
        """Return the outputs of matrix ``index`` for its inputs, [..., b, d_in] to [..., b, d_out]."""
        return affine(x)

    def param(self, name: str, shape: tuple[int, ...] = (), init: Initializer = jax.nn.initializers.ones) -> jax.Array:
        """Return a parameter of the outer loop, of shape [H, 1, n] (or [H, 1, 1]), which broadcasts against tokens.

        Args:
          name: its name; a second call with the same name returns the same parameter.
          shape: the shape for one head, ``()`` or ``(n,)``.
          init: draws the initial values.
        """
        return self._constants[name]


Function = Callable[[Dense, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Learner:
    """A learner without its weights.

    Attributes:
      f: the function.
      features: width of its inputs, the keys and queries.
    """

    f: Function
    features: int

    @property
    def structure(self) -> "Structure":
        """Return the matrices and parameters that f asks for."""
        return _structure(self.f, self.features)

    def apply(self, weights: Weights, constants: Constants, x: jax.Array) -> jax.Array:
        """Return ``f(x; W)``, [..., b, d_in] to [..., b, d_out]."""
        return self.f(Dense(weights, constants), x)


class Matrix(NamedTuple):
    """The shape of one weight matrix."""

    features_in: int
    features_out: int
    bias: bool


class Constant(NamedTuple):
    """A parameter of the outer loop inside f; ``shape`` without the axis of heads."""

    name: str
    shape: tuple[int, ...]
    init: Initializer


class Structure(NamedTuple):
    """The matrices and parameters of a learner.

    Attributes:
      matrices: shape of each weight matrix, in the order of the calls.
      constants: parameters of the outer loop inside f.
      features_out: width of f's outputs.
    """

    matrices: tuple[Matrix, ...]
    constants: tuple[Constant, ...]
    features_out: int


def init(key: jax.Array, learner: Learner, heads: int, stddev: float = 0.02) -> Weights:
    """Draw W0 for each head, leaves [H, ...]: normal weights and zero biases."""
    matrices = learner.structure.matrices
    keys = jax.random.split(key, len(matrices))
    return tuple(
        Affine(
            stddev * jax.random.normal(k, (heads, m.features_in, m.features_out)),
            jnp.zeros((heads, 1, m.features_out)) if m.bias else None,
        )
        for k, m in zip(keys, matrices, strict=True)
    )


def init_constants(key: jax.Array, learner: Learner, heads: int) -> dict[str, jax.Array]:
    """Draw the parameters of the outer loop inside f, [H, 1, n] each."""
    constants = learner.structure.constants
    keys = jax.random.split(key, max(1, len(constants)))
    return {c.name: c.init(k, (heads, *c.shape)) for k, c in zip(keys, constants, strict=False)}


def norm_per_head(weights: Weights) -> jax.Array:
    """Return the Frobenius norm over all weights and biases of each head, leaves [..., d_in, d_out] to [...]."""
    return jnp.sqrt(sum((w**2).sum((-2, -1)) for w in jax.tree.leaves(weights)))


@functools.lru_cache(maxsize=256)
def _structure(f: Function, features: int) -> Structure:
    recorder = _Recorder()
    x = jax.ShapeDtypeStruct((1, 1, 1, features), jnp.float32)
    y = jax.eval_shape(functools.partial(f, recorder), x)
    if not isinstance(y, jax.ShapeDtypeStruct) or y.shape[:-1] != (1, 1, 1):
        raise ValueError(f"{_name(f)} returns {y}; expected an array [..., tokens, features], one row per token")
    if not recorder.matrices:
        raise ValueError(f"{_name(f)} does not call dense; expected a call for each of its weight matrices")
    return Structure(tuple(recorder.matrices), tuple(recorder.constants.values()), y.shape[-1])


class _Recorder(Dense):
    """Record the shapes that f asks for; return zeros."""

    def __init__(self):
        self.matrices: list[Matrix] = []
        self.constants: dict[str, Constant] = {}

    def __call__(self, x: jax.Array, features: int, bias: bool = True) -> jax.Array:
        if features < 1:
            raise ValueError(f"dense is called with features={features}; expected 1 or more")
        self.matrices.append(Matrix(x.shape[-1], features, bool(bias)))
        return jnp.zeros((*x.shape[:-1], features), x.dtype)

    def param(self, name: str, shape: tuple[int, ...] = (), init: Initializer = jax.nn.initializers.ones) -> jax.Array:
        if not name.isidentifier() or re.fullmatch(r"(kernel|bias)_\d+", name):
            raise ValueError(f"dense.param({name!r}): expected an identifier other than kernel_0, bias_0 and so on")
        if len(shape) > 1:
            raise ValueError(f"dense.param({name!r}, {shape}): expected a shape of at most one axis, such as (d,)")
        found = Constant(name, (1,) * (2 - len(shape)) + tuple(shape), init)
        if self.constants.setdefault(name, found)[:2] != found[:2]:
            raise ValueError(f"dense.param({name!r}, {shape}): the name has another shape elsewhere in the learner")
        return jnp.zeros((1, *found.shape))


def _name(f: Any) -> str:
    return getattr(f, "__name__", None) or type(f).__name__


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

"""Build the inner loop alone, for benchmarks: by this package, and in the structure of the TTT authors' code.

Shapes: B batch, T tokens, H heads, d head width, b tokens per mini-batch, n mini-batches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.errors import ConfigError
from ttt_jax.kernels import run as kernels
from ttt_jax.kernels import self_check
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import learners, scan
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens, ttt_linear, ttt_mlp
from ttt_jax.ttt.learner import Affine, Constants, Learner, Weights

PATHS = ("official", "scan", "pallas")
OFFICIAL = ("linear", "mlp")  # the learners of the authors' code
_DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


def build(
    kind: str = "linear",
    heads: int = 12,
    head_dim: int = 64,
    tokens: int = 2048,
    batch: int = 1,
    mini_batch: int = 16,
    dtype: str = "bf16",
    backward: bool = False,
    path: str = "scan",
    remat_group: int = 4,
    unroll: int = 1,
    restarts: bool = False,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a function that runs the inner loop, and the shapes of its arguments.

    The function takes q, k, v [B, T, H d], token_eta [B, T, H], position_eta [b], W0 and the LN of the learner, and
    returns outputs [B, T, H d]: the layout between the projections of a layer.

    Args:
      kind: the learner, a name in :data:`ttt_jax.ttt.learners.LEARNERS`, with the residual and norm of the paper.
      dtype: dtype of q, k, v and the outputs, ``bf16`` or ``f32``.
      backward: whether the function also returns gradients of all arguments; it then takes the gradient of the outputs
        as a further, first argument.
      path: ``official``, the structure of the authors' code (see :func:`official`); ``scan``,
        :func:`ttt_jax.ttt.scan.run`; ``pallas``, the fused kernel.
      remat_group, unroll: see :func:`ttt_jax.ttt.scan.run`; ``official`` and ``pallas`` have no unrolling.
      restarts: whether the function takes a further, last argument, bool [B, n], which marks mini-batches that begin
        at W0; ``pallas`` only.

    Raises:
      ConfigError: where a setting is not one of the above.
    """
    for name, value, known in (("kind", kind, learners.LEARNERS), ("dtype", dtype, _DTYPES), ("path", path, PATHS)):
        if value not in known:
            raise ConfigError(f"{name}={value}: expected one of {', '.join(known)}")
    loop = InnerLoop(Learner(learners.ResidualNorm(learners.make(learners.LEARNERS[kind], {})), head_dim))
    if restarts and path != "pallas":
        raise ConfigError(f"restarts=true: expected path=pallas, not path={path}")
    if path == "official":
        if kind not in OFFICIAL:
            raise ConfigError(f"path=official: has no {kind}; expected kind={' or '.join(OFFICIAL)}, or path=scan")
        run = partial(official, remat_group=remat_group)
    elif path == "pallas":
        if reason := kernels.unsupported(loop, mini_batch):
            raise ConfigError(f"path=pallas: no kernel: {reason}; expected official or scan")
        run = partial(_by_kernel if restarts else _scan, loop, kernel=partial(kernels.run, remat_group=remat_group))
    else:
        run = partial(_scan, loop, remat_group=remat_group, unroll=unroll)

    def forward(q, k, v, *others):
        by_head = (x.reshape(batch, tokens, heads, head_dim) for x in (q, k, v))
        return run(*by_head, *others).reshape(batch, tokens, heads * head_dim)

    def array(*shape: int, of: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, of)

    tokenwise = array(batch, tokens, heads * head_dim, of=_DTYPES[dtype])
    w0 = jax.eval_shape(lambda: learner_lib.init(jax.random.key(0), loop.learner, heads))
    norm = {name: array(heads, 1, head_dim) for name in ("norm_scale", "norm_bias")}
    arguments = (tokenwise, tokenwise, tokenwise, array(batch, tokens, heads), array(mini_batch), w0, norm)
    flags = (array(batch, tokens // mini_batch, of=jnp.bool_),) if restarts else ()
    if not backward:
        return forward, (*arguments, *flags)

    def forward_backward(gradient, *arguments):
        arguments, flags = arguments[:7], arguments[7:]
        z, pullback = jax.vjp(lambda *x: forward(*x, *flags), *arguments)
        return z, pullback(gradient)

    return forward_backward, (tokenwise, *arguments, *flags)


def _scan(loop, q, k, v, token_eta, position_eta, w0, norm, **options):
    return scan.run(loop, Parameters(w0, norm, position_eta), Tokens(q, k, v, token_eta), **options).z


def _by_kernel(loop, q, k, v, token_eta, position_eta, w0, norm, flags, kernel):
    kernel = partial(kernel, restarts=flags)
    return _scan(loop, q, k, v, token_eta, position_eta, w0, norm, kernel=kernel)


def official(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    token_eta: jax.Array,
    position_eta: jax.Array,
    w0: Weights,
    norm: Constants,
    *,
    remat_group: int = 4,
) -> jax.Array:
    """Compute outputs [B, T, H, d] as the authors' JAX code does, as a baseline for speed.

    A function of one head of one sequence is scanned over mini-batches, in groups that the backward pass computes
    again, under ``vmap`` over heads and over the batch. It computes in the dtype of q with W in float32, forms eta for
    every pair of tokens, and takes the gradient of LN by autodiff. T is a multiple of b times ``remat_group``.
    """
    batch, tokens, heads, d = q.shape
    b = len(position_eta)

    def split(x):
        return x.reshape(batch, tokens // b, b, heads, d).transpose(0, 3, 1, 2, 4)  # [B, H, n, b, d]

    rates = token_eta.reshape(batch, tokens // b, b, heads).transpose(0, 3, 1, 2)[..., None, :]
    eta = position_eta[:, None] * rates  # [B, H, n, b, b]

    def head(q, k, v, eta, w0, norm):
        def step(weights, x):
            return _official_mini_batch(norm, weights, *x)

        xs = jax.tree.map(lambda x: x.reshape(-1, remat_group, *x.shape[1:]), (q, k, v, eta))
        group = jax.checkpoint(partial(jax.lax.scan, step), prevent_cse=False)
        return jax.lax.scan(group, w0, xs)[1].reshape(tokens, d)

    sequences = jax.vmap(jax.vmap(head), in_axes=(0, 0, 0, 0, None, None))
    return sequences(split(q), split(k), split(v), eta, w0, norm).transpose(0, 2, 1, 3)


def _official_mini_batch(norm, weights, q, k, v, eta):
    """Compute the dual form of one mini-batch of one head from q, k, v [b, d] and eta [b, b]."""

    def layer_norm(z):
        mean = z.mean(-1, keepdims=True)
        variance = jnp.maximum(0.0, (z * z).mean(-1, keepdims=True) - mean * mean)
        scale = jax.lax.rsqrt(variance + learners.LAYER_NORM_EPSILON) * norm["norm_scale"]
        return ((z - mean) * scale + norm["norm_bias"]).astype(q.dtype)

    last, lower = eta[-1][:, None], jnp.tril(jnp.ones_like(eta))
    inputs, hidden = [k], []
    for layer in weights:
        hidden.append(inputs[-1] @ layer.weight + layer.bias)
        inputs.append(jax.nn.gelu(hidden[-1]))
    normed, pullback = jax.vjp(layer_norm, hidden[-1])
    gradients = list(pullback((normed - (v - k)).astype(normed.dtype)))
    for layer, z in zip(weights[:0:-1], hidden[-2::-1], strict=True):
        gradients.insert(0, gradients[0] @ layer.weight.T * learners.gelu_and_derivative(z)[1])
    x_bar, new = q, []
    for index, (layer, x, g) in enumerate(zip(weights, inputs[:-1], gradients, strict=True)):
        x_bar = jax.nn.gelu(x_bar) if index else x_bar
        attention = jnp.tril(x_bar @ x.T)
        x_bar = x_bar @ layer.weight - (eta * attention) @ g + (layer.bias - (eta * lower) @ g)
        new.append(
            Affine(
                (layer.weight - (last * x).T @ g).astype(jnp.float32),
                (layer.bias - (last * g).sum(0, keepdims=True)).astype(jnp.float32),
            )
        )
    return tuple(new), (q + layer_norm(x_bar)).astype(q.dtype)


PARTS = ("scan", "kernel", "inference")


def build_self_check(
    kind: str = "linear",
    heads: int = 12,
    head_dim: int = 64,
    mini_batch: int = 16,
    dtype: str = "bf16",
    part: str = "kernel",
    remat_group: int = 4,
    device: str = "TPU v5 lite",
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a function that the self-check of a fused kernel compiles, and the shapes of its arguments.

    Args:
      kind, dtype: see :func:`build`.
      heads: heads of one device; the check takes fewer where they would take long to compile.
      part: ``scan`` and ``kernel``, each with gradients, or ``inference``, the kernel without.
      remat_group: see :func:`ttt_jax.kernels.run.run`.
      device: kind of device, as JAX names it.

    Raises:
      ConfigError: where a setting is not one of the above.
    """
    for name, value, known in (("kind", kind, ("linear", "mlp")), ("dtype", dtype, _DTYPES), ("part", part, PARTS)):
        if value not in known:
            raise ConfigError(f"{name}={value}: expected one of {', '.join(known)}")
    loop = ttt_linear(head_dim) if kind == "linear" else ttt_mlp(head_dim)
    family = self_check.Family(loop, mini_batch, heads, jnp.dtype(_DTYPES[dtype]).name, remat_group)
    arguments, kernel = self_check.problem_of(family, device)
    cotangents = self_check.cotangents(loop, arguments)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (arguments, cotangents))
    return self_check.programs(loop, kernel, jnp.dtype(family.dtype))[part], shapes

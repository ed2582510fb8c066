"""Define the TTT layer, a mixer whose hidden state is the weights of a learner.

TTT-Linear and TTT-MLP differ only in the learner. There are two ways to make q, k and v (the paper's backbones):

* ``mamba``: q and k are two causal convolutions of one projection, and a gate multiplies the output;
* ``transformer``: three projections, no convolution, no gate.

The inner learning rate of both is

    eta[t, s] = base_lr * max(0, 1/t + tau[t]) * sigmoid(w_h . x_s + c_h) / d     t, s = 1 ... b

Other rates are in :mod:`ttt_jax.ttt.rate`. An update may also read gates of each token, which are functions of
``w_h . x_s + c_h`` like the rate.

Two parts can be left out, as in the paper's steps from linear attention. Without ``learned_w0`` sequences start at
W0 = 0. Without ``learned_eta`` the rate keeps its initial value, with w, c and tau all 0.

The collection ``statistics`` describes the inner loop, for each token of each sequence and head. It is filled on
request (``mutable=["statistics"]``), and costs nothing otherwise. None of its values is a mean:

* ``loss_at_w0``, ``loss_before``, ``loss_after``, ``weight_distance`` [B, T, H]: :class:`ttt_jax.ttt.scan.Statistics`;
* ``target_spread`` [B, T, H], where the objective is the squared error: the loss of a learner that knows only the mean
  of its targets;
* ``eta`` [B, T, H] or [B, T, H, M]: the rate of each token's gradient without the factor of its position: base_lr *
  ... / d above;
* ``position_eta`` [b]: max(0, 1/t + tau[t]);
* ``w0_norm`` [H]: Frobenius norm of W0.

Shapes: B batch, T tokens, D width, H heads, d = D / H, b tokens per mini-batch, M weight matrices of the learner.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ttt_jax.distributed.sharding import device_kind, locally
from ttt_jax.kernels import run as kernels
from ttt_jax.layers import conv as conv_lib
from ttt_jax.layers import rope
from ttt_jax.layers.context import places
from ttt_jax.layers.linear import Projection, parameter
from ttt_jax.layers.norm import post_norm
from ttt_jax.mixers.mixer import PLAIN, Context
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import scan, update
from ttt_jax.ttt.inner_loop import InnerLoop, InnerState, Parameters, Tokens, initial_state, where
from ttt_jax.ttt.learner import Affine, Matrix, Weights, norm_per_head
from ttt_jax.ttt.learners import ResidualNorm
from ttt_jax.ttt.objective import squared_error


class TTTState(NamedTuple):
    """The state of a TTT layer between two pieces of its sequences."""

    inner: InnerState
    conv_q: jax.Array | None  # the last inputs of the convolutions, [B, width - 1, D]; None without them
    conv_k: jax.Array | None


class TTT(nn.Module):
    """One TTT layer.

    Attributes:
      loop: the inner loop; the width of its learner is d.
      base_lr: the paper's eta_base, 1.0 for Linear and 0.1 for MLP.
      base_lr_start: its value at the start of the warm-up (``Context.inner_lr_warmup``).
      backbone: ``mamba`` or ``transformer``.
      learned_w0: whether W0 (and the biases it starts with) are parameters; else they are zero.
      learned_eta: whether w, c and tau are parameters; else they are zero.
      kernel, remat_group, unroll: see :mod:`ttt_jax.kernels.run`.
    """

    loop: InnerLoop
    num_heads: int
    dtype: jnp.dtype
    backbone: str = "mamba"
    mini_batch: int = 16
    base_lr: float = 1.0
    base_lr_start: float = 0.0
    learned_w0: bool = True
    learned_eta: bool = True
    conv_width: int = 4
    rope_theta: float = 10000.0
    init_stddev: float = 0.02
    kernel: str = "auto"
    remat_group: int | None = None
    unroll: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, state: TTTState | None = None, context: Context = PLAIN
    ) -> tuple[jax.Array, TTTState | None]:
        """Return y [B, T, D], and the state after x where one is given."""
        width = x.shape[-1]
        q, k, v, conv_q, conv_k = self._qkv(x, state, context)  # q, k, v: [B, T, H, d]
        placed = places(context, x.shape[1], None if state is None else state.inner.position)
        positions = (jnp.arange(x.shape[1]) if placed is None else placed.position) % self.mini_batch
        parameters = self._inner_parameters()
        tokens = Tokens(
            rope.rotate(q, positions, self.rope_theta),
            rope.rotate(k, positions, self.rope_theta),
            v,
            self._token_eta(x, context.inner_lr_warmup),
            self._gates(x),
        )
        inner = None if state is None else _started(state.inner, self._begin(parameters.w0, x.shape[0]))
        result = self._inner_loop(parameters, tokens, inner, context)
        if result.statistics is not None:
            self._record(result.statistics, parameters, tokens, k, context)
        z = post_norm()(result.z.reshape(x.shape))  # [B, T, D]
        if self.backbone == "mamba":
            z *= nn.gelu(self._projection(width, "wg")(x).astype(jnp.float32), approximate=True)
        y = Projection(width, ("heads", "embed"), self.dtype, self.init_stddev, name="wo")(z)
        return context.blank(y), None if state is None else TTTState(result.state, conv_q, conv_k)

    def _inner_loop(
        self, parameters: Parameters, tokens: Tokens, state: InnerState | None, context: Context
    ) -> scan.Result:
        """Scan the mini-batches, on each device for its own sequences and heads and without communication."""
        statistics = self.is_mutable_collection("statistics") and not self.is_initializing()
        kernel = kernels.choose(self.kernel, self.loop, self.mini_batch, device_kind(), self.remat_group).kernel

        def run(parameters, tokens, state, valid, reset):
            result = scan.run(
                self.loop,
                parameters,
                tokens,
                state,
                valid=valid,
                reset=reset,
                aligned=context.aligned,
                statistics=statistics,
                kernel=kernel,
                **kernels.scan_options(self.remat_group, self.unroll, device_kind()),
            )
            return result if state is not None else scan.Result._make((result.z, None, result.statistics))

        heads, by_token, by_row = P("num_heads"), P("batch", None, "num_heads"), P("batch")
        state_axes = None if state is None else self.state_axes().inner
        inputs = (Parameters._make((heads, heads, P())), by_token, state_axes, by_row, by_row)
        read = locally(run, inputs, scan.Result._make((by_token, state_axes, by_token)))
        return read(parameters, tokens, state, context.valid, context.begins)

    def _record(
        self, statistics: scan.Statistics, parameters: Parameters, tokens: Tokens, k: jax.Array, context: Context
    ):
        """Fill the collection ``statistics``; ``k`` is before RoPE."""
        values = {
            **statistics._asdict(),
            "w0_norm": norm_per_head(parameters.w0),
            "eta": tokens.eta,
            "position_eta": parameters.position_eta,
        }
        if self.loop.objective is squared_error:
            residual = isinstance(self.loop.learner.f, ResidualNorm)
            values["target_spread"] = _spread(tokens.v - k if residual else tokens.v, context)
        for name, value in values.items():
            self.sow("statistics", name, value, reduce_fn=lambda _, new: new)

    def initial_state(self, batch: int, width: int, length: int) -> TTTState:
        """Return the state before the first token; its size does not depend on ``length``."""
        del length
        inner = self._begin(self._zero_weights(), batch)  # replaced by the state at W0 before the first token
        if self.backbone != "mamba":
            return TTTState(inner, None, None)
        conv = conv_lib.initial_state(batch, self.conv_width, width, self.dtype)
        return TTTState(inner, conv, conv)

    def state_axes(self) -> TTTState:
        """Return the names of the axes of the state; those inside a weight matrix have none."""
        inner = jax.eval_shape(lambda: self._begin(self._zero_weights(), 1))
        names = jax.tree.map(lambda x: P(*("batch", "num_heads", None, None)[: x.ndim]), inner)
        conv = conv_lib.STATE_AXES if self.backbone == "mamba" else None
        return TTTState._make((names, conv, conv))

    def _projection(self, width, name):
        return Projection(width, ("embed", "heads"), self.dtype, self.init_stddev, name=name)

    def _conv(self, name):
        return conv_lib.CausalConv(self.conv_width, self.dtype, name=name)

    def _qkv(self, x, state, context):
        """Return q, k, v [B, T, H, d] before RoPE, and the states of the convolutions."""
        batch, tokens, width = x.shape
        conv_q = conv_k = None
        q, v = self._projection(width, "wq")(x), self._projection(width, "wv")(x)
        if self.backbone == "mamba":
            k, conv_k = self._conv("conv_k")(q, None if state is None else state.conv_k, context)
            q, conv_q = self._conv("conv_q")(q, None if state is None else state.conv_q, context)
        else:
            k = self._projection(width, "wk")(x)
        q, k, v = (y.reshape(batch, tokens, self.num_heads, width // self.num_heads) for y in (q, k, v))
        return q, k, v, conv_q, conv_k

    def _inner_parameters(self) -> Parameters:
        """Return W0, the constants of the learner and the position rate, float32 whatever the compute dtype."""

        def param(name, init, *shape, split=(None, None)):
            return parameter(self, f"inner_{name}", init, (self.num_heads, *shape), ("num_heads", *split))

        normal, zeros = nn.initializers.normal(self.init_stddev), nn.initializers.zeros
        matrices, constants, _ = self.loop.learner.structure
        w0 = self._zero_weights()
        if self.learned_w0:
            w0 = tuple(
                Affine(
                    param(f"kernel_{i}", normal, m.features_in, m.features_out, split=_split(m, len(matrices))),
                    param(f"bias_{i}", zeros, 1, m.features_out) if m.bias else None,
                )
                for i, m in enumerate(matrices)
            )
        inside = {c.name: param(c.name, c.init, *c.shape) for c in constants}
        return Parameters(w0, inside, self._position_eta())

    def _begin(self, w0: Weights, batch: int) -> InnerState:
        return initial_state(w0, batch, self.loop.update)

    def _zero_weights(self) -> Weights:
        return learner_lib.init(jax.random.key(0), self.loop.learner, self.num_heads, stddev=0.0)

    def _token_eta(self, x, warmup):
        """Return the rate of each token, such as ``base_lr * sigmoid(w_h . x_s + c_h) / d``, [B, T, H(, M)]."""
        per_matrix = (len(self.loop.learner.structure.matrices),) if self.loop.rate.per_matrix else ()
        if self.learned_eta:
            logits = self._logits(x, "eta", per_matrix)
        else:
            logits = jnp.zeros((*x.shape[:2], self.num_heads, *per_matrix))
        scale = warmup_scale(self.base_lr_start, self.base_lr, warmup)
        return self.loop.rate.token_eta(logits, self.base_lr, scale, self.loop.learner.features)

    def _gates(self, x) -> dict[str, jax.Array]:
        """Return the gates that the members of the update read of each token, [B, T, H] each."""
        members = update.token_gates(self.loop.update)
        return {name: member.activation(self._logits(x, name)) for name, member in members.items()}

    def _logits(self, x, name: str, more: tuple[int, ...] = ()):
        """Return ``w_h . x_s + c_h``, [B, T, H, ...], float32."""
        shape, axes = (self.num_heads, *more), ("num_heads", *[None] * len(more))
        normal = nn.initializers.normal(self.init_stddev)
        kernel = parameter(self, f"{name}_kernel", normal, (x.shape[-1], *shape), ("channels", *axes))
        bias = parameter(self, f"{name}_bias", nn.initializers.zeros, shape, axes)
        kernel = kernel.astype(self.dtype).reshape(x.shape[-1], -1)
        return (x.astype(self.dtype) @ kernel).astype(jnp.float32).reshape(*x.shape[:2], *shape) + bias

    def _position_eta(self):
        """Return the rate of each position, such as ``max(0, 1/t + tau[t])``, [b]."""
        if not self.learned_eta or self.loop.rate.position != "1/t":
            return self.loop.rate.position_eta(self.mini_batch)
        tau = parameter(self, "tau", nn.initializers.zeros, (self.mini_batch,), (None,))
        return self.loop.rate.position_eta(self.mini_batch, tau)


def warmup_scale(start: float, peak: float, warmup: jax.Array | float) -> jax.Array | float:
    """Return the factor of the peak rate during its warm-up from ``start``, linear in ``warmup`` from 0 to 1."""
    return start / peak + (1 - start / peak) * warmup


def _split(matrix: Matrix, matrices: int) -> tuple[str | None, str | None]:
    """Return the names of the axes of a weight matrix: the wider one is hidden, if the learner has a hidden layer."""
    if matrices == 1:
        return None, None
    hidden = "learner_hidden"
    return (None, hidden) if matrix.features_out > matrix.features_in else (hidden, None)


def _started(inner: InnerState, begin: InnerState) -> InnerState:
    """Return the state ``begin`` at W0 for rows that have read no token yet, and the state as it is for others."""
    return where(inner.position == 0, begin, inner)


def _spread(target: jax.Array, context: Context) -> jax.Array:
    """Return half the squared distance of each token's target (before RoPE) from the mean target, [B, T, H].

    The mean is over the tokens of this call. This is the self-supervised loss of a learner that knows only the mean.
    """
    target = target.astype(jnp.float32)
    counted = None if context.valid is None else context.valid[..., None, None]
    return 0.5 * ((target - target.mean(1, keepdims=True, where=counted)) ** 2).sum(-1)

"""The TTT layer: a mixer whose hidden state is the weights of a learner.

Linear and MLP differ in the learner only. Two ways to make q, k and v (the backbones of the paper):

* ``mamba``: q and k are two causal convolutions of one projection, and a gate multiplies the output;
* ``transformer``: three projections, no convolution, no gate.

    eta[t, s] = base_lr * inner_lr_scale * max(0, 1/t + tau[t]) * sigmoid(w_h . x_s + c_h) / d     t, s = 1 ... b

Two parts can be left out, as on the paper's way from linear attention. Without ``learned_w0`` sequences start at
W0 = 0. Without ``learned_eta`` the rate stays what it is before any learning, with w, c and tau all 0.

The collection ``statistics``, filled on request (``mutable=["statistics"]``) and at no cost without, tells what the
inner loop did, for each token of each sequence and head. Nothing in it is a mean:

* ``loss_at_w0``, ``loss_before``, ``loss_after``, ``weight_distance`` [B, T, H]: :class:`ttt_jax.ttt.scan.Statistics`;
* ``target_spread`` [B, T, H]: what the loss would be of a learner that knows nothing but the mean of its targets;
* ``eta`` [B, T, H]: the rate of each token's gradient before its position counts, base_lr * ... / d in the above;
* ``position_eta`` [b]: max(0, 1/t + tau[t]);
* ``w0_norm`` [H]: Frobenius norm of W0.

Shapes: B batch, T tokens, D width, H heads, d = D / H, b tokens per mini-batch.
"""

from itertools import pairwise
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.layers import conv as conv_lib
from ttt_jax.layers import rope
from ttt_jax.layers.norm import post_norm
from ttt_jax.layers.parameter import parameter
from ttt_jax.layers.projection import Projection
from ttt_jax.parallel.activations import device_kind, locally
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import scan
from ttt_jax.ttt.kernels import choice
from ttt_jax.ttt.state import InnerState, initial_state


class TTTState(NamedTuple):
    """Where a TTT layer stands in its sequences."""

    inner: InnerState
    conv_q: jax.Array | None  # last inputs of the convolutions, [B, width - 1, D]; None without them
    conv_k: jax.Array | None


class TTT(nn.Module):
    """One TTT layer.

    Attributes:
      learner: the inner model; its width is d.
      base_lr: the paper's eta_base, 1.0 for Linear and 0.1 for MLP.
      backbone: ``mamba`` or ``transformer``.
      learned_w0: whether W0 (and the biases it starts with) are parameters; else they are zero.
      learned_eta: whether w, c and tau are parameters; else they are zero.
      kernel, remat_group, unroll: see :mod:`ttt_jax.ttt.kernels.choice`.
    """

    learner: learner_lib.Learner
    num_heads: int
    dtype: jnp.dtype
    backbone: str = "mamba"
    mini_batch: int = 16
    base_lr: float = 1.0
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
        self, x: jax.Array, state: TTTState | None = None, inner_lr_scale: jax.Array | float = 1.0
    ) -> tuple[jax.Array, TTTState | None]:
        width, position = x.shape[-1], 0 if state is None else state.inner.position
        q, k, v, conv_q, conv_k = self._qkv(x, state)
        positions = (position + jnp.arange(x.shape[1])) % self.mini_batch
        w0, norm = self._inner_parameters()
        token_eta, position_eta = self._token_eta(x, inner_lr_scale), self._position_eta()
        result = self._inner_loop(
            norm,
            w0,
            rope.rotate(q, positions, self.rope_theta),
            rope.rotate(k, positions, self.rope_theta),
            v,
            token_eta,
            position_eta,
            None if state is None else _started(state.inner, w0),
        )
        if result.statistics is not None:
            self._record(result.statistics, k, v, w0, token_eta, position_eta)
        z = post_norm()(result.z.reshape(x.shape))
        if self.backbone == "mamba":
            z *= nn.gelu(self._projection(width, "wg")(x).astype(jnp.float32), approximate=True)
        y = Projection(width, ("heads", "embed"), self.dtype, self.init_stddev, name="wo")(z)
        return y, None if state is None else TTTState(InnerState(*result.state), conv_q, conv_k)

    def _inner_loop(self, norm, w0, q, k, v, token_eta, position_eta, state) -> scan.Result:
        """The mini-batches in order, by each device for its own sequences and heads: it communicates nothing."""
        statistics = self.is_mutable_collection("statistics")
        kernel = choice.choose(self.kernel, self.learner, self.mini_batch, device_kind(), self.remat_group).kernel

        def run(norm, w0, q, k, v, token_eta, position_eta, state):
            z, end, stats = scan.run(
                self.learner,
                norm,
                w0,
                q,
                k,
                v,
                token_eta,
                position_eta,
                None if state is None else InnerState(*state),
                statistics=statistics,
                kernel=kernel,
                **choice.scan_options(self.remat_group, self.unroll, device_kind()),
            )
            return z, None if state is None else tuple(end), stats

        heads, tokens = ("num_heads",), ("batch", None, "num_heads")
        states = None if state is None else (("batch", "num_heads"), ("batch", "num_heads"), ())
        inputs = (heads, heads, tokens, tokens, tokens, tokens, (), states)
        return scan.Result(
            *locally(run, inputs, (tokens, states, tokens))(
                norm, w0, q, k, v, token_eta, position_eta, None if state is None else tuple(state)
            )
        )

    def _record(self, statistics: scan.Statistics, k, v, w0, token_eta, position_eta):
        """Fills the collection ``statistics``."""
        values = {
            **statistics._asdict(),
            "target_spread": _target_spread(k, v),
            "w0_norm": learner_lib.norm_per_head(w0),
            "eta": token_eta,
            "position_eta": position_eta,
        }
        for name, value in values.items():
            self.sow("statistics", name, value, reduce_fn=lambda _, new: new)

    def initial_state(self, batch: int, width: int, length: int) -> TTTState:
        """The state before the first token; its size does not depend on ``length``."""
        del length
        inner = initial_state(self._zero_weights(), batch)  # W0 takes their place
        if self.backbone != "mamba":
            return TTTState(inner, None, None)
        conv = conv_lib.initial_state(batch, self.conv_width, width, self.dtype)
        return TTTState(inner, conv, conv)

    def _projection(self, width, name):
        return Projection(width, ("embed", "heads"), self.dtype, self.init_stddev, name=name)

    def _conv(self, name):
        return conv_lib.CausalConv(self.conv_width, self.dtype, name=name)

    def _qkv(self, x, state):
        """q, k, v [B, T, H, d] before RoPE, and the states of the convolutions."""
        batch, tokens, width = x.shape
        conv_q = conv_k = None
        q, v = self._projection(width, "wq")(x), self._projection(width, "wv")(x)
        if self.backbone == "mamba":
            k, conv_k = self._conv("conv_k")(q, None if state is None else state.conv_k)
            q, conv_q = self._conv("conv_q")(q, None if state is None else state.conv_q)
        else:
            k = self._projection(width, "wk")(x)
        q, k, v = (y.reshape(batch, tokens, self.num_heads, width // self.num_heads) for y in (q, k, v))
        return q, k, v, conv_q, conv_k

    def _inner_parameters(self) -> tuple[learner_lib.Weights, learner_lib.LayerNormParams]:
        """W0 and the learner's LN, trained by the outer loop, float32 whatever the compute dtype."""

        def param(name, init, *shape, split=(None, None)):
            return parameter(self, name, init, (self.num_heads, *shape), ("num_heads", *split))

        normal, zeros, ones = nn.initializers.normal(self.init_stddev), nn.initializers.zeros, nn.initializers.ones
        hidden, last, d = "learner_hidden", self.learner.depth - 1, self.learner.widths[-1]
        if self.learned_w0:
            w0 = tuple(
                learner_lib.Dense(
                    param(
                        f"inner_kernel_{i}",
                        normal,
                        n_in,
                        n_out,
                        split=(hidden, None) if i else (None, hidden if last else None),
                    ),
                    param(f"inner_bias_{i}", zeros, 1, n_out) if self.learner.bias else None,
                )
                for i, (n_in, n_out) in enumerate(pairwise(self.learner.widths))
            )
        else:
            w0 = self._zero_weights()
        if not self.learner.norm_residual:
            no_norm = jnp.zeros((self.num_heads, 1, d))
            return w0, learner_lib.LayerNormParams(no_norm, no_norm)  # which nothing reads
        norm = learner_lib.LayerNormParams(param("inner_norm_scale", ones, 1, d), param("inner_norm_bias", zeros, 1, d))
        return w0, norm

    def _zero_weights(self) -> learner_lib.Weights:
        return learner_lib.init(jax.random.key(0), self.learner, self.num_heads, stddev=0.0)

    def _token_eta(self, x, inner_lr_scale):
        """``base_lr * scale * sigmoid(w_h . x_s + c_h) / d``, [B, T, H], float32."""
        rate = self.base_lr * inner_lr_scale / self.learner.widths[0]
        if not self.learned_eta:
            return jnp.full((*x.shape[:2], self.num_heads), rate * nn.sigmoid(0.0), jnp.float32)
        normal, shape = nn.initializers.normal(self.init_stddev), (x.shape[-1], self.num_heads)
        kernel = parameter(self, "eta_kernel", normal, shape, ("channels", "num_heads"))
        bias = parameter(self, "eta_bias", nn.initializers.zeros, (self.num_heads,), ("num_heads",))
        gate = nn.sigmoid((x.astype(self.dtype) @ kernel.astype(self.dtype)).astype(jnp.float32) + bias)
        return rate * gate

    def _position_eta(self):
        """``max(0, 1/t + tau[t])``, [b]."""
        start = 1.0 / jnp.arange(1, self.mini_batch + 1)
        if not self.learned_eta:
            return start
        tau = parameter(self, "tau", nn.initializers.zeros, (self.mini_batch,), (None,))
        return jnp.maximum(0.0, start + tau)


def _started(inner: InnerState, w0: learner_lib.Weights) -> InnerState:
    """The state with W0 for its weights where no token has been read yet."""
    first = inner.position == 0
    return inner._replace(weights=jax.tree.map(lambda new, w: jnp.where(first, new, w), w0, inner.weights))


def _target_spread(k: jax.Array, v: jax.Array) -> jax.Array:
    """Half the squared distance of each token's target v - k (before RoPE) from its mean over the tokens read in one
    go, [B, T, H]: what the self-supervised loss would be if the learner knew nothing but the mean."""
    target = (v - k).astype(jnp.float32)
    return 0.5 * ((target - target.mean(1, keepdims=True)) ** 2).sum(-1)

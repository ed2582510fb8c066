"""Attend causally with multiple heads and rotary positions: the mixer of the Llama-style Transformer.

Tokens see all tokens of their document up to themselves, or those within a window (``sliding``). There may be fewer
heads of keys and values than of queries: heads g R to g R + R - 1 of the queries share the keys and values of head g.
The state is a ring of keys and values, in which position p lies in slot p mod S. With a window, S is at most the
window.

Shapes: B batch, T tokens, S slots of the state, D width, H heads, G heads of keys and values, R = H / G, d = D / H.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ttt_jax.distributed.sharding import device_kind, locally
from ttt_jax.errors import ConfigError
from ttt_jax.kernels import cudnn, splash, splash_check
from ttt_jax.layers import rope
from ttt_jax.layers.blocked_attention import NO_DOCUMENT, Keys, causal_attention, document_attention
from ttt_jax.layers.context import Places, gather_valid, places
from ttt_jax.layers.linear import Projection, to_heads
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.mixers.mixer import KEPT, PLAIN, Context, Memory, Mixer, Model, Style, head_options
from ttt_jax.settings import setting

KERNELS = ("auto", "xla", "splash", "cudnn")
_HEADS, _ROWS = P("batch", None, "num_heads", None), P("batch", None)


class AttentionState(NamedTuple):
    """Keys (after RoPE) and values read so far."""

    keys: jax.Array  # [B, S, G, d]
    values: jax.Array  # [B, S, G, d]
    position: jax.Array  # tokens of the present document read so far, int32 [B]


class Attention(nn.Module):
    """``wo softmax(q k^T / sqrt(d)) v``, causal; softmax in float32.

    Attributes:
      window: the number of tokens that a token sees, including itself; None: all of its document up to itself.
      num_kv_heads: G, a divisor of H; None: H.
      qk_norm: whether queries and keys are normalised before they are rotated, with a scale per feature of a head.
      rope_pairs: which features are rotated together (:mod:`ttt_jax.layers.rope`).
      kernel: how whole sequences are computed: ``xla`` (:mod:`ttt_jax.layers.blocked_attention`), ``splash``
        (:mod:`ttt_jax.kernels.splash`), ``cudnn`` (:mod:`ttt_jax.kernels.cudnn`), or ``auto``, the faster of the first
        two on the device.
    """

    num_heads: int
    dtype: jnp.dtype
    init_stddev: float = 0.02
    rope_theta: float = 10000.0
    window: int | None = None
    num_kv_heads: int | None = None
    qk_norm: bool = False
    rope_pairs: str = "interleaved"
    norm_epsilon: float = 1e-6
    kernel: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, state: AttentionState | None = None, context: Context = PLAIN
    ) -> tuple[jax.Array, AttentionState | None]:
        """Attend. Without a window, the state must have room for all tokens of a document."""
        _, tokens, width = x.shape
        gathered = None
        if self.window is not None and context.valid is not None:
            gathered = gather_valid(context.valid, context)  # so that the tokens of a window are adjacent
            x, context = gathered.take(x), gathered.context
        placed = places(context, tokens, None if state is None else state.position)
        positions = jnp.arange(tokens) if placed is None else placed.position  # [T] or [B, T]
        q = self._rotated("q_norm", self._heads("wq", x, self.num_heads), positions)  # [B, T, H, d]
        k = self._rotated("k_norm", self._heads("wk", x, self._groups), positions)  # [B, T, G, d]
        v = self._heads("wv", x, self._groups)
        if placed is None:
            y = self._causal(q, k, v)
        else:
            document = placed.document
            if context.valid is not None:
                document = jnp.where(context.valid, document, NO_DOCUMENT)
            piece = Keys(k, v, placed.position, document)
            if state is None and self._kernel(q) == "splash":
                # Padding sees padding, so that every row of the softmax has a key; its output is 0 all the same.
                y = self._by_splash(q, k, v, document)
            else:
                y = document_attention(q, piece, None if state is None else _kept(state), self.window)
            state = None if state is None else _written(state, piece, placed)
        y = Projection(width, ("heads", "embed"), self.dtype, self.init_stddev, name="wo")(y.reshape(x.shape))
        return y if gathered is None else gathered.back(y), state

    def initial_state(self, batch: int, width: int, length: int) -> AttentionState:
        """Return an empty ring for documents of up to ``length`` tokens."""
        slots = length if self.window is None else min(length, self.window)
        empty = jnp.zeros((batch, slots, self._groups, width // self.num_heads), self.dtype)
        return AttentionState(empty, empty, jnp.zeros(batch, jnp.int32))

    def state_axes(self) -> AttentionState:
        """Return the names of the axes of the state."""
        slots = "time" if self.window is None else "window"
        ring = P("batch", slots, "num_heads", None)
        return AttentionState._make((ring, ring, P("batch")))

    @property
    def _groups(self) -> int:
        return self.num_kv_heads or self.num_heads

    def _heads(self, name: str, x: jax.Array, heads: int) -> jax.Array:
        features = heads * (x.shape[-1] // self.num_heads)
        return to_heads(x, heads, self.dtype, self.init_stddev, name, features)

    def _causal(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attend within whole sequences of one document."""
        kernel = self._kernel(q)
        if kernel == "splash":
            return self._by_splash(q, k, v)
        if kernel == "cudnn":
            return locally(partial(cudnn.causal_attention, window=self.window), (_HEADS,) * 3, _HEADS)(q, k, v)
        return causal_attention(q, k, v, self.window)

    def _by_splash(self, q: jax.Array, k: jax.Array, v: jax.Array, document: jax.Array | None = None) -> jax.Array:
        attend = partial(splash.causal_attention, window=self.window, name=KEPT)
        if document is None:
            return locally(lambda *qkv: attend(*qkv), (_HEADS,) * 3, _HEADS)(q, k, v)
        attend_within = locally(lambda q, k, v, d: attend(q, k, v, documents=d), (*(_HEADS,) * 3, _ROWS), _HEADS)
        return jnp.where((document != NO_DOCUMENT)[..., None, None], attend_within(q, k, v, document), 0)

    def _kernel(self, q: jax.Array) -> str:
        if self.is_initializing():  # parameters may be drawn on other devices than those of the mesh
            return "xla"
        return _chosen(self.kernel, q.shape[1], (q.shape[-1], q.dtype), self.window, device_kind())

    def _rotated(self, norm: str, x: jax.Array, positions: jax.Array) -> jax.Array:
        if self.qk_norm:
            x = RMSNorm(self.dtype, self.norm_epsilon, name=norm)(x)
        return rope.rotate(x, positions, self.rope_theta, self.rope_pairs)


def _kept(state: AttentionState) -> Keys:
    """Return the keys that the ring holds of the document that continues: its last S positions."""
    slots = state.keys.shape[1]
    last = state.position[:, None] - 1
    position = last - (last - jnp.arange(slots)) % slots
    return Keys(state.keys, state.values, position, jnp.where(position >= 0, 0, NO_DOCUMENT))


def _written(state: AttentionState, piece: Keys, placed: Places) -> AttentionState:
    """Return the ring after a piece, with the last S tokens of the piece's last document."""
    slots = state.keys.shape[1]
    stays = (piece.document == placed.document[:, -1:]) & (piece.position >= placed.end[:, None] - slots)
    slot = jnp.where(stays, piece.position % slots, slots)  # writes to slot S, which does not exist, are dropped

    @jax.vmap
    def write(ring, new, slot):
        return ring.at[slot].set(new, mode="drop")

    return AttentionState(write(state.keys, piece.keys, slot), write(state.values, piece.values, slot), placed.end)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section ``model.attention``."""

    window: int = setting(1024, "sliding: tokens that a token sees, including itself", least=1)
    num_kv_heads: int | None = setting(
        None, "heads of keys and values, a divisor of num_heads; unset: num_heads", least=1
    )
    qk_norm: bool = setting(
        False, "normalise queries and keys before they are rotated, with a scale per feature of a head"
    )
    kernel: str = setting(
        "auto",
        "how whole sequences are computed: by XLA, by splash on TPUs, by cuDNN on NVIDIA GPUs, or by XLA or splash",
        among=KERNELS,
        changes_results=False,
    )
    rope_pairs: str = setting(
        "interleaved", "features that are rotated together: 2j and 2j + 1, or j and j + d/2", among=rope.PAIRS
    )


def _module(model: Model, window: int | None = None) -> Callable[..., nn.Module]:
    return partial(
        Attention,
        **head_options(model),
        window=window,
        num_kv_heads=model.attention.num_kv_heads,
        qk_norm=model.attention.qk_norm,
        rope_pairs=model.attention.rope_pairs,
        norm_epsilon=model.norm_epsilon,
        kernel=model.attention.kernel,
    )


def _check(model: Model) -> None:
    groups = model.attention.num_kv_heads
    if groups is not None and model.num_heads % groups:
        raise ConfigError(
            f"model.attention.num_kv_heads={groups}: does not divide model.num_heads={model.num_heads}; "
            "expected a divisor"
        )
    refuses = {"splash": splash.unsupported, "cudnn": cudnn.unsupported}.get(model.attention.kernel)
    if refuses and (reason := refuses(*_head(model))):
        raise ConfigError(f"model.attention.kernel={model.attention.kernel}: {reason}; expected auto or xla")


def _head(model: Model) -> tuple[int, jnp.dtype]:
    """Return the width and the dtype of a head."""
    return model.width // model.num_heads, jnp.dtype(model.dtype)


def _chosen(kernel: str, tokens: int, head: tuple[int, jnp.dtype], window: int | None, device: str) -> str:
    """Return the kernel, one of :data:`KERNELS` but ``auto``, by which a kind of device attends.

    Raises:
      ConfigError: where the kernel is asked for and cannot be used.
    """
    try:
        if splash.choose(kernel, tokens, *head, device, window):
            return "splash"
        return "cudnn" if cudnn.choose(kernel, *head, device) else "xla"
    except ValueError as error:
        raise ConfigError(f"model.attention.kernel={kernel}: {error}; expected auto or xla") from error


def _computed(model: Model) -> str:
    """Return how sequences are computed on the devices of the present mesh; empty where there is no choice.

    Raises:
      ConfigError: for a kernel that does not exist for this model.
    """
    kernel, device = model.attention.kernel, device_kind()
    chosen = _chosen(kernel, splash.FROM_TOKENS, _head(model), None, device)
    if device == "cpu":
        return ""
    if kernel != "auto":
        return f"attention by {kernel}, as model.attention.kernel says"
    if chosen == "splash":
        return f"attention by splash from {splash.FROM_TOKENS} tokens on, where it is faster, below by XLA"
    if device.startswith("TPU"):
        return f"attention by XLA: {splash.unsupported(*_head(model))}"
    reason = cudnn.unsupported(*_head(model))
    return "attention by XLA" + (f": {reason}" if reason else "; model.attention.kernel=cudnn may be faster on GPUs")


def _kernel_check(model: Model, device: str, windowed: bool = False) -> splash_check.Check | None:
    if _chosen(model.attention.kernel, splash.FROM_TOKENS, _head(model), None, device) != "splash":
        return None
    share = model.num_heads // _groups(model)
    return splash_check.of_attention(splash_check.Family(share, _head(model)[0], windowed))


def _groups(model: Model) -> int:
    return model.attention.num_kv_heads or model.num_heads


def _seen(sequence_length: int, window: int | None = None) -> float:
    """Return the number of tokens that a token sees, on average."""
    inside = sequence_length if window is None else min(sequence_length, window)
    return (inside * (inside + 1) / 2 + (sequence_length - inside) * inside) / sequence_length


def _operations(model: Model, seen: float) -> float:
    """Count the four projections, and the products with the keys and values that a token sees."""
    shared = _groups(model) / model.num_heads
    return (2 + 2 * shared) * 2 * model.width**2 + 2 * 2 * model.width * seen


def _memory(model: Model, length: int, window: int | None = None) -> Memory:
    """Count the softmax over the tokens that a token sees: logits in float32, weights in the compute dtype.

    Splash attention keeps the logarithm of its denominator instead. Estimates are for TPUs.
    """
    by_splash = _chosen(model.attention.kernel, length, _head(model), window, "TPU") == "splash"
    of_head = 4 if by_splash else (4 + jnp.dtype(model.dtype).itemsize) * _seen(length, window)
    shared = _groups(model) / model.num_heads
    left_out = round(2 * (1 - shared) * model.width**2)  # parameters of the projections to keys and values
    return Memory(-left_out, 14, of_head)


_FULL = Mixer(
    module=_module,
    operations=lambda model, length: _operations(model, _seen(length)),
    label=lambda model: "Transformer",
    section="attention",
    settings=Settings,
    check=_check,
    heads=_groups,
    computed=_computed,
    kernel_check=lambda model, sharing, device: _kernel_check(model, device),
    memory=_memory,
)
MIXERS = {
    "attention": dataclasses.replace(
        _FULL,
        unused=("window",),
        styles={
            "Transformer": Style("#000000", "-.", "^"),
            "Transformer, fine-tuned": Style("#7A7A7A", (0, (6, 1, 1, 1, 1, 1)), "v"),
        },
    ),
    "sliding": dataclasses.replace(
        _FULL,
        module=lambda model: _module(model, model.attention.window),
        operations=lambda model, length: _operations(model, _seen(length, model.attention.window)),
        label=lambda model: "Sliding-window Transformer",
        styles={"Sliding-window Transformer": Style("#332288", (0, (8, 1, 2, 1)), "<")},
        kernel_check=lambda model, sharing, device: _kernel_check(model, device, windowed=True),
        memory=lambda model, length: _memory(model, length, model.attention.window),
    ),
}

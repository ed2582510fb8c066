"""Define the residual block, and apply segments of blocks one after the other, with one scan over the blocks of a run.

A block is a sequence mixer and channel parts, each behind a norm: [B, T, D] to [B, T, D]. A segment is a pattern of
runs, repeated; a run is some blocks of one kind, whose parameters are stacked. The compiled program has the body of
each run once, so that compile time grows with the kinds of block, not with depth.

Shapes: B batch, T tokens, D width; n blocks of a run, r repeats of a segment, L blocks of the model.

A model of equal blocks has its parameters in ``layers``, [L, ...]. In any other, block c of run j in repeat i of
segment s has them in ``segment_s/NAME_j``, at [i, c] of [r, n, ...].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ttt_jax.distributed.sharding import constrain
from ttt_jax.layers import conv as conv_lib
from ttt_jax.layers.mlp import SwiGLU
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.mixers.mixer import KEPT, PLAIN, Context

LAYERS = "layers"  # the name of the only run of a model of equal blocks
CHANNELS = ("swiglu",)  # the parts of model.channel, which is "none" without any
NORMS = ("pre", "pre_post")  # values of model.norms


class BlockState(NamedTuple):
    """The state of a block between two pieces of its sequences."""

    conv: jax.Array | None
    mixer: Any


class Block(nn.Module):
    """``h += conv(norm h)`` with ``pre_conv``; ``h += mixer(norm h)``; ``h += channel(norm h)`` for each channel part.

    Attributes:
      channel: members of :data:`CHANNELS` in order; empty for a mixer that has its own feed-forward part.
      post_norm: whether the outputs of the mixer and the channel parts also pass a norm before they are added.
    """

    make_mixer: Callable[..., nn.Module]
    mlp_width: int
    dtype: jnp.dtype
    init_stddev: float
    norm_epsilon: float = 1e-6
    pre_conv: bool = False
    conv_width: int = 4
    channel: tuple[str, ...] = ("swiglu",)
    post_norm: bool = False

    @nn.compact
    def __call__(
        self, h: jax.Array, state: BlockState | None = None, context: Context = PLAIN
    ) -> tuple[jax.Array, BlockState | None]:
        """Return h [B, T, D] after the block, and its state after the tokens."""

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(self.dtype, self.norm_epsilon, name=name)(x)

        def added(y: jax.Array) -> jax.Array:
            return h + context.blank(y)

        conv_state = mixer_state = None
        if state is not None:
            conv_state, mixer_state = state
        if self.pre_conv:
            conv = conv_lib.CausalConv(self.conv_width, self.dtype, name="conv")
            y, conv_state = conv(norm("conv_norm", h), conv_state, context)
            h = added(y)
        y, mixer_state = self.make_mixer(name="mixer")(norm("mixer_norm", h), mixer_state, context)
        h = added(norm("mixer_post_norm", y) if self.post_norm else y)
        for place, _ in enumerate(self.channel):
            name = "mlp" if place == 0 else f"mlp_{place + 1}"
            y = SwiGLU(self.mlp_width, self.dtype, self.init_stddev, name=name)(norm(f"{name}_norm", h))
            h = added(norm(f"{name}_post_norm", y) if self.post_norm else y)
        h = constrain(h, "batch", None, None)
        self.sow("hidden_states", "h", h, reduce_fn=lambda _, new: new)
        return h, None if state is None else BlockState(conv_state, mixer_state)

    def initial_state(self, batch: int, width: int, length: int) -> BlockState:
        """Return the state before the first token."""
        conv = conv_lib.initial_state(batch, self.conv_width, width, self.dtype) if self.pre_conv else None
        return BlockState(conv, self.make_mixer(parent=None).initial_state(batch, width, length))

    def state_axes(self) -> BlockState:
        """Return the names of the axes of the state."""
        conv = conv_lib.STATE_AXES if self.pre_conv else None
        return BlockState._make((conv, self.make_mixer(parent=None).state_axes()))


def channel_parts(text: str) -> tuple[str, ...]:
    """Return the channel parts that ``model.channel`` names, in order: ``none``, or names joined by +.

    Raises:
      ValueError: for a name that does not exist.
    """
    if text == "none":
        return ()
    parts = tuple(part.strip() for part in text.split("+"))
    if any(part not in CHANNELS for part in parts):
        raise ValueError(f"expected none, or one or more of {', '.join(CHANNELS)} joined by +")
    return parts


class Run(NamedTuple):
    """Blocks of one kind that follow each other; ``name`` is the name of their mixer."""

    name: str
    make_block: Callable[..., Block]
    blocks: int


class Segment(NamedTuple):
    """Runs, repeated one after the other."""

    runs: tuple[Run, ...]
    repeats: int


Segments = tuple[Segment, ...]


def read(segments: Segments, remat: bool, h: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
    """Apply all blocks to h [B, T, D], in a compact method of a Flax module; return h and the state."""
    if _only_run(segments):
        (run,) = segments[0].runs
        return _read_run(run, LAYERS, remat, h, state, context)
    after = []
    for s, segment in enumerate(segments):
        pattern = _Pattern(segment.runs, remat, name=f"segment_{s}")
        of_segment = None if state is None else state[s]
        h, of_segment = _scan(_call, segment.repeats)(pattern, h, of_segment, context)
        after.append(of_segment)
    return h, None if state is None else tuple(after)


def initial_state(segments: Segments, batch: int, width: int, length: int) -> Any:
    """Return the state of all blocks before the first token of ``batch`` sequences of at most ``length`` tokens."""

    def of_run(run: Run, repeats: tuple[int, ...]) -> Any:
        one = run.make_block(parent=None).initial_state(batch, width, length)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*repeats, run.blocks, *x.shape)), one)

    return _each(segments, of_run)


def state_axes(segments: Segments) -> Any:
    """Return a tree like the state, with the names of the axes of each array as a ``PartitionSpec``."""

    def of_run(run: Run, repeats: tuple[int, ...]) -> Any:
        stacked = ("layers",) * (len(repeats) + 1)
        return jax.tree.map(lambda axes: PartitionSpec(*stacked, *axes), run.make_block(parent=None).state_axes())

    return _each(segments, of_run)


def by_block(segments: Segments, filled: Mapping[str, Any]) -> list[Any]:
    """Return the part of a collection, or of the parameters, of each of the L blocks, in order; {} where it has none.

    Args:
      filled: the collection, as ``apply`` returns it.
    """
    if _only_run(segments):
        return _taken(filled.get(LAYERS, {}), range(segments[0].runs[0].blocks))
    found: list[Any] = []
    for s, segment in enumerate(segments):
        of_segment = filled.get(f"segment_{s}", {})
        for repeat in range(segment.repeats):
            for j, run in enumerate(segment.runs):
                of_run = jax.tree.map(lambda x, i=repeat: x[i], of_segment.get(_name(j, run), {}))
                found += _taken(of_run, range(run.blocks))
    return found


class _Pattern(nn.Module):
    """One repetition of a segment."""

    runs: tuple[Run, ...]
    remat: bool

    @nn.compact
    def __call__(self, h: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
        after = []
        for j, run in enumerate(self.runs):
            h, of_run = _read_run(run, _name(j, run), self.remat, h, None if state is None else state[j], context)
            after.append(of_run)
        return h, None if state is None else tuple(after)


def _read_run(run: Run, name: str, remat: bool, h: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
    keep = jax.checkpoint_policies.save_only_these_names(KEPT)
    body = nn.remat(_call, prevent_cse=False, policy=keep) if remat else _call
    return _scan(body, run.blocks)(run.make_block(name=name), h, state, context)


def _scan(body: Callable, length: int) -> Callable:
    return nn.scan(
        body,
        variable_axes={"params": 0, "statistics": 0, "hidden_states": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def _call(module: nn.Module, h: jax.Array, state: Any, context: Context) -> tuple[jax.Array, Any]:
    return module(h, state, context)


def _each(segments: Segments, of_run: Callable[[Run, tuple[int, ...]], Any]) -> Any:
    """Return a value for each run, in the structure of the state."""
    if _only_run(segments):
        return of_run(segments[0].runs[0], ())
    return tuple(tuple(of_run(run, (segment.repeats,)) for run in segment.runs) for segment in segments)


def _only_run(segments: Sequence[Segment]) -> bool:
    return len(segments) == 1 and len(segments[0].runs) == 1 and segments[0].repeats == 1


def _name(place: int, run: Run) -> str:
    return f"{run.name}_{place}"


def _taken(tree: Any, places: range) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in places]

"""Whole mini-batches through fused kernels: what :mod:`ttt_jax.ttt.scan` computes, by two programs for a TPU."""

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.ttt.kernels import layout as layout_lib
from ttt_jax.ttt.kernels import linear, mlp, program
from ttt_jax.ttt.kernels.layout import Layout, Norm, Tokens
from ttt_jax.ttt.kernels.ops import Numerics
from ttt_jax.ttt.kernels.program import Inputs, Program
from ttt_jax.ttt.learner import LayerNormParams, Learner, Weights


def unsupported(learner: Learner, mini_batch: int) -> str | None:
    """Say why no kernel exists for a learner and a size of mini-batches; return None where one does.

    Kernels compute one function: dense layers with GELU, LN and residual. A learner is accepted only where it equals
    the one of its widths that they compute, so a subclass, or a field added to :class:`Learner`, is refused.
    """
    if type(learner) is not Learner:
        return f"the learner is a {type(learner).__name__}, which the kernels do not compute"
    if not learner.norm_residual:
        return "the learner has no LN and residual"
    if not learner.bias:
        return "the learner has no biases"
    if learner.depth > 2:
        return f"the learner has {learner.depth} dense layers"
    if learner.depth == 2 and learner.widths[1] > 4 * learner.widths[0]:
        return f"the hidden layer of the learner has more than 4 times the {learner.widths[0]} features of a head"
    if learner != Learner(learner.widths):
        return f"{learner} is not one that the kernels compute"
    if not layout_lib.supported(learner.widths[0], mini_batch):
        return f"heads of {learner.widths[0]} features and mini-batches of {mini_batch} tokens do not fill registers"
    return None


def keeps_blocks(mini_batch: int, remat_group: int | None) -> bool:
    """Whether the weights of blocks are kept for the backward pass, not those of groups."""
    return mini_batch * (remat_group or 0) > layout_lib.GROUP_TOKENS


def blocks(
    learner: Learner,
    mini_batch: int,
    heads: int,
    dtype: Any,
    *,
    interpret: bool = False,
    most_packs: int | None = None,
) -> tuple[Layout, tuple[int, int]]:
    """Return how heads and tokens are laid out, and how many groups are computed together, forward and backward: as
    many as are of use, and 1 where the kernel is interpreted."""
    kernel = _kernel(learner)
    layout = Layout(heads, learner.widths[0], mini_batch, most_packs or kernel.most_packs(learner, _operands(dtype)))
    return layout, (1, 1) if interpret else kernel.unroll(layout)


def _kernel(learner: Learner) -> ModuleType:
    return linear if learner.depth == 1 else mlp


def _operands(dtype: Any) -> jnp.dtype:
    return jnp.dtype(jnp.bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32)


def run(
    learner: Learner,
    norm: LayerNormParams,
    start: Weights,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    token_eta: jax.Array,
    position_eta: jax.Array,
    *,
    interpret: bool = False,
    remat_group: int | None = None,
    unroll: tuple[int, int] | None = None,
    most_packs: int | None = None,
) -> tuple[jax.Array, Weights]:
    """Reads whole mini-batches.

    Args:
      learner: one that is not :func:`unsupported`.
      norm: its LN, [H, 1, d].
      start: weights before the first token, leaves [B, H, ...].
      q, k, v: [B, n * b, H, d]. In bfloat16, operands of matrix products are rounded to bfloat16; in float32 they are
        not (TPUs do it all the same, unless ``jax_default_matmul_precision`` says otherwise). All else is float32.
      token_eta: [B, n * b, H].
      position_eta: [b].
      interpret: for machines without a TPU.
      remat_group: mini-batches between two W that are kept for the backward pass, which computes what lies between
        again: every 64 tokens, with what makes going back fast, or, for more than that, every 256 tokens. None or 0
        is every 64 tokens.
      unroll: groups of mini-batches whose operations are mixed, forward and backward; unset: see :func:`blocks`.
      most_packs: packs of heads in a block, at most; unset: as many as fit into fast memory.

    Returns:
      z [B, n * b, H, d] in the dtype of q, and the weights after the last token, leaves [B, H, ...].
    """
    _, tokens, heads, _ = q.shape
    b, kernel = len(position_eta), _kernel(learner)
    layout, best = blocks(learner, b, heads, q.dtype, interpret=interpret, most_packs=most_packs)
    again = keeps_blocks(b, remat_group)
    numerics = Numerics(layout, _operands(q.dtype))
    chain = kernel.chain(numerics, learner)
    how = Program(kernel.group, kernel.derivative, chain, numerics, unroll or best, kernel.STAGGER, again, interpret)
    q, k, v = (layout_lib.pack_tokens(layout, x) for x in (q, k, v))
    inputs = Inputs(
        Tokens(q, k, v, layout_lib.pack_rates(layout, token_eta)),
        kernel.pack(layout, start),
        Norm(*(layout_lib.pack_features_in_lanes(layout, x, 0) for x in norm)),
        kernel.coefficients(layout, position_eta),
    )
    z, end = _run(how, inputs)
    return layout_lib.unpack_tokens(layout, z, tokens), kernel.unpack(layout, end, start)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(how: Program, inputs: Inputs):
    z, end, _ = program.forward(how, inputs, keep=False)
    return z, end


def _run_forward(how: Program, inputs: Inputs):
    z, end, kept = program.forward(how, inputs, keep=True)
    return (z, end), (inputs, kept)


def _run_backward(how: Program, saved, cotangents):
    inputs, kept = saved
    dz, d_end = cotangents
    d = program.backward(how, inputs, kept, dz, d_end)
    return (
        d._replace(
            norm=jax.tree.map(lambda x: x.sum(0), d.norm),
            coefficients=jax.tree.map(lambda x: x.sum((0, 1)), d.coefficients),
        ),
    )


_run.defvjp(_run_forward, _run_backward)

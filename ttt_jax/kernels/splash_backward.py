"""Compute the gradients of causal attention by one kernel for TPUs, from the output and logsumexp of the forward pass.

The grid is (sequence, head, pair), over the pairs of a block of keys with each block of queries that sees some of it.
Pairs are ordered by their keys, then by their queries. So the gradients of keys and values are complete after the last
pair of their block. Those of queries are complete after the pair with the keys of the same tokens, and are summed until
then in fast memory, in float32.

Shapes: B batch, T tokens in whole blocks, b tokens of a block, c keys of a part of a block, H heads, G heads of keys
and values, d head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_PART = 512  # keys whose logits are computed together
_WORKING_MEMORY = 24 * 2**20  # bytes of fast memory beside the sums of the gradients of queries
_MASKED = -0.7 * float(np.finfo(np.float32).max)
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))
_COLUMNS_BY_ROWS = (((0,), (0,)), ((), ()))


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    y: jax.Array,
    logsumexp: jax.Array,
    dy: jax.Array,
    documents: jax.Array | None = None,
    *,
    window: int | None,
    block: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of ``softmax(q k^T) v`` with respect to q, k and v, in their dtypes.

    Args:
      q, y, dy: [B, H, T, d], the queries, the output, and its gradient.
      k, v: [B, G, T, d], where G divides H.
      logsumexp: [B, H, T], float32.
      documents: int32 [B, T]; tokens see those of the same document. None: all are of one.
      window: the number of tokens that a token sees, including itself; None: all.
      block: b.
    """
    batch, heads, tokens, width = q.shape
    groups = k.shape[1]
    share = heads // groups
    pairs = visible_pairs(tokens // block, block, window)
    slots = int((pairs[1] - pairs[0]).max()) + 1
    dot = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), -1)  # [B, H, T]

    def queries(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda n, h, p, ks, qs: (n, h, qs[p], 0))

    def keys(at: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, block, width), lambda n, h, p, ks, qs: (n, jax.lax.div(h, at), ks[p], 0))

    row = pl.BlockSpec((None, None, 1, block), lambda n, h, p, ks, qs: (n, h, 0, qs[p]))
    arguments = [q, k, v, dy, logsumexp[:, :, None], dot[:, :, None]]
    specs = [queries(block, width), keys(share), keys(share), queries(block, width), row, row]
    if documents is not None:
        arguments += [documents[:, None], jnp.broadcast_to(documents[..., None], (batch, tokens, LANES))]
        specs += [
            pl.BlockSpec((None, 1, block), lambda n, h, p, ks, qs: (n, 0, qs[p])),
            pl.BlockSpec((None, block, LANES), lambda n, h, p, ks, qs: (n, ks[p], 0)),
        ]
    # Heads that share keys and values are added up behind the kernel.
    of_keys = jax.ShapeDtypeStruct((batch, heads, tokens, width), k.dtype if share == 1 else jnp.float32)
    memory = 4 * slots * block * -(-width // LANES) * LANES + _WORKING_MEMORY
    dq, dk, dv = pl.pallas_call(
        partial(_kernel, window=window, part=min(block, _PART), documents=documents is not None),
        name="splash_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, pairs.shape[1]),
            in_specs=specs,
            out_specs=[keys(1)] * 3,
            scratch_shapes=[
                pltpu.VMEM((slots, block, width), jnp.float32),
                *[pltpu.VMEM((block, width), jnp.float32)] * 2,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), of_keys, of_keys],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=memory
        ),
        interpret=interpret,
    )(*pairs, *arguments)
    if share > 1:
        dk, dv = (x.reshape(batch, groups, share, tokens, width).sum(2).astype(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def visible_pairs(blocks: int, block: int, window: int | None) -> np.ndarray:
    """Return the pairs of a block of keys and one of queries that sees some of it, in order, int32 [2, pairs]."""
    back = blocks if window is None else -(-(window - 1) // block)  # blocks before its own that a block of queries sees
    pairs = [(j, i) for j in range(blocks) for i in range(j, min(blocks, j + back + 1))]
    return np.array(pairs, np.int32).T


def _kernel(keys_of, queries_of, q, k, v, dy, logsumexp, dot, *rest, window, part, documents):
    of_query, of_key = rest[:2] if documents else (None, None)
    dq, dk, dv, sum_q, sum_k, sum_v = rest[-6:]
    p, last = pl.program_id(2), pl.num_programs(2) - 1
    keys, queries = keys_of[p], queries_of[p]
    slots, block, _ = sum_q.shape
    slot = jax.lax.rem(queries, slots)

    @pl.when(keys == jnp.maximum(queries - (slots - 1), 0))
    def begin_queries():
        sum_q[slot] = jnp.zeros(sum_q.shape[1:], jnp.float32)

    @pl.when(queries == keys)
    def begin_keys():
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    for start in range(0, block, part):
        at = pl.ds(start, part)
        logits = jax.lax.dot_general(k[at], q[...], _ROWS_BY_ROWS, preferred_element_type=jnp.float32)  # [c, b]
        row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
        ahead, offset = column - row, keys * block + start - queries * block  # query - key = ahead - offset
        seen = ahead >= offset
        if window is not None:
            seen &= ahead < offset + window
        if documents:
            seen &= jnp.tile(of_key[at], (1, block // LANES)) == of_query[...]
        weights = jnp.exp(jnp.where(seen, logits, _MASKED) - logsumexp[...])
        sum_v[at] += jnp.dot(weights.astype(dy.dtype), dy[...], preferred_element_type=jnp.float32)
        d_weights = jax.lax.dot_general(v[at], dy[...], _ROWS_BY_ROWS, preferred_element_type=jnp.float32)
        d_logits = ((d_weights - dot[...]) * weights).astype(q.dtype)
        sum_k[at] += jnp.dot(d_logits, q[...], preferred_element_type=jnp.float32)
        sum_q[slot] += jax.lax.dot_general(d_logits, k[at], _COLUMNS_BY_ROWS, preferred_element_type=jnp.float32)

    @pl.when(queries == keys)
    def end_queries():
        dq[...] = sum_q[slot].astype(dq.dtype)

    @pl.when((p == last) | (keys_of[jnp.minimum(p + 1, last)] != keys))
    def end_keys():
        dk[...] = sum_k[...].astype(dk.dtype)
        dv[...] = sum_v[...].astype(dv.dtype)

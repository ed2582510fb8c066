"""Compute a block of tokens inside the forward and the backward program, for any learner with a function of a group.

The forward program stores the weights that each group starts from, and the chain of each group; or, to store less, only
the weights that each block of tokens starts from. The backward program goes through the groups from the last to the
first, and differentiates the function of each group from what was stored, or from what it computes again for the block.
Where mini-batches restart, a group is read in more than one stretch (:mod:`ttt_jax.kernels.restarts`).

:mod:`ttt_jax.kernels.calls` has the calls of the two programs: their grids, and the blocks of each array.

Shapes: B batch, T tokens in whole blocks, P packs, n groups, N blocks of tokens, s heads per pack; see
:mod:`ttt_jax.kernels.layout`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ttt_jax.kernels import layout as layout_lib
from ttt_jax.kernels import restarts
from ttt_jax.kernels.layout import Norm, Rows, Tokens
from ttt_jax.kernels.ops import Numerics
from ttt_jax.kernels.restarts import Stretches
from ttt_jax.kernels.weave import weave


class Inputs(NamedTuple):
    """The inputs of a program, in the layout of :mod:`ttt_jax.kernels.layout`."""

    tokens: Tokens  # q, k, v [B, T, P * 128], eta [B, blocks of packs, T, heads of a block]
    state: Any  # a named tuple of arrays [B, P, ...]: the weights at the start
    norm: Norm  # [P, 1, 128]
    coefficients: Any  # a named tuple of arrays [rows, lanes]
    first: Any = None  # W0, from which mini-batches restart, like the state; None where none restarts


class Saved(NamedTuple):
    """The shape of an array that is stored for each group, besides the weights that it starts from."""

    rows: int  # per token
    lanes: int
    dtype: Any


class Program(NamedTuple):
    """The definition of the two programs of an inner loop.

    Attributes:
      group: the learner's function of a group, for one pack:
        ``(numerics, state, tokens, norm, coefficients, chain) -> (state, z, chain)``.
      derivative: its derivative, ``(numerics, state, tokens, norm, coefficients, chain, d_state, d_z)`` to the
        gradients with respect to state, tokens, norm and coefficients. Matrices of the state, and the chain, come in
        the dtypes in which they are stored.
      chain: the arrays of the chain: with them, the mini-batches of a group can be computed at once.
      numerics: layout and dtype of operands.
      unroll: the groups that are computed together, forward and backward.
      stagger: the cycles by which each pack starts after the one before, forward and backward.
      again: whether to store only the weights that blocks of tokens start from, and compute the rest of a block again
        in the backward program.
      interpret: whether to run as ordinary XLA operations, without a TPU.
    """

    group: Callable
    derivative: Callable
    chain: tuple[Saved, ...]
    numerics: Numerics
    unroll: tuple[int, int] = (1, 1)
    stagger: tuple[float, float] = (0.0, 0.0)
    again: bool = False
    interpret: bool = False


class Kept(NamedTuple):
    """The arrays that the backward program needs from the forward program, or computes again for a block."""

    state: Sequence[Any]  # weights that groups start from, [B, n, P, ...], as operands; or blocks, [B, N, P, ...]
    chain: Sequence[Any]  # [B, P, rows, lanes] each; empty where the chain is computed again


def forward(program: Program, structure: Any, keep: bool, *refs) -> None:
    """Go through the groups of a block in order, and update the weights.

    Args:
      structure: the tree of the first references, :class:`Inputs` and :class:`Stretches`. The other references are the
        outputs, the state, and with ``keep`` :class:`Kept`.
    """
    (inputs, stretches), (z_ref, *rest) = take(refs, structure)
    n = len(inputs.state)
    state_refs, kept = rest[:n], Kept(rest[n : 2 * n], rest[2 * n :])

    @pl.when(pl.program_id(2) == 0)
    def _():
        _copy(inputs.state, state_refs)

    if keep and program.again:
        _copy(state_refs, kept.state)
    _through_block(program, inputs, stretches, state_refs, z_ref, kept if keep and not program.again else None)


def _through_block(
    program: Program,
    inputs: Inputs,
    stretches: Stretches | None,
    state_refs: Sequence,
    z_ref: Any,
    kept: Kept | None,
) -> None:
    """Compute the groups of a block in order: write the weights after it over the weights before it.

    Write also the outputs to ``z_ref`` and what a derivative needs of each group to ``kept``, unless these are None.
    """
    layout, state_type = program.numerics.layout, type(inputs.state)
    unroll, wanted = program.unroll[0], (z_ref is not None, kept is not None)

    def groups(state, tokens, norm, coefficients):
        done = []
        for each in tokens:
            new, z, chain = program.group(program.numerics, state, each, norm, coefficients)
            done.append(_select((z, (state, chain)), wanted))
            state = new
        return state, done

    def compute(indices, only=None):
        arguments, results = [], []
        for p in range(layout.block_packs):
            state = state_type(*(layout_lib.read(ref.at[p]) for ref in state_refs))
            tokens = [layout_lib.read_tokens(layout, inputs.tokens, p, i, only) for i in indices]
            arguments.append((state, tokens, *layout_lib.read_shared(inputs.norm, inputs.coefficients, p)))
            end = state_type(*(layout_lib.write(ref.at[p], over) for ref, over in zip(state_refs, state, strict=True)))
            done = []
            for i in indices:
                z = None
                if z_ref is not None:
                    z = layout_lib.write_rows(
                        layout, z_ref.at[layout_lib.rows_of_group(layout, i), layout_lib.lanes_of_pack(p)], only
                    )
                done.append(_select((z, _write_kept(program, kept, p, i, only)), wanted))
            results.append((end, done))
        weave(groups, arguments, results, program.stagger[0])

    def begin(fresh):
        pl.when(fresh)(partial(_copy, inputs.first, state_refs))

    def step(turn, fresh):
        if fresh is not None:
            begin(fresh)
        compute([turn * unroll + u for u in range(unroll)])

    def part(group, fresh, only):
        begin(fresh)
        if kept is not None:
            at_start = [ref.at[group] for ref in kept.state]
            pl.when(only.first == 0)(partial(_copy, state_refs, at_start))
        compute([group], only)

    restarts.for_each(layout, stretches, unroll, step, part)


def _write_kept(program: Program, kept: Kept | None, p: int, i, only: Rows | None) -> Any:
    if kept is None:
        return None
    layout = program.numerics.layout
    return (
        tuple(layout_lib.write(ref.at[i, p]) if only is None else layout_lib.DISCARD for ref in kept.state),
        tuple(layout_lib.write_rows(layout, layout_lib.chain_of_group(layout, ref, p, i), only) for ref in kept.chain),
    )


def backward(program: Program, structure: Any, structure_of_results: Any, *refs) -> None:
    """Go through the groups of a block in reverse: turn the gradients of the weights after it into those before it.

    Args:
      structure: the tree of the first references, :class:`Inputs` and the :class:`Stretches` of both programs. After
        these come :class:`Kept`, the gradients of the outputs and of the state at the end, the gradients of the inputs,
        and scratch memory.
      structure_of_results: the tree of the gradients of the inputs.
    """
    (inputs, (stretches, forward_stretches)), rest = take(refs, structure)
    n, state_type = len(inputs.state), type(inputs.state)
    m = 0 if program.again else len(program.chain)
    kept, dz_ref, d_end_refs = Kept(rest[:n], rest[n : n + m]), rest[n + m], rest[n + m + 1 : 2 * n + m + 1]
    d_inputs, scratch = take(rest[2 * n + m + 1 :], structure_of_results)
    state_refs, base = d_inputs.state, scratch[-n:]  # base: start of a part of a group
    layout, unroll = program.numerics.layout, program.unroll[1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        _copy(d_end_refs, state_refs)
        for ref in jax.tree.leaves((d_inputs.norm, d_inputs.coefficients, d_inputs.first)):
            ref[...] = jnp.zeros_like(ref)

    if program.again:
        weights, at_start = scratch[:n], kept.state
        kept = Kept(scratch[n : 2 * n], scratch[2 * n : 2 * n + len(program.chain)])
        _copy(at_start, weights)
        _through_block(program, inputs, forward_stretches, weights, None, kept)

    def derivatives(d_state, norm, coefficients, groups):
        d_groups, d_shared = [], None
        for state, tokens, chain, dz in groups:
            inputs = state, tokens, norm, coefficients, chain
            d_state, d_tokens, *new = program.derivative(program.numerics, *inputs, d_state, dz)
            d_groups.append(d_tokens)
            d_shared = new if d_shared is None else jax.tree.map(jnp.add, d_shared, new)
        return d_state, d_shared, d_groups

    def compute(indices, only=None):
        arguments, results = [], []
        for p in range(layout.block_packs):
            groups, d_groups = [], []
            for i in indices:
                at_start = [ref.at[i, p] for ref in kept.state] if only is None else [ref.at[p] for ref in base]
                state = state_type(*map(layout_lib.read_as_stored, at_start))
                chain = tuple(
                    layout_lib.read_as_stored(layout_lib.chain_of_group(layout, ref, p, i)) for ref in kept.chain
                )
                dz = layout_lib.read_rows(
                    layout, dz_ref.at[layout_lib.rows_of_group(layout, i), layout_lib.lanes_of_pack(p)], only
                )
                groups.append((state, layout_lib.read_tokens(layout, inputs.tokens, p, i, only), chain, dz))
                d_groups.append(layout_lib.write_tokens(layout, d_inputs.tokens, p, i, only))
            d_state = state_type(*(layout_lib.read(ref.at[p]) for ref in state_refs))
            d_before = state_type(*(layout_lib.write(ref.at[p], x) for ref, x in zip(state_refs, d_state, strict=True)))
            arguments.append((d_state, *layout_lib.read_shared(inputs.norm, inputs.coefficients, p), groups))
            norm = Norm(*(layout_lib.add(ref.at[p]) for ref in d_inputs.norm))
            results.append((d_before, [norm, jax.tree.map(layout_lib.add, d_inputs.coefficients)], d_groups))
        weave(derivatives, arguments, results, program.stagger[1])

    def end(fresh):
        """Move the gradient of the weights to W0 at a restart, where the weights before it were not used."""

        @pl.when(fresh)
        def _():
            for total, ref in zip(d_inputs.first, state_refs, strict=True):
                total[...] += ref[...]
                ref[...] = jnp.zeros_like(ref)

    def step(turn, fresh):
        compute([layout.block_groups - 1 - turn * unroll - u for u in range(unroll)])
        if fresh is not None:
            end(fresh)

    def part(group, fresh, only):
        pl.when(only.first == 0)(partial(_copy, [ref.at[group] for ref in kept.state], base))
        pl.when(only.first > 0)(partial(_copy, inputs.first, base))
        compute([group], only)
        end(fresh)

    restarts.for_each(layout, stretches, unroll, step, part, backwards=True)


def take(arrays: Sequence, structure: Any) -> tuple[Any, Sequence]:
    """Return the first arrays as a tree of the given structure, and the other arrays."""
    n = structure.num_leaves
    return jax.tree.unflatten(structure, arrays[:n]), arrays[n:]


def _select(values: Sequence, wanted: Sequence[bool]) -> list:
    return [x for x, yes in zip(values, wanted, strict=True) if yes]


def _copy(sources: Sequence, targets: Sequence) -> None:
    for source, target in zip(sources, targets, strict=True):
        target[...] = source[...].astype(target.dtype)

"""The two programs of a fused inner loop, forward and backward, for any learner that says what a group is.

Forward, a program keeps the weights that every group starts from, and the chain of each group; or, to keep less, only
the weights that every block of tokens starts from. Backward, it goes through the groups from the last to the first, and
differentiates each from what was kept, or from what it computes again for the block: the derivative is that of the
group itself, taken inside the kernel. Where mini-batches restart, a group is read in more than one stretch
(:mod:`ttt_jax.kernels.restarts`).

Here is what a program does with a block of tokens; how the blocks come to it is in :mod:`ttt_jax.kernels.calls`.

Shapes: B batch, T tokens in whole blocks, P packs, n groups, N blocks of tokens, s heads per pack; see
:mod:`ttt_jax.kernels.layout`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ttt_jax.kernels import memory, restarts
from ttt_jax.kernels.layout import Norm, Tokens
from ttt_jax.kernels.memory import Rows
from ttt_jax.kernels.ops import Numerics
from ttt_jax.kernels.restarts import Stretches
from ttt_jax.kernels.weave import weave


class Inputs(NamedTuple):
    """What a program reads; see the functions of :mod:`ttt_jax.kernels.layout` that make them."""

    tokens: Tokens  # q, k, v [B, T, P * 128], eta [B, blocks of packs, T, heads of a block]
    state: Any  # a named tuple of arrays [B, P, ...]: the weights at the start
    norm: Norm  # [P, 1, 128]
    coefficients: Any  # a named tuple of arrays [rows, lanes]
    first: Any = None  # the weights W0 that mini-batches restart from, as the state; None where none restarts


class Saved(NamedTuple):
    """One array of what is kept of each group besides the weights it starts from."""

    rows: int  # per token
    lanes: int
    dtype: Any


class Program(NamedTuple):
    """How the programs compute.

    Attributes:
      group: of the learner: ``(numerics, state, tokens, norm, coefficients, chain) -> (state, z, chain)``, for a pack.
      derivative: of it: ``(numerics, state, tokens, norm, coefficients, chain, d_state, d_z)`` to those with respect to
        state, tokens, norm and coefficients. Matrices of the state and the chain come in the dtypes they are kept in.
      chain: what the chain is: arrays that a group can be computed from without waiting.
      numerics: layout and dtype of operands.
      unroll: forward and backward, groups that are computed together.
      stagger: forward and backward, cycles by which each pack starts after the one before.
      again: keep only the weights that blocks of tokens start from, and compute what is in a block again backwards.
      interpret: run as ordinary XLA operations, where there is no TPU.
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
    """What the backward program needs of the forward one, or computes again for a block."""

    state: Sequence[Any]  # what groups start from [B, n, P, ...], matrices as operands; or blocks, [B, N, P, ...]
    chain: Sequence[Any]  # [B, P, rows, lanes]; none where it is computed again


def forward(program: Program, structure: Any, keep: bool, *refs) -> None:
    """Go through a block: the weights before it become those after it.

    Args:
      structure: of the first of the references: :class:`Inputs` and :class:`Stretches`. The others are the outputs, the
        state, and, where something is kept, :class:`Kept`.
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
    """The groups of a block of tokens in order. Writes the weights after them over those before, and, where they are
    wanted, the outputs and what a derivative needs of each group."""
    layout, state_type = program.numerics.layout, type(inputs.state)
    unroll, wanted = program.unroll[0], (z_ref is not None, kept is not None)

    def groups(state, tokens, norm, coefficients):
        done = []
        for each in tokens:
            new, z, chain = program.group(program.numerics, state, each, norm, coefficients)
            done.append(_those((z, (state, chain)), wanted))
            state = new
        return state, done

    def compute(indices, only=None):
        arguments, results = [], []
        for p in range(layout.block_packs):
            state = state_type(*(memory.whole(ref.at[p]) for ref in state_refs))
            tokens = [memory.tokens(layout, inputs.tokens, p, i, only) for i in indices]
            arguments.append((state, tokens, *memory.shared(inputs.norm, inputs.coefficients, p)))
            end = state_type(*(memory.into(ref.at[p], over) for ref, over in zip(state_refs, state, strict=True)))
            done = []
            for i in indices:
                z = None
                if z_ref is not None:
                    z = memory.into_rows(layout, z_ref.at[memory.rows_of(layout, i), memory.lanes_of(p)], only)
                done.append(_those((z, _into_kept(program, kept, p, i, only)), wanted))
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


def _into_kept(program: Program, kept: Kept | None, p: int, i, only: Rows | None) -> Any:
    if kept is None:
        return None
    layout = program.numerics.layout
    return (
        tuple(memory.into(ref.at[i, p]) if only is None else memory.NOWHERE for ref in kept.state),
        tuple(memory.into_rows(layout, memory.chain(layout, ref, p, i), only) for ref in kept.chain),
    )


def backward(program: Program, structure: Any, structure_of_results: Any, *refs) -> None:
    """Go through a block from its end: the gradients of the weights after it become those of the weights before it.

    Args:
      structure: of the first of the references: :class:`Inputs`, and the :class:`Stretches` of both programs. Then come
        :class:`Kept`, the gradients of the outputs and of the state at the end, those of the inputs, and scratch.
      structure_of_results: of :class:`Inputs`.
    """
    (inputs, (stretches, forward_stretches)), rest = take(refs, structure)
    n, state_type = len(inputs.state), type(inputs.state)
    m = 0 if program.again else len(program.chain)
    kept, dz_ref, d_end_refs = Kept(rest[:n], rest[n : n + m]), rest[n + m], rest[n + m + 1 : 2 * n + m + 1]
    d_inputs, scratch = take(rest[2 * n + m + 1 :], structure_of_results)
    state_refs, base = d_inputs.state, scratch[-n:]  # what a part of a group starts from, where mini-batches restart
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
                state = state_type(*map(memory.as_kept, at_start))
                chain = tuple(memory.as_kept(memory.chain(layout, ref, p, i)) for ref in kept.chain)
                dz = memory.only_rows(layout, dz_ref.at[memory.rows_of(layout, i), memory.lanes_of(p)], only)
                groups.append((state, memory.tokens(layout, inputs.tokens, p, i, only), chain, dz))
                d_groups.append(memory.into_tokens(layout, d_inputs.tokens, p, i, only))
            d_state = state_type(*(memory.whole(ref.at[p]) for ref in state_refs))
            d_before = state_type(*(memory.into(ref.at[p], x) for ref, x in zip(state_refs, d_state, strict=True)))
            arguments.append((d_state, *memory.shared(inputs.norm, inputs.coefficients, p), groups))
            norm = Norm(*(memory.onto(ref.at[p]) for ref in d_inputs.norm))
            results.append((d_before, [norm, jax.tree.map(memory.onto, d_inputs.coefficients)], d_groups))
        weave(derivatives, arguments, results, program.stagger[1])

    def end(fresh):
        """What came before a restart had no part in it."""

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
    """The first arrays in a structure, and the others."""
    n = structure.num_leaves
    return jax.tree.unflatten(structure, arrays[:n]), arrays[n:]


def _those(values: Sequence, wanted: Sequence[bool]) -> list:
    return [x for x, yes in zip(values, wanted, strict=True) if yes]


def _copy(sources: Sequence, targets: Sequence) -> None:
    for source, target in zip(sources, targets, strict=True):
        target[...] = source[...].astype(target.dtype)

"""The two programs of a fused inner loop, forward and backward, for any learner that says what a group is.

A program runs over a grid (sequence, block of packs, block of tokens), the last in order; the weights stay in the fast
memory of the chip from one block of tokens to the next. Forward, it keeps the weights that every group starts from, and
the chain of each group. Backward, it goes through the groups from the last to the first, and differentiates each from
what was kept: the derivative is that of the group itself, taken inside the kernel.

Shapes: B batch, T tokens in whole blocks, P packs, n groups, s heads per pack; see
:mod:`ttt_jax.ttt.kernels.layout`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ttt_jax.ttt.kernels.blocks import Blocks
from ttt_jax.ttt.kernels.layout import LANES, Layout, Norm, Tokens
from ttt_jax.ttt.kernels.ops import Numerics
from ttt_jax.ttt.kernels.weave import Read, Write, weave

_VMEM = 48 * 2**20  # bytes of fast memory that a program may use; the chips have 128 MiB (v5e, v6e) or 64 (v5p, v7x)
_PARAMETERS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM)


class Inputs(NamedTuple):
    """What a program reads; see the functions of :mod:`ttt_jax.ttt.kernels.layout` that make them."""

    tokens: Tokens  # q, k, v [B, T, P * 128], eta [B, blocks of packs, T, heads of a block]
    state: Any  # a named tuple of arrays [B, P, ...]: the weights at the start
    norm: Norm  # [P, 1, 128]
    coefficients: Any  # a named tuple of arrays [rows, lanes]


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
      unroll: groups that are computed together.
      stagger: forward and backward, cycles by which each pack starts after the one before.
      interpret: run as ordinary XLA operations, where there is no TPU.
    """

    group: Callable
    derivative: Callable
    chain: tuple[Saved, ...]
    numerics: Numerics
    unroll: int = 1
    stagger: tuple[float, float] = (0.0, 0.0)
    interpret: bool = False


class Kept(NamedTuple):
    """What the backward program needs of the forward one."""

    state: tuple[jax.Array, ...]  # [B, n, P, ...]: what groups start from; matrices in the dtype of operands
    chain: tuple[jax.Array, ...]  # [B, P, rows, lanes]


def forward(program: Program, inputs: Inputs, *, keep: bool) -> tuple[jax.Array, Any, Kept | None]:
    """Outputs z [B, T, P * 128] in the dtype of q, the state at the end, and, where wanted, what was kept."""
    blocks = Blocks(program.numerics.layout, inputs.tokens.q.shape)
    structure, state = jax.tree.structure(inputs), tuple(inputs.state)
    shapes: list = [inputs.tokens.q, *state]
    specs = [blocks.tokens(), *(blocks.of_sequence(x) for x in state)]
    if keep:
        kept = [_kept_state(program, blocks, x) for x in state]
        chain = [blocks.chain_shape(*each) for each in program.chain]
        shapes += [*kept, *chain]
        specs += [*(blocks.of_groups(x) for x in kept), *(blocks.of_chain(*each) for each in program.chain)]
    z, *rest = pl.pallas_call(
        partial(_forward, program, structure, keep),
        name=f"ttt_{_name(program)}_forward",
        grid=blocks.grid,
        in_specs=_specs_of(blocks, inputs),
        out_specs=specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
        interpret=program.interpret,
        compiler_params=_PARAMETERS,
    )(*jax.tree.leaves(inputs))
    n = len(state)
    return z, type(inputs.state)(*rest[:n]), Kept(tuple(rest[n : 2 * n]), tuple(rest[2 * n :])) if keep else None


def backward(program: Program, inputs: Inputs, kept: Kept, dz: jax.Array, d_end: Any) -> Inputs:
    """Gradients with respect to all inputs, from those of z and of the state at the end. Those of what is shared by
    sequences or packs have axes for them, to be added up."""
    blocks = Blocks(program.numerics.layout, inputs.tokens.q.shape, backwards=True)
    structure, state = jax.tree.structure(inputs), tuple(inputs.state)
    norm = [jax.ShapeDtypeStruct((blocks.grid[0], *x.shape), x.dtype) for x in inputs.norm]
    coefficients = [jax.ShapeDtypeStruct((*blocks.grid[:2], *x.shape), x.dtype) for x in inputs.coefficients]
    results = pl.pallas_call(
        partial(_backward, program, structure),
        name=f"ttt_{_name(program)}_backward",
        grid=blocks.grid,
        in_specs=[
            *_specs_of(blocks, inputs),
            *(blocks.of_groups(x) for x in kept.state),
            *(blocks.of_chain(*each) for each in program.chain),
            blocks.tokens(),
            *(blocks.of_sequence(x) for x in state),
        ],
        out_specs=[
            *[blocks.tokens()] * 3,
            blocks.rates(),
            *(blocks.of_sequence(x) for x in (*state, *norm)),
            *(blocks.of_program(x) for x in coefficients),
        ],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs.tokens, *state, *norm, *coefficients)],
        interpret=program.interpret,
        compiler_params=_PARAMETERS,
    )(*jax.tree.leaves(inputs), *kept.state, *kept.chain, dz, *d_end)
    return _take(results, structure)[0]


def _forward(program: Program, structure: Any, keep: bool, *refs) -> None:
    inputs, (z_ref, *rest) = _take(refs, structure)
    n, state_type = len(inputs.state), type(inputs.state)
    state_refs, kept_refs = rest[:n], rest[n:]
    layout = program.numerics.layout
    packs, unrolled = range(layout.block_packs), range(program.unroll)

    @pl.when(pl.program_id(2) == 0)
    def _():
        _copy(inputs.state, state_refs)

    def groups(state, tokens, norm, coefficients):
        done = []
        for each in tokens:
            new, z, chain = program.group(program.numerics, state, each, norm, coefficients)
            done.append((z, (state, chain) if keep else ()))
            state = new
        return state, done

    def body(step, _):
        indices = [step * program.unroll + u for u in unrolled]
        arguments, results = [], []
        for p in packs:
            state = state_type(*(_whole(ref.at[p]) for ref in state_refs))
            tokens = [_tokens(layout, inputs, p, i) for i in indices]
            arguments.append((state, tokens, *_shared(inputs, p)))
            end = state_type(*(_into(ref.at[p], over) for ref, over in zip(state_refs, state, strict=True)))
            done = []
            for i in indices:
                kept = tuple(_into(ref.at[i, p]) for ref in kept_refs[:n])
                chain = tuple(_into(_of_group(ref, layout, p, i)) for ref in kept_refs[n:])
                done.append((_into(z_ref.at[_rows(layout, i), _lanes(p)]), (kept, chain) if keep else ()))
            results.append((end, done))
        weave(groups, arguments, results, program.stagger[0])
        return 0

    lax.fori_loop(0, layout.block_groups // program.unroll, body, 0)


def _backward(program: Program, structure: Any, *refs) -> None:
    inputs, rest = _take(refs, structure)
    n, m, state_type = len(inputs.state), len(program.chain), type(inputs.state)
    kept_refs, chain_refs, dz_ref, d_end_refs = rest[:n], rest[n : n + m], rest[n + m], rest[n + m + 1 : 2 * n + m + 1]
    d_tokens, state_refs, *shared = _take(rest[2 * n + m + 1 :], structure)[0]
    layout = program.numerics.layout
    packs, unrolled = range(layout.block_packs), range(program.unroll)

    @pl.when(pl.program_id(2) == 0)
    def _():
        _copy(d_end_refs, state_refs)
        for ref in jax.tree.leaves(shared):
            ref[...] = jnp.zeros_like(ref)

    def derivatives(d_state, norm, coefficients, groups):
        d_groups, d_shared = [], None
        for state, tokens, chain, dz in groups:
            inputs = state, tokens, norm, coefficients, chain
            d_state, d_tokens, *new = program.derivative(program.numerics, *inputs, d_state, dz)
            d_groups.append(d_tokens)
            d_shared = new if d_shared is None else jax.tree.map(jnp.add, d_shared, new)
        return d_state, d_shared, d_groups

    def body(step, _):
        indices = [layout.block_groups - 1 - step * program.unroll - u for u in unrolled]
        arguments, results = [], []
        for p in packs:
            groups, d_groups = [], []
            for i in indices:
                rows = (_rows(layout, i), _lanes(p))
                state = state_type(*(_as_kept(ref.at[i, p]) for ref in kept_refs))
                chain = tuple(_as_kept(_of_group(ref, layout, p, i)) for ref in chain_refs)
                groups.append((state, _tokens(layout, inputs, p, i), chain, _whole(dz_ref.at[rows])))
                eta = d_tokens.eta.at[_rows(layout, i), _heads(layout, p)]
                d_q, d_k, d_v = (_into(ref.at[rows]) for ref in d_tokens[:3])
                d_groups.append(Tokens(d_q, d_k, d_v, _into(eta)))
            d_state = state_type(*(_whole(ref.at[p]) for ref in state_refs))
            d_before = state_type(*(_into(ref.at[p], over) for ref, over in zip(state_refs, d_state, strict=True)))
            arguments.append((d_state, *_shared(inputs, p), groups))
            norm = Norm(*(_onto(ref.at[p]) for ref in shared[0]))
            results.append((d_before, [norm, jax.tree.map(_onto, shared[1])], d_groups))
        weave(derivatives, arguments, results, program.stagger[1])
        return 0

    lax.fori_loop(0, layout.block_groups // program.unroll, body, 0)


def _specs_of(blocks: Blocks, inputs: Inputs) -> list[pl.BlockSpec]:
    return [
        *[blocks.tokens()] * 3,
        blocks.rates(),
        *(blocks.of_sequence(x) for x in inputs.state),
        *(blocks.of_packs(x) for x in inputs.norm),
        *(blocks.whole(x) for x in inputs.coefficients),
    ]


def _kept_state(program: Program, blocks: Blocks, x: jax.Array) -> jax.ShapeDtypeStruct:
    """The states of all groups. Matrices are read as operands only, so rounding them here changes nothing."""
    batch, _, steps = blocks.grid
    shape = (batch, steps * program.numerics.layout.block_groups, *x.shape[1:])
    return jax.ShapeDtypeStruct(shape, program.numerics.operands if x.shape[2] == LANES else x.dtype)


def _of_group(ref: Any, layout: Layout, p: int, i) -> Any:
    rows = ref.shape[1] // layout.block_groups
    return ref.at[p, pl.ds(pl.multiple_of(i * rows, rows), rows)]


def _take(refs: Sequence, structure: Any) -> tuple[Inputs, Sequence]:
    """The first refs as :class:`Inputs`, and the others."""
    n = structure.num_leaves
    return jax.tree.unflatten(structure, refs[:n]), refs[n:]


def _tokens(layout: Layout, inputs: Inputs, p: int, i) -> Tokens:
    """Group i of pack p."""
    rows = _rows(layout, i)
    q, k, v = (_whole(ref.at[rows, _lanes(p)]) for ref in inputs.tokens[:3])
    return Tokens(q, k, v, _whole(inputs.tokens.eta.at[rows, _heads(layout, p)]))


def _shared(inputs: Inputs, p: int) -> tuple[Norm, Any]:
    return Norm(*(_whole(ref.at[p]) for ref in inputs.norm)), jax.tree.map(_whole, inputs.coefficients)


def _whole(ref: Any) -> Read:
    return Read(ref.shape, jnp.float32, lambda: ref[...].astype(jnp.float32))


def _as_kept(ref: Any) -> Read:
    return Read(ref.shape, ref.dtype, lambda: ref[...])


def _into(ref: Any, over: Read | None = None) -> Write:
    def write(value):
        ref[...] = value.astype(ref.dtype)

    return Write(write, over)


def _onto(ref: Any) -> Write:
    def write(value):
        ref[...] += value

    return Write(write)


def _rows(layout: Layout, i) -> Any:
    return pl.ds(pl.multiple_of(i * layout.group_tokens, layout.group_tokens), layout.group_tokens)


def _lanes(p: int) -> slice:
    return slice(p * LANES, (p + 1) * LANES)


def _heads(layout: Layout, p: int) -> slice:
    return slice(p * layout.pack, (p + 1) * layout.pack)


def _copy(sources: Sequence, targets: Sequence) -> None:
    for source, target in zip(sources, targets, strict=True):
        target[...] = source[...]


def _name(program: Program) -> str:
    return program.group.__module__.rpartition(".")[2]

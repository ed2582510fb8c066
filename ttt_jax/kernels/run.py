"""Run whole mini-batches by a fused kernel, choose between kernel and scan, and say where no kernel exists.

:func:`run` is a :data:`ttt_jax.ttt.scan.Kernel`: it computes what :mod:`ttt_jax.ttt.scan` computes, by two programs for
a TPU, one forward and one backward.

Shapes: B batch, H heads, d head width, n mini-batches of b tokens.
"""

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels import calls, linear, mlp
from ttt_jax.kernels import layout as layout_lib
from ttt_jax.kernels import restarts as restarts_lib
from ttt_jax.kernels.derivatives import differentiable_once
from ttt_jax.kernels.forward_backward import Inputs, Program
from ttt_jax.kernels.layout import Layout, Norm, Tokens
from ttt_jax.kernels.ops import Numerics
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters
from ttt_jax.ttt.inner_loop import Tokens as LoopTokens
from ttt_jax.ttt.learner import Learner, Weights
from ttt_jax.ttt.learners import MLP, Linear, ResidualNorm
from ttt_jax.ttt.objective import squared_error
from ttt_jax.ttt.scan import Kernel

KERNELS = ("auto", "pallas", "scan")

# Mini-batches between two stored states, and per iteration of the scan: the fastest measured, see docs/kernels.md.
_ON_TPUS, _ELSEWHERE = 4, 1
_ONCE = "the fused kernel of the inner loop has no second derivative; use model.ttt.kernel=scan"
_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # chips with 16 MiB of fast memory, where kernels take up to 50 MiB


def unsupported(loop: InnerLoop, mini_batch: int) -> str | None:
    """Return why no kernel exists for an inner loop and a mini-batch of this size; None where one exists.

    Kernels compute TTT-Linear and TTT-MLP, with any rates per token. A loop is accepted only if it equals one of these,
    never because its widths are the same.
    """
    f, d = loop.learner.f, loop.learner.features
    if loop.objective is not squared_error:
        return f"the objective is {getattr(loop.objective, '__name__', loop.objective)}"
    if loop.update:
        return f"the update is {' + '.join(type(member).__name__.lower() for member in loop.update)}"
    if loop.reading != "causal":
        return f"the reading is {loop.reading}"
    if loop.rate.per_matrix:
        return "each weight matrix has its own rate"
    if type(f) is not ResidualNorm:
        return "the learner has no LN and residual"
    inner: Any = f.f
    if type(inner) not in (Linear, MLP):
        return f"the learner is {getattr(inner, '__name__', type(inner).__name__)}, which the kernels do not compute"
    if not inner.bias:
        return "the learner has no biases"
    if type(inner) is MLP and inner.depth != 2:
        return f"the learner has {inner.depth} dense layers"
    if type(inner) is MLP and inner.width_factor > 4:
        return f"the hidden layer of the learner has more than 4 times the {d} features of a head"
    known = Linear() if type(inner) is Linear else MLP(2, inner.width_factor)
    if loop != InnerLoop(Learner(ResidualNorm(known), d), rate=loop.rate):
        return f"{loop} is not one that the kernels compute"
    if not layout_lib.supported(d, mini_batch):
        return f"heads of {d} features and mini-batches of {mini_batch} tokens do not fill registers"
    return None


def keeps_blocks(mini_batch: int, remat_group: int | None) -> bool:
    """Return whether the backward pass stores the weights that blocks start from, instead of those of groups."""
    return mini_batch * (remat_group or 0) > layout_lib.GROUP_TOKENS


def blocks(
    loop: InnerLoop,
    mini_batch: int,
    heads: int,
    dtype: Any,
    *,
    interpret: bool = False,
    most_packs: int | None = None,
) -> tuple[Layout, tuple[int, int]]:
    """Return the layout, and how many groups to compute together, forward and backward.

    These are as many groups as fill the pauses of the chip, or 1 where the kernel is interpreted.
    """
    kernel, widths = _kernel(loop), _widths(loop)
    layout = Layout(heads, widths[0], mini_batch, most_packs or kernel.most_packs(widths, _operands(dtype)))
    return layout, (1, 1) if interpret else kernel.unroll(layout)


def _kernel(loop: InnerLoop) -> ModuleType:
    return linear if len(loop.learner.structure.matrices) == 1 else mlp


def _widths(loop: InnerLoop) -> tuple[int, ...]:
    """Return the widths of the input, of each hidden layer, and of the output."""
    return (loop.learner.features, *(matrix.features_out for matrix in loop.learner.structure.matrices))


def _operands(dtype: Any) -> jnp.dtype:
    return jnp.dtype(jnp.bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32)


def run(
    loop: InnerLoop,
    parameters: Parameters,
    start: Weights,
    tokens: LoopTokens,
    restarts: jax.Array | None = None,
    *,
    interpret: bool = False,
    remat_group: int | None = None,
    unroll: tuple[int, int] | None = None,
    most_packs: int | None = None,
) -> tuple[jax.Array, Weights]:
    """Read whole mini-batches.

    Args:
      loop: an inner loop for which :func:`unsupported` returns None.
      parameters: the LN of the loop, [H, 1, d], and the rates of positions, [b]; W0, leaves [H, ...] or [B, H, ...], is
        read only where mini-batches restart.
      start: weights before the first token, leaves [B, H, ...].
      tokens: q, k, v [B, n * b, H, d] and eta [B, n * b, H]. Where q is bfloat16, operands of matrix products are
        rounded to bfloat16; where it is float32 they are not, but TPUs round them by default, see
        ``jax_default_matmul_precision``. All else is float32.
      restarts: bool [B, n], the mini-batches that begin at W0 instead of the weights after the mini-batch before, such
        as the first of a document; None for none.
      interpret: whether to interpret the kernel, on machines without a TPU.
      remat_group: mini-batches between two W that are stored for the backward pass. For None, 0 and up to 64 tokens,
        W is stored every 64 tokens together with the chain, which makes the backward pass fast; for more, W is stored
        every 256 tokens, and the rest is computed again.
      unroll: groups of mini-batches that are computed together, forward and backward; None: see :func:`blocks`.
      most_packs: the largest number of packs of heads in a block; None: as many as fit into fast memory.

    Returns:
      z [B, n * b, H, d] in the dtype of q, and the weights after the last token, leaves [B, H, ...].
    """
    position_eta, constants = parameters.position_eta, parameters.constants
    _, length, heads, _ = tokens.q.shape
    b, kernel, widths = len(position_eta), _kernel(loop), _widths(loop)
    layout, best = blocks(loop, b, heads, tokens.q.dtype, interpret=interpret, most_packs=most_packs)
    again = keeps_blocks(b, remat_group)
    numerics = Numerics(layout, _operands(tokens.q.dtype))
    chain = kernel.chain(numerics, widths)
    how = Program(kernel.group, kernel.derivative, chain, numerics, unroll or best, kernel.STAGGER, again, interpret)
    q, k, v = (layout_lib.pack_tokens(layout, x) for x in tokens[:3])
    norm = (constants["norm_scale"], constants["norm_bias"])
    inputs = Inputs(
        Tokens(q, k, v, layout_lib.pack_rates(layout, tokens.eta)),
        kernel.pack(layout, start),
        Norm(*(layout_lib.pack_features_in_lanes(layout, x, 0) for x in norm)),
        kernel.coefficients(layout, position_eta),
    )
    flags = None
    if restarts is not None:
        first = jax.tree.map(lambda w0, w: jnp.broadcast_to(w0, w.shape), parameters.w0, start)
        inputs = inputs._replace(first=kernel.pack(layout, first))
        flags = restarts_lib.flags_by_block(layout, restarts, q.shape[1] // layout.block_tokens)
        any_restarts = restarts.any(1)[:, None, None, None]
        start = jax.tree.map(lambda w0, w: jnp.where(any_restarts, w0, w), first, start)  # what the end came from
    z, end = differentiable_once(_run(how, differentiable_once(inputs, _ONCE), flags), _ONCE)
    return layout_lib.unpack_tokens(layout, z, length), kernel.unpack(layout, end, start)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(how: Program, inputs: Inputs, flags: jax.Array | None):
    z, end, _ = calls.forward(how, inputs, flags, keep=False)
    return z, end


def _run_forward(how: Program, inputs: Inputs, flags: jax.Array | None):
    z, end, kept = calls.forward(how, inputs, flags, keep=True)
    return (z, end), (inputs, flags, kept)


def _run_backward(how: Program, saved, cotangents):
    inputs, flags, kept = saved
    dz, d_end = cotangents
    d = calls.backward(how, inputs, flags, kept, dz, d_end)
    of_inputs = d._replace(
        norm=jax.tree.map(lambda x: x.sum(0), d.norm),
        coefficients=jax.tree.map(lambda x: x.sum((0, 1)), d.coefficients),
    )
    return of_inputs, None


_run.defvjp(_run_forward, _run_backward)


class Choice(NamedTuple):
    """A kernel for :func:`ttt_jax.ttt.scan.run`, or None for the scan, and the reason for it."""

    kernel: Kernel | None
    why: str


def scan_options(remat_group: int | None, unroll: int | None, device: str) -> dict[str, Any]:
    """Return ``remat_group`` and ``unroll`` for :func:`ttt_jax.ttt.scan.run`; None is replaced by the device's best."""
    best = _ON_TPUS if _is_tpu(device) else _ELSEWHERE
    return {"remat_group": best if remat_group is None else remat_group, "unroll": unroll or best}


def choose(kernel: str, loop: InnerLoop, mini_batch: int, device: str, remat_group: int | None = None) -> Choice:
    """Choose between kernel and scan for a configured ``auto``, ``pallas`` or ``scan``.

    Args:
      device: the kind of device to compile for, as JAX names it. On devices other than TPUs, ``pallas`` interprets the
        kernel, which is slow and gives the same numbers.
      remat_group: mini-batches between two W that the kernel stores; see :func:`run`.

    Raises:
      ValueError: for ``pallas`` where no kernel exists.
    """
    if kernel == "scan":
        return Choice(None, "scan, as configured")
    reason = unsupported(loop, mini_batch)
    fused = partial(run, remat_group=remat_group, interpret=interpreted(device))
    if device.startswith(_SMALL):
        reason = reason or f"too little fast memory on {device}"
    if kernel == "pallas":
        if reason:
            raise ValueError(f"no kernel: {reason}")
        how = "fused kernel, as configured" + (f", interpreted: slow on {device}" if interpreted(device) else "")
        return Choice(fused, how)
    if not _is_tpu(device):
        return Choice(None, f"scan, for {device} (fused kernels are for TPUs)")
    if reason:
        return Choice(None, f"scan, for {reason}")
    return Choice(fused, f"fused kernel, for {device}")


def interpreted(device: str) -> bool:
    """Return whether kernels are interpreted on a device, as ordinary XLA operations: on all but TPUs."""
    return not _is_tpu(device)


def _is_tpu(device: str) -> bool:
    return device.startswith("TPU")

"""Compare a fused kernel with the scan on a small problem, on the device that is going to run it.

A compiler may compile a kernel wrongly that is right when it is interpreted. So the small problem is computed by the
program that the real problem uses: the same inner loop, mini-batch, head width, dtype, number of groups computed
together and stored weights, and the same packs of heads per block unless those take long to compile. It has two
sequences of one block of tokens and a part of another, and two blocks of packs where the real problem has several. So
it covers what is carried from group to group and from block to block, what begins again with each sequence, sums over
sequences, and missing tokens and heads of a block. The check compares the outputs and the steps of the weights, both of
the program for inference and of the program that a backward pass follows, and the gradients with respect to each input.

It does not cover errors that grow over thousands of tokens, blocks of more packs than are affordable, or how the
compiler treats the model around the kernel. In float32 both sides compute matrix products in float32, whatever
``jax_default_matmul_precision`` is: the check is of the program, not of how a TPU rounds operands.

Shapes: B batch, T tokens, H heads, d head width, b tokens per mini-batch.
"""

import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.kernels import run
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import scan
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens
from ttt_jax.ttt.learner import Weights
from ttt_jax.ttt.scan import Kernel

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # relative to the largest entry of an array; by the dtype of q, k, v
_AFFORDABLE = 3 / 8  # of the packs that fit into a block (6 of TTT-Linear, 3 of TTT-MLP in bfloat16): docs/kernels.md
_BATCH = 2


class Family(NamedTuple):
    """The problems that are covered by one check.

    Attributes:
      loop, mini_batch: the inner loop and its b.
      heads: the heads on one device.
      dtype: of q, k and v: ``float32`` or ``bfloat16``.
      remat_group: see :func:`ttt_jax.kernels.run.run`.
    """

    loop: InnerLoop
    mini_batch: int
    heads: int
    dtype: str
    remat_group: int | None = None


class Report(NamedTuple):
    """The differences between a kernel and the scan.

    Attributes:
      errors: for each array by its name, the largest difference over the largest entry; NaN where either is not finite.
      tolerance: the largest error that is allowed.
      seconds: the time that the comparison took, with compiling.
    """

    errors: dict[str, float]
    tolerance: float
    seconds: float

    @property
    def wrong(self) -> list[str]:
        """Return the names of the arrays that differ by more than the tolerance, the worst first."""
        return [name for name in self._by_size if not self.errors[name] <= self.tolerance]

    @property
    def _by_size(self) -> list[str]:
        return sorted(self.errors, key=lambda name: -math.inf if math.isnan(x := self.errors[name]) else -x)

    def __str__(self) -> str:
        worst, others = self._by_size[0], len(self.wrong) - 1
        also = f" and of {others} other array{'s' * (others > 1)}" if others > 0 else ""
        return f"{self.errors[worst]:.1e} of the largest entry of the {worst}{also} ({self.tolerance:.0e} is allowed)"


class Check(NamedTuple):
    """A comparison of a kernel with a plain form, to be made before the kernel is used.

    Attributes:
      family: the problems that are covered.
      report: a function of the family and a device that compares once per process.
      kernel, plain: the two in words.
      key, instead: the key of the section ``model``, and its value with which the plain form is used.
      otherwise: says how to leave the check out.
    """

    family: Any
    report: "functools._lru_cache_wrapper[Report]"
    kernel: str
    plain: str
    key: tuple[str, str]
    instead: str
    otherwise: str


class Arguments(NamedTuple):
    """The arrays that the inner loop is computed from; gradients are compared with respect to all of them."""

    norm: dict[str, Any]  # [H, 1, d]
    w0: Weights  # leaves [H, ...]
    q: Any  # [B, T, H, d]
    k: Any
    v: Any
    token_eta: Any  # [B, T, H]
    position_eta: Any  # [b]


@functools.cache
def of_family(family: Family, device: jax.Device) -> Report:
    """Check the kernel of a family on a device, once per process.

    Raises:
      Exception: any exception of the kernel where it does not compile or run.
    """
    arguments, kernel = problem_of(family, device.device_kind)
    return compare(family.loop, kernel, arguments, device)


def of_inner_loop(family: Family) -> Check:
    """Return the check of the kernel of a family of inner loops."""
    return Check(
        family,
        of_family,
        "the fused kernel of the inner loop",
        "the scan",
        ("ttt", "kernel"),
        "scan",
        "model.ttt.kernel=scan leaves the check out, model.ttt.kernel_check=false uses the kernel as it is",
    )


def compare(loop: InnerLoop, kernel: Kernel, arguments: Arguments, device: jax.Device) -> Report:
    """Compute a problem by a kernel and by the scan on a device, and compare all results and gradients.

    This compiles and runs programs, so it must not be called while a function is traced.
    """
    began = time.monotonic()
    dtype = jnp.dtype(arguments.q.dtype)
    functions = programs(loop, kernel, dtype)
    inputs = jax.device_put((arguments, cotangents(loop, arguments)), device)
    with ThreadPoolExecutor(len(functions)) as pool:  # nearly all of the time is compiling
        compiled = list(pool.map(lambda function: jax.jit(function).lower(*inputs).compile(), functions.values()))
    by_scan, by_kernel, inference = (jax.device_get(program(*inputs)) for program in compiled)
    errors = differences(by_kernel, by_scan)
    for name, error in differences(inference, {key: by_scan[key] for key in inference}).items():
        errors[f"{name} of inference"] = error
    return Report(errors, TOLERANCES[dtype.name], time.monotonic() - began)


def programs(loop: InnerLoop, kernel: Kernel, dtype: jnp.dtype) -> dict[str, Callable[..., dict[str, Any]]]:
    """Return the functions of (arguments, cotangents) that the check compiles.

    ``scan`` and ``kernel`` return results and gradients, ``inference`` the results of the kernel's program without
    gradients.
    """

    def everything(kernel, arguments, cotangents):
        results, pullback = jax.vjp(partial(_solve, loop, kernel), arguments)
        (gradients,) = pullback(cotangents)
        return {**_with_steps(results, arguments), "gradient of": gradients}

    def inference(arguments, cotangents):
        return _with_steps(_solve(loop, kernel, arguments), arguments)

    exact = partial(_with_precision, "highest")
    same = exact if dtype == jnp.float32 else lambda function: function
    return {
        "scan": exact(partial(everything, None)),
        "kernel": same(partial(everything, kernel)),
        "inference": same(inference),
    }


def problem(loop: InnerLoop, mini_batch: int, heads: int, tokens: int, dtype: str) -> Arguments:
    """Draw arguments to which every part of the inner loop contributes, by NumPy, which compiles nothing."""
    rng, d = np.random.default_rng(0), loop.learner.features

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    weights = jax.eval_shape(lambda: learner_lib.init(jax.random.key(0), loop.learner, heads))
    q, k, v = (normal(_BATCH, tokens, heads, d) for _ in "qkv")
    q, k, v = (x.astype(jnp.dtype(dtype)) for x in (0.6 * q + 0.8 * k, k, v))  # queries are like keys
    return Arguments(
        {"norm_scale": 1 + 0.1 * normal(heads, 1, d), "norm_bias": 0.1 * normal(heads, 1, d)},
        jax.tree.map(lambda x: 0.1 * normal(*x.shape), weights),
        q,
        k,
        v,
        np.float32(1 / d) / (1 + np.exp(-normal(_BATCH, tokens, heads))),
        (1 / np.arange(1, mini_batch + 1) + 0.01 * normal(mini_batch)).astype(np.float32),
    )


class Size(NamedTuple):
    """The size of a small problem, and of the blocks of the kernel that computes it."""

    heads: int
    tokens: int
    most_packs: int
    unroll: tuple[int, int]


def small_size(family: Family, *, interpret: bool = False) -> Size:
    """Return the size of the small problem for a family."""
    loop, b = family.loop, family.mini_batch
    layout, unroll = run.blocks(loop, b, family.heads, family.dtype, interpret=interpret)
    packs = min(layout.block_packs, max(1, int(layout.most_packs * _AFFORDABLE)))
    blocks = min(layout.packs // layout.block_packs, 2)
    heads = min(family.heads, blocks * packs * layout.pack - -family.heads % layout.pack)
    return Size(heads, layout.block_tokens + layout.group_tokens + b, packs, unroll)


def problem_of(family: Family, device: str) -> tuple[Arguments, Kernel]:
    """Return the small problem for a family, and the kernel for a kind of device in blocks of its size."""
    loop, b = family.loop, family.mini_batch
    size = small_size(family, interpret=run.interpreted(device))
    kernel = run.choose("pallas", loop, b, device, family.remat_group).kernel
    assert kernel is not None  # choose raises where there is none
    kernel = partial(kernel, most_packs=size.most_packs, unroll=size.unroll)
    return problem(loop, b, size.heads, size.tokens, family.dtype), kernel


def _solve(loop: InnerLoop, kernel: Kernel | None, arguments: Arguments) -> dict[str, Any]:
    parameters = Parameters(arguments.w0, arguments.norm, arguments.position_eta)
    tokens = Tokens(arguments.q, arguments.k, arguments.v, arguments.token_eta)
    result = scan.run(loop, parameters, tokens, kernel=kernel)
    return {"outputs": result.z, "final weights": result.state.weights}


def _with_steps(results: dict[str, Any], arguments: Arguments) -> dict[str, Any]:
    """Replace the final weights by the sum of the steps, because steps may be small beside the weights."""
    steps = jax.tree.map(jnp.subtract, results["final weights"], arguments.w0)
    return {"outputs": results["outputs"], "sum of steps": steps}


def cotangents(loop: InnerLoop, arguments: Arguments) -> dict[str, Any]:
    """Draw the cotangents of the results.

    Those of the outputs have the values v added: steps bring outputs nearer to v, so that their effect does not cancel
    in sums over tokens.
    """
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(_solve, loop, None), arguments)
    drawn = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes)
    return {**drawn, "outputs": drawn["outputs"] + arguments.v}


def _with_precision(precision: str, function: Callable) -> Callable:
    def traced(*arguments):
        with jax.default_matmul_precision(precision):
            return function(*arguments)

    return traced


def differences(found: Any, expected: Any) -> dict[str, float]:
    """Return the largest difference over the largest entry of each array, by its name."""

    def error(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x.astype(np.float64), y.astype(np.float64)
        with np.errstate(invalid="ignore"):
            return float(np.abs(x - y).max() / (np.abs(y).max() or 1.0))

    differences = jax.tree.map(error, found, expected)
    return {
        " ".join(jax.tree_util.keystr((key,), simple=True) for key in path): difference
        for path, difference in jax.tree_util.tree_leaves_with_path(differences)
    }

"""Which way the inner loop is computed."""

from functools import partial
from typing import NamedTuple

from ttt_jax.ttt.kernels import run
from ttt_jax.ttt.learner import Learner
from ttt_jax.ttt.scan import Kernel

KERNELS = ("auto", "pallas", "scan")


# Mini-batches between two kept states and per iteration of the scan, the fastest measured: docs/kernels.md.
_SCAN = {"tpu": 4}
_SCAN_ELSEWHERE = 1


class Choice(NamedTuple):
    """A kernel for :func:`ttt_jax.ttt.scan.run`, None for none, and why."""

    kernel: Kernel | None
    why: str


def scan_options(remat_group: int | None, unroll: int | None, platform: str) -> dict[str, int]:
    """``remat_group`` and ``unroll`` of :func:`ttt_jax.ttt.scan.run`, where they are unset the best of the platform."""
    best = _SCAN.get(platform, _SCAN_ELSEWHERE)
    return {"remat_group": best if remat_group is None else remat_group, "unroll": unroll or best}


def choose(kernel: str, learner: Learner, mini_batch: int, platform: str) -> Choice:
    """What ``auto``, ``pallas`` or ``scan`` comes to.

    Args:
      platform: that programs are compiled for, as JAX names it. On any but ``tpu`` the kernels are interpreted, where
        they are asked for: slow, with the same numbers.

    Raises:
      ValueError: for ``pallas`` where there is no kernel.
    """
    if kernel == "scan":
        return Choice(None, "scan, as configured")
    reason = run.unsupported(learner, mini_batch)
    if kernel == "pallas":
        if reason:
            raise ValueError(f"no kernel: {reason}")
        how = "fused kernel, as configured" + ("" if platform == "tpu" else f", interpreted: slow on {platform}")
        return Choice(partial(run.run, interpret=platform != "tpu"), how)
    if platform != "tpu":
        return Choice(None, f"scan, for {platform} (fused kernels are for TPUs)")
    if reason:
        return Choice(None, f"scan, for {reason}")
    return Choice(run.run, "fused kernel, for tpu")

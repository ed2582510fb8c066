"""Which way the inner loop is computed."""

from functools import partial
from typing import Any, NamedTuple

from ttt_jax.kernels import run
from ttt_jax.ttt.inner_loop import InnerLoop
from ttt_jax.ttt.scan import Kernel

KERNELS = ("auto", "pallas", "scan")


# Mini-batches between two kept states and per iteration of the scan, the fastest measured: docs/kernels.md.
_ON_TPUS, _ELSEWHERE = 4, 1
_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # whose fast memory is 16 MiB: kernels take up to 50


class Choice(NamedTuple):
    """A kernel for :func:`ttt_jax.ttt.scan.run`, None for none, and why."""

    kernel: Kernel | None
    why: str


def scan_options(remat_group: int | None, unroll: int | None, device: str) -> dict[str, Any]:
    """``remat_group`` and ``unroll`` of :func:`ttt_jax.ttt.scan.run`, where they are unset the best of the device."""
    best = _ON_TPUS if _is_tpu(device) else _ELSEWHERE
    return {"remat_group": best if remat_group is None else remat_group, "unroll": unroll or best}


def choose(kernel: str, loop: InnerLoop, mini_batch: int, device: str, remat_group: int | None = None) -> Choice:
    """What ``auto``, ``pallas`` or ``scan`` comes to.

    Args:
      device: that programs are compiled for, its kind as JAX names it. On any but TPUs the kernels are interpreted,
        where they are asked for: slow, with the same numbers.
      remat_group: mini-batches between two W that the kernel keeps; see :func:`ttt_jax.kernels.run.run`.

    Raises:
      ValueError: for ``pallas`` where there is no kernel.
    """
    if kernel == "scan":
        return Choice(None, "scan, as configured")
    reason = run.unsupported(loop, mini_batch)
    there = partial(run.run, remat_group=remat_group, interpret=interpreted(device))
    if device.startswith(_SMALL):
        reason = reason or f"too little fast memory on {device}"
    if kernel == "pallas":
        if reason:
            raise ValueError(f"no kernel: {reason}")
        how = "fused kernel, as configured" + (f", interpreted: slow on {device}" if interpreted(device) else "")
        return Choice(there, how)
    if not _is_tpu(device):
        return Choice(None, f"scan, for {device} (fused kernels are for TPUs)")
    if reason:
        return Choice(None, f"scan, for {reason}")
    return Choice(there, f"fused kernel, for {device}")


def interpreted(device: str) -> bool:
    """Whether the kernels run as ordinary XLA operations on a device: on all but TPUs."""
    return not _is_tpu(device)


def _is_tpu(device: str) -> bool:
    return device.startswith("TPU")

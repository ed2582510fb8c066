"""Have a fused kernel check itself before a program is compiled with it, and use the scan where it is wrong."""

import jax
import ml_collections
from jax.sharding import Mesh

from ttt_jax.distributed import process_checks
from ttt_jax.distributed.agreement import Exchange, describe
from ttt_jax.kernels import run as kernels
from ttt_jax.kernels import self_check
from ttt_jax.models import pattern
from ttt_jax.training.step import Program, build_program

_LIMIT = 900.0  # seconds for the slowest process


def checked(run: Program) -> Program:
    """Return a program whose inner loop has been checked on its devices, some of which belong to this process.

    Each process has the fused kernels of :func:`kernels_to_check` compared with the scan on one of its devices, once
    for all programs of the same shapes (:mod:`ttt_jax.kernels.self_check`). If one is wrong on any process, all
    processes print a line on standard error that names the array that differs most, and get a program that uses the
    scan. Its ``config`` is not changed.

    All processes make this call alike.
    """
    families = kernels_to_check(run.config.model, run.mesh)
    if not families:
        return run
    device = next(device for device in run.mesh.devices.flat if device.process_index == jax.process_index())
    known = self_check.of_family.cache_info().misses
    wrong = "; ".join(filter(None, (_problem(family, device) for family in families)))
    problem = Exchange("kernel check").first_problem(wrong, _LIMIT)
    if problem is None:
        if self_check.of_family.cache_info().misses > known:
            for report in (self_check.of_family(family, device) for family in families):
                process_checks.print_once(
                    f"fused kernel checked against the scan in {report.seconds:.1f} s: differs by {report}"
                )
        return run
    process_checks.print_once(
        f"WARNING: the fused kernel of the inner loop is wrong on {device.device_kind}: {problem}. The scan is used "
        "instead, which is several times slower; please report this. model.ttt.kernel=scan leaves the check out, "
        "model.ttt.kernel_check=false uses the kernel as it is"
    )
    config = run.config.copy_and_resolve_references()
    config.model.ttt.kernel = "scan"
    return build_program(config, run.mesh)._replace(config=run.config)


def kernels_to_check(model: ml_collections.ConfigDict, mesh: Mesh) -> list[self_check.Family]:
    """Return the fused kernels of a model on a mesh that are to be checked, one for each kind of block that uses one.

    There are none where kernels are interpreted, or where ``model.ttt.kernel_check`` is false.
    """
    device, heads = mesh.devices.flat[0].device_kind, model.num_heads // mesh.shape["tensor"]
    if not model.ttt.kernel_check or kernels.interpreted(device):
        return []
    families = []
    for kind in pattern.learning_kinds(model):
        loop, ttt = pattern.inner_loop(kind.model), kind.model.ttt
        if kernels.choose(ttt.kernel, loop, ttt.mini_batch, device).kernel is not None:
            families.append(self_check.Family(loop, ttt.mini_batch, heads, model.dtype, ttt.remat_group))
    return list(dict.fromkeys(families))


def _problem(kernel: self_check.Family, device: jax.Device) -> str:
    """Return what is wrong with the kernel; an empty text where nothing is."""
    try:
        report = self_check.of_family(kernel, device)
    except Exception as error:  # whatever the compiler or the device raises
        return f"it does not run, {describe(error)}"
    return f"it differs from the scan by {report}" if report.wrong else ""

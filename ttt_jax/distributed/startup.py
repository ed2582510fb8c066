"""Set a process up before JAX looks for devices: join the other processes, keep compiled programs and freed memory.

The processes of one run find each other on TPU pods, GKE, Slurm and Open MPI, or by hand.
"""

import contextlib
import ctypes
import glob
import importlib.util
import os
import socket
import sys
import traceback
from typing import NoReturn

import jax

from ttt_jax.distributed.agreement import describe
from ttt_jax.distributed.watchdog import Watchdog
from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir import cache_folder
from ttt_jax.terminal.stopping import FAILED, INTERRUPTED, RESTART

_SURELY, _PERHAPS = "surely", "perhaps"
_FOREVER = 7 * 24 * 3600  # at JAX's own limit the process is aborted without saying where; the watchdog comes first
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, limit: float = 300
) -> None:
    """Join the other processes of this run, if there are any, and return once all have come.

    The processes are given by the three arguments, by ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``, or by the environment (Cloud TPU, GKE, Slurm, Open MPI). If some are still missing after
    ``limit`` seconds, the process says so and ends with status 75.

    Args:
      coordinator: ``host:port`` of process 0, where the port is free.
      processes: the number of processes.
      process: the index of this process, from 0.

    Raises:
      ConfigError: where only some of the three are given, they are not valid, or the others cannot be joined.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    by_hand = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in by_hand.items() if value is None]
    if coordinator and processes is not None and process is not None:
        _check(coordinator, processes, process)
    elif len(missing) < len(by_hand):
        raise ConfigError(f"{missing[0]}: missing; expected all of {', '.join(by_hand)}, or none")
    elif not (cluster := _cluster()):
        return

    who = f"process {process} of {processes}" if not missing else "this process"
    where = coordinator or "the coordinator that the environment names"
    print(f"{who} on {socket.gethostname()} waits for the others at {where}", file=sys.stderr, flush=True)

    def complaint(seconds: float) -> str:
        return (
            f"ttt: {who} on {socket.gethostname()}: not all processes came to {where} within {seconds:.0f} s; expected "
            "the same command on every host (a slice of several hosts needs all of them), and a port that they reach"
        )

    jax.config.update("jax_enable_preemption_service", False)  # it would swallow a SIGTERM; see StopSignals
    with Watchdog(limit, complaint):
        try:
            jax.distributed.initialize(coordinator, processes, process, initialization_timeout=_FOREVER)
        except Exception as error:
            if missing and cluster == _PERHAPS:
                print(f"found no other processes ({describe(error)}); going on alone", file=sys.stderr, flush=True)
            else:
                raise ConfigError(f"{who} cannot join the others at {where}: {describe(error)}") from error
        jax.devices()  # on a pod this waits for the others too


def leave(error: BaseException) -> NoReturn:
    """End this process, one of several, after an error that the others do not share.

    It ends at once, because what JAX does at an ordinary exit waits for the others.
    """
    traceback.print_exception(error)
    lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    who = f"ttt: process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    print(f"{who} {'has lost another one; start all again' if lost else 'failed'}", file=sys.stderr, flush=True)
    os._exit(RESTART if lost else INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs.

    They lie in ``JAX_COMPILATION_CACHE_DIR`` (a folder or ``gs://``) or else in the user's cache folder.
    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns the cache off.
    """
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        with contextlib.suppress(ConfigError):  # without a home folder, programs are compiled each time
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


def keep_freed_memory() -> None:
    """Make glibc keep the buffers that a step frees for the next step, on machines without accelerators.

    By default glibc gives large buffers back to the kernel, and a third of a step on a CPU goes into page faults.
    Nothing is done with another C library, or where the user asks glibc for huge pages, which cost few faults and
    become slower with these settings. The constants are those of malloc.h.
    """
    if "glibc.malloc.hugetlb" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 26)):
            mallopt(parameter, value)


def _cluster() -> str | None:
    """Return whether the environment names other processes surely, or perhaps: on a TPU host, by its metadata."""
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return _SURELY
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS") or 1) > 1:
        return _SURELY
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return None
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return _SURELY
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if chips and importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in os.environ:
        return _PERHAPS
    return None


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.strip().isdecimal():
        raise ConfigError(f"{variable}={text!r}: expected a whole number")
    return int(text)


def _check(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--coordinator {coordinator}: expected host:port")
    if not 0 <= process < processes:
        raise ConfigError(f"--process {process}: expected a number from 0 to below --processes, {processes}")

"""Set a process up before JAX looks for devices, and end it when it waits in vain.

The processes of one run find each other on TPU pods, GKE, Slurm and Open MPI, or by hand.
"""

import contextlib
import ctypes
import faulthandler
import glob
import importlib.util
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax

from ttt_jax.distributed.agreement import describe
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
                print(f"found no other processes ({describe(error)}); continuing alone", file=sys.stderr, flush=True)
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


class Watchdog:
    """A thread that ends the process with status 75 when :meth:`heard` has not been called for too long.

    The main thread could not do it while it waits in a collective.

    Args:
      limit: seconds; 0 for no limit.
      complaint: makes the message to print from the seconds that have passed.
      armed: whether the time runs from the start; else from the first :meth:`heard`.
    """

    def __init__(self, limit: float, complaint: Callable[[float], str], *, armed: bool = True):
        self._limit, self._complaint = limit, complaint
        self._last: float | None = time.monotonic() if armed else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if limit > 0:
            self._thread.start()

    def heard(self, took: float = 0.0) -> None:
        """Start the time anew. After something that took long, allow five times as long."""
        self._limit = max(self._limit, 5 * took) if self._limit > 0 else 0
        self._last = time.monotonic()

    def rest(self) -> None:
        """Stop the time until the next :meth:`heard`."""
        self._last = None

    def close(self) -> None:
        """End the thread."""
        self._ended.set()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit / 10)):
            last = self._last
            passed = 0.0 if last is None else time.monotonic() - last
            if passed > self._limit:
                print(f"\n{self._complaint(passed)}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(RESTART)


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

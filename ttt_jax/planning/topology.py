"""Describe devices that need not be present: a TPU topology, for its compiler alone, or any number of CPU devices.

The compiler of TPUs is the library ``libtpu``, which runs on any Linux machine.
"""

import contextlib
import importlib.util
import math
import os
import re
from typing import NamedTuple

from ttt_jax import extras
from ttt_jax.errors import ConfigError

# The slices of v5e and v6e that Google offers. Those of v5p are boxes of many sizes, which its compiler checks.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_ACCEPTED = (
    f"v5e:AxB or v6e:AxB with AxB one of {', '.join(_FLAT)}; v5p:AxBxC, such as v5p:4x4x4; or cpu:N, such as cpu:8"
)


class Topology(NamedTuple):
    """The chips that ``--topology`` and ``--slices`` describe."""

    chip: str  # "v5e", "v6e", "v5p" or "cpu"
    shape: tuple[int, ...]  # of a slice
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}" + (f" x {self.slices}" if self.slices > 1 else "")

    @property
    def chips(self) -> int:
        """Return the number of chips in all slices together."""
        return math.prod(self.shape) * self.slices


def parse(text: str, slices: int = 1) -> Topology:
    """Parse a topology such as ``v5e:16x16``; raise ConfigError for anything else."""
    match = re.fullmatch(r"(v5e|v6e|v5p|cpu):(\d+(?:x\d+)*)", text)
    shape = tuple(int(n) for n in match[2].split("x")) if match else ()
    known = match is not None and {
        "cpu": len(shape) == 1 and slices == 1,
        "v5p": len(shape) == 3,
    }.get(match[1], match[2] in _FLAT)
    if match is None or not known or min(shape) < 1:
        raise ConfigError(f"--topology {text}: expected {_ACCEPTED}" + ("; --slices is for TPUs" if slices > 1 else ""))
    return Topology(match[1], shape, slices)


def prepare(topology: Topology) -> None:
    """Set the environment variables that the TPU compiler needs, before JAX and libtpu are loaded.

    Raises:
      ConfigError: where libtpu is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip == "cpu":
        return
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology {topology}: needs the compiler of TPUs; {extras.install_command('plan')} (on Linux)"
        )
    chips = math.prod(topology.shape)
    names = {"v5e": f"v5litepod-{chips}", "v6e": f"v6e-{chips}", "v5p": f"v5p-{2 * chips}"}  # v5p counts cores
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=names[topology.chip],
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")  # fatal messages only; errors come as exceptions
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def devices(topology: Topology) -> list:
    """Return the devices of a topology, for meshes of programs that are compiled and, for TPUs, never run.

    Raises:
      ConfigError: where the compiler does not know the topology, or this process has another number of CPU devices.
    """
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_enable_compilation_cache", False)  # it cannot hold programs for absent devices
    if topology.chip == "cpu":
        jax.config.update("jax_platforms", "cpu")
        with contextlib.suppress(RuntimeError):  # where JAX has started already
            jax.config.update("jax_num_cpu_devices", topology.chips)
        found = jax.devices("cpu")
        if len(found) != topology.chips:
            raise ConfigError(
                f"--topology {topology}: this process has {len(found)} CPU devices; expected cpu:{len(found)}"
            )
        return found
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    name = str(topology._replace(slices=1))
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].partition(": ")[2] or error
        raise ConfigError(f"--topology {topology}: {reason}; expected {_ACCEPTED}") from error

"""Accelerator types of Cloud TPU: how many chips a name such as v5litepod-256 means, and what is installed on them."""

import re
from typing import NamedTuple

from ttt_jax.errors import ConfigError


class Accelerator(NamedTuple):
    """What a name such as ``v5litepod-256`` means."""

    name: str
    devices: int  # as JAX counts: chips, but cores of v2 and v3
    several_hosts: bool
    runtime_version: str


class _Generation(NamedTuple):
    cores_per_chip: int  # 2 where the number in the name counts TensorCores
    most_chips_of_a_host: int
    runtime_version: str


# cloud.google.com/tpu/docs/supported-tpu-configurations and runtimes
_GENERATIONS = {
    "v2": _Generation(2, 4, "tpu-ubuntu2204-base"),
    "v3": _Generation(2, 4, "tpu-ubuntu2204-base"),
    "v4": _Generation(2, 4, "tpu-ubuntu2204-base"),
    "v5litepod": _Generation(1, 8, "v2-alpha-tpuv5-lite"),
    "v5p": _Generation(2, 4, "v2-alpha-tpuv5"),
    "v6e": _Generation(1, 8, "v2-alpha-tpuv6e"),
}


def parse(name: str) -> Accelerator:
    """Reads ``v5litepod-256``, ``v4-32`` (32 cores, 16 chips) and their like.

    Raises:
      ConfigError: for a name that is no accelerator type.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name)
    generation = _GENERATIONS.get(match[1]) if match else None
    number = int(match[2]) if match else 0
    if match is None or generation is None or number < 1 or number % generation.cores_per_chip:
        example = "v5litepod-256, v6e-64, v5p-128 or v4-32 (these two count cores, two a chip)"
        kinds = ", ".join(_GENERATIONS)
        raise ConfigError(f"--accelerator {name}: expected an accelerator type, such as {example}; known are {kinds}")
    chips = number // generation.cores_per_chip
    devices = number if match[1] in ("v2", "v3") else chips
    return Accelerator(name, devices, chips > generation.most_chips_of_a_host, generation.runtime_version)

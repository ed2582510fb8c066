"""Which GPUs each of several processes of a machine sees: by itself, JAX takes all of them, and the memory of all."""

import glob
import os
from collections.abc import Mapping

from ttt_jax.errors import ConfigError


def split(jobs: int, environment: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """What to add to the environment of each of so many processes: an equal share of the GPUs; nothing without GPUs.

    Raises:
      ConfigError: where there are more processes than GPUs.
    """
    found = _visible(environment)
    if jobs == 1 or not found:
        return [{}] * jobs
    if jobs > len(found):
        raise ConfigError(f"--jobs {jobs}: this machine has {len(found)} GPUs; expected at most {len(found)}")
    each = len(found) // jobs
    return [{"CUDA_VISIBLE_DEVICES": ",".join(found[job * each : (job + 1) * each])} for job in range(jobs)]


def _visible(environment: Mapping[str, str]) -> list[str]:
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip()]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]

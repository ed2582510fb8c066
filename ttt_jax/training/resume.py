"""Whether a run may go on in a workdir: it has to be the same run, on the same data."""

from typing import Any

import ml_collections

from ttt_jax import config as config_lib
from ttt_jax import config_file
from ttt_jax.config import ConfigError
from ttt_jax.workdir import Workdir

# What may differ between the parts of a run. None of it changes which numbers are computed, but for the duration (the
# schedule of the rest), the mesh (the order of sums) and the guard (which has to be turned on when spikes are seen).
MAY_CHANGE = (
    "training.duration",
    "training.accumulation",
    "training.stall_limit",
    "optimizer.spike_factor",
    "checkpoint.",
    "data.source",  # a copy elsewhere; that it holds the same tokens is checked
    "data.tokenizer",
    "data.worker_processes",
    "evaluation.",
    "log.",
    "mesh.",
    "model.remat",
    "model.ttt.kernel",
    "model.ttt.remat_group",
    "model.ttt.unroll",
    "profile.",
)


def check_same_run(config: ml_collections.ConfigDict, workdir: Workdir) -> None:
    """Raises :class:`ConfigError` that lists the keys by which the run in the workdir differs."""
    if not (workdir / "config.json").exists():
        return
    there = config_file.from_json(workdir / "config.json")
    different = config_lib.differing_keys(there.to_dict(), config.to_dict())
    refused = {key: values for key, values in different.items() if not key.startswith(MAY_CHANGE)}
    if refused:
        listed = ", ".join(f"{key} {there!r} there, {here!r} here" for key, (there, here) in refused.items())
        raise ConfigError(
            f"--workdir {workdir}: holds a run of another config ({listed}); expected a new workdir, or the "
            "values that are there"
        )


def check_same_data(there: dict[str, Any], fingerprint: str, name: str) -> None:
    """Raises :class:`ConfigError` where a checkpoint is of other data."""
    if there["fingerprint"] != fingerprint:
        raise ConfigError(
            f"data.source: {name} is not the data this run began with (fingerprint {there['fingerprint']}, "
            f"now {fingerprint}); expected the same data, or a new workdir"
        )

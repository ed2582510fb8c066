"""Whether a run may go on in a workdir: it has to be the same run, on the same data."""

from typing import Any

import ml_collections

from ttt_jax.errors import ConfigError
from ttt_jax.storage import json_files
from ttt_jax.storage.json_files import DamagedFile
from ttt_jax.storage.workdir import Workdir
from ttt_jax.training import own_learner, run_config


def check_same_run(config: ml_collections.ConfigDict, workdir: Workdir, accept_changed_learner: bool = False) -> bool:
    """Check that the run in a workdir, if there is one, is that of a config.

    Where ``config.json`` is damaged and no checkpoint has been saved, there is nothing to go on with.

    Args:
      accept_changed_learner: allow that the source of a learner of the user's own is another than that of the run.

    Returns:
      Whether it is another one.

    Raises:
      ConfigError: where it is another run, with the keys that differ.
    """
    try:
        found = run_config.find(workdir)
    except DamagedFile as error:
        if run_config.saved_steps(workdir):
            raise
        json_files.tell(f"{error}; no checkpoint has been saved, so the run begins anew")
        return False
    if found is None:
        return False
    if differing := run_config.refused(found.config, config):
        origin = f"; {found.problem}, so this is from {found.origin}" if found.problem else ""
        raise ConfigError(
            f"--workdir {workdir}: holds a run of another config ({run_config.listed(differing)}); expected a new "
            f"workdir, or the values that are there{origin}"
        )
    if found.problem:
        json_files.tell(f"{found.problem}; the config that {found.origin.parent.parent} holds is this one, going on")
    return own_learner.is_changed(found.config, accept_changed_learner)


def check_same_data(there: dict[str, Any], fingerprint: str, name: str) -> None:
    """Raises :class:`ConfigError` where a checkpoint is of other data."""
    if there["fingerprint"] != fingerprint:
        raise ConfigError(
            f"data.source: {name} is not the data this run began with (fingerprint {there['fingerprint']}, "
            f"now {fingerprint}); expected the same data, or a new workdir"
        )

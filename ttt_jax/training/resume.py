"""Whether a run may go on in a workdir: it has to be the same run, on the same data."""

from typing import Any

import ml_collections

from ttt_jax import config as config_lib
from ttt_jax import import_path
from ttt_jax.errors import ConfigError
from ttt_jax.storage import json_files
from ttt_jax.storage.json_files import DamagedFile
from ttt_jax.storage.workdir import Workdir
from ttt_jax.training import run_config

LEARNER = "model.ttt.learner"


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
        json_files.warn_once(f"{error}; no checkpoint has been saved, so the run begins anew")
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
        json_files.warn_once(
            f"{found.problem}; the config that {found.origin.parent.parent} holds is this one, going on"
        )
    return is_changed(found.config, accept_changed_learner)


def check_same_data(there: dict[str, Any], fingerprint: str, name: str) -> None:
    """Raises :class:`ConfigError` where a checkpoint is of other data."""
    if there["fingerprint"] != fingerprint:
        raise ConfigError(
            f"data.source: {name} is not the data this run began with (fingerprint {there['fingerprint']}, "
            f"now {fingerprint}); expected the same data, or a new workdir"
        )


def found(config: ml_collections.ConfigDict, workdir: Workdir, accept_changed: bool) -> ml_collections.ConfigDict:
    """Return the config of a training with the hash of its learner's source, which is not imported.

    Args:
      accept_changed: allow that the run in the workdir has another one.

    Raises:
      ConfigError: where there is no such module, it lies in the workdir, or its source is not that of the run, or not
        the one that the config names.
    """
    run_config.check_learner_outside(config, workdir)
    config = with_source(config)
    try:
        run = run_config.find(workdir)
    except DamagedFile:  # whether the training may go on is told where it is opened
        return config
    if run is not None:
        is_changed(run.config, accept_changed)
    return config


def with_source(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return a config with the hash of the source of a learner of the user's own; any other config as it is.

    Raises:
      ConfigError: where there is no such module, or the config holds the hash of another source.
    """
    if (named := config_lib.own_functions(config).get(LEARNER)) is None:
        return config
    if config.model.ttt.learner_source:
        import_path.check_unchanged(named, LEARNER, config.model.ttt.learner_source)
    return _with(config, import_path.source_hash(named, LEARNER))


def is_changed(run: ml_collections.ConfigDict, accept: bool) -> bool:
    """Return whether the source of a run's learner is another one by now.

    Args:
      run: the config of the run.
      accept: return true for another one, rather than raise.

    Raises:
      ConfigError: where it is another one, or there is none.
    """
    named, source = config_lib.own_functions(run).get(LEARNER), run.model.ttt.learner_source
    if named is None or not source:
        return False
    if not accept:
        import_path.check_unchanged(named, LEARNER, source)
    return import_path.source_hash(named, LEARNER) != source


def record(workdir: Workdir, source: str) -> None:
    """Write the hash of a learner's source into ``config.json``, in the place of the one that the run had."""
    run = run_config.find(workdir)
    assert run is not None
    run_config.write(workdir, _with(run.config, source))


def _with(config: ml_collections.ConfigDict, source: str) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(config).lock()
    config.model.ttt.learner_source = source
    return config

"""Check that a run may continue in a workdir: it must have the same config, data and source of its learner.

A learner of the user's own is found before it is imported, and the hash of its source is kept with the run.
"""

from typing import Any

import jax
import ml_collections

from ttt_jax import config as config_lib
from ttt_jax import import_path
from ttt_jax.distributed import process_checks
from ttt_jax.errors import ConfigError
from ttt_jax.storage import json_files
from ttt_jax.storage.json_files import DamagedFile
from ttt_jax.storage.workdir import Workdir
from ttt_jax.training import run_config

LEARNER = "model.ttt.learner"


def check_run(config: ml_collections.ConfigDict, workdir: Workdir, accept_changed_learner: bool) -> None:
    """Check on all processes that the workdir holds no other run, and record a changed learner that is accepted.

    Raises:
      ConfigError: as :func:`check_same_run`.
    """
    if process_checks.on_all(lambda: check_same_run(config, workdir, accept_changed_learner)):
        learner, source = config.model.ttt.learner, config.model.ttt.learner_source
        process_checks.print_once(f"model.ttt.learner={learner!r}: has changed since the run began; accepted")
        if jax.process_index() == 0:
            record_learner_source(workdir, source)


def check_same_run(config: ml_collections.ConfigDict, workdir: Workdir, accept_changed_learner: bool = False) -> bool:
    """Check that the run in a workdir, if there is one, has this config, and return whether its learner has changed.

    Where ``config.json`` is damaged and no checkpoint has been saved, the run begins anew.

    Args:
      accept_changed_learner: accept that the source of a learner of the user's own has changed.

    Raises:
      ConfigError: where it is another run, with the keys that differ.
    """
    try:
        run = run_config.find(workdir)
    except DamagedFile as error:
        if run_config.saved_steps(workdir):
            raise
        json_files.warn_once(f"{error}; no checkpoint has been saved, so the run begins anew")
        return False
    if run is None:
        return False
    if differing := run_config.forbidden_changes(run.config, config):
        origin = f"; {run.problem}, so this is from {run.origin}" if run.problem else ""
        raise ConfigError(
            f"--workdir {workdir}: holds a run of another config ({run_config.describe_changes(differing)}); expected "
            f"a new workdir, or the values that are there{origin}"
        )
    if run.problem:
        json_files.warn_once(f"{run.problem}; the config that {run.origin.parent.parent} holds is this one, going on")
    return learner_has_changed(run.config, accept_changed_learner)


def check_same_data(saved: dict[str, Any], fingerprint: str, name: str) -> None:
    """Raise :class:`ConfigError` where a checkpoint is of other data.

    Args:
      saved: what the checkpoint says about its data.
      fingerprint: of the data now.
      name: the name of the data, for the message.
    """
    if saved["fingerprint"] != fingerprint:
        raise ConfigError(
            f"data.source: {name} is not the data this run began with (fingerprint {saved['fingerprint']}, "
            f"now {fingerprint}); expected the same data, or a new workdir"
        )


# ---- A learner of the user's own


def with_learner_of_run(
    config: ml_collections.ConfigDict, workdir: Workdir, accept_changed: bool
) -> ml_collections.ConfigDict:
    """Return the config of a training with the hash of its learner's source, the same on all processes.

    The learner is not imported. A config without functions of the user's own is returned as it is.

    Args:
      accept_changed: accept that the run in the workdir has another source.

    Raises:
      ConfigError: where there is no such module, where it lies in the workdir, or where its source is not that of the
        run or of the config.
    """
    if not config_lib.own_functions(config):
        return config

    def find() -> ml_collections.ConfigDict:
        run_config.check_learner_outside(config, workdir)
        hashed = with_learner_source(config)
        try:
            run = run_config.find(workdir)
        except DamagedFile:  # check_same_run decides whether the run may continue
            return hashed
        if run is not None:
            learner_has_changed(run.config, accept_changed)
        return hashed

    hashed = process_checks.on_all(find)
    process_checks.check_same({"model.ttt.learner_source": hashed.model.ttt.learner_source})
    return hashed


def with_learner_source(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return a config with the hash of the source of a learner of the user's own; any other config as it is.

    Raises:
      ConfigError: where there is no such module, or the config holds the hash of another source.
    """
    if (name := config_lib.own_functions(config).get(LEARNER)) is None:
        return config
    if config.model.ttt.learner_source:
        import_path.check_unchanged(name, LEARNER, config.model.ttt.learner_source)
    return _replace_source(config, import_path.source_hash(name, LEARNER))


def learner_has_changed(run: ml_collections.ConfigDict, accept: bool) -> bool:
    """Return whether the source of a run's learner has changed since the run began.

    Args:
      run: the config of the run.
      accept: return true for a changed source, rather than raise.

    Raises:
      ConfigError: where the source has changed, or there is none any more.
    """
    name, source = config_lib.own_functions(run).get(LEARNER), run.model.ttt.learner_source
    if name is None or not source:
        return False
    if not accept:
        import_path.check_unchanged(name, LEARNER, source)
    return import_path.source_hash(name, LEARNER) != source


def record_learner_source(workdir: Workdir, source: str) -> None:
    """Replace the hash of the learner's source in ``config.json``."""
    run = run_config.find(workdir)
    assert run is not None
    run_config.write(workdir, _replace_source(run.config, source))


def _replace_source(config: ml_collections.ConfigDict, source: str) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(config).lock()
    config.model.ttt.learner_source = source
    return config

"""Read and write the config of a run, and check whether the run may continue with a config.

``config.json`` is checked against the copy in the newest checkpoint, which says what its numbers were computed with.
Where ``config.json`` is gone or damaged, the copy is used. A ``config.json`` with other settings is refused, unless it
was edited on purpose: then it has no hash.

A run may only continue with the same config, data and source of its learner. A learner of the user's own is found
before it is imported, and the hash of its source is kept with the run.

JAX is imported only where processes agree, so that commands that read configs answer wrong arguments at once.
"""

import json
from typing import Any, NamedTuple

import ml_collections

from ttt_jax import config as config_lib
from ttt_jax import import_path
from ttt_jax.errors import ConfigError
from ttt_jax.storage import checksums, json_files, writing
from ttt_jax.storage.json_files import DamagedFile
from ttt_jax.storage.workdir import Workdir, explained, is_local

NAME = "config.json"


class RunConfig(NamedTuple):
    """The config of a run, and where it was read.

    Attributes:
      config: the config.
      origin: the file that it was read from.
      problem: what is wrong with ``config.json``, in one line; empty where nothing is.
    """

    config: ml_collections.ConfigDict
    origin: Workdir
    problem: str = ""


def write(workdir: Workdir, config: ml_collections.ConfigDict) -> None:
    """Write ``config.json``: the keys of the config, and the hash of the content. A damaged file is set aside."""
    path = workdir / NAME
    try:
        json_files.read_object(path)
    except DamagedFile:
        json_files.warn_once(f"{path}: kept as it was under the name {writing.set_aside(path)}")
    except (FileNotFoundError, NotADirectoryError):
        pass
    json_files.write_object(path, config.to_dict())


def load(workdir: Workdir) -> ml_collections.ConfigDict:
    """Return the config of a run. Where it is taken from a checkpoint, say so on standard error.

    Raises:
      ConfigError: where the workdir holds no run, or ``config.json`` and the checkpoints are of different runs.
    """
    run = find(workdir)
    if run is None:
        raise ConfigError(f"{workdir / NAME}: not found; expected the workdir of a run, with its {NAME}")
    if run.problem:
        json_files.warn_once(f"{run.problem}; using the config that {run.origin.parent.parent} holds")
    return run.config


def find(workdir: Workdir) -> RunConfig | None:
    """Return the config of a run; None where the workdir holds neither ``config.json`` nor a checkpoint with one.

    Raises:
      ConfigError: where ``config.json`` is damaged and no checkpoint holds the config, where the two are of different
        runs, or where the learner lies in the workdir.
    """
    run = _find(workdir)
    if run is not None:
        check_learner_outside(run.config, workdir)
    return run


def _find(workdir: Workdir) -> RunConfig | None:
    path, saved = workdir / NAME, _newest_saved(workdir)
    try:
        config = config_lib.from_dict(json_files.read_object(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return saved and saved._replace(problem=f"{path}: not found")
    except ConfigError as error:  # damaged, or written by another version or another program
        if saved is None:
            raise
        return saved._replace(problem=str(error))
    if saved is not None and _has_hash(path) and (differing := forbidden_changes(saved.config, config)):
        checkpoint = saved.origin.parent.parent
        raise ConfigError(
            f"{path}: is not the config of the checkpoint {checkpoint} "
            f"({describe_changes(differing, checkpoint.name, NAME)}); bring back the run's own {NAME}, or delete "
            "the file to use the checkpoint's copy"
        )
    return RunConfig(config, path)


def check_learner_outside(config: ml_collections.ConfigDict, workdir: Workdir) -> None:
    """Raise :class:`ConfigError` where a function of the user's own, such as a learner, lies in the workdir.

    A run is data, which may come from a stranger, and nothing in it is ever executed.
    """
    if is_local(workdir):
        for key, name in config_lib.own_functions(config).items():
            import_path.check_outside(name, key, str(workdir))


def forbidden_changes(saved: ml_collections.ConfigDict, given: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ and may not change within a run, with their saved and their given values."""
    different = config_lib.differing_keys(saved.to_dict(), given.to_dict())
    return {key: values for key, values in different.items() if not config_lib.may_change(key)}


def describe_changes(differing: dict[str, tuple[Any, Any]], there: str = "there", here: str = "here") -> str:
    """Return a text with the keys that differ and both of their values."""
    return ", ".join(f"{key} {left!r} {there}, {right!r} {here}" for key, (left, right) in differing.items())


def saved_steps(workdir: Workdir) -> list[int]:
    """Return the steps of all checkpoint folders, complete or not, the newest first."""
    folder = workdir / "checkpoints"
    with explained(folder):
        if not folder.is_dir():
            return []
        return sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)


def _has_hash(path: Workdir) -> bool:
    with explained(path):
        return json_files.HASH in json.loads(path.read_bytes())


def _newest_saved(workdir: Workdir) -> RunConfig | None:
    """Return the config in the newest checkpoint whose copy can be read; None where there is none."""
    for step in saved_steps(workdir):
        folder = workdir / "checkpoints" / str(step)
        path = folder / "meta" / "metadata"
        try:
            with explained(path):
                damage = checksums.first_difference(folder, names=["meta/metadata"])
            if damage is None:
                content = json_files.read_object(path)["config"]
                return RunConfig(config_lib.from_dict(content, path), path)
        except (OSError, KeyError, ConfigError):
            continue  # damaged, half written, or of a version that did not keep the config
    return None


LEARNER = "model.ttt.learner"


# ---- Whether a run may continue


def check_run(config: ml_collections.ConfigDict, workdir: Workdir, accept_changed_learner: bool) -> None:
    """Check on all processes that the workdir holds no other run, and record a changed learner that is accepted.

    Raises:
      ConfigError: as :func:`check_same_run`.
    """
    import jax

    from ttt_jax.distributed import agreement

    if agreement.on_all(lambda: check_same_run(config, workdir, accept_changed_learner)):
        learner, source = config.model.ttt.learner, config.model.ttt.learner_source
        agreement.print_once(f"model.ttt.learner={learner!r}: has changed since the run began; accepted")
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
        run = find(workdir)
    except DamagedFile as error:
        if saved_steps(workdir):
            raise
        json_files.warn_once(f"{error}; no checkpoint has been saved, so the run begins anew")
        return False
    if run is None:
        return False
    if differing := forbidden_changes(run.config, config):
        origin = f"; {run.problem}, so this is from {run.origin}" if run.problem else ""
        raise ConfigError(
            f"--workdir {workdir}: holds a run of another config ({describe_changes(differing)}); expected "
            f"a new workdir, or the values that are there{origin}"
        )
    if run.problem:
        json_files.warn_once(f"{run.problem}; {run.origin.parent.parent} holds the same config; continuing")
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
    from ttt_jax.distributed import agreement

    def hash_source() -> ml_collections.ConfigDict:
        check_learner_outside(config, workdir)
        hashed = with_learner_source(config)
        try:
            run = find(workdir)
        except DamagedFile:  # check_same_run decides whether the run may continue
            return hashed
        if run is not None:
            learner_has_changed(run.config, accept_changed)
        return hashed

    hashed = agreement.on_all(hash_source)
    agreement.check_same({"model.ttt.learner_source": hashed.model.ttt.learner_source})
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
    run = find(workdir)
    assert run is not None
    write(workdir, _replace_source(run.config, source))


def _replace_source(config: ml_collections.ConfigDict, source: str) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(config).lock()
    config.model.ttt.learner_source = source
    return config

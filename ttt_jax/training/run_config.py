"""Read and write the config of a run: ``config.json``, checked against the copy in the newest checkpoint.

The copy in a checkpoint says what its numbers were computed with. Where ``config.json`` is gone or damaged, the copy is
used. A ``config.json`` with other settings is refused, unless it was edited on purpose: then it has no hash.
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

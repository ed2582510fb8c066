"""The config of a run: ``config.json``, checked against the copy in the newest checkpoint.

The checkpoint's own copy says what its numbers were computed with. Where ``config.json`` is gone or damaged, that copy
is used; where ``config.json`` holds other settings, it is refused, unless it was edited on purpose (it has no hash).
"""

import json
import zlib
from typing import Any, NamedTuple

import ml_collections

from ttt_jax import config as config_lib
from ttt_jax import import_path
from ttt_jax.errors import ConfigError
from ttt_jax.storage import json_files, writing
from ttt_jax.storage.json_files import DamagedFile
from ttt_jax.storage.workdir import Workdir, explained, is_local

NAME = "config.json"


class Found(NamedTuple):
    """The config of a run.

    Attributes:
      config: of the run.
      origin: the file that it is from.
      problem: what is wrong with ``config.json``, in one line; empty where nothing is.
    """

    config: ml_collections.ConfigDict
    origin: Workdir
    problem: str = ""


def write(workdir: Workdir, config: ml_collections.ConfigDict) -> None:
    """Write ``config.json``: the keys of the config, and the hash of the content. A damaged one is kept aside."""
    try:
        json_files.read_object(workdir / NAME)
    except DamagedFile:
        json_files.warn_once(f"{workdir / NAME}: kept as it was under the name {writing.set_aside(workdir / NAME)}")
    except (FileNotFoundError, NotADirectoryError):
        pass
    json_files.write_object(workdir / NAME, config.to_dict())


def check_learner_outside(config: ml_collections.ConfigDict, workdir: Workdir) -> None:
    """Raise :class:`ConfigError` where a learner of the user's own lies in the workdir: a run is data, also that of a
    stranger, and nothing in it is ever run."""
    for key, named in config_lib.own_functions(config).items():
        if is_local(workdir):
            import_path.check_outside(named, key, str(workdir))


def load(workdir: Workdir) -> ml_collections.ConfigDict:
    """Return the config of a run. Where it is taken from a checkpoint, say so on standard error.

    Raises:
      ConfigError: where the workdir holds no run, or ``config.json`` and the checkpoints are of different runs.
    """
    found = find(workdir)
    if found is None:
        raise ConfigError(f"{workdir / NAME}: not found; expected the workdir of a run, with its {NAME}")
    if found.problem:
        json_files.warn_once(f"{found.problem}; using the config that {found.origin.parent.parent} holds")
    return found.config


def find(workdir: Workdir) -> Found | None:
    """Return the config of a run; None where the workdir holds neither ``config.json`` nor a checkpoint with one.

    Raises:
      ConfigError: where ``config.json`` is damaged and no checkpoint holds the config, or the two are of different
        runs; where the learner lies in the workdir.
    """
    found = _find(workdir)
    if found is not None:
        check_learner_outside(found.config, workdir)
    return found


def _find(workdir: Workdir) -> Found | None:
    path, saved = workdir / NAME, _newest_saved(workdir)
    problem: ConfigError | None = None
    try:
        content = json_files.read_object(path)
        there = config_lib.from_dict(content, path)
    except (FileNotFoundError, NotADirectoryError):
        if saved is None:
            return None
        return Found(saved.config, saved.origin, f"{path}: not found")
    except DamagedFile as error:
        problem = error
    except ConfigError as error:  # whole, and of another version or another program
        problem = error
    if problem is not None:
        if saved is None:
            raise problem
        return Found(saved.config, saved.origin, str(problem))
    if saved is not None and _is_sealed(path) and (differing := refused(saved.config, there)):
        raise ConfigError(
            f"{path}: is not the config of the checkpoint {saved.origin.parent.parent} "
            f"({listed(differing, saved.origin.parent.parent.name, NAME)}); bring back the run's own {NAME}, or delete "
            "the file to use the checkpoint's copy"
        )
    return Found(there, path)


def refused(there: ml_collections.ConfigDict, here: ml_collections.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ and may not change between the parts of a run, with both values."""
    different = config_lib.differing_keys(there.to_dict(), here.to_dict())
    return {key: values for key, values in different.items() if not config_lib.may_change(key)}


def listed(differing: dict[str, tuple[Any, Any]], there: str = "there", here: str = "here") -> str:
    """Return keys and both of their values as text."""
    return ", ".join(f"{key} {left!r} {there}, {right!r} {here}" for key, (left, right) in differing.items())


def _is_sealed(path: Workdir) -> bool:
    with explained(path):
        return json_files.HASH in json.loads(path.read_bytes())


def _newest_saved(workdir: Workdir) -> Found | None:
    """Return the config in the newest checkpoint whose copy can be read; None where there is none."""
    folder = workdir / "checkpoints"
    for step in saved_steps(workdir):
        path = folder / str(step) / "meta" / "metadata"
        try:
            _check(folder / str(step), path)
            content = json_files.read_object(path)["config"]
            return Found(config_lib.from_dict(content, path), path)
        except (OSError, KeyError, ConfigError):
            continue  # damaged, half written, or of a version that did not keep it
    return None


def saved_steps(workdir: Workdir) -> list[int]:
    """Return the steps of all folders of checkpoints, complete or not, the newest first."""
    folder = workdir / "checkpoints"
    with explained(folder):
        if not folder.is_dir():
            return []
        return sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)


def _check(folder: Workdir, path: Workdir) -> None:
    """Raise :class:`DamagedFile` where a checkpoint's ``meta`` is not what its checksums say."""
    try:
        size, expected = json_files.read_object(folder / "checksums.json")["files"]["meta/metadata"]
    except (FileNotFoundError, NotADirectoryError):
        return  # written before there were checksums
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedFile(f"{folder / 'checksums.json'}: damaged") from error
    with explained(path):
        content = path.read_bytes()
    if (len(content), zlib.crc32(content)) != (size, expected):
        raise DamagedFile(f"{path}: damaged")

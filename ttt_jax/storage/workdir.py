"""Find folders: the workdir of a run, on this machine or in a bucket (``gs://``), and the user's cache folder."""

import importlib.util
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, Union

from ttt_jax import extras
from ttt_jax.errors import ConfigError

if TYPE_CHECKING:
    from etils import epath

Workdir: TypeAlias = Union[Path, "epath.Path"]  # the folder of a run, or a file in it


def at(location: str | os.PathLike) -> Workdir:
    """Return a location as a path: a :class:`pathlib.Path` for a local folder, an :class:`etils.epath.Path` for gs://.

    Raises:
      ConfigError: for a name that is empty or not text, for another kind of URL, and where gcsfs is not installed.
    """
    text = os.fspath(location)
    if not text.strip():
        raise ConfigError(f"--workdir {text!r}: is empty; expected a folder (. is this one), or gs://bucket/name")
    if text != text.encode(errors="replace").decode():  # Orbax opens no such files
        raise ConfigError(f"--workdir {text!r}: is not text in UTF-8; expected another name, or LC_ALL=C.UTF-8")
    if "://" not in text:
        return Path(text)
    if not text.removeprefix("gs://").strip("/") or not text.startswith("gs://"):
        raise ConfigError(f"--workdir {text}: expected a folder, or gs://bucket/name")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"--workdir {text}: needs gcsfs; {extras.install_command('gcs')}")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # failures are reported here, once
    os.environ.setdefault("EPATH_USE_TF", "false")  # even where TensorFlow is installed
    from etils import epath

    return epath.Path(text)


def is_local(path: Workdir) -> TypeGuard[Path]:
    """Return whether a path is in this machine's file system, where files can be appended to."""
    return isinstance(path, Path)


def make(workdir: Workdir) -> None:
    """Create a workdir where there is none. In a bucket, check that files can be written and deleted.

    Raises:
      ConfigError: where a file is in its place, or the bucket does not exist or may not be written to.
      OSError: where a local folder cannot be created.
    """
    if is_local(workdir):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"--workdir {workdir}: {error.filename} is not a folder; expected one") from error
        return
    trial = workdir / f".trial-{uuid.uuid4().hex}"
    try:
        with explained(trial):
            trial.write_text("may this be written?")
            trial.unlink()
    except FileNotFoundError as error:
        raise ConfigError(f"--workdir {workdir}: no such bucket") from error
    except OSError as error:
        raise ConfigError(
            f"--workdir {workdir}: cannot be written: {error}; expected credentials that may create and delete objects "
            "there (of this machine, or by: gcloud auth application-default login)"
        ) from error


def names(workdirs: Sequence[Workdir]) -> list[str]:
    """Return the shortest ends of the paths that differ from each other, such as ``run`` or ``a/run`` and ``b/run``."""
    parts = [path.resolve().parts for path in workdirs]
    shortest = []
    for own in parts:
        others = {other for other in parts if other != own}
        length = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        shortest.append(os.path.join(*own[-length:]))
    return shortest


def check_exists(workdir: Workdir) -> None:
    """Raise :class:`ConfigError` where there is no such folder."""
    with explained(workdir):
        if not workdir.is_dir():
            raise ConfigError(f"{workdir}: no such folder; expected the workdir of a run")


@contextmanager
def explained(path: Workdir) -> Iterator[None]:
    """Turn failures with a file into an OSError of one line that names the file.

    In a bucket, these are errors of any library on the way there; on this machine, errors of the system that do not
    name the file, such as that of a full disk while writing.
    """
    try:
        yield
    except Exception as error:
        if is_local(path) and isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        if is_local(path) or isinstance(error, FileNotFoundError):
            raise
        raise OSError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def cache_folder() -> Path:
    """Return the folder ``ttt_jax`` in the user's cache folder; it may not exist yet.

    It holds compiled programs, packed source trees and logs of sweeps.

    Raises:
      ConfigError: where the user has no home folder, as in some containers, and XDG_CACHE_HOME is not set.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_jax"
    except RuntimeError as error:  # from Path.home
        raise ConfigError("no home folder to keep files in; expected XDG_CACHE_HOME to be set to a folder") from error

"""Read and write files of a dataset, in a local folder or at a URL of TensorStore (``gs://``, ``s3://``, ``http://``).

Writes are atomic: a reader, or a restart after a kill, finds the old content or the new.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorstore as ts

from ttt_jax.errors import ConfigError, DataError
from ttt_jax.storage import json_files


class Store:
    """The files of a folder, which is a path or a URL.

    Every method raises a DataError where the folder cannot be read or written.

    Raises:
      ConfigError: for a URL that TensorStore does not know.
    """

    def __init__(self, location: str | os.PathLike):
        if not os.fspath(location):
            raise ConfigError("an empty name of a folder; expected a path or a URL")
        self.location = os.fspath(location).rstrip("/") or "/"
        try:
            if is_url(os.fspath(location)) and not is_url(self.location):
                raise DataError(f"{location}: expected a bucket behind ://")
            with self._explained("open"):
                self._kv = ts.KvStore.open(self.spec()).result()
        except DataError as error:
            raise ConfigError(str(error)) from error

    def __reduce__(self):
        return Store, (self.location,)

    def spec(self, name: str = "") -> Any:
        """Return TensorStore's specification of this folder, or of a folder inside it, as a key-value store."""
        place = f"{self.location}/{name}/" if name else f"{self.location}/"
        if is_url(self.location):
            return place
        return {"driver": "file", "path": f"{os.path.abspath(place)}/"}

    def path(self, name: str) -> str:
        """Return the path or URL of a file, for messages."""
        return f"{self.location}/{name}"

    def exists(self, name: str) -> bool:
        """Return whether a file exists."""
        if not is_url(self.location):
            return os.path.isfile(os.path.join(self.location, name))
        try:
            return self.read(name, 0, 1) is not None
        except DataError as error:
            if "OUT_OF_RANGE" in str(error):  # an empty file
                return True
            raise

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """Return the bytes ``[start, stop)`` of a file; None where there is no such file."""
        with self._explained("read", name):
            answer = self._kv.read(name, byte_range=slice(start, stop)).result()
        return None if answer.state == "missing" else bytes(answer.value)

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file, without its hash; None where there is no such file."""
        content = self.read(name)
        try:
            return None if content is None else json_files.parse(content, self.path(name))
        except json_files.DamagedFile as error:
            raise DataError(str(error)) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file, and return when it would outlive a crash."""
        with self._explained("write", name):
            self._kv.write(name, content).result()

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of files, with their folders, that begin with ``prefix``, in no order."""
        if is_url(self.location):
            with self._explained("list"):
                keys = self._kv.list(ts.KvStore.KeyRange(prefix, _after(prefix))).result()
            yield from (key.decode() for key in keys)
            return
        for place, folders, files in os.walk(self.location):
            inside = "" if place == self.location else f"{os.path.relpath(place, self.location)}/"
            below = {folder: f"{inside}{folder}/" for folder in folders}
            folders[:] = [f for f, name in below.items() if name.startswith(prefix) or prefix.startswith(name)]
            yield from (inside + file for file in files if (inside + file).startswith(prefix))

    def delete_file(self, name: str) -> None:
        """Delete a file, if it exists."""
        with self._explained("delete", name):
            self._kv.write(name, None).result()

    def delete(self, folder: str) -> None:
        """Delete all files in a folder of the store."""
        with self._explained("delete", folder):
            if is_url(self.location):
                self._kv.delete_range(ts.KvStore.KeyRange(f"{folder}/", _after(f"{folder}/"))).result()
            elif os.path.isdir(os.path.join(self.location, folder)):
                shutil.rmtree(os.path.join(self.location, folder))

    @contextmanager
    def _explained(self, verb: str, name: str = "") -> Iterator[None]:
        with explained(f"cannot {verb} {self.path(name) if name else self.location}"):
            yield


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors of TensorStore into a :class:`DataError` of one line.

    Args:
      what: what cannot be done, such as ``cannot read gs://bucket/file``.
    """
    try:
        yield
    except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
        reason = re.split(r" \[(?:tensorstore_spec|source locations|http_response)", str(error))[0]
        advice = "; free some space and run the same command again" if "No space left" in reason else ""
        raise DataError(f"{what}: {' '.join(reason.split())}{advice}") from error


def is_url(location: str) -> bool:
    """Return whether a location is a URL rather than a local path."""
    return "://" in location


def _after(prefix: str) -> str:
    """Return the first key after those that begin with ``prefix``; empty, which is no bound, for no prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""

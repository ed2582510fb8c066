"""Find the files and folders that a command names, and refuse those that another machine would not have.

The kind of an option is declared where the option is: its metavar is ``DIR``, ``FILE`` or ``FILES``. Nothing is guessed
from values.
"""

import argparse
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections

from ttt_jax.config import GENERATED, value_of
from ttt_jax.errors import ConfigError

_KINDS = {"DIR": "folder", "FILE": "file", "FILES": "file"}  # by metavar
_WRITTEN = {("train", "workdir"), ("tokenize", "output")}  # by verb and option
_WRITTEN_HERE = {  # on the disk of whatever machine runs the verb
    ("eval", "csv"),
    ("harness", "output"),
    ("probe needle", "plot"),
    ("probe task", "plot"),
    ("bench tpu-schedule", "keep"),
}
_CONFIG_KINDS = {"data.source": "folder", "data.tokenizer": "file", "training.start_from": "folder"}
_NO_FILES = {"tokenizer": ("byte",), "source": GENERATED, "data.tokenizer": ("byte",), "data.source": GENERATED}
_FILE_VARIABLES = {  # environment variables whose values are paths of files that must be there
    *("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG", "BOTO_CONFIG", "AWS_SHARED_CREDENTIALS_FILE"),
    *("AWS_CONFIG_FILE", "KUBECONFIG", "NETRC", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("CURL_CA_BUNDLE", "HF_TOKEN_PATH", "PYTHONPATH"),
}
_LOCAL_URL = re.compile(
    r"(file|local|memory)://|[a-z0-9+.-]+://([^/@]*@)?(localhost|127\.[\d.]+|0\.0\.0\.0|\[::1\])([:/]|$)", re.IGNORECASE
)


class Place(NamedTuple):
    """A file or folder that a command names.

    Attributes:
      shown: the option or key with its value, for messages.
      value: the path, glob or URL.
      kind: ``file`` or ``folder``.
      use: ``read``; ``written``; or ``written here``, on the disk of the machine that runs the command.
      name: of the option, without hyphens, or the key of the config.
    """

    shown: str
    value: str
    kind: str
    use: str
    name: str


def of_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Place]:
    """Return the places that the options of a verb name, from what its parser declares."""
    found = []
    for action in parser._actions:
        values = getattr(options, action.dest, None)
        shown = action.option_strings[-1] if action.option_strings else str(action.metavar)
        for value in values if isinstance(values, list) else [values]:
            text = "" if value is None else str(value)
            kind = _KINDS.get(str(action.metavar))
            if (options.verb, action.dest) == ("bench tpu-schedule", "function") and ".py:" in text:
                text, kind = text.rpartition(":")[0], "file"
            if kind and text and text.partition(":")[0] not in _NO_FILES.get(action.dest, ()):
                written = "written" if (options.verb, action.dest) in _WRITTEN else "read"
                use = "written here" if (options.verb, action.dest) in _WRITTEN_HERE else written
                found.append(Place(f"{shown} {text}", text, kind, use, action.dest))
    return found


def of_config(config: ml_collections.ConfigDict) -> list[Place]:
    """Return the places that a config names."""
    found = []
    for key, kind in _CONFIG_KINDS.items():
        value = value_of(config, key)
        if not value or value.partition(":")[0] in _NO_FILES.get(key, ()):
            continue
        if key == "data.tokenizer" and "/" not in value and not Path(value).exists() and not value.startswith("~"):
            continue  # a name or a hash
        found.append(Place(f"{key}={value!r}", value, kind, "read", key))
    return found


def is_local(location: str) -> bool:
    """Return whether a path or URL, such as fsspec takes them, leads to the machine that reads it."""
    parts = [part.strip() for part in location.split("::")]  # zip://a.txt::file:///b.zip
    return any(_LOCAL_URL.match(part) for part in parts) or "://" not in parts[-1]


def check_readable(places: Sequence[Place], checkout: Path, sent: Sequence[Path]) -> None:
    """Check that what a command reads is there on a machine that gets the files ``sent`` of ``checkout`` and no others.

    Raises:
      ConfigError: for the first place that is not, naming its option or key.
    """
    for place in places:
        if place.use != "read":
            continue
        if place.name == "workdir" and not place.value.startswith("gs://"):
            raise ConfigError(f"{place.shown}: a folder of this machine, not there; expected gs://bucket/name")
        if not is_local(place.value):
            continue
        inside = _inside(place.value, checkout, sent)
        if inside is not None and Path(os.path.normpath(place.value)) == inside:
            continue
        if inside is not None:
            raise ConfigError(
                f"{place.shown}: a local path; expected {inside}, which it is called in the source tree that is sent "
                f"(run this in {checkout})"
            )
        path = re.sub("(?i)^file://", "", place.value)
        raise ConfigError(
            f"{place.shown}: a {place.kind} of this machine, not there; expected "
            + ("its hash or name, " if place.name == "data.tokenizer" else "")
            + f"gs://bucket/name (copy it: gcloud storage cp -r {shlex.quote(path)} gs://bucket/), another URL, or a "
            f"path in the source tree {checkout}, which is sent"
        )


def check_written(places: Sequence[Place], why: str) -> None:
    """Check that nothing is written to the disks of the machines; ``why`` says what is wrong with that.

    Raises:
      ConfigError: for the first place that is, naming its option.
    """
    for place in places:
        if place.use == "written here":
            raise ConfigError(f"{place.shown}: is on a local disk, and {why}; expected a command without it")
        if place.use == "written" and not place.value.startswith("gs://"):
            raise ConfigError(f"{place.shown}: {why}; expected gs://bucket/name")


def check_variables(copied: Sequence[str], variables: Mapping[str, str]) -> None:
    """Check that the values of ``--env`` name no files of this machine. Values may be secrets: none is shown.

    Raises:
      ConfigError: for the first variable that does.
    """
    for key, value in variables.items():
        if value and (_names_a_file(value) or (key in _FILE_VARIABLES and (key in copied or _exists(value)))):
            raise ConfigError(
                f"--env {key}: names a file of this machine, which is not sent; expected a value that means the same "
                "there (on Google Cloud, machines have the credentials of their service account)"
            )


def _inside(value: str, checkout: Path, sent: Sequence[Path]) -> Path | None:
    """Return the path of ``value`` in the source tree if it is sent: a file, a folder, or a glob that matches files."""
    if "://" in value or "::" in value:
        return None
    try:
        path = Path(os.path.abspath(value)).relative_to(checkout)
    except ValueError:
        return None
    if path in sent or any(file.is_relative_to(path) for file in sent):
        return path
    return path if any(file.match(str(path)) for file in sent) else None


def _names_a_file(value: str) -> bool:
    """Return whether a value is the URL of a local file, or the path of one in a folder that no two machines share."""
    if re.match(r"(?i)(file|local)://", value):
        return True
    path = os.path.abspath(os.path.expanduser(value))
    own = (os.path.expanduser("~"), tempfile.gettempdir())
    absolute = value.startswith(("/", "~"))
    return absolute and os.path.isfile(path) and any(path.startswith(f"{place.rstrip('/')}/") for place in own)


def _exists(value: str) -> bool:
    return any(os.path.exists(os.path.expanduser(part)) for part in value.split(os.pathsep))

"""Find the files and folders that a command names, and refuse those that another machine would not have.

An option names files where its metavar is one of ``METAVARS``. Nothing is guessed from values.
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

METAVARS = ("DIR", "FILE", "FILES")
CONFIG_KEYS = ("data.source", "data.tokenizer", "training.start_from")
WRITTEN = ("output", "csv", "plot", "keep")  # options; those of type Path only take files on a local disk
_NO_FILES = {"tokenizer": ("byte",), "source": GENERATED}  # values of options and keys
_FILE_VARIABLES = """GOOGLE_APPLICATION_CREDENTIALS CLOUDSDK_CONFIG BOTO_CONFIG AWS_SHARED_CREDENTIALS_FILE
    AWS_CONFIG_FILE KUBECONFIG NETRC SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE HF_TOKEN_PATH
    PYTHONPATH""".split()  # their values are paths
_LOCAL_URL = re.compile(
    r"(file|local|memory)://|[a-z0-9+.-]+://([^/@]*@)?(localhost|127\.[\d.]+|0\.0\.0\.0|\[::1\])([:/]|$)", re.IGNORECASE
)


class Place(NamedTuple):
    """A file or folder that a command names."""

    name: str  # the option without hyphens, or the key of the config
    shown: str  # the option or key with its value, for messages
    value: str  # a path, glob or URL
    use: str = "read"  # or "written", or "written here": on the disk of the machine that runs the command


def find(options: argparse.Namespace, config: ml_collections.ConfigDict | None) -> tuple[Place, ...]:
    """Return the places that the options of a verb and its config name."""
    places = []
    for action in options.parser._actions:
        option = action.option_strings[-1] if action.option_strings else action.metavar
        written = action.dest in WRITTEN or (options.verb, action.dest) == ("train", "workdir")
        use = ("written here" if action.type is Path else "written") if written else "read"
        values = getattr(options, action.dest, None)
        for value in values if isinstance(values, list) else [values]:
            text = "" if value is None else str(value)
            if action.dest == "function" and ".py:" in text:  # FILE.py:NAME
                text = text.rpartition(":")[0]
            elif action.metavar not in METAVARS:
                continue
            places.append(Place(action.dest, f"{option} {text}", text, use))
    for key in CONFIG_KEYS if config is not None else ():
        value = value_of(config, key) or ""
        if key != "data.tokenizer" or "/" in value or Path(value).exists():  # else it is a name or a hash
            places.append(Place(key, f"{key}={value!r}", value))

    def is_file(place: Place) -> bool:
        return place.value.partition(":")[0] not in ("", *_NO_FILES.get(place.name.rpartition(".")[2], ()))

    return tuple(filter(is_file, places))


def is_local(location: str) -> bool:
    """Return whether a path or URL, as fsspec takes them, leads to the machine that reads it."""
    parts = [part.strip() for part in location.split("::")]  # zip://a.txt::file:///b.zip
    return any(_LOCAL_URL.match(part) for part in parts) or "://" not in parts[-1]


def check(places: Sequence[Place], checkout: Path, sent: Sequence[Path], why_not_written: str | None) -> None:
    """Raise ConfigError for a place that a machine that gets the files ``sent`` cannot read, or loses after writing it.

    ``why_not_written`` says why its disk may not be written to; None where it may.
    """
    for place in places:
        problem, in_bucket = "", place.value.startswith("gs://")
        path = Path(os.path.relpath(place.value, checkout))
        is_sent = not re.search("://|::", place.value) and any(
            f.is_relative_to(path) or f.match(str(path)) for f in sent
        )
        if place.use != "read":
            if why_not_written and (place.use == "written here" or not in_bucket):
                expected = "gs://bucket/name" if place.use == "written" else "a command without it"
                problem = f"{why_not_written}; expected {expected}"
        elif place.name == "workdir":
            problem = "" if in_bucket else "a folder that other machines do not have; expected gs://bucket/name"
        elif is_sent and path != Path(os.path.normpath(place.value)):
            problem = f"a local path; expected {path}, as in the source tree that is sent (run this in {checkout})"
        elif not is_sent and is_local(place.value):
            alternative = "its hash or name, " if place.name == "data.tokenizer" else ""
            source = shlex.quote(re.sub("(?i)^file://", "", place.value))
            problem = (
                f"is on this machine only; expected {alternative}gs://bucket/name (copy it: gcloud storage cp -r "
                f"{source} gs://bucket/), another URL, or a path in the source tree {checkout}, which is sent"
            )
        if problem:
            raise ConfigError(f"{place.shown}: {problem}")


def check_variables(copied: Sequence[str], variables: Mapping[str, str]) -> None:
    """Raise ConfigError where variables, of which some are copied from here, name local files; show no values."""
    not_shared = tuple(f"{folder.rstrip('/')}/" for folder in (os.path.expanduser("~"), tempfile.gettempdir()))
    for key, value in variables.items():
        path = os.path.abspath(os.path.expanduser(value))
        is_own = value.startswith(("/", "~")) and os.path.isfile(path) and path.startswith(not_shared)
        exists = any(os.path.exists(os.path.expanduser(part)) for part in value.split(os.pathsep))
        is_known = key in _FILE_VARIABLES and (key in copied or exists)
        if value and (is_own or is_known or re.match("(?i)(file|local)://", value)):
            raise ConfigError(
                f"--env {key}: names a file of this machine, which is not sent; expected a value that means the same "
                "there (on Google Cloud, machines have the credentials of their service account)"
            )

"""Say what goes along with a job: the source tree, the versions of the packages, and none of the files of this machine.

An option names files where its metavar is one of ``METAVARS``. Nothing is guessed from values.
"""

import argparse
import gzip
import hashlib
import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import ml_collections
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ttt_jax.config import GENERATED, value_of
from ttt_jax.errors import ConfigError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"  # the version for the other machine, too
_OTHER_MACHINE = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
_WITHOUT_GIT = "setup.py README.md pyproject.toml ttt_jax/**/* configs/**/* launch/**/* scripts/**/*".split()
_NOT_SENT = re.compile(r"tests/|(.*/)?__pycache__/")  # tests are tens of megabytes that no run needs
_MOST_BYTES = 200 * 2**20
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


def constraints(extras: Sequence[str] = ()) -> str:
    """Return a constraints file for pip or uv: the installed versions of all packages that ttt_jax requires.

    Packages that are not installed here, such as those of another platform, are left out, and so are packages in a
    version that another one does not allow (libtpu beside another jax): the other machine chooses their versions.

    Raises:
      ConfigError: where ttt_jax itself was not installed.
    """
    versions: dict[str, str] = {}
    refused, seen = {"ttt-jax"}, set()
    requirements = [Requirement(f"ttt-jax[{','.join(extras)}]")]
    for requirement in requirements:  # the list grows in the loop
        name = canonicalize_name(requirement.name)
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(versions[name], prereleases=True):
            refused.add(name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                further = map(Requirement, importlib.metadata.requires(name) or ())
                environment = {**_OTHER_MACHINE, "extra": extra}
                requirements += [each for each in further if not each.marker or each.marker.evaluate(environment)]
    if "ttt-jax" not in versions:
        raise ConfigError("ttt_jax: is not installed here; expected pip install -e of the source tree")
    # The part after + names local builds, such as +cuda.
    return "".join(f"{name}=={versions[name].partition('+')[0]}\n" for name in sorted(versions.keys() - refused))


@lru_cache
def files(checkout: Path) -> tuple[Path, ...]:
    """Return the paths, in a source tree, of the files to send.

    In a git clone these are the files that git tracks or would add, with their changes; else those of the package.
    """
    command = ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [str(path.relative_to(checkout)) for pattern in _WITHOUT_GIT for path in checkout.glob(pattern)]
    return tuple(sorted({Path(name) for name in names if not _NOT_SENT.match(name) and (checkout / name).is_file()}))


def archive(checkout: Path, extra: dict[str, str], path: Path) -> str:
    """Write a .tar.gz of a source tree and further texts by file name; return a hash of its contents.

    The same files make the same bytes. The folder of ``path`` is created.

    Raises:
      ConfigError: for a tree of more than 200 MB, naming its largest files.
    """
    stats = {name: (checkout / name).stat() for name in files(checkout)}
    if (size := sum(stat.st_size for stat in stats.values())) > _MOST_BYTES:
        largest = sorted(stats, key=lambda name: -stats[name].st_size)[:3]
        raise ConfigError(
            f"{checkout}: {size >> 20} MB to send; expected less than {_MOST_BYTES >> 20} MB. Name what does not "
            f"belong to it in .gitignore: {', '.join(f'{name} ({stats[name].st_size >> 20} MB)' for name in largest)}"
        )
    members = [(str(name), (checkout / name).read_bytes(), stat.st_mode & 0o755) for name, stat in stats.items()]
    members += [(name, text.encode(), 0o644) for name, text in sorted(extra.items())]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, mode in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(packed.getvalue(), mtime=0))
    return hashlib.sha256(packed.getvalue()).hexdigest()[:12]


def unpack(archived: Path, folder: Path) -> None:
    """Unpack an archive that :func:`archive` has written."""
    with tarfile.open(archived) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python has from 3.11.4 on
        tar.extractall(folder)


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
        is_url = re.search("://|::", place.value)
        is_sent = not is_url and any(file.is_relative_to(path) or file.match(str(path)) for file in sent)
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


def check_variables(variables: Mapping[str, str]) -> None:
    """Raise ConfigError where variables name local files; show no values."""
    not_shared = tuple(f"{folder.rstrip('/')}/" for folder in (os.path.expanduser("~"), tempfile.gettempdir()))
    for key, value in variables.items():
        path = os.path.abspath(os.path.expanduser(value))
        is_own = value.startswith(("/", "~")) and os.path.isfile(path) and path.startswith(not_shared)
        exists = any(os.path.exists(os.path.expanduser(part)) for part in value.split(os.pathsep))
        is_known = key in _FILE_VARIABLES and exists
        if value and (is_own or is_known or re.match("(?i)(file|local)://", value)):
            raise ConfigError(
                f"--env {key}: names a file of this machine, which is not sent; expected a value that means the same "
                "there (on Google Cloud, machines have the credentials of their service account)"
            )

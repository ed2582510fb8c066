"""Pack what makes another machine equal to this one: the source tree, and the versions of the packages."""

import gzip
import hashlib
import importlib.metadata
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ttt_jax.errors import ConfigError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"  # the version for the other machine, too
_OTHER_MACHINE = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
_WITHOUT_GIT = "setup.py README.md pyproject.toml ttt_jax/**/* configs/**/* launch/**/* scripts/**/*".split()
_NOT_SENT = re.compile(r"tests/|(.*/)?__pycache__/")  # tests are tens of megabytes that no run needs
_MOST_BYTES = 200 * 2**20


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

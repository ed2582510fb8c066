"""Pack what makes another machine equal to this one: the source tree, and the versions of the packages."""

import gzip
import hashlib
import importlib.metadata
import io
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ttt_jax.errors import ConfigError

_NOT_SENT = ("tests",)  # tens of megabytes that no run needs
_MOST_BYTES = 200 * 2**20
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"  # of the other machine, too
# The other machine runs Linux, whatever this one does.
_THERE = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}


def installed(extras: Sequence[str] = ()) -> dict[str, str]:
    """Return the installed versions of all packages that ttt_jax requires, directly or through others.

    Packages that are not installed here, such as those of another platform, are left out, and so are packages in a
    version that another one does not allow (libtpu beside another jax): the other machine chooses their versions.

    Raises:
      ConfigError: where ttt_jax itself was not installed.
    """
    found: dict[str, str] = {}
    seen = set()
    refused = set()
    left = [("ttt-jax", extra) for extra in ("", *extras)]
    while left:
        package, extra = left.pop()
        if (package, extra) in seen:
            continue
        seen.add((package, extra))
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[package] = distribution.version.partition("+")[0]  # +cuda and its like are names of local builds
        for line in distribution.requires or ():
            requirement = Requirement(line)
            environment: dict[str, str] = {**default_environment(), **_THERE, "extra": extra}  # type: ignore[dict-item]
            if requirement.marker and not requirement.marker.evaluate(environment):
                continue
            name = canonicalize_name(requirement.name)
            left += [(name, wanted) for wanted in ("", *requirement.extras)]
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                refused.add(name)
    if found.pop("ttt-jax", None) is None:
        raise ConfigError("ttt_jax: is not installed here; expected pip install -e of the source tree")
    return {name: version for name, version in sorted(found.items()) if name not in refused}


def constraints(extras: Sequence[str] = ()) -> str:
    """Return a constraints file for pip or uv, with the versions of :func:`installed`."""
    return "".join(f"{name}=={version}\n" for name, version in installed(extras).items())


@lru_cache
def files(checkout: Path) -> tuple[Path, ...]:
    """Return the paths, in a source tree, of the files to send.

    In a git clone these are the files that git tracks or would add, with their changes; else those of the package.
    """
    command = ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
        names = [Path(name) for name in done.stdout.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = [checkout / "setup.py", checkout / "README.md", checkout / "pyproject.toml"]
        for room in ("ttt_jax", "configs", "launch", "scripts"):
            found += [path for path in (checkout / room).rglob("*") if "__pycache__" not in path.parts]
        names = [path.relative_to(checkout) for path in found]
    sent = [name for name in names if name.parts[0] not in _NOT_SENT and (checkout / name).is_file()]
    return tuple(sorted(set(sent)))


def archive(checkout: Path, extra: dict[str, str], path: Path) -> str:
    """Write a .tar.gz of the source tree; the same bytes for the same files.

    Args:
      checkout: the source tree.
      extra: texts to add by file name, such as the constraints.
      path: of the archive; its folder is created.

    Returns:
      Twelve letters and digits that differ between contents.

    Raises:
      ConfigError: for a tree of more than 200 MB, naming its largest files.
    """
    chosen = files(checkout)
    sizes = {name: (checkout / name).stat().st_size for name in chosen}
    if sum(sizes.values()) > _MOST_BYTES:
        largest = ", ".join(f"{n} ({sizes[n] >> 20} MB)" for n in sorted(sizes, key=sizes.__getitem__)[:-4:-1])
        raise ConfigError(
            f"{checkout}: {sum(sizes.values()) >> 20} MB to send; expected less than {_MOST_BYTES >> 20} MB. "
            f"Name what does not belong to it in .gitignore: {largest}"
        )
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in chosen:
            content = (checkout / name).read_bytes()
            _add(tar, str(name), content, (checkout / name).stat().st_mode & 0o755)
        for name_of_text, text in sorted(extra.items()):
            _add(tar, name_of_text, text.encode(), 0o644)
    content = gzip.compress(packed.getvalue(), mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.sha256(packed.getvalue()).hexdigest()[:12]


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    tar.addfile(info, io.BytesIO(content))


def unpack(archived: Path, folder: Path) -> None:
    """Unpack an archive that :func:`archive` has written."""
    # The first Python with filters is 3.11.4.
    safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archived) as tar:
        tar.extractall(folder, **safely)

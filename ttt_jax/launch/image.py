"""The container image of the source tree, with the versions of this machine: launch/Dockerfile."""

import re
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ttt_jax.errors import ConfigError
from ttt_jax.launch import checks, versions
from ttt_jax.launch.commands import Commands, Retry
from ttt_jax.launch.job import Job

_PASSES = Retry(
    on="i/o timeout|TLS handshake timeout|connection (refused|reset)|unexpected EOF|net/http: request canceled|"
    "503 Service Unavailable|500 Internal Server Error|502 Bad Gateway|429 Too Many Requests"
)


def checked(name: str, option: str) -> str:
    """The name of an image.

    Raises:
      ConfigError: for what is no name of an image.
    """
    if not re.fullmatch(r"[a-z0-9][A-Za-z0-9_.:/@-]*", name):
        raise ConfigError(f"{option} {name}: expected an image, such as us-docker.pkg.dev/PROJECT/REPOSITORY/ttt_jax")
    return name


def build(commands: Commands, job: Job, platform: str, repository: str) -> str:
    """Builds the image for ``platform``, tpu or cuda, and pushes it; returns its name, which has a tag that differs
    between contents."""
    if ":" in checked(repository, "--build").rpartition("/")[2]:
        raise ConfigError(f"--build {repository}: expected no tag; it is made of what is in the image")
    wanted = checks.extras(job, platform)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory(prefix="ttt-launch-") as folder:
        context = Path(folder) / "context"
        packed = Path(folder) / "source.tar.gz"
        content = versions.archive(job.checkout, {"constraints.txt": versions.constraints(wanted)}, packed)
        # The first Python with filters is 3.11.4; the archive is of this function's own making.
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(packed) as tar:
            tar.extractall(context, **safely)  # the constraints of this machine come last, and so are those
        image = f"{repository}:{platform}-{content}"
        commands.note(f"{image}: the source tree {job.checkout}, with the versions of this machine as constraints.txt")
        commands.run(
            [
                *("docker", "build", f"--file={context / 'launch' / 'Dockerfile'}", f"--target={platform}"),
                *("--platform=linux/amd64", f"--build-arg=PYTHON={python}"),
                *(f"--build-arg=EXTRAS={','.join(wanted[1:])}", f"--tag={image}", str(context)),
            ],
            retry=_PASSES,
        )
        commands.run(["docker", "push", image], retry=_PASSES)
    return image

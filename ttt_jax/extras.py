"""What to install for the parts of ttt_jax that need more packages: extras of setup.py."""

import importlib.metadata
import importlib.util
import shlex

from packaging.requirements import Requirement

from ttt_jax.errors import ConfigError


def install_command(extra: str) -> str:
    """Return the command that installs what an extra stands for, such as ``pip install 'wandb>=0.19'``.

    It names the packages rather than the extra, so that it works for a checkout, too.
    """
    try:
        lines = importlib.metadata.requires("ttt_jax") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return f"pip install -e '.[{extra}]' in the source tree of ttt_jax"
    found = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.append(str(requirement))
    return f"pip install {shlex.join(found)}"


def check(extra: str, module: str, what: str) -> None:
    """Check that the module of an extra is installed, without importing it.

    Raises:
      ConfigError: where it is not: ``what``, which needs it, and how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{what}: needs {module}; {install_command(extra)}")

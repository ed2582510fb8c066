"""Check and name the packages that optional parts of ttt_jax need: the extras of setup.py."""

import importlib.metadata
import importlib.util
import shlex

from packaging.requirements import Requirement

from ttt_jax.errors import ConfigError


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, such as ``pip install 'wandb>=0.19'``.

    It names the packages rather than the extra, so that it works for a checkout too.
    """
    try:
        lines = importlib.metadata.requires("ttt_jax") or []
    except importlib.metadata.PackageNotFoundError:  # the package runs from a source tree
        return f"pip install -e '.[{extra}]' in the source tree of ttt_jax"
    packages = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            requirement.marker = None
            packages.append(str(requirement))
    return f"pip install {shlex.join(packages)}"


def check(extra: str, module: str, what: str) -> None:
    """Check that a module is installed, without importing it.

    Args:
      extra: the extra that installs the module.
      what: the option or value that needs it, for the message.

    Raises:
      ConfigError: where it is not installed; the message says how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{what}: needs {module}; {install_command(extra)}")

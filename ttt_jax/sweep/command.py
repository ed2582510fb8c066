"""The command of a point."""

import shlex
import sys
from collections.abc import Mapping, Sequence

from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir import Workdir
from ttt_jax.sweep import names
from ttt_jax.sweep.names import Value
from ttt_jax.sweep.points import Point

_NOT_OF_SWEEPS = {  # options of ttt launch
    "--detach": "which follow their points",
    "--dry-run": "which have one themselves, before --",
    "--name": "whose points have names of their own",
    "--status": "which have ttt sweep status",
    "--stop": "which are stopped by Ctrl-C",
}
PROGRAM = (sys.executable, "-m", "ttt_jax")


def of(point: Point, base: Mapping[str, Value], workdir: Workdir, launcher: Sequence[str] = ()) -> list[str]:
    """The arguments of ``ttt`` that train a point.

    Args:
      base: the values of the keys that are set for all points.
      workdir: of the point.
      launcher: ``launch TARGET options``, to have it done elsewhere.
    """
    settings = [f"--config.{key}={names.text(value)}" for key, value in {**base, **point.values}.items()]
    train = ["train", "--config", point.recipe, *settings, "--workdir", str(workdir)]
    return [*launcher, "--", *train] if launcher else train


def check_launcher(launcher: Sequence[str]) -> None:
    """Raises :class:`ConfigError` where what follows ``--`` is no launcher that runs each point to its end."""
    if list(launcher[:1]) != ["launch"] or len(launcher) < 2 or "--" in launcher:
        raise ConfigError(f"-- {shlex.join(launcher)}: expected -- launch TARGET, and options of it")
    for option in launcher[2:]:
        why = _NOT_OF_SWEEPS.get(option.partition("=")[0])
        if why is not None:
            raise ConfigError(f"-- {shlex.join(launcher)}: {option} is not for sweeps, {why}")


def shown(arguments: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["ttt", *arguments])

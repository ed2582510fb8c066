"""Where ttt keeps files of its own, beside those of runs: compiled programs, packed source trees, logs of sweeps."""

import os
from pathlib import Path

from ttt_jax.errors import ConfigError


def cache_folder() -> Path:
    """Return ``ttt_jax`` in the user's cache folder, which need not exist.

    Raises:
      ConfigError: where the user has no home folder, as in some containers, and XDG_CACHE_HOME is not set.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_jax"
    except RuntimeError as error:  # of Path.home
        raise ConfigError("no home folder to keep files in; expected XDG_CACHE_HOME to be set to a folder") from error

"""Which share of a run's time went into steps that count, from its first start on, restarts and lost steps included."""

import math
import time

from ttt_jax.storage.json_files import DamagedFile, read_object, set_aside, tell, write_object
from ttt_jax.storage.workdir import Workdir

_NAME = "started.json"


class Goodput:
    """The clock of a run.

    Args:
      workdir: of the run; remembers when it was first started.
      useful: seconds of useful steps up to the checkpoint that the run goes on from; steps after it are done again, so
        their time was lost.
    """

    def __init__(self, workdir: Workdir, useful: float = 0.0):
        path = workdir / _NAME
        started = _read(path, useful)
        if not path.exists():
            write_object(path, {"unix_time": started})
        self._started = started
        self.useful = useful

    def add(self, seconds: float) -> None:
        """A step took so long, not counting what it waited for."""
        self.useful += seconds

    def share(self) -> float:
        """Useful seconds per second since the first start."""
        return self.useful / max(time.time() - self._started, self.useful, 1e-9)


def _read(path: Workdir, useful: float) -> float:
    """Return when the run was first started, as far as that is known. A damaged file is kept aside."""
    try:
        started = read_object(path).get("unix_time")
        if isinstance(started, int | float) and 0 < started < math.inf:
            return float(started)
        problem = f"{path}: damaged: it holds no unix_time"
    except (FileNotFoundError, NotADirectoryError):
        return time.time()
    except DamagedFile as error:
        problem = str(error)
    tell(f"{problem}; kept as {set_aside(path)}, goodput counts the useful time and from now on")
    return time.time() - useful

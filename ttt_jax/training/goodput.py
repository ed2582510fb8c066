"""Which share of a run's time went into steps that count, from its first start on, restarts and lost steps included."""

import json
import time

from ttt_jax.training.metrics import write_atomically
from ttt_jax.workdir import Workdir

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
        if not path.exists():
            write_atomically(path, json.dumps({"unix_time": time.time()}) + "\n")
        self._started = json.loads(path.read_text())["unix_time"]
        self.useful = useful

    def add(self, seconds: float) -> None:
        """A step took so long, not counting what it waited for."""
        self.useful += seconds

    def share(self) -> float:
        """Useful seconds per second since the first start."""
        return self.useful / max(time.time() - self._started, self.useful, 1e-9)

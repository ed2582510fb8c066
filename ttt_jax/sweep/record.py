"""``point.json`` beside a run: what the sweep last did with the point, and how that ended."""

import dataclasses
import os
import socket
import time
from typing import Any, get_type_hints

from ttt_jax.storage.json_files import warn_once, write_object
from ttt_jax.storage.workdir import Workdir, is_local
from ttt_jax.sweep.files import json_object

NAME = "point.json"
RUNNING, DONE, FAILED, STOPPED, STOPPED_EARLY = "running", "done", "failed", "stopped", "stopped early"


@dataclasses.dataclass(frozen=True)
class Record:
    """One attempt at a point.

    Attributes:
      state: running (as far as its sweep knows), done, failed, stopped (to be gone on with) or stopped early (by
        comparison with others).
      steps: optimizer steps that were wanted.
      status: exit status, once it has ended; below 0 the signal that ended it.
      said: the last line that it wrote, where it failed.
      starts: processes of this command, one and one more for each restart.
      began: seconds since 1970; ``ended`` too.
    """

    state: str
    steps: int
    status: int | None = None
    said: str = ""
    starts: int = 0
    began: float = dataclasses.field(default_factory=time.time)
    ended: float | None = None
    host: str = dataclasses.field(default_factory=socket.gethostname)
    pid: int = dataclasses.field(default_factory=os.getpid)

    def is_final(self, steps: int, *, stopping_early: bool = False) -> bool:
        """Whether nothing is left to do, of a run of so many steps."""
        return self.steps >= steps and (self.state == DONE or (stopping_early and self.state == STOPPED_EARLY))


def read(workdir: Workdir) -> Record | None:
    """Return the record of a point; None where it has none, or a damaged one, which is told on standard error."""
    content = json_object(workdir / NAME)
    if content is None:
        return None
    known = get_type_hints(Record)
    found = {key: x for key, x in content.items() if key in known}
    if {"state", "steps"} <= found.keys() and all(_is(known[key], x) for key, x in found.items()):
        return Record(**found)
    warn_once(f"{workdir / NAME}: is no record of a point of a sweep; passed over")
    return None


def _is(kind: Any, value: Any) -> bool:
    """Return whether a value of JSON is of a type, where an integer is a float too, and a boolean no integer."""
    is_whole_float = isinstance(value, int) and isinstance(0.0, kind)
    return not isinstance(value, bool) and (isinstance(value, kind) or is_whole_float)


def write(workdir: Workdir, record: Record) -> None:
    """Write it as a whole."""
    if is_local(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    write_object(workdir / NAME, dataclasses.asdict(record))

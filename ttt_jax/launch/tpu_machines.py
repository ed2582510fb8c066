"""The slices of a job on Cloud TPU: from the queue until they are there, and whether they are there still."""

import math
import re
import time
from collections.abc import Sequence

from rich.text import Text

from ttt_jax.errors import LaunchError
from ttt_jax.launch.commands import Commands
from ttt_jax.launch.queued_resource import LOST, NO_CAPACITY, QUEUED, QueuedResource
from ttt_jax.terminal import console
from ttt_jax.terminal.console import duration

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0  # seconds between one attempt to have machines and the next


class Stopped(LaunchError):
    """Somebody else has ended the job."""


class Late(LaunchError):
    """The machines did not come in time."""


class Machines:
    """The slices of a job.

    Args:
      request: options of the queued resource; with ``alpha`` they need gcloud alpha.
      about: them, for people.
      timeout: seconds to wait for them; None for any time.
      poll: seconds between two looks.
    """

    def __init__(
        self,
        commands: Commands,
        resource: QueuedResource,
        request: Sequence[str],
        alpha: bool,
        about: str,
        timeout: float | None,
        poll: float,
    ):
        self._commands, self._resource, self._request, self._alpha = commands, resource, request, alpha
        self._about, self._timeout, self._poll = about, timeout, poll

    def get(self) -> tuple[tuple[str, ...], bool]:
        """The names of slices that are there, and whether they are new. Those of this job that exist are used; what is
        lost is deleted and asked for anew.

        Raises:
          Late: when they do not come in time.
          Stopped: when somebody deletes them meanwhile.
          LaunchError: when they cannot be had.
        """
        name, note = self._resource.name, self._commands.note
        began, pause, shown, new = time.monotonic(), FIRST_PAUSE, "", False
        with console.literal(stderr=True).status("") as line:
            while True:
                found = self._resource.find()
                if found is None:
                    if new:
                        raise Stopped(f"{name}: was deleted by somebody else")
                    note(f"{name}: asks for {self._about}")
                    self._resource.create(self._request, self._alpha)
                    new = True
                    continue
                if found.state == "ACTIVE":
                    return found.nodes, new
                waited = time.monotonic() - began
                line.update(Text(f"{name}: {found.state}, {duration(waited)}"))
                if found.state != shown:
                    note(f"{name}: {found.state}")
                    shown = found.state
                if found.state not in QUEUED:
                    self._resource.delete()
                    if new and found.error and not re.search(NO_CAPACITY, found.error):
                        raise LaunchError(f"{name}: cannot be had: {found.error}")
                    if new:
                        note(f"{name}: {found.error or 'was lost at once'}; asks anew in {pause:.0f} s")
                        time.sleep(pause)
                        pause = min(2 * pause, LONGEST_PAUSE)
                    new = False
                    continue
                if waited > (self._timeout or math.inf):
                    raise Late(f"{name}: is {found.state} after {duration(waited)}, which is the --timeout")
                time.sleep(self._poll)

    def lost(self, nodes: Sequence[str]) -> str | None:
        """Why they cannot be reached any more; None where they are there for all that anybody knows.

        Raises:
          Stopped: when somebody has deleted them.
          CommandError: when nobody can tell, such as without a network.
        """
        found = self._resource.find()
        if found is None or found.state == "DELETING":
            raise Stopped(f"{self._resource.name}: was deleted by somebody else")
        if found.state in LOST:
            return f"the machines are {found.state}"
        return self._resource.lost_nodes(nodes)

"""Run a command, and ask it to stop once the process that wanted it has died, so that it saves and ends.

    python supervisor.py PIPE COMMAND ARGUMENT...

PIPE is the reading end of a pipe without data: it is closed when the process with the writing end ends, even if killed.
SIGINT and SIGTERM are passed on. The supervisor ends as the command does, with its exit status or by its signal. If it
is killed itself, the command gets SIGTERM (on Linux).
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys

_POLL = 0.1  # seconds
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def main() -> None:
    """Run the command, and end as it does."""
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(pipe, False)
    received: list[int] = []  # passed on below, as there may be no process yet
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    process = subprocess.Popen(command, close_fds=False, preexec_fn=_stop_with_parent)  # keeps the folder's lock
    watched, asked = [pipe], False
    while process.poll() is None:
        if select.select(watched, [], [], _POLL)[0]:
            watched.clear()
            if not asked and not received:  # at a second signal it would not save
                received.append(signal.SIGTERM)
        while received:
            process.send_signal(received.pop(0))
            asked = True
    if process.returncode >= 0:
        sys.exit(process.returncode)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core of the command is enough
    with contextlib.suppress(OSError):  # SIGKILL needs no preparation
        signal.signal(-process.returncode, signal.SIG_DFL)
    os.kill(os.getpid(), -process.returncode)


def _stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies; do nothing where the system has no such call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


if __name__ == "__main__":
    main()

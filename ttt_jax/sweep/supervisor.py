"""Run a command, and ask it to stop once the process that wanted it has died, so that it saves and ends.

    python supervisor.py PIPE COMMAND ARGUMENT...

PIPE is the reading end of a pipe without data: it is closed when the process with the writing end ends, even if killed.
SIGINT and SIGTERM are passed on. The supervisor ends as the command does, with its exit status or by its signal. If
the supervisor itself is killed, the command gets SIGTERM (on Linux).

There must be one thread: the kernel sends SIGTERM at the death of every thread of a parent, and at the second signal
the command would not save.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h
_POLL = 0.1  # seconds


def main() -> None:
    """Run the command, and end as it does."""
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until there is a process to pass them to
    own = os.getpid()

    def prepare() -> None:
        os.close(pipe)
        with contextlib.suppress(OSError, AttributeError):  # where there is no such call
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != own:  # the supervisor was killed before the kernel was asked
            os._exit(128 + signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    process = subprocess.Popen(command, close_fds=False, preexec_fn=prepare)
    asked = []

    def pass_on(number: int, frame: object = None) -> None:
        asked.append(number)
        process.send_signal(number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    watched = [pipe]
    while process.poll() is None:
        if select.select(watched, [], [], _POLL)[0]:
            watched.clear()
            if not asked:  # at a second one it would not save
                pass_on(signal.SIGTERM)
    if process.returncode >= 0:
        sys.exit(process.returncode)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core of the command is enough
    with contextlib.suppress(OSError):  # SIGKILL needs no preparation
        signal.signal(-process.returncode, signal.SIG_DFL)
    os.kill(os.getpid(), -process.returncode)


if __name__ == "__main__":
    main()

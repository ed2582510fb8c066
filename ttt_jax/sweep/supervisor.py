"""Runs a command that is asked to stop once the process that wanted it has died: it saves, and nobody is left behind.

    python supervisor.py PIPE COMMAND ARGUMENT...

PIPE is a file descriptor that nobody writes to: it ends with whoever holds its other side, also where that was killed.
SIGINT and SIGTERM are passed on. The supervisor ends as the command does, with its exit status or by its signal; where
it is killed itself, the command gets SIGTERM (on Linux).

It has one thread: a process hears of the death of every thread of its parent, and two SIGTERM are one too many.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def main() -> None:
    """Never returns."""
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # none is lost before there is somebody to pass it to
    own = os.getpid()
    process = os.fork()
    if process == 0:
        os.close(pipe)
        with contextlib.suppress(OSError, AttributeError):  # where there is no such call
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _become(command, own)
    asked = []

    def pass_on(number: int, frame: object = None) -> None:
        asked.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    watched = [pipe, woken]
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            _end_like(os.waitstatus_to_exitcode(status))
        ready, _, _ = select.select(watched, [], [], 1.0)
        if woken in ready:
            os.read(woken, 1024)
        if pipe in ready:
            watched.remove(pipe)
            if not asked:  # a second one would not wait for it to save
                pass_on(signal.SIGTERM)


def _become(command: list[str], parent: int) -> None:
    if os.getppid() != parent:  # which was killed before it was asked about
        os._exit(128 + signal.SIGTERM)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _end_like(status: int) -> None:
    """Ends this process with an exit status, or by a signal."""
    if status >= 0:
        os._exit(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core of the command is enough
    with contextlib.suppress(OSError):  # SIGKILL needs no preparation
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    os._exit(128 - status)


if __name__ == "__main__":
    main()

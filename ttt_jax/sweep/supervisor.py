"""Runs a command that is asked to stop once the process that wanted it has died: it saves, and nobody is left behind.

    python supervisor.py PIPE LOCK COMMAND ARGUMENT...

PIPE is a file descriptor that nobody writes to: it ends with whoever holds its other side, also where that was killed.
LOCK is one that the command holds for as long as it lives. SIGINT and SIGTERM are passed on, once each time. The
supervisor ends as the command does, with its exit status or by its signal.
"""

import contextlib
import os
import resource
import signal
import sys
import threading

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Never returns."""
    pipe, lock, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # none is lost before there is somebody to pass it to
    process = os.fork()
    if process == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(pipe)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127)
    os.close(lock)

    def pass_on(number: int, frame: object = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    def watch() -> None:
        os.read(pipe, 1)
        pass_on(signal.SIGTERM)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    threading.Thread(target=watch, daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core of the command is enough
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        if -status in _PASSED_ON:
            signal.signal(-status, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
        os.kill(os.getpid(), -status)
    os._exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()

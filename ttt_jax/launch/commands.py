"""Runs the tools of others (gcloud, kubectl, sbatch): printed instead when dry, repeated when the fault may pass."""

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from ttt_jax.errors import ConfigError, LaunchError

FIRST_WAIT = 5.0  # seconds before the second attempt; each further wait is twice as long
LONGEST_WAIT = 120.0
_HOW_TO_INSTALL = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
    "xpk": "pip install xpk",
    "sky": "pip install 'skypilot[gcp]'",
    "sbatch": "it is part of Slurm; run this on a login node",
    "squeue": "it is part of Slurm; run this on a login node",
    "docker": "https://docs.docker.com/engine/install",
}


@dataclasses.dataclass(frozen=True)
class Retry:
    """When a command that failed is run again.

    Attributes:
      on: a regular expression for what it printed when the fault may pass.
      but_not: one for what is final all the same.
      attempts: in all.
    """

    on: str
    but_not: str = r"(?!)"
    attempts: int = 6

    def wants(self, printed: str) -> bool:
        return bool(re.search(self.on, printed)) and not re.search(self.but_not, printed)


NEVER = Retry(on=r"(?!)", attempts=1)


class CommandError(LaunchError):
    """A command failed. ``status`` is its exit status, ``printed`` what it printed, the errors last."""

    def __init__(self, argv: Sequence[str], status: int, printed: str):
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "")
        super().__init__(f"{short(argv)}: exit status {status}" + (f": {said}" if said else ""))
        self.status = status
        self.printed = printed


class Commands:
    """Runs commands, or only prints them.

    Each command is in a session of its own, so that Ctrl-C reaches this process alone, which then decides what to end.

    Args:
      dry_run: print the commands to standard output, in a form that a shell takes, and run none.
    """

    def __init__(self, dry_run: bool = False):
        self.dry_run = dry_run
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def note(self, text: str) -> None:
        """A line for people: a comment among the commands when dry, else on standard error."""
        if self.dry_run:
            print(f"# {text}", flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def run(self, argv: Sequence[str], *, input: str | None = None, retry: Retry = NEVER, finish: bool = False) -> str:
        """Runs a command that changes something; returns what it printed on standard output ("" when dry).

        Args:
          argv: the program and its arguments; no shell is involved.
          input: for its standard input.
          retry: when to run it again.
          finish: Ctrl-C waits for its end, because half of it would leave nobody knows what.

        Raises:
          CommandError: when it fails for good.
          ConfigError: where the program is not installed.
        """
        if self.dry_run:
            print(shlex.join(argv) + (f" <<'END'\n{input}\nEND" if input is not None else ""), flush=True)
            return ""
        return self._run(argv, input, retry, finish)

    def output(self, argv: Sequence[str], *, retry: Retry = NEVER) -> str:
        """What a command prints that changes nothing; when dry it becomes a comment, and the answer is ""."""
        if self.dry_run:
            print(f"# {shlex.join(argv)}", flush=True)
            return ""
        return self._run(argv, None, retry, False)

    @contextlib.contextmanager
    def follow(self, argv: Sequence[str]) -> Iterator[subprocess.Popen | None]:
        """A command that is read while it runs: its standard output is a pipe, and it is ended with the ``with``.
        None when dry."""
        if self.dry_run:
            print(shlex.join(argv), flush=True)
            yield None
            return
        process = self._start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            self._end(process)

    def wait(self, seconds: float) -> None:
        """Sleeps; not when dry."""
        if not self.dry_run:
            time.sleep(seconds)

    def _run(self, argv, input, retry, finish) -> str:
        wait = FIRST_WAIT
        for attempt in range(1, retry.attempts + 1):
            try:
                return self._once(argv, input, finish)
            except CommandError as error:
                if attempt == retry.attempts or not retry.wants(error.printed):
                    raise
                self.note(f"{error}; again in {wait:.0f} s ({attempt} of {retry.attempts - 1})")
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError

    def _once(self, argv, input, finish) -> str:
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        process = self._start(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            try:
                out, err = process.communicate(None if input is None else input.encode())
            except KeyboardInterrupt:
                if finish:
                    process.communicate()
                raise
        finally:
            self._end(process)
        if process.returncode:
            raise CommandError(argv, process.returncode, (out + err).decode(errors="replace"))
        return out.decode(errors="replace")

    def _start(self, argv, **pipes) -> subprocess.Popen:
        try:
            process = subprocess.Popen(list(argv), start_new_session=True, **pipes)
        except FileNotFoundError as error:
            how = _HOW_TO_INSTALL.get(argv[0])
            raise ConfigError(f"{argv[0]}: is not installed" + (f"; {how}" if how else "")) from error
        with self._lock:
            self._running.add(process)
        return process

    def _end(self, process: subprocess.Popen) -> None:
        """Ends a command, with all that it has started, if it runs still."""
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        with self._lock:
            self._running.discard(process)

    def end_all(self) -> None:
        """Ends the commands of other threads."""
        with self._lock:
            running = list(self._running)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def short(argv: Sequence[str]) -> str:
    """The words of a command up to its first option, to name it in a message."""
    words: list[str] = []
    for word in argv:
        if word.startswith("-"):
            break
        words.append(word)
    return shlex.join(words[:7])

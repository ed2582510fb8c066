"""Run the programs of other projects (gcloud, kubectl, sbatch): print them in a dry run, repeat them after faults."""

import codecs
import contextlib
import dataclasses
import itertools
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ttt_jax.errors import ConfigError, LaunchError

FIRST_WAIT, LONGEST_WAIT = 5.0, 120.0  # seconds before the second attempt; each further wait is twice as long
LAST_WORDS = 5.0  # seconds in which a log may show what is left when its job has ended
FIRST_WORDS = 30.0  # the same where nothing came yet: a connection takes a while, and the job may have ended at once
_HOW_TO_INSTALL = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
    "xpk": "pip install xpk",
    "sky": "pip install 'skypilot[gcp]'",
    "squeue": "it is part of Slurm; run this on a login node",
    "docker": "https://docs.docker.com/engine/install",
}


@dataclasses.dataclass(frozen=True)
class Retry:
    """The conditions to run a failed command again: regular expressions for what it printed."""

    on: str
    but_not: str = r"(?!)"
    attempts: int = 6  # in all

    def wants(self, printed: str) -> bool:
        return bool(re.search(self.on, printed)) and not re.search(self.but_not, printed)


NEVER = Retry(on=r"(?!)", attempts=1)
# What programs print of faults that pass: of networks, of the APIs of Google, SkyPilot, Kubernetes, registries and
# Slurm (unavailable, overloaded, rates of requests), and of machines whose ssh daemon is not up yet.
TRANSIENT = Retry(
    on=r"(?i)unavailable|(?-i:INTERNAL\b|ABORTED)|deadline.exceeded|resource_exhausted|rate ?limit ?exceeded|"
    r"quota exceeded for quota metric|too ?many ?requests|httperror (?:.* )?(?:429|50[0-9])|50[234] (?:server|bad|"
    r"gateway)|internal (?:server )?error|(?:currently|temporarily) unable|backend error|timed out|handshake timeout|"
    r"i/o timeout|connection (?:refused|reset|closed|aborted)|unexpected EOF|request canceled|broken pipe|"
    r"temporary failure|unable to (?:connect to the|find the|contact slurm)|could not connect to skypilot|"
    r"failed to connect to jobs|max retries exceeded|service not known|no route to host|network is unreachable|"
    r"leader changed|zero bytes were|endpoint is not connected|kex_exchange_identification|\[255\]|exit status 255",
    # Limits of a project in chips come with the code of rates that are too high, but waiting does not raise them.
    but_not=r"Quota limit '|PERMISSION_DENIED|INVALID_ARGUMENT|does not have permission|Unauthorized|[Ff]orbidden",
)


class CommandError(LaunchError):
    """A command failed; ``printed`` is what it printed, the errors last."""

    def __init__(self, argv: Sequence[str], status: int, printed: str):
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "")
        words = [word for i, word in enumerate(argv[:7]) if not any(w.startswith("-") for w in argv[: i + 1])]
        super().__init__(f"{shlex.join(words)}: exit status {status}" + (f": {reason}" if reason else ""))
        self.printed = printed


class Commands:
    """Run commands, or only print them.

    Each command has a session of its own, so that Ctrl-C reaches this process alone, which then decides what to end.

    Args:
      dry_run: print the commands to standard output, as bash takes them, and run none.
    """

    def __init__(self, dry_run: bool = False):
        self.dry_run = dry_run
        self._running: set[subprocess.Popen] = set()

    def note(self, text: str) -> None:
        """Print a line for people: to standard error, or as a comment among the commands of a dry run."""
        print("# " * self.dry_run + text, file=sys.stdout if self.dry_run else sys.stderr, flush=True)

    def run(
        self,
        argv: Sequence[str],
        *,
        retry: Retry = NEVER,
        finish: bool = False,
        environment: Mapping[str, str] | None = None,
        done: Callable[[], object] = lambda: None,
    ) -> str:
        """Run a command that changes something, and return its standard output ("" in a dry run).

        Args:
          argv: the program and its arguments; no shell is involved.
          retry: when to run it again.
          finish: let it end before Ctrl-C is raised, because what it does must not be left half done.
          environment: variables beside those of this process.
          done: asked when it has failed; what is true if it has done its work all the same, as one may that timed out.
            Then the output is "".

        Raises:
          CommandError: when it fails for good.
          ConfigError: where the program is not installed.
        """
        if self.dry_run:
            print(shlex.join(argv), flush=True)
            return ""
        for attempt in itertools.count(1):
            try:
                return self._once(argv, finish, environment)
            except CommandError as error:
                if done():
                    self.note(f"{error}; but it has done its work")
                    return ""
                if attempt == retry.attempts or not retry.wants(error.printed):
                    raise
                wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
                self.note(f"{error}; again in {wait:.0f} s ({attempt} of {retry.attempts - 1})")
            time.sleep(wait)
        raise AssertionError

    def output(self, argv: Sequence[str], *, retry: Retry = NEVER) -> str:
        """Run a command that changes nothing, and return its standard output; a dry run prints it as a comment."""
        if self.dry_run:
            print(f"# {shlex.join(argv)}", flush=True)
            return ""
        return self.run(argv, retry=retry)

    @contextlib.contextmanager
    def follow(self, argv: Sequence[str], errors: int = subprocess.DEVNULL, **options) -> Iterator[subprocess.Popen]:
        """Start a command whose output is a pipe; end it with the ``with``, and all that it has started."""
        options |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        try:
            process: subprocess.Popen = subprocess.Popen(list(argv), start_new_session=True, **options)
        except FileNotFoundError as error:
            how = _HOW_TO_INSTALL.get(argv[0])
            raise ConfigError(f"{argv[0]}: is not installed" + (f"; {how}" if how else "")) from error
        self._running.add(process)
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    _signal(process, signal.SIGTERM)
                    try:
                        process.wait(5)
                    except subprocess.TimeoutExpired:
                        _signal(process, signal.SIGKILL)
                self._running.discard(process)

    @contextlib.contextmanager
    def private_file(self, path: Path, lines: Mapping[str, str]) -> Iterator[str]:
        """Write lines, given by what they are about, to a file that only this user can read, for the ``with``."""
        if self.dry_run:
            self.note(f"{path} has a line for each of {', '.join(lines)}; it is not written now")
            yield str(path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(f"{line}\n" for line in lines.values())
        try:
            yield str(path)
        finally:
            path.unlink()

    def end_all(self) -> None:
        """End the commands of other threads."""
        for process in list(self._running):
            _signal(process, signal.SIGTERM)

    def _once(self, argv: Sequence[str], finish: bool, environment: Mapping[str, str] | None) -> str:
        variables = {**os.environ, **environment} if environment else None
        with self.follow(argv, subprocess.PIPE, env=variables) as process:
            try:
                out, err = process.communicate()
            except KeyboardInterrupt:
                if finish:
                    process.communicate()
                raise
        if process.returncode:
            raise CommandError(argv, process.returncode, (out + err).decode(errors="replace"))
        return out.decode(errors="replace")


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a command and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def show(commands: Commands, argv: Sequence[str], over: Callable[[], bool], poll: float) -> tuple[int, float]:
    """Copy the standard output of a command to that of this process until the command ends.

    Args:
      over: asked every ``poll`` seconds; once it is true the command is ended when nothing comes for ``LAST_WORDS``
        seconds, or ``FIRST_WORDS`` if nothing has come at all, for a command that reads the log of a dead machine may
        never end by itself.

    Returns:
      How many bytes came, and when the last did (time.monotonic).
    """
    decoder, size = codecs.getincrementaldecoder("utf-8")("replace"), 0
    with commands.follow(argv) as process, selectors.DefaultSelector() as selector:
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        heard = asked = time.monotonic()
        ended = None
        while ended is None or time.monotonic() - max(ended, heard) < (LAST_WORDS if size else FIRST_WORDS):
            if selector.select(min(poll, LAST_WORDS)):
                new = os.read(process.stdout.fileno(), 65536)
                if not new:
                    break
                heard, size = time.monotonic(), size + len(new)
                sys.stdout.write(decoder.decode(new))
                sys.stdout.flush()
            if ended is None and time.monotonic() - asked >= poll:
                is_over, asked = over(), time.monotonic()
                ended = asked if is_over else None
        return size, heard


def quoted(word: str) -> str:
    """Quote a word for a bash command that goes through YAML and Kubernetes, which replaces ``$(NAME)`` and ``$$``.

    The result is one line of printable ASCII without a dollar sign that Kubernetes could take for a variable.
    """
    if re.fullmatch(r"[ -#%-~]*", word):
        return shlex.quote(word)
    plain = (chr(byte) if 32 <= byte < 127 and chr(byte) not in "$'\\" else f"\\x{byte:02x}" for byte in word.encode())
    return "$'" + "".join(plain) + "'"

"""Take a job through its life on any target: follow the one that is there or submit it, and end it by Ctrl-C."""

import argparse
import dataclasses
import functools
import shlex
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple

from ttt_jax.errors import ConfigError, LaunchError
from ttt_jax.launch.commands import TRANSIENT, CommandError, Commands, show
from ttt_jax.launch.job import Job
from ttt_jax.terminal.stopping import DONE, INTERRUPTED, RESTART

# Where to begin a log: at its start, near its end, or with what may have been missed in so many seconds.
Begin = Literal["start", "end"] | float


PATIENT = dataclasses.replace(TRANSIENT, attempts=20)  # a job runs on while its target cannot be asked


class State(NamedTuple):
    """The state of a job."""

    text: str  # for people
    status: int | None = None  # what ttt launch exits with, once the job has ended
    log: str = ""  # names what Target.log_command prints; empty while there is no log
    growing: bool = True  # whether the log may become longer
    restarts: int = 0  # how often the job was started again, where ttt launch has to keep the limit


class Target:
    """A system that runs jobs, seen by one job, which it knows by a key.

    Subclasses define the methods that raise NotImplementedError; these may raise ConfigError and LaunchError.

    Attributes:
      where: options that name the place, such as ``--zone=...``.
    """

    DESCRIPTION: ClassVar[str]
    SENDS_SOURCES: ClassVar[bool] = True  # False where the job uses the files of this machine
    POLL: ClassVar[float] = 10.0  # seconds between two questions

    def __init__(self, options: argparse.Namespace, job: Job, commands: Commands):
        self.options, self.job, self.commands, self._seen = options, job, commands, State("")
        self.where = self.given("cluster", "zone", "project")
        self.identity = job.identity  # kept with the job, to tell commands apart

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options of the target."""
        raise NotImplementedError

    @staticmethod
    def check(options: argparse.Namespace, job: Job) -> None:
        """Raise ConfigError for whatever would fail there and can be seen from here."""
        raise NotImplementedError

    def find(self) -> str | None:
        """Return the key of the job if it waits or runs; refuse another one of its name by :meth:`check_ours`."""
        raise NotImplementedError

    def submit(self) -> str:
        """Submit the job and return its key; in a dry run, print the commands."""
        raise NotImplementedError

    def state(self, key: str) -> State:
        """Return the state of the job, also when it has ended."""
        raise NotImplementedError

    def log_command(self, log: str, begin: Begin) -> list[str]:
        """Return the command that prints a log until it ends."""
        raise NotImplementedError

    def stop(self, key: str) -> None:
        """End the job, which may save first; at once when interrupted."""
        raise NotImplementedError

    def leave(self) -> None:
        """Say what is left when a second Ctrl-C has interrupted :meth:`stop`."""

    def given(self, *names: str) -> list[str]:
        """Return options with the same names in the target's program; those that are not given are left out."""
        values = {name: getattr(self.options, name.replace("-", "_"), None) for name in names}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items() if value]

    def follow(self, key: str, from_start: bool) -> int:
        """Show the log until the job has ended, and return its exit status; 75 after more restarts than wanted."""
        how = "submitted as" if from_start else "is there already and followed:"
        self.commands.note(f"{self.job.name}: {how} {key}")
        if self.options.detach:
            return DONE
        begin: Begin = "start" if from_start else "end"
        complete = ""  # the log of which all was shown
        while True:
            state = self._look(key)
            if state.log not in ("", complete):
                over = functools.partial(self._is_complete, key, state.log)
                _, heard = show(self.commands, self.log_command(state.log, begin), over, self.POLL)
                begin = time.monotonic() - heard + self.POLL
                if over():
                    complete, begin = state.log, "start"
                state = self._seen
            if self._ended(state) and state.log in ("", complete):
                break
            time.sleep(self.POLL)
        if state.status is not None:
            return state.status
        self.commands.note(f"{self.job.name}: started again {state.restarts} times, more than --restarts; is ended")
        self.stop(key)
        return RESTART

    def _look(self, key: str) -> State:
        state, before = self.state(key), self._seen.text
        if state.text != before:
            self.commands.note(f"{self.job.name}: {state.text}")
        self._seen = state
        return state

    def _is_complete(self, key: str, log: str) -> bool:
        state = self._look(key)
        return state.log != log or not state.growing or self._ended(state)

    def _ended(self, state: State) -> bool:
        return state.status is not None or state.restarts > self.options.restarts

    def run_submission(self, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
        """Run a command that submits the job, and return what it printed; "" where it failed but the job is there."""
        try:
            return self.commands.run(argv, retry=PATIENT, finish=True, environment=environment, done=self.find)
        except CommandError as error:
            if len(error.printed.strip().splitlines()) < 2:
                raise
            self.commands.note(error.printed.rstrip())
            raise LaunchError(f"{error}; all that it said is above") from error

    def check_ours(self, what: str, identity: str | None) -> None:
        """Raise ConfigError if ``what`` was not submitted by ttt launch (None), or runs another command."""
        if identity is None:
            raise ConfigError(
                f"{what} is there already, and not of ttt launch; it is left alone; expected another --name"
            )
        if self.job.command and identity != self.identity:
            stop = shlex.join(["ttt", "launch", self.options.target, *self.where, "--name", self.job.name, "--stop"])
            raise ConfigError(f"{what} runs another command; expected another --name, or first: {stop}")


def run(target: Target) -> int:
    """Run the job to its end, or do what ``options.action`` says.

    Returns:
      The exit status: that of the job, or 130 after Ctrl-C and 75 after SIGTERM, both of which end the job.
    """
    name, commands = target.job.name, target.commands
    if target.options.action is not None:
        return _act(target)
    with _sigterm_as_interrupt() as received:
        key, ours = None, False
        try:
            key = target.find()
            ours = True
            if from_start := key is None:
                key = target.submit()
            return DONE if commands.dry_run else target.follow(key, from_start)
        except KeyboardInterrupt:
            if ours:
                try:
                    key = key or target.find()  # the interrupt may have come while the job was submitted
                    if key is not None:
                        target.stop(key)
                        commands.note(f"{name}: is ended; the same command continues with it")
                except KeyboardInterrupt:
                    target.leave()
            return RESTART if received else INTERRUPTED


def _act(target: Target) -> int:
    name, key = target.job.name, target.find()
    if target.commands.dry_run:
        return DONE
    if key is None:
        place = f" ({shlex.join(target.where)})" if target.where else ""
        print(f"{name}: no such job waits or runs{place}")
    elif target.options.action == "status":
        print(f"{name}: {target.state(key).text}")
    else:
        target.stop(key)
        target.commands.note(f"{name}: is ended")
    return DONE


@contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at SIGTERM; the list that is given is not empty then."""
    received: list[int] = []

    def receive(number, frame) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_status(codes: Collection[int]) -> int:
    """Return the exit status of a job whose processes ended with these codes.

    A code that says that the run cannot go on counts more than 75 and signals, which the loss of a process does to the
    others.
    """
    if final := [code for code in codes if is_final(code)]:
        return min(final)
    return RESTART if any(codes) else DONE


def is_final(code: int) -> bool:
    """Return whether an exit status of a process says that the run cannot go on, which 75 and signals do not."""
    return code == INTERRUPTED or (0 < code < 128 and code != RESTART)


def required(*wanted: tuple[object, str, str], job: Job | None = None) -> None:
    """Raise ConfigError with all that is missing: values, with name and what is expected, and the command of a job."""
    if job is not None:
        wanted += ((job.command, "a command", "one after --, such as -- train --config FILE --workdir DIR"),)
    missing = [(name, expected) for value, name, expected in wanted if not value]
    if missing:
        names, expected = zip(*missing, strict=True)
        raise ConfigError(f"{', '.join(names)}: missing; expected {'; '.join(expected)}")


def check_one_host(job: Job, several: bool) -> None:
    """Raise ConfigError for a command that runs on one host, where there are several."""
    if several and job.command[0] != "train":
        raise ConfigError(
            f"ttt {job.command[0]}: runs on one host; expected a smaller --accelerator, such as v5litepod-8"
        )

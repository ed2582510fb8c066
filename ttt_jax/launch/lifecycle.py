"""What ``ttt launch`` does with a job of any queue: follow the one that is there or submit it, and end it by Ctrl-C."""

import argparse
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ttt_jax.launch.commands import CommandError, Commands, Retry
from ttt_jax.launch.job import Job
from ttt_jax.terminal.stopping import DONE, INTERRUPTED, RESTART


class Queue(Protocol):
    """Where jobs are submitted to, seen by one job. Its methods raise ConfigError and LaunchError."""

    def find(self) -> str | None:
        """By what the queue knows the job, if it waits or runs. Refuses one that ttt launch has not submitted, and one
        of another command."""

    def submit(self) -> str:
        """Submits the job; returns by what the queue knows it."""

    def describe(self, known_as: str) -> str:
        """How the job is, in a line."""

    def follow(self, known_as: str, from_start: bool) -> int:
        """Shows the log until the job has ended; returns its exit status."""

    def stop(self, known_as: str) -> None:
        """Ends the job, which may save first; at once when it is interrupted."""


def run(options: argparse.Namespace, job: Job, commands: Commands, queue: Queue) -> int:
    """Runs the job to its end, or does what ``options.action`` says; returns the exit status: that of the job, or 130
    after Ctrl-C and 75 after SIGTERM, both of which end the job."""
    if options.action is not None:
        return _act(options.action, job, commands, queue)
    with sigterm_as_interrupt() as received:
        known_as, ours = None, False
        try:
            known_as = queue.find()
            ours = True
            if from_start := known_as is None:
                known_as = queue.submit()
            if commands.dry_run:
                return DONE
            commands.note(
                f"{job.name}: {'submitted as' if from_start else 'is there already and followed:'} {known_as}"
            )
            return DONE if options.detach else queue.follow(known_as, from_start)
        except KeyboardInterrupt:
            if ours:
                # It may have come while the job was submitted.
                if known_as is None:
                    known_as = queue.find()
                if known_as is not None:
                    queue.stop(known_as)
                    commands.note(f"{job.name}: is ended; the same command goes on with it")
            return RESTART if received else INTERRUPTED


def submit(
    commands: Commands, argv: Sequence[str], passes: Retry, find: Callable[[], str | None], pause: float
) -> str | None:
    """Runs a command that submits a job; returns what it printed, or None where ``find`` finds the job although the
    command has failed. It is not repeated before that look: a command that timed out may have done its work.

    Args:
      passes: faults after which it is tried again, ``pause`` seconds later.

    Raises:
      CommandError: when it fails for good.
    """
    for attempt in range(1, passes.attempts + 1):
        try:
            return commands.run(argv, finish=True)
        except CommandError as error:
            if find() is not None:
                commands.note(f"{error}; but the job is there")
                return None
            if attempt == passes.attempts or not passes.wants(error.printed):
                raise
            commands.note(f"{error}; again in {pause:.0f} s")
        commands.wait(pause)
    raise AssertionError


def _act(action: str, job: Job, commands: Commands, queue: Queue) -> int:
    known_as = queue.find()
    if commands.dry_run:
        return DONE
    if known_as is None:
        print(f"{job.name}: no such job waits or runs")
    elif action == "status":
        print(f"{job.name}: {queue.describe(known_as)}")
    else:
        queue.stop(known_as)
        commands.note(f"{job.name}: is ended")
    return DONE


@contextmanager
def sigterm_as_interrupt() -> Iterator[list[int]]:
    """SIGTERM cleans up like Ctrl-C; the list that is given is not empty then."""
    received: list[int] = []

    def receive(number, frame) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)

"""A job on Cloud TPU to its end: install, run, watch, start again, delete."""

import datetime
import secrets
import shlex
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ttt_jax.errors import LaunchError
from ttt_jax.launch.commands import CommandError, Commands
from ttt_jax.launch.job import Job
from ttt_jax.launch.lifecycle import sigterm_as_interrupt
from ttt_jax.launch.queued_resource import QueuedResource
from ttt_jax.launch.tpu_machines import Late, Machines, Stopped
from ttt_jax.launch.workers import LogStream, Verdict, Worker, Workers, verdict
from ttt_jax.terminal.stopping import DONE, INTERRUPTED, RESTART

SAVE_LIMIT = 600  # seconds that a command has for saving when it is asked to stop
OTHERS_LIMIT = 600  # seconds that the other hosts have when the first one has ended
UNREACHABLE_LIMIT = 1800  # seconds after which hosts count as lost that are there for all that Google says
SHORT_RUN = 180  # seconds; after several in a row there are pauses, and then an end
MOST_SHORT_RUNS = 6
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0  # seconds
LAST_LINES = 30


class Plan(NamedTuple):
    """What the options say, checked."""

    where: tuple[str, ...]  # --zone and --project
    request: tuple[str, ...]  # options of the queued resource
    alpha: bool  # it needs gcloud alpha
    slices: int
    accelerator: str
    internal: bool  # hosts are reached by internal addresses
    extras: tuple[str, ...]
    restarts: int
    keep: bool
    detach: bool
    timeout: float | None  # seconds in the queue
    poll: float  # seconds
    folder: Path  # for what is sent


def run(commands: Commands, job: Job, plan: Plan) -> int:
    """Runs the job to its end; returns the exit status of its command, 75 after more preemptions than wanted or where
    the machines did not come in time, 130 after Ctrl-C.

    Raises:
      LaunchError: when machines cannot be had, reached or deleted.
    """
    launch = _Launch(commands, job, plan)
    if commands.dry_run:
        launch.show()
        return DONE
    with sigterm_as_interrupt() as received:
        try:
            try:
                status = launch.to_the_end()
            except Stopped as error:
                commands.note(str(error))
                return INTERRUPTED
            except Late as error:
                commands.note(str(error))
                status = RESTART
            if not (plan.detach and status == DONE):
                launch.clean_up()
            return status
        except KeyboardInterrupt:
            launch.interrupted()
            return RESTART if received else INTERRUPTED
        except BaseException:
            launch.clean_up()
            raise


def act(action: str, commands: Commands, job: Job, where: Sequence[str], internal: bool) -> int:
    """``--status`` and ``--stop`` of a job that was launched before."""
    resource = QueuedResource(commands, job.name, "", where)
    found = resource.find()
    if found is None and not commands.dry_run:
        print(f"{job.name}: no such job; looked with {shlex.join(where) or 'the zone and project of gcloud config'}")
        return DONE
    workers = Workers(commands, job, found.nodes if found else resource.nodes, where, internal, Path())
    if action == "status":
        _print_status(job.name, found.state if found else "", workers)
        return DONE
    if found is None or found.state == "ACTIVE":
        commands.note(f"{job.name}: stops; the command saves")
        workers.stop(SAVE_LIMIT)
    resource.delete()
    commands.note(f"{job.name}: is deleted")
    return DONE


def _print_status(name: str, state: str, workers: Workers) -> None:
    print(f"{name}: {state}")
    if state not in ("", "ACTIVE"):
        return
    statuses = workers.statuses()
    for worker in statuses:
        print(f"  {worker}: {worker.state if worker.status is None else said(worker)}")
    if statuses and statuses[0].state != "none":
        print(workers.tail(statuses[0], LAST_LINES), end="")


class _Launch:
    def __init__(self, commands: Commands, job: Job, plan: Plan):
        self.commands, self.job, self.plan = commands, job, plan
        identity = f"{job.identity}-{plan.slices}-{plan.accelerator}"
        self.resource = QueuedResource(commands, job.name, identity, plan.where, plan.slices)
        about = f"{plan.slices} x {plan.accelerator}" if plan.slices > 1 else plan.accelerator
        self.machines = Machines(commands, self.resource, plan.request, plan.alpha, about, plan.timeout, plan.poll)
        self.nodes: tuple[str, ...] = self.resource.nodes
        self.workers = self._reach()
        self.installed = False  # by this process, on these machines
        self.running = False  # as far as this process knows

    # ---- The whole of it

    def show(self) -> None:
        """All commands, in order."""
        note = self.commands.note
        self.resource.create(self.plan.request, self.plan.alpha)
        note("until its state is ACTIVE:")
        self.resource.find()
        self.workers.install(self.plan.extras)
        run = _new_run()
        self.workers.start(run)
        if self.plan.detach:
            return
        with self.commands.follow(self.workers.following(run, 0)):
            pass
        note("until it has ended on all hosts:")
        self.workers.statuses()
        if not self.plan.keep:
            self.resource.delete()

    def to_the_end(self) -> int:
        """The exit status of the command, after as many starts as it takes."""
        short_runs = 0
        for restart in range(self.plan.restarts + 1):
            began = time.monotonic()
            ended = self._once()
            if ended is None:
                return DONE
            if isinstance(ended, Verdict) and not ended.restart:
                self._explain(ended)
                return ended.status
            why = ended if isinstance(ended, str) else f"{ended.worker} {said(ended.worker)}"
            short_runs = short_runs + 1 if time.monotonic() - began < SHORT_RUN else 0
            if short_runs == MOST_SHORT_RUNS:
                why += f"; so it ended {short_runs} times in a row in less than {SHORT_RUN} s each"
            if restart == self.plan.restarts or short_runs == MOST_SHORT_RUNS:
                self.commands.note(f"{self.job.name}: {why}; no more restarts")
                if isinstance(ended, Verdict):
                    self._explain(ended)
                return RESTART
            self.commands.note(f"{self.job.name}: {why}; restart {restart + 1} of {self.plan.restarts}")
            if isinstance(ended, str):
                self.installed = False
                self.resource.delete()
            if short_runs:
                time.sleep(min(FIRST_PAUSE * 2 ** (short_runs - 1), LONGEST_PAUSE))
        raise AssertionError

    def interrupted(self) -> None:
        """Ctrl-C: the command saves, the machines go. A second one does not wait."""
        what = "stops the command, which saves" if self.running else "stops"
        what += "" if self.plan.keep else ", and deletes the machines"
        self.commands.note(f"{self.job.name}: {what}; Ctrl-C again leaves at once, and leaves them")
        try:
            self.clean_up()
        except KeyboardInterrupt:
            self._tell_of("may still exist, and cost")

    def clean_up(self) -> None:
        """Stops the command if it may be running still, and deletes the machines, unless they are to be kept."""
        try:
            if self.running:
                try:
                    self.workers.stop(SAVE_LIMIT)
                    self.running = False
                except LaunchError as error:
                    self.commands.note(f"{self.job.name}: could not be asked to save: {error}")
            if self.plan.keep:
                self._tell_of("is kept, and costs")
            else:
                self.resource.delete()
        except LaunchError:
            self._tell_of("may still exist, and cost")
            raise

    # ---- One start

    def _once(self) -> Verdict | str | None:
        """How a run ended on all hosts together; or how its machines were lost; None where it is left to itself."""
        nodes, new = self.machines.get()
        if new or nodes != self.nodes:
            self.nodes, self.installed = nodes, False
            self.workers = self._reach()
        try:
            run = self._begin(new)
        except CommandError as error:
            lost = self.machines.lost(self.nodes)
            if lost is None:
                raise
            self.commands.note(str(error))
            return lost
        self.running = True
        if self.plan.detach:
            self._tell_how_to_go_on()
            return None
        ended = self._watch(run)
        self.running = False
        return ended

    def _begin(self, new: bool) -> str:
        """Starts the command, unless it runs already; returns the name of the run."""
        note, name = self.commands.note, self.job.name
        if not new and not self.installed:
            for worker in self.workers.statuses(patient=True):
                if worker.state == "running":
                    note(f"{name}: runs already; here is its log")
                    return worker.run
        if not self.installed:
            note(f"{name}: installs")
            self.workers.install(self.plan.extras)
            self.installed = True
        run = _new_run()
        self.running = True
        self.workers.start(run)
        note(f"{name}: runs ttt {shlex.join(self.job.command)}")
        return run

    def _watch(self, run: str) -> Verdict | str:
        """Shows the log until the command has ended on all hosts, or the machines are lost."""
        woken = threading.Event()  # by the end of the log
        first_end = unreachable = None
        with LogStream(self.commands, self.workers, run, woken) as log:
            while True:
                if not woken.wait(self.plan.poll):
                    log.go_on()
                woken.clear()
                now = time.monotonic()
                try:
                    statuses = self.workers.statuses()
                except CommandError as error:
                    self.commands.note(f"{self.job.name}: cannot be reached, and will be tried again: {error}")
                    try:
                        lost = self.machines.lost(self.nodes)
                    except CommandError:  # it is this machine that has no network: the command goes on without it
                        unreachable = None
                        continue
                    unreachable = unreachable or now
                    if lost is None and now - unreachable > UNREACHABLE_LIMIT:
                        lost = f"the hosts cannot be reached since {UNREACHABLE_LIMIT / 60:.0f} minutes"
                    if lost is not None:
                        return lost
                    continue
                unreachable = None
                ended = [worker for worker in statuses if worker.state != "running"]
                if len(ended) == len(statuses):
                    self.installed &= all(worker.state == "exited" for worker in statuses)
                    log.finish()
                    return verdict(statuses)
                if ended:
                    first_end = first_end or now
                    if now - first_end > OTHERS_LIMIT:
                        self.commands.note(f"{self.job.name}: {ended[0]} {said(ended[0])}, others run on; ends them")
                        self.workers.stop(60, "end")

    # ---- Words

    def _explain(self, ended: Verdict) -> None:
        """The end of the log of the host that says how it ended, where it is not the one whose log was shown."""
        worker = ended.worker
        if worker is None:
            return
        self.commands.note(f"{self.job.name}: {worker} {said(worker)}")
        if (worker.node, worker.number) != (self.nodes[0], "0"):
            try:
                self.commands.note(self.workers.tail(worker, LAST_LINES).rstrip())
            except LaunchError as error:
                self.commands.note(f"its log cannot be read: {error}")

    def _tell_of(self, what: str) -> None:
        self.commands.note(f"{self.job.name}: {what}; to delete it:\n  {shlex.join(self.resource.deletion)}")

    def _tell_how_to_go_on(self) -> None:
        where = shlex.join([*self.plan.where, "--name", self.job.name])
        self.commands.note(
            f"{self.job.name}: runs by itself; nobody starts it again after a preemption, or deletes its machines. The "
            f"same command without --detach does both; or ttt launch tpu {where} --status, --stop"
        )

    def _reach(self) -> Workers:
        plan = self.plan
        return Workers(self.commands, self.job, self.nodes, plan.where, plan.internal, plan.folder)


def said(worker: Worker | None) -> str:
    """How the command ended on a host."""
    if worker is None or worker.status is None:
        return "was started anew" if worker and worker.state == "lost" else "runs nothing"
    if worker.status > 128 and worker.status != INTERRUPTED:
        name = {number.value: number.name for number in signal.Signals}.get(worker.status - 128)
        return f"was ended by {name or worker.status}"
    return f"ended with status {worker.status}"


def _new_run() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"

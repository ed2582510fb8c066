"""Cloud TPU: a slice, or several, through queued resources, and a command on all their hosts.

Nothing restarts a command there, so the target does it: it installs, starts, watches, starts again and deletes.
"""

import argparse
import datetime
import re
import secrets
import shlex
import time

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError, LaunchError
from ttt_jax.launch import cloud_tpu
from ttt_jax.launch.cloud_tpu import GoneError, QueuedResource
from ttt_jax.launch.commands import TRANSIENT, CommandError, Commands, show
from ttt_jax.launch.job import Job, check_files, extras
from ttt_jax.launch.lifecycle import State, Target, check_one_host, required
from ttt_jax.launch.tpu_hosts import Host, Hosts, Verdict, verdict
from ttt_jax.terminal.console import positive
from ttt_jax.terminal.stopping import DONE, INTERRUPTED, RESTART

SAVE_LIMIT = 600  # seconds that a command has for saving when it is asked to stop
OTHERS_LIMIT = 600  # seconds that the other hosts have when the first one has ended
UNREACHABLE_LIMIT = 1800  # seconds after which hosts count as lost that exist as far as Google knows
SHORT_RUN = 180  # seconds; after several in a row there are pauses, and then an end
MOST_SHORT_RUNS = 6
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0  # seconds
LAST_LINES = 30


class Tpu(Target):
    """Cloud TPU, seen by the queued resource of one job."""

    DESCRIPTION = """\
Run a command of ttt on all hosts of a slice of Cloud TPU, or of several: ask for them through a queued resource, wait
for them, install this source tree with the versions of this machine, run the command detached, show the log of the
first host, and delete the slices when it has ended, has failed, or by Ctrl-C (which saves first).

A preempted slice is asked for anew, and the command continues from its workdir. The same command run again while the
job runs shows its log again.
"""

    def __init__(self, options: argparse.Namespace, job: Job, commands: Commands):
        super().__init__(options, job, commands)
        self.identity += f"-{options.slices}-{options.accelerator}"
        self._resource = QueuedResource(self)
        self._hosts = Hosts(self, self._resource.nodes)
        self._installed = False  # by this process, on these machines
        self._running = False  # as far as this process knows

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("machines").add_argument
        add("--accelerator", metavar="TYPE", help="of each slice: v5litepod-256, v6e-64, v5p-128, v4-32, ...")
        add("--zone", help="where (default: compute/zone of gcloud config)")
        add("--project", help="whose (default: core/project of gcloud config)")
        add("--slices", type=positive, default=1, metavar="N", help="so many, joined by the data center network")
        tier = parser.add_mutually_exclusive_group()
        tier.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
        tier.add_argument("--best-effort", action="store_true", help="what spot was before it (needs gcloud alpha)")
        tier.add_argument("--reserved", action="store_true", help="of a reservation")
        add("--runtime-version", metavar="VERSION", help="image of the hosts (default: that of the accelerator)")
        add("--network", help="(default: default)")
        add("--subnetwork", help="of the network")
        inside = "no external addresses; run this within the network, with Cloud NAT"
        add("--internal-ips", action="store_true", help=inside)
        account = "that reads and writes the bucket (default: that of Compute Engine)"
        add("--service-account", metavar="EMAIL", help=account)
        add = parser.add_argument_group("running").add_argument
        add("--keep", action="store_true", help="leave the machines when the command has ended")
        add("--timeout", type=_duration, metavar="TIME", help="give up when they do not come within 90m, 12h, 2d, ...")
        add("--poll", type=_duration, default=30.0, metavar="TIME", help="between looks at them (default: 30s)")

    @staticmethod
    def check(options: argparse.Namespace, job: Job) -> None:
        """Raise ConfigError for whatever would fail there, before anybody waits for a pod."""
        expected = "an accelerator type, such as v5litepod-16"
        required((options.accelerator, "--accelerator", expected), job=job)
        accelerator = cloud_tpu.parse(options.accelerator)
        several = accelerator.several_hosts or options.slices > 1
        check_one_host(job, several)
        why = "its hosts share no disk" if several else "the machines are deleted in the end"
        check_files(job, why if several or not options.keep else None)
        if job.command[0] == "train" and job.config is not None:
            shape = config_lib.mesh_shape(job.config, accelerator.devices * options.slices)
            if shape["data"] % options.slices:
                raise ConfigError(
                    f"mesh.data={shape['data']}: expected a multiple of --slices {options.slices}; only this axis may "
                    "cross from slice to slice"
                )

    def find(self) -> str | None:
        found = self._resource.find()
        if found is None:
            return None
        self._found, self._hosts, self._running = found, Hosts(self, found.nodes), found.state == "ACTIVE"
        return self.job.name

    def submit(self) -> str:
        """Leave the request to :meth:`follow`; print all commands in a dry run."""
        if not self.commands.dry_run:
            return self.job.name
        self._resource.create()
        self.commands.note("until its state is ACTIVE:")
        self._resource.find()
        run = _new_run()
        self._hosts.install(extras(self.job, "tpu"))
        self._hosts.start(run)
        if not self.options.detach:
            self.commands.run(self._hosts.log_command(run, 0))
            self.commands.note("until it has ended on all hosts:")
            self._hosts.ask()
            if not self.options.keep:
                self._resource.delete()
        return self.job.name

    def state(self, key: str) -> State:
        lines = [self._found.state]
        workers = self._hosts.ask() if self._running else []
        lines += [f"  {worker}: {worker.state if worker.status is None else worker.ending}" for worker in workers]
        if workers and workers[0].state != "none":
            lines.append(self._hosts.tail(workers[0], LAST_LINES).rstrip())
        return State("\n".join(lines))

    def follow(self, key: str, from_start: bool) -> int:
        """Run the command to its end, on new machines whenever they are lost; delete them in the end."""
        try:
            status = self._to_the_end()
        except GoneError as error:
            self.commands.note(str(error))
            if error.status == INTERRUPTED:  # nothing is left to clean up
                return INTERRUPTED
            status = error.status
        except Exception:
            self._clean_up()
            raise
        if not (self.options.detach and status == DONE):
            self._clean_up()
        return status

    def stop(self, key: str) -> None:
        """Have the command save, and delete the machines."""
        what = "stops the command, which saves" if self._running else "stops"
        what += "" if self.options.keep else ", and deletes the machines"
        self.commands.note(f"{self.job.name}: {what}; Ctrl-C again leaves at once, and leaves them")
        self._clean_up()

    def leave(self) -> None:
        self._tell_how_to_delete("may still exist, and cost")

    def _to_the_end(self) -> int:
        """Return the exit status of the command, after as many starts as it takes."""
        name, note, restarts, short_runs = self.job.name, self.commands.note, self.options.restarts, 0
        for restart in range(restarts + 1):
            began = time.monotonic()
            ended = self._once()
            if ended is None:
                return DONE
            if isinstance(ended, Verdict) and ended.status != RESTART:
                self._explain(ended.host)
                return ended.status
            why = ended if isinstance(ended, str) else f"{ended.host} {ended.host.ending if ended.host else ''}"
            short_runs = short_runs + 1 if time.monotonic() - began < SHORT_RUN else 0
            if short_runs == MOST_SHORT_RUNS:
                why += f"; so it ended {short_runs} times in a row in less than {SHORT_RUN} s each"
            if restart == restarts or short_runs == MOST_SHORT_RUNS:
                note(f"{name}: {why}; no more restarts")
                self._explain(ended.host if isinstance(ended, Verdict) else None)
                return RESTART
            note(f"{name}: {why}; restart {restart + 1} of {restarts}")
            if isinstance(ended, str):
                self._installed = False
                self._resource.delete()
            if short_runs:
                time.sleep(min(FIRST_PAUSE * 2 ** (short_runs - 1), LONGEST_PAUSE))
        raise AssertionError

    def _once(self) -> Verdict | str | None:
        """Start the command once, unless it runs, and follow it.

        Returns:
          How it ended on all hosts; or how its machines were lost; None where it is left to itself.
        """
        nodes, new = self._resource.get()
        if new or nodes != self._hosts.nodes:
            self._installed, self._hosts = False, Hosts(self, nodes)
        try:
            run = self._begin(new)
        except CommandError as error:
            lost = self._resource.lost(nodes)
            if lost is None:
                raise
            self.commands.note(str(error))
            return lost
        self._running = True
        if self.options.detach:
            where = shlex.join([*self.where, "--name", self.job.name])
            self.commands.note(
                f"{self.job.name}: runs by itself; nobody starts it again after a preemption, or deletes its machines. "
                f"The same command without --detach does both; or ttt launch tpu {where} --status, --stop"
            )
            return None
        ended = self._watch(run)
        self._running = False
        return ended

    def _begin(self, new: bool) -> str:
        """Start the command, unless it runs already; return the name of the run."""
        name, note = self.job.name, self.commands.note
        if not self._installed:
            for host in [] if new else self._hosts.ask(TRANSIENT):
                if host.state == "running":
                    note(f"{name}: runs already; here is its log")
                    return host.run
            note(f"{name}: installs")
            self._hosts.install(extras(self.job, "tpu"))
            self._installed = True
        run = _new_run()
        self._running = True
        self._hosts.start(run)
        note(f"{name}: runs ttt {shlex.join(self.job.command)}")
        return run

    def _watch(self, run: str) -> Verdict | str:
        """Show the log until the command has ended on all hosts, or the machines are lost."""
        offset = 0
        ended: Verdict | str | None = None
        first_end = unreachable = None  # since when

        def look() -> bool:
            nonlocal ended, first_end, unreachable
            now, name = time.monotonic(), self.job.name
            try:
                hosts = self._hosts.ask()
            except CommandError as error:
                self.commands.note(f"{name}: cannot be reached, and will be tried again: {error}")
                try:
                    ended = self._resource.lost(self._hosts.nodes)
                except CommandError:  # it is this machine that has no network: the command continues without it
                    unreachable = None
                    return False
                unreachable = unreachable or now
                if ended is None and now - unreachable > UNREACHABLE_LIMIT:
                    ended = f"the hosts cannot be reached since {UNREACHABLE_LIMIT / 60:.0f} minutes"
                return ended is not None
            unreachable = None
            over = [host for host in hosts if host.state != "running"]
            if len(over) == len(hosts):
                self._installed &= all(host.state == "exited" for host in hosts)
                ended = verdict(hosts)
            elif over:
                first_end = first_end or now
                if now - first_end > OTHERS_LIMIT:
                    self.commands.note(f"{name}: {over[0]} {over[0].ending}, others run on; ends them")
                    self._hosts.stop(60, "end")
            return ended is not None

        while ended is None:
            size, _ = show(self.commands, self._hosts.log_command(run, offset), look, self.options.poll)
            offset += size
            if ended is None and not look():
                time.sleep(self.options.poll)
        return ended

    def _clean_up(self) -> None:
        """Stop the command if it may still run, and delete the machines, unless they are to be kept."""
        try:
            if self._running:
                try:
                    self._hosts.stop(SAVE_LIMIT)
                    self._running = False
                except LaunchError as error:
                    if self.options.action:
                        raise
                    self.commands.note(f"{self.job.name}: could not be asked to save: {error}")
            if self.options.keep:
                self._tell_how_to_delete("is kept, and costs")
            else:
                self._resource.delete()
        except LaunchError:
            self._tell_how_to_delete("may still exist, and cost")
            raise

    def _explain(self, host: Host | None) -> None:
        """Show the end of the log of the host that decided how the run ended, if it is not the one that was shown."""
        if host is None:
            return
        self.commands.note(f"{self.job.name}: {host} {host.ending}")
        if (host.node, host.number) != (self._hosts.nodes[0], "0"):
            try:
                self.commands.note(self._hosts.tail(host, LAST_LINES).rstrip())
            except LaunchError as error:
                self.commands.note(f"its log cannot be read: {error}")

    def _tell_how_to_delete(self, what: str) -> None:
        self.commands.note(f"{self.job.name}: {what}; to delete it:\n  {shlex.join(self._resource.deletion)}")


def _new_run() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a time such as 90m, 12h or 2d, or seconds")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]

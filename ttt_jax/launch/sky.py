"""SkyPilot: managed jobs on whatever cloud has the accelerators, TPUs or GPUs."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml

from ttt_jax.errors import ConfigError, LaunchError
from ttt_jax.launch import cloud_tpu, sources
from ttt_jax.launch.commands import CommandError, Commands, quoted
from ttt_jax.launch.job import Job, check_files, extras
from ttt_jax.launch.lifecycle import PATIENT, Begin, State, Target, check_one_host, exit_status, required
from ttt_jax.storage.workdir import cache_folder
from ttt_jax.terminal.console import positive
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, REFUSED, RESTART

_FOLDER = "~/ttt-launch"  # on the machines
# Statuses after which the same command continues: that of ttt, abort (JAX, when another process is lost) and SIGTERM.
_RECOVERED = (RESTART, 134, 143)
_NO_JOBS = "No in-progress managed jobs"  # what sky says before there has ever been one
_ENDED = {
    "SUCCEEDED": DONE,
    "CANCELLED": INTERRUPTED,
    "FAILED": FAILED,  # or what the command exited with
    "FAILED_SETUP": FAILED,
    "FAILED_PRECHECKS": REFUSED,
    "FAILED_NO_RESOURCE": RESTART,
    "FAILED_CONTROLLER": RESTART,
}


class Sky(Target):
    """The managed jobs of SkyPilot, seen by one of them, which they know by a number.

    The name of a managed job ends with the identity of its command, which shows that ttt launch has submitted it.
    """

    DESCRIPTION = """\
Run a command of ttt as a managed job of SkyPilot, which finds machines for it, installs this source tree with the
versions of this machine there, makes new ones after a preemption, and deletes them in the end.

Ctrl-C cancels the job; SkyPilot does not wait for it to save, so what it has done since its last checkpoint is lost.
The same command while the job waits or runs follows that one.
"""
    POLL = 30.0

    def __init__(self, options: argparse.Namespace, job: Job, commands: Commands):
        super().__init__(options, job, commands)
        self._name = f"{job.name}-{job.identity}"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("machines").add_argument
        kinds = "of each node, in SkyPilot's terms: tpu-v5litepod-8, H100:8, ..."
        add("--accelerator", dest="accelerators", metavar="NAME[:N]", help=kinds)
        add("--cpus", metavar="N", help="instead: machines without accelerators, such as 32+")
        add("--nodes", type=positive, default=1, metavar="N", help="with GPUs (default: 1)")
        add("--infra", metavar="CLOUD[/REGION[/ZONE]]", help="where (default: where it is cheapest)")
        add("--spot", dest="use_spot", action="store_true", help="cheaper, and may be preempted")
        add("--disk-size", type=positive, metavar="GB", help="(default: that of SkyPilot)")

    @staticmethod
    def check(options: argparse.Namespace, job: Job) -> None:
        kinds = "one, such as tpu-v5litepod-8 or H100:8, or --cpus instead"
        required((options.accelerators or options.cpus, "--accelerator", kinds), job=job)
        if options.accelerators is not None and options.cpus is not None:
            raise ConfigError("--accelerator: expected one, or --cpus instead, not both")
        check_files(job, "the machines are deleted in the end")

    def find(self) -> str | None:
        for record in self._queue():
            match = re.fullmatch(rf"{self.job.name}-([0-9a-f]{{12}})", record["job_name"] or "")
            if match and record["status"] not in _ENDED:
                self.check_ours(f"the managed job {record['job_id']} of the name {self.job.name}", match[1])
                return str(record["job_id"])
        return None

    def submit(self) -> str:
        job = self.job
        packed, file = (cache_folder() / "launch" / f"{self._name}{end}" for end in (".tar.gz", ".yaml"))
        task = yaml.safe_dump(self._task(packed), sort_keys=False, allow_unicode=True, width=float("inf"))
        if self.commands.dry_run:
            self.commands.note(f"{packed}: the source tree {job.checkout}, with the versions of this machine")
            print(f"cat >{file} <<'END'\n{task}END")
        else:
            constraints = sources.constraints(extras(job, self._platform))
            sources.archive(job.checkout, {"launch-constraints.txt": constraints}, packed)
            file.write_text(task)
        # sky takes secrets from the environment; on the command line everybody could read them.
        secrets = [f"--secret={key}" for key in job.environment]
        arguments = ["sky", "jobs", "launch", f"--name={self._name}", "--yes", "--detach-run", *secrets, str(file)]
        self.run_submission(arguments, job.environment)
        if self.commands.dry_run:
            return "NUMBER"
        numbers = [record["job_id"] for record in self._queue() if record["job_name"] == self._name]
        if not numbers:
            raise LaunchError(f"{self._name}: was submitted, and sky jobs queue does not have it")
        return str(max(numbers))

    def state(self, key: str) -> State:
        for record in self._queue():
            if str(record["job_id"]) == key:
                state, recoveries = record["status"], record.get("recovery_count") or 0
                failure = record.get("failure_reason") or ""
                text = f"managed job {key}, {state}" + (f", recovered {recoveries} times" if recoveries else "")
                status = _status(state, failure)
                return State(text + (f": {failure}" if failure else ""), status, key, status is None, recoveries)
        raise LaunchError(f"managed job {key}: sky jobs queue does not have it any more")

    def log_command(self, log: str, begin: Begin) -> list[str]:
        return ["sky", "jobs", "logs", "--follow", "--tail=0" if begin == "start" else "--tail=50", log]

    def stop(self, key: str) -> None:
        """Cancel the job."""
        self.commands.run(["sky", "jobs", "cancel", "--yes", key], retry=PATIENT, finish=True)

    def _queue(self) -> list[dict[str, Any]]:
        """Return the managed jobs of this user."""
        question = ["sky", "jobs", "queue", "--all", "--verbose", "--output=json"]
        try:
            answer = self.commands.output(question, retry=PATIENT)
        except CommandError as error:
            if _NO_JOBS in error.printed:
                return []
            raise
        if (start := re.search(r"^\[", answer, re.MULTILINE)) is None:
            if answer.strip() and _NO_JOBS not in answer:
                raise LaunchError(f"{' '.join(question)}: printed no list; expected SkyPilot 0.14 or later")
            return []
        return json.JSONDecoder().raw_decode(answer, start.start())[0]

    @property
    def _platform(self) -> str | None:
        if self.options.accelerators is None:
            return None
        return "tpu" if self.options.accelerators.startswith("tpu-") else "cuda"

    def _task(self, packed: Path) -> dict[str, Any]:
        """Return the task, as SkyPilot reads it from YAML."""
        options, job = self.options, self.job
        recovery = {"max_restarts_on_errors": 0, "recover_on_exit_codes": list(_RECOVERED)}
        resources: dict[str, Any] = {"job_recovery": recovery}
        keys = ("infra", "cpus", "disk_size", "accelerators", "use_spot")
        resources |= {key: value for key in keys if (value := getattr(options, key))}
        several = options.nodes > 1
        if self._platform == "tpu":
            if several:
                raise ConfigError("--nodes: of GPUs only; expected a larger slice, such as tpu-v5litepod-16")
            accelerator = cloud_tpu.parse(options.accelerators.removeprefix("tpu-").removesuffix(":1"))
            several = accelerator.several_hosts
            if not re.match("k8s|kubernetes", options.infra or ""):
                resources["accelerator_args"] = {"runtime_version": accelerator.runtime_version}
        check_one_host(job, several)
        source, there = f"{_FOLDER}/source", f"{_FOLDER}/source.tar.gz"
        unpack = f"rm -rf {source} && mkdir -p {source} && tar -xzf {there} -C {source}"
        install = f"{source}/launch/install.sh {_FOLDER}/venv {sources.PYTHON} {','.join(extras(job, self._platform))}"
        run = [f"cd {source}", 'export PATH="$HOME/ttt-launch/venv/bin:$PATH" PYTHONUNBUFFERED=1']
        if options.nodes > 1:  # they meet at the first one; hosts of a TPU slice find each other
            run.append('export JAX_COORDINATOR_ADDRESS="$(head -n1 <<<"$SKYPILOT_NODE_IPS"):8476"')
            run.append('export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"')
        run.append(f"exec ttt {' '.join(map(quoted, job.command))}")  # in the place of this shell: it gets the signals
        return {
            "name": self._name,
            "resources": resources,
            "num_nodes": options.nodes,
            "file_mounts": {there: str(packed)},
            "setup": f"{unpack} && bash {install}",
            "run": "\n".join(run),
        }


def _status(state: str, failure: str) -> int | None:
    """Return what ttt launch exits with, once the job has ended."""
    if state == "FAILED" and (match := re.search(r"exit codes? \[?([\d, ]+)", failure)):
        return exit_status([int(code) for code in re.findall(r"\d+", match[1])])
    return _ENDED.get(state)

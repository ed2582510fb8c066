"""Run ``ttt launch`` with stand-ins for the programs of others."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from unittest import mock

from ttt_jax import cli
from ttt_jax.launch import versions

ROOT = Path(__file__).resolve().parents[2]
NASTY = 'it\'s "$(touch pwned)" $(TTT_JAX_COMMAND) $$ `id`; !! \\ $HOME * {x,y} &\nsecond line é😀\x7f'
PROGRAMS = {  # on this machine, and on others
    "slurm": ("sbatch squeue scontrol sacct scancel srun limit", "python"),
    "gke": ("xpk kubectl docker", "ttt"),
    "sky": ("sky", "ttt uv"),
    "tpu": ("gcloud", "ttt uv curl"),
}
OPTIONS = {
    "slurm": ("--gpus-per-node", "2"),
    "gke": ("--cluster", "c", "--tpu-type", "v5litepod-8", "--image", "us-docker.pkg.dev/p/r/ttt_jax:1"),
    "sky": ("--accelerator", "tpu-v5litepod-8"),
    "tpu": ("--accelerator", "v5litepod-8", "--zone", "us-west4-a", "--poll", "0.1"),
}
PLACES = {"gke": ("--cluster", "c"), "tpu": ("--zone", "us-west4-a")}
# The waits of real clusters, shortened, and few files to send.
WAITS = {
    "commands.FIRST_WAIT": 0.01,
    "commands.LAST_WORDS": 0.3,
    "lifecycle.Target.POLL": 0.05,
    "sky.Sky.POLL": 0.05,
    "cloud_tpu.FIRST_PAUSE": 0.01,
    "tpu.FIRST_PAUSE": 0.01,
}
FILES = "configs/quickstart.py setup.py launch/Dockerfile launch/install.sh launch/sky.sh launch/worker.sh".split()
_constraints = functools.cache(versions.constraints)  # which takes a third of a second
_CHILD = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.path.insert(0, {!r}); "
_CHILD += "import stand_ins; sys.exit(stand_ins.main({!r}, sys.argv[1:]))"  # signals as in a terminal


@contextlib.contextmanager
def shortened(executable: str):
    """Patch what takes long."""
    with contextlib.ExitStack() as stack:
        patch = lambda name, value: stack.enter_context(mock.patch(name, value))  # noqa: E731
        for name, value in WAITS.items():
            patch(f"ttt_jax.launch.{name}", value)
        if executable:
            patch("sys.executable", executable)
        patch("ttt_jax.launch.versions.files", lambda checkout: tuple(map(Path, FILES)))
        patch("ttt_jax.launch.versions.constraints", lambda extras: _constraints(tuple(extras)))
        yield


def main(executable: str, arguments: list[str]) -> int:
    """Run ttt as the process of a test."""
    with shortened(executable):
        return cli.main(arguments)


class StandIns:
    """The programs of a target in a folder, and ``ttt launch`` with them.

    Attributes:
      folder: where they keep what they know; $STAND_IN of theirs.
      environment: with the programs first on PATH.
    """

    def __init__(self, target: str, folder: Path):
        self.target, self.folder = target, folder
        local, remote = PROGRAMS[target]
        lines = (f"#!{sys.executable} -IS", "import sys", f"sys.path[:0] = [{str(Path(__file__).parent)!r}]")
        lines += (f"sys.path.append({sysconfig.get_path('purelib')!r})", "import stand_in")  # -IS: starts in 20 ms
        text = "\n".join([*lines, f"sys.exit(stand_in.main({target!r}))\n"])
        for path in (*(f"bin/{name}" for name in (*local.split(), "runner")), *(f"remote/{n}" for n in remote.split())):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
            (folder / path).chmod(0o755)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "STAND_IN": str(folder), "PYTHONPATH": str(ROOT)}
        self.environment["XDG_CACHE_HOME"] = str(folder / "cache")
        self.executable = str(folder / "remote/python") if target == "slurm" else ""
        self.workdir = str(folder / "runs/a") if target == "slurm" else "gs://bucket/runs/a"
        self.plan(0)

    def plan(self, *words) -> None:
        """Say what the launched command does, a word for each start; the last one for all further starts."""
        (self.folder / "plan").write_text(json.dumps(words))

    def has(self, *names: str) -> None:
        """Make files that change how jobs go."""
        for name in names:
            (self.folder / name).touch()

    def fail(self, call: str, *faults: tuple[str, str]) -> None:
        """Let the next calls with these words fail: ("before" or "after" the work, what it says); "" does not fail."""
        (self.folder / f"fail-{call}").write_text(json.dumps(faults))

    def kept(self, name: str, default=None, **changes):
        """Return what the programs keep under a name, after changes."""
        path = self.folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else default
        if changes:
            path.write_text(json.dumps(found := {**(found or {}), **changes}))
        return found

    def calls(self, *words: str) -> list[list[str]]:
        """Return the calls so far that have all these words."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if set(words) <= set(call)]

    def started(self) -> list[dict]:
        """Return what each process of the launched command got."""
        return self.kept("started", [])

    def uv(self) -> list[list[str]]:
        """Return the calls of uv on other machines."""
        return [json.loads(line) for line in (self.folder / "uv").read_text().splitlines()]

    def wait_until(self, ready) -> None:
        """Return once ``ready()`` is true; at most 20 seconds later."""
        deadline = time.monotonic() + 20
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def start(self, *arguments, cwd: Path = ROOT) -> subprocess.Popen:
        """Start ``ttt ARGUMENTS`` in a process of its own."""
        command = [sys.executable, "-c", _CHILD.format(str(Path(__file__).parent), self.executable)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, *map(str, arguments)], cwd=cwd, env=self.environment, **pipes)

    def ttt(self, *arguments, cwd: Path = ROOT) -> tuple[int, str, str]:
        """Return exit status, standard output and standard error of ``ttt ARGUMENTS``, run in this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            for each in (contextlib.chdir(cwd), mock.patch.dict(os.environ, self.environment)):
                stack.enter_context(each)
            for each in (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), shortened(self.executable)):
                stack.enter_context(each)
            status = cli.main([str(argument) for argument in arguments])
        return status, out.getvalue(), err.getvalue()

    def launch(self, *options, machines=None, command=(), workdir=None, wait=True):
        """Launch a training run; return what :meth:`ttt` does, or the process if it is not to be waited for."""
        train = ("train", "--config", ROOT / "configs/quickstart.py", "--workdir", workdir or self.workdir)
        machines = OPTIONS[self.target] if machines is None else machines
        arguments = ("launch", self.target, "--name", "mine", *machines, *options, "--", *train)
        return (self.ttt if wait else self.start)(*arguments, "--config.data.batch_size=8", *command, cwd=self.folder)

    def act(self, action: str) -> tuple[int, str, str]:
        """Do ``--status`` or ``--stop``."""
        return self.ttt("launch", self.target, *PLACES.get(self.target, ()), "--name", "mine", action)

    def end(self) -> None:
        """End what a test has left behind."""
        self.has("finish")
        (self.folder / "hold").unlink(missing_ok=True)
        for pid in self.folder.glob("machines/*/*/*/ttt-launch/*/runs/*/pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), 9)

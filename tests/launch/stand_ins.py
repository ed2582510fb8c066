"""Run ``ttt launch`` with stand-ins for the programs of others."""

import contextlib
import functools
import io
import json
import os
import signal
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from ttt_jax import cli
from ttt_jax.launch import sources
from ttt_jax.terminal.stopping import DONE

ROOT = Path(__file__).resolve().parents[2]
NASTY = 'it\'s "$(touch pwned)" $(TTT_JAX_COMMAND) $$ `id`; !! \\ $HOME * {x,y} &\nsecond line é😀\x7f'
PROGRAMS = {  # on this machine, and on others
    "slurm": ("sbatch squeue scontrol sacct scancel srun", "python"),
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
# Of ttt_jax.launch: the waits of real clusters, shortened, and few files to send.
PATCHES = {
    "commands.FIRST_WAIT": 0.01,
    "commands.LAST_WORDS": 1.5,  # tail looks for a new file once a second
    "lifecycle.Target.POLL": 0.05,
    "sky.Sky.POLL": 0.05,
    "cloud_tpu.FIRST_PAUSE": 0.01,
    "tpu.FIRST_PAUSE": 0.01,
    "sources.files": lambda checkout: tuple(map(Path, FILES)),
    "sources.constraints": functools.cache(sources.constraints),  # which takes a third of a second
}
FILES = "configs/quickstart.py setup.py launch/Dockerfile launch/install.sh launch/worker.sh".split()


class StandIns:
    """The programs of a target in a folder, and ``ttt launch`` with them.

    Attributes:
      folder: where they keep what they know; $STAND_IN of theirs.
      environment: with the programs first on PATH.
    """

    patience = 20.0

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
        self.executable = str(folder / "remote/python") if target == "slurm" else sys.executable
        self.workdir = str(folder / "runs/a") if target == "slurm" else "gs://bucket/runs/a"
        self.processes = 2 if target in ("slurm", "gke") else 1
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

    def runs(self) -> bool:
        """Return whether all processes of the launched command have started."""
        return len(self.started()) == self.processes

    def wait_until(self, ready) -> None:
        """Return once ``ready()`` is true; at most ``patience`` seconds later."""
        deadline = time.monotonic() + self.patience
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    @contextlib.contextmanager
    def meanwhile(self, *steps):
        """Take steps beside this thread: once a condition is true, send it a signal or call a function."""
        thread = threading.get_ident()

        def take() -> None:
            try:
                for ready, action in steps:
                    self.wait_until(ready)
                    action() if callable(action) else signal.pthread_kill(thread, action)
            except AssertionError:
                self.close()
                raise

        with ThreadPoolExecutor() as pool:
            taken = pool.submit(take)
            yield
            taken.result()

    def ttt(self, *arguments, cwd: Path = ROOT) -> tuple[int, str, str]:
        """Return exit status, standard output and standard error of ``ttt ARGUMENTS``, run in this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            for each in (
                contextlib.chdir(cwd),
                mock.patch.dict(os.environ, self.environment),
                mock.patch("sys.executable", self.executable),
                *(mock.patch(f"ttt_jax.launch.{name}", value) for name, value in PATCHES.items()),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                stack.enter_context(each)
            return cli.main([*map(str, arguments)]), out.getvalue(), err.getvalue()

    def launch(self, *options, machines=None, command=(), workdir=None, meanwhile=(), ends=DONE) -> tuple[str, str]:
        """Launch a training run, with steps of :meth:`meanwhile`, which ends with a status; return what it prints."""
        train = ("train", "--config", ROOT / "configs/quickstart.py", "--workdir", workdir or self.workdir)
        machines = OPTIONS[self.target] if machines is None else machines
        arguments = ("launch", self.target, "--name", "mine", *machines, *options, "--", *train)
        with self.meanwhile(*meanwhile):
            status, out, err = self.ttt(*arguments, "--config.data.batch_size=8", *command, cwd=self.folder)
        assert status == ends, err
        return out, err

    def act(self, action: str) -> tuple[int, str, str]:
        """Do ``--status`` or ``--stop``."""
        return self.ttt("launch", self.target, *PLACES.get(self.target, ()), "--name", "mine", action)

    def close(self) -> None:
        """End what a test has left behind."""
        self.has("finish")
        (self.folder / "hold").unlink(missing_ok=True)
        jobs = (self.kept("jobs") or {}).values()
        started = [number for job in jobs for key in ("processes", "batch") for number in job.get(key, [])]
        started += [path.read_text() for path in self.folder.glob("machines/*/*/*/ttt-launch/*/runs/*/pid")]
        for number in started:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(number), signal.SIGKILL)

"""Describe a command that is to run elsewhere, and check it before it costs anything."""

import argparse
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_collections

import ttt_jax
from ttt_jax import config as config_lib
from ttt_jax import import_path
from ttt_jax.errors import ConfigError
from ttt_jax.launch import sources
from ttt_jax.launch.sources import Place

LONGEST_NAME = 40  # of workloads on GKE; Cloud TPU and Slurm take longer ones
_HERE_ONLY = ("launch", "sweep", "plot", "config")  # first words of verbs


@dataclasses.dataclass(frozen=True)
class Job:
    """A command of ttt that is to run elsewhere.

    Attributes:
      name: of the job and whatever is created for it: small letters, digits and hyphens.
      command: what follows ``ttt``, such as ``("train", "--config", ...)``; the config by its path in the checkout.
        Empty where a job that runs already is only asked for, or stopped.
      checkout: the source tree that is sent.
      workdir: ``--workdir`` of the command, or ``--output``, if it has one.
      config: what ``--config`` and its overrides make, for commands that have one.
      environment: variables that the command needs there. Values may be secrets: print none.
      places: files and folders that the command and its config name.
    """

    name: str
    command: tuple[str, ...]
    checkout: Path
    workdir: str | None = None
    config: ml_collections.ConfigDict | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    places: tuple[Place, ...] = ()

    @property
    def identity(self) -> str:
        """Return twelve letters and digits that differ between commands."""
        return hashlib.sha256("\0".join(self.command).encode()).hexdigest()[:12]


def make(
    command: Sequence[str],
    parse: Callable[[Sequence[str]], tuple[argparse.Namespace, list[str]]],
    name: str | None = None,
    environment: Sequence[str] = (),
    sends_sources: bool = True,
) -> Job:
    """Return a job, after all checks that can be made here.

    Args:
      command: what follows ``ttt``.
      parse: the parser of ttt, to options and the arguments of the config; ends the process on bad options.
      name: of the job; by default made from the workdir, so that the same command finds its job again.
      environment: ``KEY=VALUE``, or ``KEY`` for the value it has here.
      sends_sources: whether the config has to be a file of the source tree, which is sent.

    Raises:
      ConfigError: for whatever could not run there.
    """
    root = checkout()
    if not command:
        if name is None:
            raise ConfigError("--name: missing; expected the name of a job, or its command after --")
        return Job(_checked(name), (), root, environment=_variables(environment))
    options, rest = parse(command)
    if options.verb.split()[0] in _HERE_ONLY:
        raise ConfigError(f"ttt {options.verb}: runs here; expected a command for other machines, such as ttt train")
    workdir = getattr(options, "workdir", None) or getattr(options, "output", None)
    if isinstance(workdir, list):  # of ttt eval: the first stands for all, but the name is of all of them
        name, workdir = name or default_name(None, command), workdir[0]
    needs_config = options.takes_config and not getattr(options, "function", None)  # ttt bench tpu-schedule
    config = config_lib.from_arguments(rest) if needs_config else None
    places = sources.find(options, config)
    if needs_config and sends_sources:
        command = config_lib.replace_files(command, lambda path: _path_in(root, path))
    name = default_name(workdir, command) if name is None else _checked(name)
    return Job(name, tuple(command), root, workdir, config, _variables(environment), places)


def checkout() -> Path:
    """Return the source tree that this package is part of.

    Raises:
      ConfigError: where it was installed without its sources.
    """
    root = Path(ttt_jax.__file__).resolve().parents[1]
    if not (root / "setup.py").is_file() or not (root / "launch").is_dir():
        raise ConfigError(
            f"{root}: not a source tree of ttt_jax, which is sent to other machines; expected a git clone, installed "
            "by pip install -e"
        )
    return root


def check_functions(job: Job) -> dict[str, str]:
    """Return the import paths of the user's own functions in the config, by key; their modules have to exist here."""
    functions = {} if job.config is None else config_lib.own_functions(job.config)
    for key, path in functions.items():
        import_path.source_file(path, key)
    return functions


def check_files(job: Job, written: str | None) -> None:
    """Raise ConfigError where the job reads files of this machine that are not sent.

    Args:
      written: why it may not write to the disks of the machines either; None where it may.
    """
    sent = sources.files(job.checkout)
    sources.check_variables(job.environment)
    sources.check(job.places, job.checkout, sent, written)
    for key, path in check_functions(job).items():
        import_path.check_sent(path, key, job.checkout, sent)
    if job.config is not None and job.config.log.tensorboard and (job.workdir or "").startswith("gs://"):
        raise ConfigError("log.tensorboard=true: needs a local workdir; expected false")


def extras(job: Job, platform: str | None) -> tuple[str, ...]:
    """Return the extras of setup.py that the job needs on ``platform``: tpu, cuda, or None for CPUs."""
    log = None if job.config is None else job.config.log
    wanted = {
        platform or "": platform is not None,
        "gcs": True,
        "wandb": log is not None and bool(log.wandb_project),
        "tensorboard": log is not None and log.tensorboard,
        "sentencepiece": job.command[:1] == ("tokenize",),
        "parquet": job.command[:1] == ("tokenize",),
    }
    return tuple(extra for extra, needed in wanted.items() if needed)


def default_name(workdir: str | None, command: Sequence[str]) -> str:
    """Return the end of the workdir with six letters that tell apart jobs whose workdirs end alike."""
    whole = (workdir or "\0".join(command)).rstrip("/")
    last = re.sub("[^a-z0-9]+", "-", (workdir or command[0]).rstrip("/").rpartition("/")[2].lower()).strip("-")
    readable = last[: LONGEST_NAME - len("ttt-") - 7].strip("-")
    return f"ttt-{readable}{'-' if readable else ''}{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def _checked(name: str) -> str:
    if not re.fullmatch(rf"[a-z](?:[a-z0-9-]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", name):
        raise ConfigError(
            f"--name {name}: expected small letters, digits and hyphens, {LONGEST_NAME} at most, a letter first"
        )
    return name


def _path_in(root: Path, path: str) -> str:
    """Return the path of a config file in the source tree, where it will lie there."""
    resolved = Path(path).resolve()
    inside = resolved.relative_to(root) if resolved.is_relative_to(root) else None
    if inside not in sources.files(root):
        raise ConfigError(f"--config {path}: expected a file of the source tree {root}, which is sent")
    return str(inside)


def _variables(given: Sequence[str]) -> dict[str, str]:
    variables = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key):
            raise ConfigError(f"--env {key}: expected KEY=VALUE, or KEY of a variable that is set here")
        if not equals:
            if key not in os.environ:
                raise ConfigError(f"--env {key}: is not set here; expected KEY=VALUE, or KEY of a variable that is")
            value = os.environ[key]
        variables[key] = value
    return variables

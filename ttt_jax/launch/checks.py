"""What a job on other machines may not need, and what it needs to be installed."""

from ttt_jax import import_path
from ttt_jax.config import own_functions
from ttt_jax.errors import ConfigError
from ttt_jax.launch import places, versions
from ttt_jax.launch.job import Job


def required(*wanted: tuple[bool, str, str]) -> None:
    """Raise ConfigError with all that is missing: of each, whether it is, what it is called, and what is expected."""
    missing = [(name, expected) for is_missing, name, expected in wanted if is_missing]
    if missing:
        names, expected = zip(*missing, strict=True)
        raise ConfigError(f"{', '.join(names)}: missing; expected {'; '.join(expected)}")


def command(job: Job) -> tuple[bool, str, str]:
    """Return what :func:`required` takes, of the command that a job is to run."""
    return not job.command, "a command", "one after --, such as -- train --config FILE --workdir DIR"


def bucket(job: Job, why: str) -> None:
    """Raise ConfigError where the job writes to the disks of the machines, which it may not because of ``why``."""
    places.check_written(job.places, why)


def no_local_files(job: Job) -> None:
    """Raise ConfigError where the job reads files of this machine that are not sent."""
    places.check_variables(job.copied, job.environment)
    places.check_readable(job.places, job.checkout, versions.files(job.checkout))
    for key, named in functions(job).items():
        import_path.check_sent(named, key, job.checkout, versions.files(job.checkout))
    if job.config is not None and job.config.log.tensorboard and (job.workdir or "").startswith("gs://"):
        raise ConfigError("log.tensorboard=true: needs a local workdir; expected false")


def functions(job: Job) -> dict[str, str]:
    """Return the import paths of the user's own functions that the job's config names, by key; all are found here.

    Raises:
      ConfigError: where there is no such module.
    """
    named = {} if job.config is None else own_functions(job.config)
    for key, path in named.items():
        import_path.source_file(path, key)
    return named


def one_host(job: Job, several: bool) -> None:
    """Raises ConfigError for a command that runs on one host, where there are several."""
    if several and job.command[0] != "train":
        raise ConfigError(
            f"ttt {job.command[0]}: runs on one host; expected a smaller --accelerator, such as v5litepod-8"
        )


def extras(job: Job, platform: str | None) -> tuple[str, ...]:
    """Extras of setup.py that the job needs on ``platform``, tpu or cuda; None for CPUs."""
    wanted = [platform] if platform else []
    wanted.append("gcs")
    if job.config is not None and job.config.log.wandb_project:
        wanted.append("wandb")
    if job.config is not None and job.config.log.tensorboard:
        wanted.append("tensorboard")
    if job.command[:1] == ("tokenize",):
        wanted += ["sentencepiece", "parquet"]
    return tuple(wanted)

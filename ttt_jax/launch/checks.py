"""What a job on machines that vanish with their disks may not need, and what it needs to be installed."""

from ttt_jax.config import ConfigError
from ttt_jax.launch.job import Job


def no_local_files(job: Job) -> None:
    """Raises ConfigError where the job reads or writes files of this machine, which the others do not have."""
    if job.workdir is not None and not job.workdir.startswith("gs://"):
        raise ConfigError(f"--workdir {job.workdir}: the machines vanish in the end; expected gs://bucket/name")
    if job.config is None:
        return
    source = job.config.data.source
    if source not in ("embedded", "synthetic") and "://" not in source:
        raise ConfigError(
            f"data.source={source!r}: a folder of this machine, not there; expected gs://bucket/name (copy it: "
            f"gcloud storage cp -r {source} gs://bucket/), another URL, embedded or synthetic"
        )
    if job.config.log.tensorboard:
        raise ConfigError("log.tensorboard=true: needs a local workdir; expected false")


def one_host(job: Job, several: bool) -> None:
    """Raises ConfigError for a command that runs on one host, where there are several."""
    if several and job.command[0] != "train":
        raise ConfigError(f"ttt {job.command[0]}: runs on one host; expected machines of one, such as a v5litepod-8")


def extras(job: Job, platform: str | None) -> tuple[str, ...]:
    """Extras of setup.py that the job needs on ``platform``, tpu or cuda; None for CPUs."""
    wanted = [platform] if platform else []
    wanted.append("gcs")
    if job.config is not None and job.config.log.wandb_project:
        wanted.append("wandb")
    if job.command[:1] == ("tokenize",):
        wanted += ["sentencepiece", "parquet"]
    return tuple(wanted)

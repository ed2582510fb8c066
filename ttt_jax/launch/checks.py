"""What a job on machines that vanish with their disks may not need, and what it needs to be installed."""

from pathlib import Path

from ttt_jax.config import GENERATED, ConfigError
from ttt_jax.launch.job import Job


def bucket(job: Job, why: str) -> None:
    """Raises ConfigError where the job writes to a folder of the machines, which it may not because of ``why``."""
    if job.workdir is not None and not job.workdir.startswith("gs://"):
        raise ConfigError(f"{job.workdir}: {why}; expected gs://bucket/name")


def no_local_files(job: Job) -> None:
    """Raises ConfigError where the job reads files of this machine that are not sent."""
    config = job.config
    if config is None:
        return
    places = {"data.source": config.data.source, "training.start_from": config.training.start_from}
    for key, place in places.items():
        if place and place.partition(":")[0] not in GENERATED and "://" not in place:
            raise ConfigError(
                f"{key}={place!r}: a folder of this machine, not there; expected gs://bucket/name (copy it: "
                f"gcloud storage cp -r {place} gs://bucket/), or another URL"
            )
    if Path(config.data.tokenizer).is_file():
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r}: a file of this machine; expected its hash or name"
        )
    if config.log.tensorboard and (job.workdir or "").startswith("gs://"):
        raise ConfigError("log.tensorboard=true: needs a local workdir; expected false")


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

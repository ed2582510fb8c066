"""Where metrics go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases when asked for."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from ttt_jax import extras
from ttt_jax.config import ConfigError
from ttt_jax.training.bucket_file import BucketFile
from ttt_jax.workdir import Workdir, explained, is_local


class MetricsWriter:
    """Appends one JSON object per record to ``metrics.jsonl``.

    Opening it for a run that resumes at ``step`` drops the records after that step (they are computed again, and equal)
    and a last line that was cut short. In a bucket, the file is brought up to date now and then, by :meth:`flush` and
    by :meth:`close`.
    """

    def __init__(self, workdir: Workdir, step: int, *, tensorboard: bool = False, wandb: dict[str, Any] | None = None):
        self._file = _open(workdir / "metrics.jsonl", step)
        self._others: list[tuple[Callable, Callable]] = []  # write and close of each
        if tensorboard:
            self._others.append(_tensorboard(workdir))
        if wandb:
            self._others.append(_wandb(workdir, wandb))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers of one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for write_other, _ in self._others:
            write_other(step, values)

    def flush(self) -> None:
        """Returns when a run that is killed now would find all records; at the latest after some seconds."""
        self._file.flush()

    def close(self) -> None:
        """Flushes to disk, and ends what the others began."""
        self._file.close()
        for _, close_other in self._others:
            close_other()


def check_place(workdir: Workdir, *, tensorboard: bool, wandb: bool = False) -> None:
    """Raise :class:`ConfigError` where metrics cannot go to such a workdir, or a package for them is missing."""
    if tensorboard and not is_local(workdir):
        raise ConfigError(
            f"log.tensorboard=true: needs a local workdir, not {workdir}; expected false (metrics.jsonl is written "
            "anyway), or log.wandb_project"
        )
    if tensorboard:
        extras.check("tensorboard", "tensorboardX", "log.tensorboard=true")
    if wandb:
        extras.check("wandb", "wandb", "log.wandb_project")


def read(workdir: Workdir) -> list[dict[str, float]]:
    """All complete records of a run."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in _complete_lines(path)] if path.exists() else []


def _open(path: Workdir, step: int) -> TextIO | BucketFile:
    """The file to append to, without the records after ``step``."""
    with explained(path):
        lines = _complete_lines(path) if path.exists() else []
    kept = "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step)
    if not is_local(path):
        return BucketFile(path, kept)
    if path.exists():
        write_atomically(path, kept)
    return path.open("a", buffering=1)


def _complete_lines(path: Workdir) -> list[str]:
    lines = path.read_text().split("\n")
    return lines[:-1]  # what follows the last line break was cut short, or is empty


def write_atomically(path: Workdir, text: str) -> None:
    """Replaces a file as a whole: a reader, or a crash, finds the old one or the new one."""
    if not is_local(path):
        with explained(path):
            path.write_text(text)  # an object is there once all of it is
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _tensorboard(workdir: Workdir):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"log.tensorboard=true: needs tensorboardX; {extras.hint('tensorboard')}") from error
    writer = SummaryWriter(str(workdir / "tensorboard"))

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _wandb(workdir: Workdir, settings: dict[str, Any]):
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"log.wandb_project: needs wandb; {extras.hint('wandb')}") from error
    local = is_local(workdir)
    place = str(workdir.resolve() if local else workdir)
    identity = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()  # resumes with the workdir
    folder = workdir if local else None  # None is ./wandb, for it writes to local folders only
    run = wandb.init(dir=folder, name=workdir.name, id=identity, resume="allow", **settings)
    return (lambda step, values: run.log(dict(values), step=step)), run.finish
